"""Figures show the numbers that they were given, are readable at every size of grid, and raise no warning."""

from __future__ import annotations

import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from made_up_run import BASE, assert_readable, curves, fake_run, texts, xy

from fastmono import plots
from fastmono.files import BadFile
from fastmono.metrics import single_feature_activations
from fastmono.presets import preset
from fastmono.spec import Grid, ModelSpec

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
