"""Tables of any run, on made-up results whose answers are known; and `python scripts/results.py` on a trained run."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_up_run import BASE, fake_run

import fastmono as fm
from fastmono import interpret, results
from fastmono.claims import settled
from fastmono.spec import Grid, ModelSpec
from fastmono.store import logged_steps

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("results_script", ROOT / "scripts" / "results.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

RATES = (0.003, 0.005, 0.01, 0.03)
GRID = Grid(BASE.replace(steps=8192), lr=RATES, init_bias=(0.0, -1.0), seed=(0, 1, 2))


def made_up(mono, loss, in_trough):
    """Results as functions of the spec; `in_trough` is added to logged losses while the rate is below lr / 2."""
    run = fake_run(GRID)
    run.path = Path("nowhere")
    rate = 0.5 * (1 + torch.cos(math.pi * (run.logged_steps - 1).double() / 512))
    for i, spec in enumerate(GRID):
        run.losses[i] = loss(spec) + in_trough(spec) * (rate < 0.5)
        run.table[i] |= {"mono_per_feature": mono(spec), "final_loss": loss(spec), "mean_bias": -spec.lr}
    return run


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def test_losses_of_peaks_and_troughs_are_those_of_the_last_four_periods():
    spec = BASE.replace(steps=8192)
    steps = logged_steps(spec.steps)
    rate = 0.5 * (1 + torch.cos(math.pi * (steps - 1).double() / 512))
    losses = torch.full((1, len(steps)), 7.0)
    losses[0, rate > 0.95], losses[0, rate < 0.05] = 2.0, 1.0
    losses[0, steps <= 4096] = 99.0
    run = SimpleNamespace(specs=(spec,), losses=losses, logged_steps=steps)
    assert [results.EXTRA[name](run, 0) for name in ("loss_peak", "loss_trough")] == [2.0, 1.0]


@pytest.mark.parametrize("change", [{"schedule": "constant"}, {"schedule": "cosine"}, {"steps": 4095}])
def test_a_schedule_without_four_swings_has_no_losses_of_them(change):
    run = fake_run(Grid(BASE.replace(**change)))
    assert math.isnan(results.EXTRA["loss_peak"](run, 0)) and math.isnan(results.EXTRA["loss_trough"](run, 0))


def test_a_row_is_the_mean_lowest_and_highest_over_seeds():
    run = made_up(lambda s: s.lr * (1 + s.seed), lambda s: 0.25, lambda s: 0.0)
    rows = rows_of(results.models_table(run, ["mono_per_feature", "final_loss"]))
    assert [(row["lr"], row["init_bias"]) for row in rows] == [
        (f"{lr:g}", bias) for lr in RATES for bias in ("\N{MINUS SIGN}1", "0")
    ]
    assert {row["models"] for row in rows} == {"3"} and {row["final_loss"] for row in rows} == {"0.25"}
    assert rows[0]["mono_per_feature"] == "0.006 [0.003, 0.009]"


def test_models_that_are_not_done_are_not_averaged_and_those_that_learn_are_counted():
    run = made_up(lambda s: 0.5, lambda s: 0.25 + s.seed, lambda s: 0.0)
    slow, lost = (GRID.specs.index(BASE.replace(steps=8192, lr=0.003, init_bias=-1.0, seed=seed)) for seed in (1, 2))
    run.losses[slow, run.logged_steps <= 6144] *= 2
    run.table[lost]["status"] = "diverged"
    row = rows_of(results.models_table(run, ["final_loss"]))[0]
    assert row["models"] == "2 of 3, 1 still learning" and row["final_loss"] == "0.75 [0.25, 1.25]"


def test_what_goes_with_the_learning_rate_is_measured_with_noise_and_in_the_troughs():
    run = made_up(lambda s: 10 * s.lr, lambda s: 0.3 + s.lr, lambda s: -3 * s.lr)
    rows = rows_of(results.rates_table(run))
    assert [row["init_bias"] for row in rows] == ["\N{MINUS SIGN}1", "0"]
    low, high = (0.003 + 0.005) / 2, (0.01 + 0.03) / 2
    for row in rows:
        assert float(row["rank correlation of mono/N with lr"]) == 1
        assert float(row["with mean bias"].replace("\N{MINUS SIGN}", "-")) == -1
        assert float(row["mono/N, highest less lowest lr"]) == pytest.approx(0.27)
        loss = row["1 - final loss, higher half of the rates / lower"].replace("\N{MINUS SIGN}", "-")
        assert float(loss) == pytest.approx(1 - (0.3 + high) / (0.3 + low), rel=5e-3)
        assert float(row["the same in the troughs"]) == pytest.approx(1 - (0.3 - 2 * high) / (0.3 - 2 * low), rel=5e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = ModelSpec(n_features=16, d_embed=12, n_neurons=32, feature_prob=1 / 8, batch_size=64, steps=512, lr=0.03)
    path = tmp_path_factory.mktemp("results") / "run"
    return fm.train(Grid(base, lr=(0.01, 0.03), seed=(0, 1)), path, workers=1, quiet=True)


def test_the_share_that_the_map_keeps_is_that_of_the_losses_of_interpret(run):
    found = results.values(run, ["kept_by_map", "loss_fit", "mono_per_feature"])
    for i, values in enumerate(found):
        n = interpret.summary(run.parameters(i), run.specs[i])
        kept = (n["loss_constant"] - n["loss_fit"]) / (n["loss_constant"] - n["loss"])
        assert values["kept_by_map"] == pytest.approx(kept) and values["loss_fit"] == pytest.approx(n["loss_fit"])
        assert values["mono_per_feature"] == run.table[i]["mono_per_feature"]
    kept = (run.path / "insides.json").stat().st_mtime_ns
    assert results.values(run, ["loss_fit"]) == [{"loss_fit": values["loss_fit"]} for values in found]
    assert (run.path / "insides.json").stat().st_mtime_ns == kept


def test_a_measure_of_the_last_checkpoint_is_a_column(run):
    wanted = [float(value) for value in run.metrics["features_0"][:, -1]]
    assert [values["features_0"] for values in results.values(run, ["features_0"])] == wanted


def test_the_script_prints_both_tables_of_the_models_chosen(run, capsys):
    assert script.main([str(run.path), "--columns", "final_loss", "--only", "lr=.01,3/100", "seed=1"]) == 0
    shown = capsys.readouterr().out
    first = [row for row in run.table if row["seed"] == 1]
    assert [float(row["final_loss"]) for row in rows_of(shown.split("Along")[0])] == pytest.approx(
        [row["final_loss"] for row in first], rel=5e-3
    )
    found, _ = settled(run, [spec for spec in run.specs if spec.seed == 1])
    assert "Along the learning rates" in shown and len(found) == 2
    assert script.main([str(run.path), "--columns", "final_loss", "--only", "lr=.01"]) == 0
    assert "Along" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "rate=3"], "must be FIELD=VALUE"),
        (["--only", "lr"], "must be FIELD=VALUE"),
        (["--only", "lr=high"], "is not a number"),
        (["--only", "lr=.5"], "no model of the run"),
        (["--columns", "lost"], "column='lost': must be"),
        (["--preset", "demo"], "has no model with"),
        (["--preset", "nothing"], "must be demo"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_line(run, arguments, message, capsys):
    assert script.main([str(run.path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ")
