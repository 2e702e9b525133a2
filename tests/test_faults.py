"""What breaks, one fault after another. After each the same command is run again, and the result must be bitwise that
of an undisturbed run. docs/scale.md has the table of faults, promises and these tests.

`python -m pytest -m slow tests/test_faults.py tests/test_ray.py tests/test_chaos.py` runs those that take longer.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from fault_cases import ROOT, command, grid, is_alive, job, processes, results, wait_for

import fastmono as fm
from fastmono.executor import TRIES
from fastmono.trainer import BlockTrainer

STEPS = 100_000
"""Of runs that something is done to meanwhile: seconds."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The results of an undisturbed run, and of a longer one."""
    out = tmp_path_factory.mktemp("calm")
    fm.train(grid(), out / "short", workers=1, quiet=True)
    fm.train(grid(STEPS), out / "long", workers=1, quiet=True)
    return {40: results(out / "short"), STEPS: results(out / "long")}


def start(out, steps=STEPS):
    """A run of two workers that has been training for a while."""
    process = subprocess.Popen(
        command(out, "--workers", "2", "--save-every", "0.5", steps=steps),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: list(out.glob("checkpoints/step-000000000256-*")) or process.poll() is not None)
    return process


def rerun(out, calm):
    """The same command again, which must end well and with the right bits."""
    done = job(out, "--workers", "2", steps=STEPS)
    assert done.returncode == 0, done.stderr
    assert results(out) == calm[STEPS]


def test_a_driver_that_is_killed_and_started_again_gives_the_same_bits(calm, tmp_path):
    process = start(tmp_path / "run")
    workers = processes(process.pid, "fastmono.worker")
    process.kill()
    process.communicate()
    assert len(workers) == 2
    wait_for(lambda: not any(map(is_alive, workers)), 10)
    rerun(tmp_path / "run", calm)


def test_a_second_driver_is_refused_in_one_line_and_the_first_does_not_notice(tmp_path):
    first = start(tmp_path / "run", steps=10**7)
    second = job(tmp_path / "run", "--workers", "1", steps=10**7)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith("error: ") and f"in use by process {first.pid}" in second.stderr
    assert first.poll() is None and len(processes(first.pid, "fastmono.worker")) == 2
    first.terminate()
    _, errors = first.communicate(timeout=60)
    assert errors.endswith("stopped: the state is saved, and the same command continues from it\n")


@pytest.mark.parametrize("how", ["zero length", "missing", "truncated", "corrupted"])
def test_a_state_that_is_damaged_while_its_model_waits_is_trained_from_an_older_one(how, calm, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupt(run, step):
        if step == 32:
            raise Interrupted

    with pytest.raises(Interrupted):
        fm.train(grid(), tmp_path, workers=1, quiet=True, on_checkpoint=interrupt)
    real, begun = BlockTrainer.__init__, itertools.count()

    def spoiled(self, directory, job, *rest):
        if next(begun) == 0:  # after the plan was made and every state verified
            path = directory.checkpoints / job.saved[0].path
            data = path.read_bytes()
            path.unlink()
            if how != "missing":
                middle = len(data) // 2
                path.write_bytes({"zero length": b"", "truncated": data[:middle]}.get(
                    how, data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]))  # fmt: skip
        real(self, directory, job, *rest)

    monkeypatch.setattr(BlockTrainer, "__init__", spoiled)
    with pytest.warns(UserWarning) if how != "missing" else pytest.MonkeyPatch.context():
        fm.train(grid(), tmp_path, workers=1, quiet=True)
    assert next(begun) == 2, "the one block that was left was not tried again"
    assert results(tmp_path) == calm[40]


def test_clocks_that_jump_change_no_bit_and_stop_nothing(calm, tmp_path, monkeypatch):
    jumps, truth = random.Random(0), time.monotonic
    ahead = [0.0]

    def forward():  # the machine slept
        ahead[0] += jumps.choice([0.0, 0.0, 3600.0])
        return truth() + ahead[0]

    class Interrupted(Exception):
        pass

    def interrupt(run, step):
        if step == 8:
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(time, "time", lambda: jumps.uniform(-1e9, 4e9))
        patch.setattr(time, "monotonic", forward)
        fm.train(grid(), tmp_path, workers=1, quiet=True, on_checkpoint=interrupt)
    for path in tmp_path.rglob("*"):
        when = jumps.choice([0, 2**31])
        os.utime(path, (when, when))
    fm.train(grid(), tmp_path, workers=1, quiet=True)
    assert results(tmp_path) == calm[40]


def test_where_a_disk_fills_in_this_process_models_fail_by_name_and_the_next_run_finishes(calm, tmp_path, monkeypatch):
    from fastmono import files

    real, written = files.write_bytes, itertools.count()

    def full(path, data):
        if path.parent.name == "checkpoints" and 10 <= next(written) < 20:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match="failed: OSError: .*No space left"):
        run = fm.train(grid(), tmp_path, workers=1, quiet=True)
    assert "failed" in {row["status"] for row in run.table}
    monkeypatch.undo()
    fm.train(grid(), tmp_path, workers=1, quiet=True)
    assert results(tmp_path) == calm[40]


COMPILED = """
import resource, sys
from fastmono.engines.simd import entry

@entry
def twice(x):
    return 2 * x

if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
print(twice(21))
"""


@pytest.mark.parametrize("state", ["full", "empty", "cut short"])
def test_a_disk_that_is_full_or_was_when_a_compiled_function_is_kept_costs_a_compilation_alone(state, tmp_path):
    script, kept = tmp_path / "script.py", tmp_path / "kept"
    script.write_text(COMPILED)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(kept), "PYTHONPATH": str(ROOT)}

    def run(word):
        return subprocess.run(
            [sys.executable, str(script), word], env=environment, capture_output=True, text=True, timeout=120
        )

    if state == "cut short":
        assert run("").stdout == "42\n"
        for path in kept.rglob("*.nb?"):
            path.write_bytes(path.read_bytes()[:40])
    done = run("full" if state == "full" else "")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert bool(list(kept.rglob("*.nbi"))) == (state != "full")


# What takes longer


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_on_a_disk_that_is_full_the_run_ends_with_an_error_and_goes_on_when_there_is_room(small_disk, calm):
    process = start(small_disk / "run")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "No space left" in said + errors
    filler.unlink()
    rerun(small_disk / "run", calm)


@pytest.mark.slow
def test_in_a_directory_that_becomes_read_only_the_run_ends_with_an_error_and_goes_on_afterwards(small_disk, calm):
    process = start(small_disk / "run")
    subprocess.run(["mount", "--bind", str(small_disk), str(small_disk)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(small_disk)], check=True)
    try:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "Read-only file system" in said + errors
        again = job(small_disk / "run", steps=STEPS)
        assert again.returncode == 1 and "Read-only file system" in again.stderr and again.stderr.count("\n") == 1
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    rerun(small_disk / "run", calm)


@pytest.mark.slow
def test_workers_that_are_killed_at_random_moments_cost_only_time(calm, tmp_path):
    moments = random.Random(1)
    process = start(tmp_path / "run")
    killed = 0
    while process.poll() is None and killed < 6:
        time.sleep(moments.uniform(0.2, 2.0))
        for worker in processes(process.pid, "fastmono.worker")[:1]:
            os.kill(worker, signal.SIGKILL)
            killed += 1
    _, errors = process.communicate(timeout=300)
    assert killed >= 2 and process.returncode in (0, 1), errors  # 1: three times in a row before anything was saved
    rerun(tmp_path / "run", calm)


POISON = """
import os, sys
if "fastmono.worker" in " ".join(sys.orig_argv):
    from fastmono.engines.cpu import CpuEngine
    advance = CpuEngine.advance
    def poisoned(self, block, n_steps):
        if any(spec.seed == 1 and spec.lr == .03 and spec.n_neurons == 24 for spec in block.specs):
            os.kill(os.getpid(), 11)
        return advance(self, block, n_steps)
    CpuEngine.advance = poisoned
"""


@pytest.mark.slow
def test_a_model_that_always_crashes_is_given_up_and_named_and_everything_else_is_complete(calm, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(POISON)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = job(tmp_path / "run", "--workers", "2", steps=STEPS, env=environment)
    assert done.returncode == 1
    (poison,) = [i for i, s in enumerate(grid()) if (s.seed, s.lr, s.n_neurons) == (1, 0.03, 24)]
    said = f"error: model {poison} failed: given up after {TRIES} tries: worker"
    assert said in done.stderr and "(signal SIGSEGV)" in done.stderr
    statuses = [row["status"] for row in fm.load_run(tmp_path / "run").table]
    assert statuses == ["failed" if i == poison else "done" for i in range(8)]
    rerun(tmp_path / "run", calm)
