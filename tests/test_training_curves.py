"""Training curves show the numbers that they were given: means over periods and seeds, up to where a model diverged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_up_run import BASE, curves, fake_run, texts, xy

from fastmono import plots
from fastmono.presets import preset
from fastmono.spec import Grid
from fastmono.store import checkpoint_steps


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
