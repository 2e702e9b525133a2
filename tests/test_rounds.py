"""Successive rounds of a run: that they can be stopped, that engines agree, what they refuse; script and figure."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_run import assert_readable, texts, xy

import fastmono as fm
from fastmono import rounds as module
from fastmono.metrics import HeldOut
from fastmono.rounds import COLUMNS, round_seed, successive_rounds
from fastmono.rows import read_csv

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("rounds_script", ROOT / "scripts" / "rounds.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

BASE = fm.ModelSpec(
    n_features=12, d_embed=5, n_neurons=24, feature_prob=0.1, batch_size=48, steps=300, lr=0.03, init_bias=-0.3
)
GRID = fm.Grid(BASE, seed=[0, 1], optimizer=["lamb", "adamw"])
ROUNDS = {"rounds": 2, "steps": 10, "rank": 3, "workers": 1, "quiet": True}


@pytest.fixture(scope="module", autouse=True)
def files_that_need_not_survive_a_power_cut():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fm.train(GRID, tmp_path_factory.mktemp("run"), engine="cpu", workers=1, quiet=True)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Two rounds that nothing disturbed: the directory, and the table."""
    out = tmp_path_factory.mktemp("whole")
    return out, successive_rounds(run, out=out, **ROUNDS)


def assert_same_rounds(folder, other):
    for number in (1, 2):
        a, b = (fm.load_run(each / f"round-{number}") for each in (folder, other))
        assert a.table == b.table and torch.equal(a.losses, b.losses)
        for i in range(len(a)):
            assert a.kept_steps(i) == b.kept_steps(i) == [0, 1, 2, 4, 8, 10]
            for step in a.kept_steps(i):
                for name, tensor in a.parameters(i, step).items():
                    assert torch.equal(tensor, b.parameters(i, step)[name]), (number, i, step, name)


def test_a_round_begins_where_the_one_before_ended(run, whole):
    folder, rows = whole
    assert [(row["model"], row["round"]) for row in rows] == [(i, number) for number in (1, 2) for i in range(4)]
    before = run
    for number in (1, 2):
        trained = fm.load_run(folder / f"round-{number}")
        for i, (spec, row) in enumerate(zip(GRID, rows[4 * (number - 1) :], strict=False)):
            seed = round_seed(spec.seed, number)
            assert trained.specs[i] == spec.replace(seed=seed, steps=10, linear_path=3)
            old, start, new = before.parameters(i), trained.parameters(i, 0), trained.parameters(i)
            kept = fm.interpret.split(old, spec).monosemantic
            assert torch.equal(start["W_in"][kept], old["W_in"][kept]) and torch.equal(start["P"], old["P"])
            assert not torch.isclose(start["W_in"][~kept], old["W_in"][~kept]).all(-1).any()
            assert row["before_neurons_poly"] + row["before_neurons_dead"] == int((~kept).sum())
            held_out = HeldOut()
            for params, name in ((old, "before_eval_loss"), (start, "reset_loss"), (new, "after_eval_loss")):
                assert row[name] == held_out.measure(params, spec)["eval_loss"]
            assert (row["before_loss"], row["after_loss"]) == tuple(
                each.table[i]["final_loss"] for each in (before, trained)
            )
        before = trained
    assert any(row["before_neurons_mono"] > 0 for row in rows)  # else nothing was tested of them


def test_rounds_see_batches_of_their_own_which_models_of_one_seed_share(whole):
    folder, _ = whole
    seeds = [spec.seed for number in (1, 2) for spec in fm.load_run(folder / f"round-{number}").specs]
    assert seeds[0] == seeds[1] and seeds[2] == seeds[3] and len({0, 1, *seeds}) == 6


def test_table_is_written_as_it_is_returned(whole):
    folder, rows = whole
    written = read_csv(folder / "rounds.csv", COLUMNS)
    for row, cells in zip(rows, written, strict=True):
        assert tuple(row) == COLUMNS
        for name, value in row.items():
            assert cells[name] == (value if isinstance(value, str) else repr(value))


@pytest.mark.parametrize("moment", ["before round-1", "in round-2"])
def test_rounds_stopped_and_continued_are_bitwise_those_that_nothing_disturbed(
    moment, run, whole, tmp_path, monkeypatch
):
    when, stopped_round = moment.split()

    def stopping(grid, out, *arguments, **settings):
        def stop(run, step):
            if step == 4:
                raise KeyboardInterrupt

        if out.name == stopped_round and when == "before":
            raise KeyboardInterrupt
        settings |= {"on_checkpoint": stop} if out.name == stopped_round else {}
        return fm.train(grid, out, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            successive_rounds(run, out=tmp_path, **ROUNDS)
    assert successive_rounds(run, out=tmp_path, **ROUNDS) == whole[1]
    assert_same_rounds(tmp_path, whole[0])


def test_rounds_that_are_done_are_not_trained_again_and_more_continue_them(run, whole, tmp_path, monkeypatch):
    one = successive_rounds(run, out=tmp_path, **{**ROUNDS, "rounds": 1})
    trained = []

    class Noted(fm.trainer.BlockTrainer):
        def run(self):
            trained.append(self.directory.path.name)
            return super().run()

    monkeypatch.setattr(fm.trainer, "BlockTrainer", Noted)
    assert successive_rounds(run, out=tmp_path, **ROUNDS) == whole[1] and one == whole[1][:4]
    assert set(trained) == {"round-2"}
    trained.clear()
    assert successive_rounds(run, out=tmp_path, **ROUNDS) == whole[1] and not trained
    # A round whose states are all damaged begins again from its move.
    for path in (tmp_path / "round-1" / "checkpoints").glob("state-*"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is truncated or corrupted"):
        assert successive_rounds(run, out=tmp_path, **ROUNDS) == whole[1]
    assert set(trained) == {"round-1"}
    assert_same_rounds(tmp_path, whole[0])


def test_one_model_alone_is_bitwise_the_one_among_others(run, whole, tmp_path):
    (first, second) = successive_rounds(run, [2], out=tmp_path, **ROUNDS)
    assert [first, second] == [row for row in whole[1] if row["model"] == 2]


def test_reference_and_cpu_engine_agree(run, whole, tmp_path):
    slow = successive_rounds(run, out=tmp_path, engine="reference", **{**ROUNDS, "steps": 6})
    fast = successive_rounds(run, out=tmp_path / "cpu", engine="cpu", **{**ROUNDS, "steps": 6})
    for number in (1, 2):
        a, b = (fm.load_run(folder / f"round-{number}") for folder in (tmp_path, tmp_path / "cpu"))
        assert (a.engine, b.engine) == ("reference", "cpu")
        for i in range(len(a)):
            for name, tensor in a.parameters(i).items():
                # float32 rounding, 6e-8, that 6 or 12 steps of LAMB and Adam multiply by less than 1e4
                torch.testing.assert_close(b.parameters(i)[name], tensor, rtol=0, atol=6e-4)
    for one, other in zip(slow, fast, strict=True):
        for name in ("left", "moved_loss", "reset_loss", "after_loss", "after_eval_loss", "after_share_path"):
            assert other[name] == pytest.approx(one[name], rel=1e-3), name


def test_a_model_that_diverges_is_in_no_later_round(tmp_path):
    grid = fm.Grid.of([BASE.replace(steps=2), BASE.replace(steps=2, optimizer="sgd", lr=8.0)])
    run = fm.train(grid, tmp_path, engine="cpu", workers=1, quiet=True)
    assert [row["status"] for row in run.table] == ["done", "done"]
    rows = successive_rounds(run, **{**ROUNDS, "rank": None})
    found = [(row["model"], row["round"], row["status"], row["rank"]) for row in rows]
    assert found == [(0, 1, "done", 5), (1, 1, "diverged", 5), (0, 2, "done", 5)]
    assert math.isfinite(rows[1]["before_eval_loss"]) and math.isnan(rows[1]["after_eval_loss"])
    fm.rounds_plots.save(run, rows, tmp_path / "figures")
    assert_readable(fm.rounds_plots.rounds_figure(run, rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds=0: must be a whole number, at least 1"),
        ({"models": [4]}, "model 4: the run has models 0 to 3"),
        ({"models": [-1]}, "model -1: the run has models 0 to 3"),
        ({"models": [1, 1]}, r"models=\[1, 1\]: must be at least one, and each once"),
        ({"models": []}, r"models=\[\]: must be at least one"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"rank": 6}, "linear_path=6: must be at most d_embed, which is 5"),
        ({"steps": 0}, "steps=0: must be a whole number from 1"),
        ({"engine": "gpu"}, "engine='gpu': must be one of auto"),
        ({"workers": 0}, "workers=0: must be auto or a whole number"),
        ({"steps": 11}, "holds rounds of other models, or with other steps or another rank"),
        ({"models": [0]}, "holds rounds of other models"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_rounds_as_they_are(run, whole, arguments, message):
    files = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        successive_rounds(run, out=whole[0], **{**ROUNDS, **arguments})
    assert files == {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}


def test_models_that_are_not_done_or_would_be_one_are_refused(tmp_path):
    grid = fm.Grid(BASE, steps=[4, 8], bias_decay=[0.0, 1e30])
    run = fm.train(grid, tmp_path, engine="cpu", workers=1, quiet=True)
    assert [row["status"] for row in run.table] == ["done", "diverged"] * 2
    with pytest.raises(ValueError, match="model 1 is diverged: only one that is done"):
        successive_rounds(run, [1], quiet=True)
    with pytest.raises(ValueError, match="two of the models differ in nothing but what a round sets"):
        successive_rounds(run, steps=4, quiet=True)
    assert not (tmp_path / "rounds").exists()
    for path in (tmp_path / "checkpoints").glob("state-*"):
        path.unlink()
    with pytest.raises(ValueError, match="lacks the last state of model 0: train it again"):
        successive_rounds(run, [0], quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, and must be a directory"):
        successive_rounds(run, [0], out=tmp_path / "file", quiet=True)


# the figure and the script


def test_figure_shows_each_number_against_its_round_and_the_jump_of_each_move(run, whole):
    rows = whole[1]
    figure = fm.rounds_plots.rounds_figure(run, rows)
    assert_readable(figure)
    own = [row for row in rows if row["model"] == 3]
    curve = [own[0]["before_eval_loss"], own[0]["after_eval_loss"], own[1]["after_eval_loss"]]
    drawn = [xy(line) for line in figure.axes[0].lines]
    assert any(np.array_equal(x, [0, 1, 2]) and np.array_equal(y, curve) for x, y in drawn)
    for row in own:
        assert any(np.array_equal(x, [row["round"] - 1]) and y == row["moved_loss"] for x, y in drawn)
    shares = [own[0]["before_share_path"], *(row["after_share_path"] for row in own)]
    assert any(np.array_equal(y, shares) for _, y in map(xy, figure.axes[3].lines))
    assert "model 3: optimizer adamw, seed 1" in texts(figure)
    with pytest.raises(ValueError, match="there is no round to draw"):
        fm.rounds_plots.rounds_figure(run, [])


def test_script_prints_and_draws_what_the_rounds_did(run, whole, capsys, tmp_path):
    flags = ["--model", "2", "--rounds", "2", "--steps", "10", "--rank", "3", "--workers", "1", "--out", str(tmp_path)]
    assert script.main([str(run.path), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [row for row in whole[1] if row["model"] == 2]
    for row in rows:
        expected = [script.cell(row[name]) for name in script.TABLE]
        assert expected in [line.split() for line in lines]
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG") and lines[-1].endswith("rounds.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        ([], "the following arguments are required: RUN"),
        (["RUN", "--model", "9"], "model 9: the run has models 0 to 3"),
        (["RUN", "--rounds", "0"], "rounds=0: must be a whole number"),
        (["RUN", "--workers", "x"], "workers='x': must be auto or a whole number"),
    ],
)
def test_script_ends_bad_arguments_in_one_line_and_exit_code_2(run, capsys, arguments, message):
    assert script.main([str(run.path) if word == "RUN" else word for word in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert re.search(message, said.err)
