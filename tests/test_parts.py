"""Array tasks: `--part I/N` of one grid in one directory, one after another and at the same time."""

import subprocess

import pytest
from fault_cases import command, grid, job, processes, results, wait_for

import fastmono as fm
from fastmono.files import DirectoryLock
from fastmono.shards import array_part

N = 3


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    out = tmp_path_factory.mktemp("calm") / "run"
    assert job(out, "--workers", "1").returncode == 0
    return results(out)


def part(out, i, *flags, **settings):
    return subprocess.Popen(
        command(out, "--workers", "1", "--part", f"{i}/{N}", *flags, **settings),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_parts_that_run_at_the_same_time_give_bitwise_the_run_of_one_process(calm, tmp_path):
    tasks = [part(tmp_path / "run", i) for i in range(N)]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0] * N, said
    assert results(tmp_path / "run") == calm
    # whoever came last has the table; nobody else
    assert sum("final_loss" in out for out, _ in said) >= 1
    telemetry = (tmp_path / "run" / "telemetry.csv").read_text().splitlines()[1:]
    assert [line.split(",")[4] for line in telemetry] == ["1"] * 8  # each model was trained in one session
    assert {p.name for p in (tmp_path / "run").glob("events-*")} == {f"events-{i}-of-{N}.jsonl" for i in range(N)}


def test_a_part_says_what_is_missing_and_a_plain_run_trains_the_rest(calm, tmp_path):
    out, errors = part(tmp_path / "run", 1).communicate(timeout=60)
    own = array_part(grid(), False, (1, N))
    assert 0 < len(own) < 8 and not errors
    assert f"this part is done; {8 - len(own)} models of other parts are not, yet" in out
    table = fm.load_run(tmp_path / "run").table
    assert [row["status"] for row in table] == ["done" if i in own else "pending" for i in range(8)]
    assert job(tmp_path / "run", "--workers", "1").returncode == 0
    assert results(tmp_path / "run") == calm


def test_the_same_part_twice_or_the_whole_grid_meanwhile_is_refused_and_another_part_is_not(tmp_path):
    with_others = DirectoryLock(tmp_path, "0-of-3")
    DirectoryLock(tmp_path, "1-of-3").release()
    for argument in ("0-of-3", None):
        held = subprocess.run(
            [command("")[0], "-c", "import sys, pathlib; from fastmono.files import DirectoryLock; "
             "DirectoryLock.PATIENCE = 0.3; DirectoryLock(pathlib.Path(sys.argv[1]), *sys.argv[2:])",
             str(tmp_path), *filter(None, [argument])], capture_output=True, text=True,
        )  # fmt: skip
        assert "is in use by" in held.stderr and "BlockingIOError" in held.stderr
    with_others.release()
    DirectoryLock(tmp_path).release()


def test_a_part_that_was_killed_is_done_by_the_same_command(calm, tmp_path):
    task = part(tmp_path / "run", 0, "--save-every", "0.1", steps=10**6)
    wait_for(lambda: list(tmp_path.glob("run/checkpoints/state-*-0000000[1-9]*")))
    task.kill()
    task.communicate()
    again = part(tmp_path / "run", 0, steps=10**6)
    wait_for(lambda: "from step" in (tmp_path / "run" / f"events-0-of-{N}.jsonl").read_text().splitlines()[-1])
    again.terminate()
    _, errors = again.communicate(timeout=60)
    assert "the state is saved" in errors and not processes(again.pid, "fastmono")
