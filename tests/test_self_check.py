"""The self-check: it passes kernels that are right, catches planted faults, and a run trains with what passed."""

import dataclasses
import json
import sys

import pytest
import torch
from test_kernels import HAS_TRITON, interpreted

import fastmono as fm
from fastmono import runner, self_check
from fastmono.engines.reference import ReferenceEngine
from fastmono.engines.switches import SAFER, Switches
from fastmono.self_check import Outcome

if HAS_TRITON:
    from fastmono.engines import self_check as engine_check
    from fastmono.engines.triton import TritonEngine

TINY = fm.ModelSpec(n_features=40, d_embed=9, n_neurons=40, feature_prob=0.1, batch_size=64, steps=8, lr=0.01)
TILES = dict.fromkeys(("BN", "BS", "BR", "BK", "BO", "BB", "BL", "BP", "BU", "BV"), 16)
OTHERS = {
    "lamb": {}, "surveyed": {"init_bias": -0.6},
    "adamw, abs": {"optimizer": "adamw", "task": "abs", "bias_decay": 0.1, "bias_decay_mode": "per_neuron", "l1": 0.1},
    "sgd, reprojector": {"optimizer": "sgd", "task": "reprojector", "bias_decay": 0.1},
    "linear path": {"activation": "gelu", "linear_path": 3, "bias_decay": 0.2, "bias_decay_mode": "rate"},
}  # fmt: skip


def small_tiles(regime="auto"):
    return Switches.of(regime, True, True, TILES)


def only_problem(spec, precision, switches):
    (problem,) = engine_check.problems([spec], precision, 0, switches)
    return problem


@interpreted
@pytest.mark.parametrize(("regime", "precision", "other"), [
    ("resident", "tf32", "surveyed"), ("resident", "fp32", "sgd, reprojector"), ("streamed", "tf32", "lamb"),
    ("streamed", "fp32", "surveyed"), ("streamed", "fp32", "adamw, abs"), ("streamed", "fp32", "sgd, reprojector"),
    ("streamed", "tf32", "linear path"),
])  # fmt: skip
def test_kernels_that_are_right_pass(regime, precision, other):
    problem = only_problem(TINY.replace(**OTHERS[other]), precision, small_tiles(regime))
    assert engine_check.judge(problem, precision, TritonEngine(precision), 1) == ""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
def test_the_bound_of_a_precision_is_kept_by_it_and_not_by_a_coarser_one(optimizer):
    spec = TINY.replace(n_features=512, d_embed=64, n_neurons=1024, batch_size=8192, optimizer=optimizer)
    (problem,) = engine_check.problems([spec], "bf16", 90, Switches())
    for bound, used, passes in (
        ("bf16", "bf16", True), ("bf16", "fp32", True), ("tf32", "tf32", True), ("tf32", "bf16", False),
        ("fp32", "fp32", True), ("fp32", "tf32", False),
    ):  # fmt: skip
        said = engine_check.judge(problem, bound, ReferenceEngine(used), 1)
        assert (said == "") == passes, (bound, used, said)


class Broken:
    """The engine with a fault in what it brings back, or in its losses."""

    def __init__(self, fault):
        self.fault, self.calls, self.inner = fault, 0, TritonEngine("fp32")
        self.architecture = 0

    def __setattr__(self, name, value):
        if name == "switches":
            self.inner.switches = value
        object.__setattr__(self, name, value)

    def advance(self, block, n_steps):
        self.calls += 1
        losses = self.inner.advance(block, n_steps)
        return losses * 1.01 if self.fault == "loss" else losses

    def fetch(self, block):
        self.inner.fetch(block)
        model = block.models[1]
        first, second = (engine_check.views(model.spec, m) for m in (model.first_moment, model.second_moment))
        if self.fault == "tile of the gradient":
            first["W_in"][16:32, :8] *= 1.01
        elif self.fault == "one number of the gradient":
            first["W_outT"][3, 5] += 0.01 * first["W_outT"].abs().max()
        elif self.fault == "second moment":
            second["b"][:16] *= 1.5
        elif self.fault == "row that is not updated":
            model.tensors["W_outT"][20] = 0.0
        elif self.fault == "not a number":
            model.tensors["b"][2] = torch.nan
        elif self.fault == "run to run" and self.calls > 3:
            model.tensors["b"][2] += 1e-7


@interpreted
@pytest.mark.parametrize(
    ("fault", "said"),
    [("loss", "wrong result: the loss of step 1"),
     ("tile of the gradient", "wrong result: the gradient of W_in in step 1: off by"),
     ("one number of the gradient", "wrong result: the gradient of W_outT in step 1: off by"),
     ("second moment", "wrong result: the second moment of b in step 1"),
     ("row that is not updated", "wrong result: the update of W_outT in step 1"),
     ("not a number", "wrong result: the update of b in step 1"),
     ("run to run", "other bits when it is repeated (time 2 of 3)")],
)  # fmt: skip
def test_planted_faults_are_caught_and_named(fault, said):
    problem = only_problem(TINY, "fp32", small_tiles("streamed"))
    assert engine_check.judge(problem, "fp32", Broken(fault), 3).startswith(said)


@interpreted
def test_a_problem_launches_what_the_runs_models_launch_with_ragged_ends_in_two_parts_and_both_biases():
    base = TINY.replace(n_features=512, d_embed=64, n_neurons=1024, batch_size=8192)
    grid = [
        base.replace(lr=lr, init_bias=bias, seed=seed) for lr in (0.1, 0.2) for bias in (0.0, -1.0) for seed in (0, 1)
    ]
    grid += [grid[1].replace(bias_decay=0.03, l1=0.1)]
    found = engine_check.problems(grid, "bf16", 90, Switches())
    assert len(found) == 1  # rates, biases and seeds are no constants of a kernel
    (problem,), chosen = found, engine_check.launches_of(grid[:1], "bf16", 90)[0]
    assert dataclasses.replace(problem.launch, rows=chosen.rows) == chosen
    one, other = problem.specs
    assert one.init_bias == 0.0 and engine_check.last_survey(other) >= 0 > engine_check.last_survey(one)
    for size, tiles in ((one.n_neurons, (chosen.BK, chosen.BL)), (one.d_output, (chosen.BO, chosen.BP)),
                        (one.batch_size, (chosen.BR, chosen.BB))):  # fmt: skip
        assert all(size > 2 * tile and size % tile for tile in tiles)
    assert problem.launch.rows < one.batch_size and problem.launch.rows % 32 == 0
    several = engine_check.problems([*grid, base.replace(n_neurons=48), TINY], "bf16", 90, Switches())
    assert len(several) == 3 and any(p.launch.fused and p.specs[0].n_neurons < p.launch.BL for p in several)


@interpreted
def test_the_check_runs_in_a_process_of_its_own_and_passes():
    verdict = engine_check.attempt([TINY], "fp32", small_tiles())
    assert verdict == engine_check.Verdict(passed=1), verdict


SCRIPTS = {
    "crash": ("import os; print('{\"begun\": 0, \"of\": 1}', flush=True); os.abort()", "ended with code -6"),
    "hang": ("import time; print('{\"begun\": 0}', flush=True); time.sleep(60)", "does not end: nothing came"),
    "no start": ("raise SystemExit('no such module')", "its process ended with code 1: no such module"),
}  # fmt: skip


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("fault", SCRIPTS)
def test_a_process_that_crashes_or_hangs_fails_the_check_and_harms_nothing(fault):
    code, said = SCRIPTS[fault]
    from fastmono.engines.self_check import attempt

    verdict = attempt([TINY], "fp32", Switches(), silent=2.0, command=[sys.executable, "-c", code])
    assert said in verdict.wrong and not verdict.passed
    unable = 'print(\'{"unable": "CUDA error: out of memory"}\')'
    assert attempt([TINY], "fp32", Switches(), command=[sys.executable, "-c", unable]).unable


@pytest.fixture
def verdicts(monkeypatch, tmp_path):
    """Settings of which something is wrong, and those that were tried; the memory is in a folder of the test's."""
    wrong, tried = {}, []

    def attempt(specs, precision, switches):
        tried.append(switches.to_dict())
        said = wrong.get(json.dumps(switches.to_dict()), wrong.get("all", ""))
        return engine_check.Verdict(wrong=said) if said else engine_check.Verdict(passed=len(specs))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_check, "attempt", attempt)
    return wrong, tried


@interpreted
def test_safer_settings_are_tried_in_turn_and_a_run_trains_with_the_first_that_pass(verdicts, tmp_path, capsys):
    wrong, tried = verdicts
    wrong["{}"] = "wrong result: planted"
    wrong[json.dumps({"bulk": False})] = "other bits when it is repeated"
    settings = {"engine": "triton", "precision": "fp32", "self_check": "always"}
    run = fm.train(fm.Grid(TINY), tmp_path / "run", **settings)
    safe = SAFER["one warp group"]
    assert tried == [{}, {"bulk": False}, safe] or tried == [
        {},
        safe,
    ]  # resident models have no copy engine to leave out
    said = json.loads((tmp_path / "run" / "grid.json").read_text())["self_check"]
    assert said["result"] == "passed" and said["switches"] == safe and said["settings"] == "one warp group"
    assert said["failed"][self_check.AS_CHOSEN] == "wrong result: planted"
    shown = " ".join(capsys.readouterr().err.split())
    assert "self-check: settings of this device failed: wrong result: planted" in shown
    assert run.table[0]["status"] == "done" and '"self-check"' in (tmp_path / "run" / "events.jsonl").read_text()


@interpreted
def test_where_all_settings_fail_auto_trains_with_another_engine_and_triton_with_none(verdicts, tmp_path, monkeypatch):
    wrong, _ = verdicts
    wrong["all"] = "wrong result: planted"
    with pytest.raises(ValueError, match=r"self-check: failed with all settings .*planted.*--engine cpu") as error:
        fm.train(fm.Grid(TINY), tmp_path / "asked", engine="triton", precision="fp32", self_check="always", quiet=True)
    assert "\n" not in str(error.value) and not (tmp_path / "asked" / "grid.json").exists()
    resolved = runner.resolve
    monkeypatch.setattr(
        runner, "resolve", lambda engine, *rest: resolved("triton" if engine == "auto" else engine, *rest)
    )
    run = fm.train(fm.Grid(TINY), tmp_path / "auto", self_check="always", quiet=True)
    held = json.loads((tmp_path / "auto" / "grid.json").read_text())
    assert held["engine"] == "cpu" and held["self_check"]["result"] == "failed" and run.table[0]["status"] == "done"


@interpreted
def test_a_device_that_passed_is_not_checked_again_until_something_changes(verdicts, monkeypatch):
    _, tried = verdicts
    monkeypatch.setattr(engine_check, "this_architecture", lambda: 90)
    first = self_check.check([TINY], "fp32")
    again = self_check.check([TINY.replace(seed=7, lr=0.1)], "fp32")
    assert first.result == again.result == "passed" and (first.remembered, again.remembered) == (False, True)
    assert len(tried) == 1
    assert not self_check.check([TINY], "fp32", "always").remembered and len(tried) == 2
    monkeypatch.setattr(self_check, "driver_version", lambda: "999.1")
    assert not self_check.check([TINY], "fp32").remembered and len(tried) == 3
    monkeypatch.setattr(self_check, "kernels_digest", lambda: "other kernels")
    assert not self_check.check([TINY], "fp32").remembered and len(tried) == 4
    assert not self_check.check([TINY.replace(optimizer="sgd")], "fp32").remembered and len(tried) == 5
    for path in (self_check.memory_of({}).parent).iterdir():
        path.write_text("{")  # what is damaged is as if it were not there
    assert not self_check.check([TINY], "fp32").remembered


@interpreted
def test_what_must_not_be_checked_is_not_and_says_why(verdicts):
    _, tried = verdicts
    assert self_check.check([TINY], "fp32", "never").line() == "self-check: none (as asked)"
    assert self_check.check([TINY], "fp32", "once").line() == "self-check: none (the interpreter does not compile)"
    assert not tried


def test_an_unknown_mode_is_refused_and_engines_without_kernels_have_no_check(tmp_path):
    with pytest.raises(ValueError, match="self_check='twice': must be one of once, always, never"):
        fm.train(fm.Grid(TINY), tmp_path / "run", self_check="twice")
    assert not (tmp_path / "run").exists()
    fm.train(fm.Grid(TINY), tmp_path / "run", engine="cpu", quiet=True)
    assert "self_check" not in json.loads((tmp_path / "run" / "grid.json").read_text())


def test_an_outcome_is_told_in_a_line():
    assert Outcome("passed", problems=3).line() == "self-check: 3 problems passed"
    assert Outcome("passed", remembered=True).line() == "self-check: passed before on this device"
    fell = Outcome("passed", "copy engine off", {"bulk": False}, {"settings of this device": "wrong"}, 1)
    assert fell.line() == (
        "self-check: 1 problem passed with copy engine off, since others failed (settings of this device: wrong)"
    )
