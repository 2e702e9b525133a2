"""Figures show the numbers that they were given, are readable at every size of grid, and raise no warning."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastmono import plots
from fastmono.files import BadFile
from fastmono.metrics import NAMES, monosemanticity, single_feature_activations
from fastmono.spec import Grid, ModelSpec, preset
from fastmono.store import checkpoint_steps, final_loss, logged_steps

BASE = ModelSpec(n_features=24, d_embed=8, n_neurons=48, feature_prob=1 / 8, batch_size=64, steps=4096)


def fake_run(grid, diverged=(), pending=(), diverges_at=100):
    """A run of made-up, seeded results in the shapes of `fastmono.Run`; monosemanticity grows with lr and k."""
    rng = np.random.default_rng(7)
    logged = torch.cat([logged_steps(s.steps) for s in grid]).unique()
    checkpoints = torch.tensor(sorted({c for s in grid for c in checkpoint_steps(s.steps)}))
    losses = torch.full((len(grid), len(logged)), math.nan)
    measures = {name: torch.full((len(grid), len(checkpoints)), math.nan, dtype=torch.float64) for name in NAMES}
    params, table = [], []
    for i, spec in enumerate(grid):
        row = {**spec.to_dict(), "status": "done", "diverged_step": None}
        row |= dict.fromkeys(
            ("final_loss", "eval_loss", "mono_neurons", "mono_per_feature", "mono_per_neuron"), math.nan
        )
        row |= dict.fromkeys(("dead_neurons", "mean_bias", "density"), math.nan)
        table.append(row)
        if i in pending:
            params.append(None)
            row["status"] = "pending"
            continue
        k, m, n = spec.n_neurons, spec.d_embed, spec.n_features
        P = torch.tensor(rng.standard_normal((m, n)), dtype=torch.float32)
        P /= P.norm(dim=0)
        share = min(1.0, 0.2 + 0.15 * math.log10(spec.lr / 1e-3) + 0.2 * rng.random())
        W_in = torch.tensor(0.5 * rng.standard_normal((k, m)), dtype=torch.float32)
        b = torch.tensor(0.1 * rng.standard_normal(k) + 0.2 * spec.init_bias, dtype=torch.float32)
        alone = rng.permutation(k)[: int(share * k)]
        features = rng.permutation(max(n, k))[: len(alone)] % n
        W_in[alone] = (1 + torch.rand(len(alone), 1, generator=torch.Generator().manual_seed(i))) * P[:, features].T
        overlap = (P[:, features].T @ P).masked_fill(torch.nn.functional.one_hot(torch.tensor(features), n) > 0, 0)
        b[alone] = -2.05 * overlap.amax(1).clamp_min(0.05)
        params.append({"W_in": W_in, "b": b, "W_out": torch.zeros(spec.d_output, k), "P": P})
        own = logged_steps(spec.steps)
        at = torch.searchsorted(logged, own)
        curve = 0.3 + 0.05 * rng.random() + 3 / (1 + own.double().numpy() / 40)
        if spec.schedule == "published":
            curve *= 1 + 0.15 * np.cos(np.pi * own.double().numpy() / 512)
        losses[i, at] = torch.tensor(curve * np.exp(0.04 * rng.standard_normal(len(own))), dtype=torch.float32)
        at = torch.searchsorted(checkpoints, torch.tensor(checkpoint_steps(spec.steps)))
        progress = torch.linspace(0, 1, len(at), dtype=torch.float64)
        sfa = single_feature_activations(params[-1], spec.activation)
        count = int((monosemanticity(sfa) > 0.999).sum())
        last = {"mono_neurons": count, "mono_per_feature": count / n, "mono_per_neuron": count / k}
        last |= {"mean_bias": float(b.mean()), "eval_loss": 0.31, "dead_neurons": 1, "density": 0.2}
        for name, value in last.items():
            measures[name][i, at] = progress**2 * value
        if i in diverged:
            row |= {"status": "diverged", "diverged_step": diverges_at}
            losses[i, logged >= diverges_at] = math.nan
            for values in measures.values():
                values[i, checkpoints >= diverges_at] = math.nan
        else:
            row |= {**last, "final_loss": final_loss(losses[i][torch.searchsorted(logged, own)], spec.steps)}

    def parameters(i, step=None):
        if params[i] is None:
            raise ValueError(f"model {i} has nothing on disk yet")
        return params[i]

    return SimpleNamespace(
        specs=grid.specs, grid=grid, table=table, losses=losses, logged_steps=logged, checkpoint_steps=checkpoints,
        metrics=measures, parameters=parameters,
    )  # fmt: skip


def texts(figure):
    found = [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in figure.findobj(Text)]
    return [text for text in found if text]


def curves(ax):
    """The lines of an axes that show data: not the markers of divergence, not lines across the axes."""
    return [line for line in ax.lines if line.get_marker() != "X" and line.get_transform() == ax.transData]


def xy(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


# training_curves


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_losses_of_a_schedule_that_does_not_swing_are_drawn_as_logged(schedule):
    run = fake_run(Grid(BASE.replace(schedule=schedule), lr=[1e-3, 1e-2]))
    lines = curves(plots.training_curves(run).axes[0])
    assert len(lines) == 2
    for i, line in enumerate(lines):
        np.testing.assert_array_equal(xy(line)[0], run.logged_steps.numpy())
        np.testing.assert_array_equal(xy(line)[1], run.losses[i].double().numpy())


def test_losses_of_the_published_schedule_are_means_over_whole_periods():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2]))
    steps = run.logged_steps.numpy()
    for i, line in enumerate(curves(plots.training_curves(run).axes[0])):
        x, y = xy(line)
        losses = run.losses[i].double().numpy()
        assert x.tolist() == [*range(1, 1024, 16), 2048, 3072, 4096]
        np.testing.assert_array_equal(y[:64], losses[:64])
        expected = [np.mean([v for s, v in zip(steps, losses, strict=True) if e - 1024 < s <= e]) for e in x[64:]]
        np.testing.assert_allclose(y[64:], expected, rtol=1e-13)  # sums of 65 numbers in another order
        assert y[-1] == pytest.approx(run.table[i]["final_loss"], rel=1e-13)


def test_a_period_that_a_model_has_not_finished_is_not_averaged():
    run = fake_run(Grid(BASE, steps=[2500, 4096]))
    run.losses[1, run.logged_steps > 3100] = math.nan  # stopped: it logged 3089 and no more
    run.table[1]["status"] = "stopped"
    short, long = curves(plots.training_curves(run).axes[0])
    assert xy(short)[0].max() == 2048
    assert xy(long)[0].max() == 3072


@pytest.mark.parametrize("diverged", [True, False])
def test_a_period_is_not_whole_when_its_last_loss_was_logged_but_its_end_not_reached(diverged):
    run = fake_run(Grid(BASE.replace(steps=4096 if diverged else 2047)), diverged=[0] * diverged, diverges_at=2045)
    if not diverged:  # a run without the last step's own entry
        run.losses[0, -1] = math.nan
    assert run.losses[0, run.logged_steps == 2033].isfinite().all()
    (line,) = curves(plots.training_curves(run).axes[0])
    assert xy(line)[0].max() == 1009


def test_a_seed_counts_only_in_the_periods_that_it_has_finished():
    run = fake_run(Grid(BASE, seed=range(2)))
    run.losses[1, run.logged_steps > 3100] = math.nan
    (line,) = curves(plots.training_curves(run).axes[0])
    within = (run.logged_steps > 3072).numpy()
    assert xy(line)[0][-1] == 4096
    assert xy(line)[1][-1] == pytest.approx(run.losses[0].double().numpy()[within].mean(), rel=1e-13)


def test_measures_are_drawn_at_their_checkpoints_without_the_missing_ones():
    run = fake_run(Grid(BASE, steps=[1000, 4096]))
    figure = plots.training_curves(run)
    for ax, name in zip(figure.axes[1:3], ("mono_per_feature", "mean_bias"), strict=True):
        for i, line in enumerate(curves(ax)):
            own = checkpoint_steps(run.specs[i].steps)
            assert xy(line)[0].tolist() == own
            values = run.metrics[name][i][torch.searchsorted(run.checkpoint_steps, torch.tensor(own))]
            np.testing.assert_array_equal(xy(line)[1], values.numpy())


def test_seeds_are_drawn_as_their_mean_with_a_band_from_lowest_to_highest():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2], seed=range(3)))
    figure = plots.training_curves(run)
    lines, bands = curves(figure.axes[1]), figure.axes[1].collections
    assert len(lines) == len(bands) == 2
    for i, (line, band) in enumerate(zip(lines, bands, strict=True)):
        values = run.metrics["mono_per_feature"][3 * i : 3 * i + 3].numpy()
        np.testing.assert_allclose(xy(line)[1], values.mean(0), rtol=1e-14)
        vertices = band.get_paths()[0].vertices
        for step, low, high in zip(run.checkpoint_steps.tolist(), values.min(0), values.max(0), strict=True):
            at = vertices[vertices[:, 0] == step, 1]
            assert (at.min(), at.max()) == (low, high)
    assert "mean, lowest and highest of up to 3 seeds" in texts(figure)


def test_a_diverged_model_is_drawn_up_to_there_marked_and_counted():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2]), diverged=[1], diverges_at=1500)
    figure = plots.training_curves(run)
    (marker,) = (line for line in figure.axes[0].lines if line.get_marker() == "X")
    last = int((run.logged_steps < 1500).sum()) - 1
    assert xy(marker)[0][-1] == run.logged_steps[last] == 1489
    assert xy(marker)[1][-1] == run.losses[1, last]
    for ax in figure.axes[1:3]:
        assert max(xy(line)[0].max() for line in ax.lines if np.all(line.get_color() == marker.get_color())) == 1024
    assert "diverged (1)" in texts(figure)


def test_a_loss_that_explodes_does_not_stretch_the_axis():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2]), diverged=[1], diverges_at=100)
    run.losses[1, 4:7] = torch.tensor([1e5, 1e20, 3e38])  # the last before it diverges
    ax = plots.training_curves(run).axes[0]
    low, high = ax.get_ylim()
    assert low < 0.5
    assert high < 1e3
    (marker,) = (line for line in ax.lines if line.get_marker() == "X")
    assert low < xy(marker)[1][-1] < high  # it is seen, at the edge


def test_a_bias_that_explodes_does_not_stretch_the_axis():
    run = fake_run(Grid(BASE, lr=[1e-3, 3e-3, 1e-2]), diverged=[2], diverges_at=100)
    run.metrics["mean_bias"][2, 5:7] = torch.tensor([1e10, 1e26], dtype=torch.float64)
    figure = plots.training_curves(run)
    ax = figure.axes[2]
    calm = run.metrics["mean_bias"][:2]
    low, high = ax.get_ylim()
    span = float(calm.max() - calm.min())
    assert float(calm.min()) - span < low < float(calm.min()) and float(calm.max()) < high < float(calm.max()) + span
    for line, values in zip(curves(ax)[:2], calm, strict=True):
        np.testing.assert_array_equal(xy(line)[1], values.numpy())
    (marker,) = (line for line in ax.lines if line.get_marker() == "X")
    assert low < xy(marker)[1][-1] < high  # it is seen, at the edge
    assert "diverged (1), cut off at the edge of the axis" in texts(figure)


def test_a_diverged_model_whose_bias_stays_small_is_drawn_as_it_was():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2]), diverged=[1], diverges_at=100)
    line = curves(plots.training_curves(run).axes[2])[1]
    np.testing.assert_array_equal(xy(line)[1], run.metrics["mean_bias"][1, :7].numpy())


def test_the_axis_of_losses_holds_the_lowest_and_highest_seed():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2], seed=range(3)))
    run.losses[0, 20], run.losses[1, 30] = 40.0, 0.002
    low, high = plots.training_curves(run).axes[0].get_ylim()
    assert low < 0.002 and high > 40.0


def test_lines_share_a_colour_for_equal_values_and_a_style_for_equal_others():
    run = fake_run(preset("demo"))
    figure = plots.training_curves(run)
    lines = curves(figure.axes[1])
    for i, a in enumerate(run.specs):
        for j, b in enumerate(run.specs):
            assert (tuple(lines[i].get_color()) == tuple(lines[j].get_color())) == (a.lr == b.lr)
            assert (lines[i].get_linestyle() == lines[j].get_linestyle()) == (a.init_bias == b.init_bias)
    # bias_decay goes with init_bias: it is not a third axis
    assert {"lr 0.001", "lr 0.03", "init_bias 0", "init_bias \N{MINUS SIGN}1"} <= set(texts(figure))
    assert not any("bias_decay" in text for text in texts(figure))


def test_lines_are_coloured_by_the_field_asked_for():
    run = fake_run(Grid(BASE, lr=[1e-3, 3e-3, 1e-2], init_bias=[0.0, -1.0]))
    lines = curves(plots.training_curves(run, color="init_bias").axes[0])
    assert len({tuple(line.get_color()) for line in lines}) == 2
    assert len({line.get_linestyle() for line in lines}) == 3
    seeds = fake_run(Grid(BASE, seed=range(3)))
    assert len(curves(plots.training_curves(seeds, color="seed").axes[0])) == 3
    assert len(curves(plots.training_curves(seeds).axes[0])) == 1


def test_many_values_get_a_colour_bar_instead_of_a_legend():
    few = fake_run(Grid(BASE.replace(steps=16), lr=[i / 1000 for i in range(1, 9)]))
    many = fake_run(Grid(BASE.replace(steps=16), lr=[i / 1000 for i in range(1, 61)]))
    assert [len(figure.axes) for figure in map(plots.training_curves, (few, many))] == [3, 4]
    figure = plots.training_curves(many)
    assert figure.axes[3].get_ylabel() == "learning rate (lr)"
    assert not figure.legends


# activation_table, sorted_biases


def independent_order(run, model):
    """Recipe fact 14 in loops: neurons by monosemanticity, features by the place of their strongest neuron."""
    params = run.parameters(model)
    table = single_feature_activations(params).numpy()
    mono = [max(row) / (np.float32(1e-10) + torch.tensor(row).sum().numpy()) for row in table]
    neurons = sorted(range(len(mono)), key=lambda j: -mono[j])
    strongest = [max(range(len(neurons)), key=lambda place: table[neurons[place], f]) for f in range(table.shape[1])]
    features = sorted(range(table.shape[1]), key=lambda f: strongest[f])
    return table, neurons, features, mono


def test_table_shows_every_activation_in_the_order_of_the_paper():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2]))
    table, neurons, features, mono = independent_order(run, 1)
    figure = plots.activation_table(run, 1)
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal(np.asarray(image.get_array()), table[neurons][:, features].T)
    assert image.get_clim() == (0, table.max())
    count = sum(value > 0.999 for value in mono)
    title = " ".join(texts(figure)).replace("\n", " ")
    assert f"model 1: lr 0.01 {count} of 48 neurons monosemantic ({count / 24:.2f} per feature)" in title


def test_biases_stand_in_the_order_of_the_table_with_a_line_at_n():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2]))
    _, neurons, _, mono = independent_order(run, 1)
    ax = plots.sorted_biases(run, 1).axes[0]
    (edge,) = (line for line in ax.lines if line.get_label().startswith("at N"))
    assert set(edge.get_xdata()) == {24}
    for name, wanted in (("monosemantic", True), ("other neurons", False)):
        (line,) = (line for line in ax.lines if line.get_label() == name)
        places = [place for place, neuron in enumerate(neurons) if (mono[neuron] > 0.999) == wanted]
        assert len(places) > 3
        np.testing.assert_array_equal(xy(line)[0], np.array(places) + 0.5)
        np.testing.assert_array_equal(xy(line)[1], [float(run.parameters(1)["b"][neurons[p]]) for p in places])


def test_line_stands_at_the_last_neuron_when_there_are_fewer_neurons_than_features():
    run = fake_run(Grid(BASE.replace(n_neurons=10)))
    ax = plots.sorted_biases(run, 0).axes[0]
    (edge,) = (line for line in ax.lines if line.get_label().startswith("at N"))
    assert set(edge.get_xdata()) == {10}
    assert ax.get_xlim() == (0, 10)


def test_models_side_by_side_share_their_scales():
    run = fake_run(Grid(BASE, n_neurons=[10, 48, 64]))
    figure = plots.activations_and_biases(run, [2, 0])
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert [image.get_array().shape for image in images] == [(24, 64), (24, 10)]
    assert images[0].norm is images[1].norm
    biases = [ax for ax in figure.axes if any(line.get_label() == "other neurons" for line in ax.lines)]
    assert len(biases) == 2
    assert biases[0].get_ylim() == biases[1].get_ylim()


# monosemanticity_against


def test_shares_are_drawn_against_the_width_with_a_line_where_k_is_n():
    run = fake_run(Grid(BASE, n_neurons=[12, 48, 96], lr=[1e-3, 1e-2]))
    figure = plots.monosemanticity_against(run, "n_neurons")
    for ax, column in zip(figure.axes, ("mono_per_neuron", "mono_per_feature"), strict=True):
        assert ax.get_xscale() == "log"
        assert ax.xaxis.get_transform().base == 2
        lines = curves(ax)
        assert len(lines) == 2
        for line, lr in zip(lines, (1e-3, 1e-2), strict=True):
            assert xy(line)[0].tolist() == [12, 48, 96]
            assert xy(line)[1].tolist() == [row[column] for row in run.table if row["lr"] == lr]
        assert [set(line.get_xdata()) for line in ax.lines if line not in lines] == [{24}]
        assert ax.get_xlim()[0] < 12 < 96 < ax.get_xlim()[1]


def test_the_line_at_n_is_on_the_axis_when_n_lies_beyond_every_width():
    ax = plots.monosemanticity_against(fake_run(Grid(BASE, n_neurons=[4, 8])), "n_neurons").axes[0]
    assert ax.get_xlim()[0] < 4
    assert ax.get_xlim()[1] > 24


def test_seeds_of_a_value_give_their_mean_and_bars_and_diverged_models_are_left_out():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2], seed=range(3)), diverged=[4])
    run.table[4]["mono_per_neuron"] = 0.9  # of the parameters that it is frozen at
    ax = plots.monosemanticity_against(run, "lr").axes[0]
    found = [[run.table[i]["mono_per_neuron"] for i in models] for models in ((0, 1, 2), (3, 5))]
    (line,) = curves(ax)[:1]
    np.testing.assert_allclose(xy(line)[1], [np.mean(values) for values in found], rtol=1e-14)
    (bars,) = ax.containers
    ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, [[min(values), max(values)] for values in found], rtol=1e-12)


def test_bars_of_several_lines_stand_side_by_side_within_the_axis():
    run = fake_run(Grid(BASE, lr=[1e-3, 1e-2], init_bias=[0.0, -1.0], seed=range(3)))
    for i, row in enumerate(run.table):
        row["mono_per_feature"] = 0.9 if i % 3 == 0 else 0.01  # bars far longer than the lines are apart
    ax = plots.monosemanticity_against(run, "lr").axes[1]
    assert ax.get_ylim()[0] <= 0.01 and ax.get_ylim()[1] >= 0.9
    columns = [bars.lines[2][0] for bars in ax.containers]
    assert len(columns) == 2
    at = [column.get_transform().transform(column.get_segments()[0])[0, 0] for column in columns]
    assert at[0] + 2 < at[1]  # pixels


@pytest.mark.parametrize(
    ("axis", "scale"),
    [({"lr": [1e-3, 3e-2]}, "log"), ({"lr": [1e-3, 3e-3]}, "linear"), ({"init_bias": [0.0, -1.0]}, "linear")],
)
def test_an_axis_is_logarithmic_for_positive_values_over_more_than_a_decade(axis, scale):
    run = fake_run(Grid(BASE.replace(steps=16), **axis))
    assert plots.monosemanticity_against(run, next(iter(axis))).axes[0].get_xscale() == scale


def test_names_are_categories():
    run = fake_run(Grid(BASE.replace(steps=16), task=["abs", "decoder"], lr=[1e-3, 1e-2]))
    ax = plots.monosemanticity_against(run, "task").axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["abs", "decoder"]
    assert xy(curves(ax)[1])[0].tolist() == [0, 1]
    assert xy(curves(ax)[1])[1].tolist() == [run.table[1]["mono_per_neuron"], run.table[3]["mono_per_neuron"]]


# heatmap


def test_cells_hold_means_and_deviations_and_say_why_one_is_empty():
    grid = Grid(BASE, lr=[1e-2, 1e-3], init_bias=[0.0, -1.0], seed=range(3))
    run = fake_run(grid + Grid(BASE, lr=[0.1], init_bias=[0.0]), diverged=[0, 1, 2, 3], pending=[11])
    figure = plots.heatmap(run, "lr", "init_bias", "final_loss")
    ax = figure.axes[0]
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.001", "0.01", "0.1"]  # ascending
    assert [t.get_text() for t in ax.get_yticklabels()] == ["\N{MINUS SIGN}1", "0"]
    cells = {tuple(map(round, text.get_position())): text.get_text() for text in ax.texts}
    for i, lr in enumerate((1e-3, 1e-2, 0.1)):
        for j, bias in enumerate((-1.0, 0.0)):
            here = [row for row in run.table if (row["lr"], row["init_bias"]) == (lr, bias)]
            values = [row["final_loss"] for row in here if row["status"] == "done"]
            if not values:
                assert math.isnan(shown[j, i])
                assert cells[i, j] == ("diverged" if here else "no model")
                continue
            assert shown[j, i] == pytest.approx(np.mean(values), rel=1e-14)
            lines = cells[i, j].split("\n")
            assert lines[0] == f"{np.mean(values):.3g}"
            assert lines[1:2] == ([f"± {np.std(values, ddof=1):.2g}"] if len(values) > 1 else [])
            assert lines[2:] == ([f"({len(values)} of 3)"] if len(values) < len(here) else [])
    assert sorted(patch.get_xy() for patch in ax.patches if patch.get_hatch()) == [(0.5, 0.5), (1.5, -0.5)]


def test_the_deviation_is_said_to_be_over_what_differs_within_a_cell():
    run = fake_run(preset("demo").override(seed=[0, 1], steps=[16]))
    title = " ".join(plots.heatmap(run, "lr", "init_bias", "final_loss").get_suptitle().split())
    assert "standard deviation over seed, up to 2 models a cell" in title  # bias_decay goes with init_bias


def test_any_numeric_column_can_be_shown():
    run = fake_run(Grid(BASE.replace(steps=16), lr=[1e-3, 1e-2], l1=[0.0, 0.1]))
    shown = plots.heatmap(run, "l1", "lr", "mean_bias").axes[0].images[0].get_array()
    assert shown[1, 0] == run.table[2]["mean_bias"]


# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run: plots.training_curves(run, "rate"),
            r"color='rate': must be a field of a model, one of task, .*lr",
        ),
        (lambda run: plots.monosemanticity_against(run, "k"), r"field='k': must be a field of a model, one of task"),
        (lambda run: plots.heatmap(run, "lr", "y", "final_loss"), r"y='y': must be a field of a model"),
        (lambda run: plots.heatmap(run, "lr", "lr", "final_loss"), r"y='lr': must be another field than x"),
        (lambda run: plots.heatmap(run, "lr", "l1", "status"), r"value='status': must be a numeric .*final_loss"),
        (lambda run: plots.activation_table(run, 2), r"model=2: must be a whole number from 0 to 1"),
        (lambda run: plots.sorted_biases(run, -1), r"model=-1: must be a whole number from 0 to 1"),
        (lambda run: plots.activations_and_biases(run, [0, 5]), r"model=5: must be a whole number from 0 to 1"),
        (lambda run: plots.activations_and_biases(run, []), r"must name at least one model"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call(fake_run(Grid(BASE.replace(steps=1), lr=[1e-3, 1e-2])))


# every figure, at every size


def nothing_but_nan(run):
    run.losses[:] = math.nan
    for row in run.table:
        row |= {name: math.nan for name, value in row.items() if isinstance(value, float) and name not in ("lr", "l1")}
    for i in range(len(run.specs)):
        for name in ("W_in", "b"):
            run.parameters(i)[name][:] = math.nan
    for values in run.metrics.values():
        values[:] = math.nan
    return run


def dead(run):
    for i in range(len(run.specs)):
        run.parameters(i)["b"][:] = -100.0
        run.parameters(i)["W_in"][:] = 0.0
    run.losses[:, 1:] = 0.0
    return run


SMALL = BASE.replace(steps=64)
RUNS = {
    "one model, one step": lambda: fake_run(Grid(BASE.replace(steps=1))),
    "one neuron, one feature": lambda: fake_run(Grid(ModelSpec(n_features=1, d_embed=1, n_neurons=1, steps=2))),
    "the demo grid": lambda: fake_run(preset("demo"), diverged=[5], diverges_at=3000),
    "60 models": lambda: fake_run(Grid(SMALL, lr=[i / 1000 for i in range(1, 21)], init_bias=[0.0, -0.5, -1.0])),
    "three seeds": lambda: fake_run(Grid(SMALL, lr=[1e-3, 1e-2], init_bias=[0.0, -1.0], seed=range(3)), pending=[4]),
    "four fields": lambda: fake_run(
        Grid(
            SMALL,
            lr=[1e-3, 3e-3, 1e-2],
            n_neurons=[8, 48],
            task=["decoder", "abs"],
            activation=["gelu", "relu", "solu"],
        )
    ),
    "all diverged": lambda: fake_run(Grid(SMALL, lr=[1e-3, 1e-2], l1=[0.0, 0.1]), diverged=range(4), diverges_at=1),
    "all pending": lambda: fake_run(Grid(SMALL, lr=[1e-3, 1e-2], l1=[0.0, 0.1]), pending=range(4)),
    "all not a number": lambda: nothing_but_nan(fake_run(Grid(SMALL, lr=[1e-3, 1e-2], l1=[0.0, 0.1]))),
    "all dead": lambda: dead(fake_run(Grid(SMALL, lr=[1e-3, 1e-2], l1=[0.0, 0.1]))),
}


def assert_readable(figure):
    """Not blank, nothing beyond the figure's edges, no two tick labels of an axis on top of each other."""
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)
    assert pixels.std() > 3
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert all(a.x1 <= b.x0 or a.y1 <= b.y0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_is_drawn_within_its_edges_and_without_a_warning(name):
    run = RUNS[name]()
    x, y = list(dict.fromkeys([*run.grid.axes, "lr", "l1"]))[:2]
    assert_readable(plots.training_curves(run))
    assert_readable(plots.monosemanticity_against(run, x))
    assert_readable(plots.monosemanticity_against(run, y))
    assert_readable(plots.heatmap(run, x, y, "mono_per_feature"))
    if name != "all pending":
        assert_readable(plots.activation_table(run, 0))
        assert_readable(plots.sorted_biases(run, 0))
        assert_readable(plots.activations_and_biases(run, range(min(len(run.specs), 3))))


# save_all


def test_save_all_writes_whole_png_files_and_nothing_else(tmp_path):
    run = fake_run(Grid(SMALL, lr=[1e-3, 1e-2, 3e-2], n_neurons=[16, 48], task=["decoder", "abs"]), diverged=[2])
    before = dict(matplotlib.rcParams)
    paths = plots.save_all(run, tmp_path / "figures")
    assert sorted(tmp_path.rglob("*.png")) == sorted(paths)
    assert sorted(path.stem for path in paths) == [
        *(f"activations_{which}" for which in ("and_biases", "least_monosemantic", "median_monosemantic")),
        *("activations_most_monosemantic", "biases_least_monosemantic", "biases_median_monosemantic"),
        *("biases_most_monosemantic", "heatmap_final_loss", "heatmap_mono_per_feature"),
        *("monosemanticity_against_lr", "monosemanticity_against_n_neurons", "training_curves"),
    ]
    assert len(list((tmp_path / "figures").iterdir())) == len(paths)
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert dict(matplotlib.rcParams) == before


def test_save_all_draws_the_extremes_of_the_finished_models(tmp_path, monkeypatch):
    run = fake_run(Grid(SMALL, lr=[1e-3, 3e-3, 1e-2, 3e-2]))
    for row, value in zip(run.table, (0.5, 0.1, 0.9, 0.7), strict=True):
        row["mono_per_feature"] = value
    run.table[2]["status"] = "diverged"
    drawn = []
    real = plots.activation_table
    monkeypatch.setattr(plots, "activation_table", lambda run, model: drawn.append(model) or real(run, model))
    plots.save_all(run, tmp_path)
    assert sorted(drawn) == [0, 1, 3]


def test_save_all_skips_tables_of_models_that_have_no_parameters(tmp_path):
    pending = fake_run(Grid(SMALL, lr=[1e-3, 1e-2]), pending=[0, 1])
    assert [path.stem for path in plots.save_all(pending, tmp_path)] == ["training_curves"]
    lost = fake_run(Grid(SMALL))
    lost.parameters = fake_run(Grid(SMALL), pending=[0]).parameters
    assert [path.stem for path in plots.save_all(lost, tmp_path)] == ["training_curves"]


@pytest.mark.parametrize("error", [BadFile("x.safetensors", "is corrupted"), RuntimeError("surprise")])
def test_save_all_hides_no_other_error(tmp_path, error):
    def parameters(i, step=None):
        raise error

    run = fake_run(Grid(SMALL))
    run.parameters = parameters
    with pytest.raises(type(error)):
        plots.save_all(run, tmp_path)


def test_plots_leave_pyplot_alone():
    code = "import fastmono.plots, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
