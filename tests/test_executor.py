"""Workers: their crashes, Ctrl-C, and what is left behind when a driver dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastmono as fm
from fastmono.engines.cpu import CpuEngine
from fastmono.executor import Dispatcher
from fastmono.files import BadFile
from fastmono.plan import Machine, make_plan, model_seconds
from fastmono.shards import decode_shard, encode_shard
from fastmono.store import RunDirectory, Saved, checkpoint_steps
from fastmono.trainer import Options

SPEC = fm.ModelSpec(n_features=32, d_embed=8, n_neurons=32, feature_prob=0.1, batch_size=64, steps=10**6)
GRID = fm.Grid(SPEC, lr=[0.001, 0.003, 0.01, 0.03])
SCRIPT = """
import sys, fastmono as fm
spec = fm.ModelSpec(n_features=32, d_embed=8, n_neurons=32, feature_prob=0.1, batch_size=64, steps=int(sys.argv[2]))
fm.train(fm.Grid(spec, lr=[.001, .003, .01, .03]), sys.argv[1], workers=int(sys.argv[3]), save_every=0.1)
"""  # no __main__ guard, on purpose


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def states(out):
    return set(out.glob("checkpoints/state-*-000000000*[1-9]*"))


def start(out, steps=10**6, workers=2):
    """A driver, once each of its workers has saved a state."""
    before = states(out)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), str(steps), str(workers)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(states(out) - before) >= workers)
    return process


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_survives_its_way_to_the_worker(tmp_path):
    options = Options("cpu", "fp32", "last", 1.5)
    hashes = [spec.content_hash("cpu", "fp32", 1) for spec in GRID]
    saved = {hashes[2]: Saved("state-x.safetensors", 1, 64, None)}
    plan = make_plan(GRID, options, "", saved, 2, Machine(2, None, 1e11))
    for shard in plan.shards:
        directory, jobs, decoded = decode_shard(encode_shard(RunDirectory(tmp_path), shard, options))
        assert (directory.path, tuple(jobs), decoded) == (tmp_path, shard.jobs, options)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_in_seconds_with_the_state_saved_and_no_child_left(number, workers, tmp_path):
    process = start(tmp_path, workers=workers)
    offspring = children(process.pid)
    assert len(offspring) == (workers if workers > 1 else 0)
    stopped = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - stopped < 10
    assert process.returncode != 0 and "the state is saved" in errors.splitlines()[-1]
    assert not any(map(alive, offspring))
    table = fm.load_run(tmp_path).table
    assert {row["status"] for row in table} == {"stopped"}


def test_no_child_survives_a_driver_that_is_killed_and_the_run_continues_at_once(tmp_path):
    process = start(tmp_path)
    offspring = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, offspring)), 10)
    again = start(tmp_path)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    assert again.returncode != 0


def test_the_shard_of_a_killed_worker_is_trained_again_and_its_results_are_bitwise_those_of_a_calm_run(tmp_path):
    calm = fm.train(GRID.override(steps=[20_000]), tmp_path / "calm", workers=1, quiet=True)
    process = start(tmp_path / "killed", steps=20_000)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "RuntimeWarning" not in errors
    assert "2 models are trained again (try 1 failed): worker" in errors and "SIGKILL" in errors
    for name in ("models.csv", "history.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (calm.path / name).read_bytes()


def test_a_worker_that_raises_is_reported_with_its_traceback(tmp_path):
    short = GRID.override(steps=[64])
    first = fm.train(short, tmp_path, workers=2, quiet=True)
    for state in first.directory.checkpoints.glob("state-*"):
        state.unlink()
    blocked = next(first.directory.checkpoints.glob("step-000000000004-*"))
    blocked.unlink()
    blocked.mkdir()  # os.replace onto a directory fails, in the worker that owns it
    with pytest.warns(RuntimeWarning, match=r"models \d, \d failed: (IsADirectory|OS)Error"):
        run = fm.train(short, tmp_path, workers=2, quiet=True)
    assert sorted(row["status"] for row in run.table) == ["done", "done", "failed", "failed"]
    blocked.rmdir()
    assert {row["status"] for row in fm.train(short, tmp_path, workers=2, quiet=True).table} == {"done"}


def test_on_checkpoint_is_called_once_a_step_although_a_worker_dies(tmp_path):
    called = []

    def kill_one(run, step):
        called.append(step)
        if step == 64:
            command = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(os.getpid())}
            workers = [pid for pid, words in command.items() if b"fastmono.worker" in words]
            os.kill(min(workers), signal.SIGKILL)  # other tests of this process may have left children of their own

    run = fm.train(GRID.override(steps=[60_000]), tmp_path, workers=2, quiet=True, on_checkpoint=kill_one)
    assert {row["status"] for row in run.table} == {"done"}
    assert called == checkpoint_steps(60_000)


def test_a_block_that_fails_takes_no_other_block_of_its_worker_with_it(tmp_path):
    grid = GRID.override(steps=[64], n_neurons=[8, 16, 32])  # a block for each width
    first = fm.train(grid, tmp_path, workers=1, quiet=True)
    trained_first = first.specs[first._hashes.index(min(first.directory.files("state"), key=age)[1][0])].n_neurons
    for state in first.directory.checkpoints.glob("state-*"):
        state.unlink()
    for file, models in first.directory.files("checkpoint"):
        if file.header["step"] == 4 and first.specs[first._hashes.index(models[0])].n_neurons == trained_first:
            file.path.unlink()
            file.path.mkdir()  # os.replace onto a directory fails
    with pytest.warns(RuntimeWarning, match=r"failed: (IsADirectory|OS)Error"):
        run = fm.train(grid, tmp_path, workers=1, quiet=True)
    assert {row["n_neurons"] for row in run.table if row["status"] == "failed"} == {trained_first}
    assert {row["n_neurons"] for row in run.table if row["status"] == "done"} == {8, 16, 32} - {trained_first}


def age(item):
    return item[0].path.stat().st_mtime_ns


def test_workers_auto_is_this_process_for_a_short_run_and_a_core_each_for_a_long_one():
    options, machine = Options("cpu", "fp32"), Machine(cores=3, memory=None, flops=1e11)
    short = make_plan(GRID.override(steps=[10]), options, "", {}, "auto", machine)
    long = make_plan(GRID, options, "", {}, "auto", machine)
    assert (len(short.shards), len(long.shards)) == (1, 3)


def test_measuring_at_checkpoints_is_part_of_the_expected_time():
    tiny = GRID[0].replace(n_features=8, d_embed=4, n_neurons=8, batch_size=16, steps=64)
    machine = Machine(cores=2, memory=None, flops=1e11)
    plan = make_plan(fm.Grid(tiny, seed=range(300)), Options("cpu", "fp32"), "", {}, 1, machine)
    # 300 models x 7 checkpoints x 8,192 samples of 8 words: far more than 64 steps of 16 samples
    assert plan.seconds > 5 * 300 * 64 * model_seconds(tiny, "cpu", machine, 1)
    begun = {name: Saved("state-x.safetensors", 0, 32, None) for name in plan.hashes}
    rest = make_plan(fm.Grid(tiny, seed=range(300)), Options("cpu", "fp32"), "", begun, 1, machine)
    assert 0 < rest.seconds < plan.seconds / 2


def test_models_that_share_a_stream_go_to_one_worker_and_the_work_is_balanced():
    grid = fm.Grid(SPEC, seed=[0, 1], lr=[0.001, 0.003, 0.01])
    plan = make_plan(grid, Options("cpu", "fp32"), "", {}, 2, Machine(2, None, 1e11))
    assert [{spec.seed for job in shard.jobs for spec in job.specs} for shard in plan.shards] == [{0}, {1}]


def test_a_checkpoint_that_a_worker_wrote_and_did_not_live_to_report_is_called_all_the_same(tmp_path, monkeypatch):
    called, real = [], Dispatcher._hear

    def lose(self, slot, event):  # what is on its way when a worker dies
        if event["kind"] != "checkpoint" or event["step"] not in (8, 64):
            real(self, slot, event)

    def die_once(self, block, n_steps):
        if block.step == 16 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            raise BadFile(tmp_path / "state", "is gone")  # as if: a failure that may pass, tried again
        return advance(self, block, n_steps)

    advance = CpuEngine.advance
    monkeypatch.setattr(Dispatcher, "_hear", lose)
    monkeypatch.setattr(CpuEngine, "advance", die_once)
    grid = GRID.override(steps=[64])
    fm.train(grid, tmp_path / "run", workers=1, quiet=True, on_checkpoint=lambda run, step: called.append(step))
    assert sorted(called) == checkpoint_steps(64) and len(called) == len(set(called))
    assert called.index(8) < called.index(32), "it was known when the second try began behind it"


def test_on_checkpoint_follows_a_diverging_model_to_its_last_step_alone(tmp_path):
    called = []
    grid = fm.Grid(SPEC.replace(optimizer="sgd", steps=300), lr=[1e6])
    run = fm.train(grid, tmp_path, workers=1, quiet=True, on_checkpoint=lambda run, step: called.append(step))
    assert run.table[0]["diverged_step"] < 128
    assert called == sorted(set(called)) and called[-1] == 300
    assert not {s for s in called[:-1] if s >= run.table[0]["diverged_step"]}


def test_models_that_were_done_before_call_no_checkpoint_of_one_that_fails(tmp_path, monkeypatch):
    grid = GRID.override(steps=[40])
    fm.train(grid, tmp_path, workers=1, quiet=True)
    advance, called = CpuEngine.advance, []

    def fails(self, block, n_steps):
        if block.step >= 8:
            raise ArithmeticError("at step 8")
        return advance(self, block, n_steps)

    monkeypatch.setattr(CpuEngine, "advance", fails)
    longer = grid + fm.Grid(SPEC.replace(steps=40), seed=[77])
    with pytest.warns(RuntimeWarning, match="at step 8"):
        fm.train(longer, tmp_path, workers=1, quiet=True, on_checkpoint=lambda run, step: called.append(step))
    assert called == [1, 2, 4, 8]
