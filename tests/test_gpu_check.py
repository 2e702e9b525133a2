"""The check of a CUDA machine, as far as it goes where there is none: rehearsed, with faults of every kind planted."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastmono as fm
from benchmarks.gpu import comparison, correctness, tuning
from benchmarks.gpu.floors import traffic
from benchmarks.gpu.jobs import Flight, Job, Outcome
from benchmarks.gpu.planted import FAULTS
from benchmarks.gpu.report import page
from fastmono.engines import has_gpu
from fastmono.engines.launch import choose_launch

ROOT = Path(__file__).resolve().parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def check(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_or_with_a_wrong_assembler_the_exit_code_is_2(tmp_path):
    done = check("--call", "1", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "error: there is no CUDA GPU with Triton here; --rehearse goes without one\n"
    done = check("--call", "2", "--rehearse", "--out", str(tmp_path), "--switches", '{"bulc": false}')
    assert done.returncode == 2 and 'error: --switches {"bulc": false}: ' in done.stderr
    assert "Traceback" not in done.stderr
    done = check("--call", "1", "--rehearse", "--out", str(tmp_path), "--ptxas", "/nowhere/ptxas")
    assert done.returncode == 2 and done.stderr == "error: --ptxas /nowhere/ptxas: is no program that can be run\n"


def script(code):
    return [sys.executable, "-c", code]


def test_jobs_that_crash_hang_or_never_end_leave_the_results_of_the_others_and_their_own(tmp_path, capsys):
    flight = Flight(tmp_path, 1, 60.0, False)
    say = "import json, time, os, signal; print('@ ' + json.dumps({'said': 1}), flush=True); "
    found = flight.run("part", [
        Job("good", script(say + "time.sleep(0.3)"), 20.0),
        Job("crash", script(say + "os.abort()"), 20.0),
        Job("hang", script(say + "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"), 1.5),
        Job("memory", script(say + "raise RuntimeError('CUDA error: out of memory')"), 20.0),
        Job("bad", script(say + "print('reason'); raise SystemExit(3)"), 20.0),
        Job("missing", ["/nowhere/program"], 20.0),
    ], at_once=3)  # fmt: skip
    flight.close()
    assert {name: outcome.status for name, outcome in found.items()} == {
        "good": "passed", "crash": "crashed (SIGABRT)", "hang": "cut off", "memory": "out of memory", "bad": "failed",
        "missing": "failed",
    }  # fmt: skip
    assert all(outcome.lines == [{"said": 1}] for name, outcome in found.items() if name != "missing")
    assert "reason" in found["bad"].tail
    lines = [json.loads(line) for line in (tmp_path / "call1.jsonl").read_text().splitlines()]
    assert sum("said" in line for line in lines) == 5 and sum("status" in line for line in lines) == 6
    assert "s left  part: job good" in capsys.readouterr().out


def test_what_time_does_not_allow_is_said_to_be_not_begun(tmp_path):
    flight = Flight(tmp_path, 1, 2.0, False)
    jobs = [Job("long", script("import time; time.sleep(60)"), 50.0), Job("next", script(""), 50.0)]
    found = flight.run("part", jobs, at_once=1, reserve=1.0)
    flight.close()
    assert found["long"].status == "cut off by the end of the call" and found["next"].status == "not begun"
    assert "next" in page(1, flight.records, 2.0, False)


def test_a_job_that_reports_nothing_for_too_long_is_cut_off_and_one_that_does_is_not(tmp_path):
    flight = Flight(tmp_path, 1, 60.0, False)
    talks = "import time\nfor i in range(8): print('@ {\"i\": 1}', flush=True); time.sleep(0.25)"
    found = flight.run("part", [
        Job("silent", script("import time; time.sleep(60)"), 50.0, silent=1.5),
        Job("talks", script(talks), 50.0, silent=1.5),
    ], at_once=2)  # fmt: skip
    flight.close()
    assert (found["silent"].status, found["talks"].status) == ("cut off", "passed")
    assert found["silent"].seconds < 10


def test_a_childs_log_has_the_beginning_and_the_end_of_a_long_output(tmp_path):
    flight = Flight(tmp_path, 1, 60.0, False)
    many = "print('the reason'); print('\\n'.join('line %d' % i for i in range(40_000))); print('the end')"
    flight.run("part", [Job("long", script(many), 50.0)])
    flight.close()
    text = flight.log.read_text()
    assert "the reason" in text and "the end" in text and "[...]" in text and "line 20000\n" not in text
    assert len(text) < 110_000


def test_an_error_of_the_page_or_of_a_part_ends_neither_the_call_nor_other_parts(tmp_path):
    flight = Flight(tmp_path, 1, 60.0, False)

    def broken():
        raise KeyError("planted")

    flight.on_record, flight.shown = broken, 0.0
    flight.record("part", found=1)
    with flight.guarded("second part"):
        broken()
    flight.close()
    assert flight.log.read_text().count("KeyError: 'planted'") == 2
    assert flight.records[-1]["status"] == "failed" and "planted" in flight.records[-1]["tail"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_what_running_children_said_is_there_when_the_call_is_killed(tmp_path):
    (tmp_path / "child.py").write_text(
        "import time\nprint('its last words')\n"
        "for i in range(99):\n    print('@ {\"i\": 1}', flush=True)\n    time.sleep(0.2)"
    )
    (tmp_path / "call.py").write_text(
        "import sys; from pathlib import Path; from benchmarks.gpu.jobs import Flight, Job\n"
        "folder = Path(__file__).parent; flight = Flight(folder, 1, 60.0, False); flight.on_record = lambda: None\n"
        "flight.run('part', [Job('child', [sys.executable, str(folder / 'child.py')], 50.0)])"
    )
    command = [sys.executable, str(tmp_path / "call.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    path, ends = tmp_path / "call1.running.log", time.monotonic() + 30
    while not (path.exists() and "its last words" in path.read_text()) and time.monotonic() < ends:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert "its last words" in path.read_text()


def test_tests_behind_a_device_error_are_known_and_the_switch_that_mends_most_is_chosen():
    lines = [{"collected": ["t::a", "t::b", "t::c"]}, {"test": "t::a", "outcome": "begun"},
             {"test": "t::a", "outcome": "failed", "kind": "device error"}]  # fmt: skip
    assert correctness.not_reached(Outcome("group", "failed", lines=lines)) == ["t::b", "t::c"]
    lines[-1] = {**lines[-1], "kind": "wrong result"}
    assert correctness.not_reached(Outcome("group", "failed", lines=lines)) == []
    tried = {
        job: Outcome(job, status)
        for job, status in {
            "a | graphs off": "failed", "b | graphs off": "passed", "a | copy engine off": "passed",
            "b | copy engine off": "passed", "a | launches block": "passed", "b | launches block": "passed",
        }.items()
    }  # fmt: skip
    assert correctness.mending(tried, correctness.SUSPECTS) == {"bulk": False}
    assert correctness.mending({"a | graphs off": Outcome("", "failed")}, correctness.SUSPECTS) == {}


def test_the_first_turn_counts_where_there_is_no_other_and_switches_of_the_call_reach_every_one_of_ours():
    turn = {"part": "turn", "match": "m", "state": "s"}
    lines = [{**turn, "partner": name, "ms_a_model_step": ms}
             for name, ms in (("one", 9.0), ("many", 9.0), ("many", 1.0), ("many", 3.0), ("many", 2.0))]  # fmt: skip
    assert comparison.medians(lines)["m", "s"] == {"one": 9.0, "many": 2.0}
    of_call = {"bulk": False, "launch": {"BA": 32, "rows": 2048}}
    assert comparison.merged(of_call, {"launch": {"rows": 4096}}) == {
        "bulk": False, "launch": {"BA": 32, "rows": 4096}
    }  # fmt: skip
    assert comparison.merged({}, {"regime": "streamed"}) == {"regime": "streamed"}


def test_every_test_of_the_gpu_is_in_one_group():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu and not slow", "tests/test_gpu.py"]
    collected = re.findall(
        r"^tests/\S+::.+$", subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout, re.M
    )
    assert len(collected) > 100
    for test in collected:
        assert sum(bool(re.search(pattern, test)) for pattern in correctness.GROUPS.values()) == 1, test
    for name, pattern in correctness.GROUPS.items():
        assert any(re.search(pattern, test) for test in collected), name


@needs_triton
def test_all_kernels_that_a_call_needs_are_shared_out_once():
    from benchmarks.gpu.cases import to_compile
    from benchmarks.gpu.compiling import launches, share

    cases = to_compile(1)
    every = launches([cases[0], cases[1], cases[-1]], 90)
    assert {launched.name for launched in every} > {"project", "survey", "forward", "backward", "apply", "resident"}
    keys = [launched.key() for worker in range(5) for launched in share(every, worker, 5)]
    assert sorted(keys) == sorted({launched.key() for launched in every})


@needs_triton
@pytest.mark.parametrize("alternatives", [tuning.PUBLISHED, tuning.SMALL])
def test_every_alternative_is_one_that_the_engine_takes_and_says_what_is_expected(alternatives):
    from fastmono.engines.switches import Switches

    for other in alternatives.values():
        assert other.expected and other.arguments()
        Switches.of(**{"regime": "auto", "bulk": True, "graphs": True, "launch": None, **other.arguments()})


def test_the_page_shows_which_kernel_an_alternative_changes():
    lines = [
        {"part": "profile", "match": "published", "state": "grid", "partner": partner,
         "kernels": {"forward_kernel": ms, "backward_kernel": 0.4}}
        for partner, ms in (("today", 0.25), ("forward, two stages", 0.3))
    ]  # fmt: skip
    text = page(3, lines, 1.0, False)
    assert "| us a step | backward | forward |" in text
    assert "| today | 400.0 | 250.0 |" in text and "| forward, two stages | 400.0 | 300.0 |" in text


def rehearsed(call, folder, seconds):
    """The page and the lines of a rehearsal, which ends well if those parts failed that were planted, and no other."""
    done = check("--call", str(call), "--rehearse", "--out", str(folder), "--seconds", str(seconds))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (folder / f"call{call}.jsonl").read_text().splitlines()]
    assert {path.name for path in folder.iterdir()} == {f"call{call}.{kind}" for kind in ("jsonl", "log", "md")}
    return (folder / f"call{call}.md").read_text(), lines


@needs_triton
@pytest.mark.slow
def test_call_1_is_rehearsed_and_every_planted_fault_has_its_line(tmp_path):
    text, _ = rehearsed(1, tmp_path, 300)
    for line in (
        "| right | passed | 1 of 1 |", "| wrong | failed | 0 of 1 | wrong result |", "| crash | crashed (SIGABRT) |",
        "| kill | crashed (SIGKILL) |", "| hang | cut off |", "| memory | out of memory | 0 of 1 | out of memory |",
        "| wrong | nothing changed: failed, 0 of 1 passed (", "); **copy engine off: mended** |",
        "| device | failed | 0 of 1 | device error |", "| device, after a device error | passed | 1 of 1 |",
        "| test_device_refuses | device error | RuntimeError: CUDA error: an illegal memory access",
        "| tiny decoder | fp32 | ",
        "| test_wrong | wrong result | assert False",
    ):  # fmt: skip
        assert line in text, line
    assert "| step 8, bias 0 | 8 |" in text and "Measured rates: fp32_TFLOPs" in text


@needs_triton
@pytest.mark.slow
def test_call_2_is_rehearsed_and_the_others_take_their_turns_beside_planted_faults(tmp_path):
    text, lines = rehearsed(2, tmp_path, 300)
    for line in (
        "| crash | crashed (SIGABRT) |", "| kill | crashed (SIGKILL) |", "| hang | cut off |",
        "| memory | failed: OutOfMemoryError", "| wrong | wrong result: gate failed",
        "| published fp32 | ours | passed |", "| grid.py | passed |",
    ):  # fmt: skip
        assert line in text, line
    found = comparison.medians(lines)
    assert set(found["published fp32", "grid"]) == set(found["published fp32", "grid, step 16"]) == {"ours", "bmm"}
    for state in ("2 models", "1 model"):
        assert set(found["tiny fp32", state]) == {"ours resident", "ours streamed", "bmm"}


@needs_triton
@pytest.mark.slow
def test_call_3_is_rehearsed_and_an_alternative_that_trains_something_else_is_out(tmp_path):
    text, lines = rehearsed(3, tmp_path, 300)
    assert "| wrong | wrong result: off by" in text and "| few | passed |" in text
    assert all(f"| {fault} |" in text for fault in FAULTS)
    expected = tuning.PUBLISHED["update by 32 rows"].expected
    assert re.search(rf"\| update by 32 rows \| [\d.]+ \| [\d.]+ \| {expected} \|", text)
    assert set(comparison.medians(lines)["published", "grid"]) == {"today", "update by 32 rows", "copy engine off"}


def test_floors_of_the_papers_shape():
    """By hand, bf16: 28 GFLOP a model-step in all, each array passed once."""
    spec = fm.ModelSpec()
    launch = choose_launch(90, 512, 64, 1024, 512, 8192, "bf16")
    specs = [spec, spec.replace(lr=0.01)]
    found = traffic(specs, launch, 2, [1024, 1024], [False, False])
    assert found["survey_kernel"] == found["gather_kernel"] == (0, 0)
    forward, backward = found["forward_kernel"], found["backward_kernel"]
    assert forward[1] == 2 * 2 * 8192 * 1024 * 576 and forward[1] + backward[1] == 2 * spec.flops_per_step
    x, tau = 2 * 8192 * 64, 4 * 8192 * 512  # one stream for both
    assert found["project_kernel"] == (x + 2 * 512 * 64 + tau, 2 * 8192 * 512 * 64)
    assert forward[0] == x + tau + 2 * 2 * (8192 * (512 + 1024) + 1024 * 576)
    parts = 2 * (1024 * 512 + 2 * 1024 * 65)
    assert backward[0] == x + 2 * (2 * (8192 * (512 + 1024) + 1024 * 576) + 4 * parts)
    assert found["moments_kernel"][0] == 2 * 4 * (parts + 5 * 1024 * 577)
    # A quarter of the second model's neurons found by a survey: z of all of its neurons, and the rest of a quarter.
    sparse = traffic(specs, launch, 2, [1024, 256], [False, True])
    assert sparse["survey_kernel"] == (x + 4 * 1024 * 65, 2 * 8192 * 1024 * 64)
    assert sparse["gather_kernel"] == (256 * (6 * 576 + 8), 0)
    for name in ("forward_kernel", "backward_kernel"):
        assert sparse[name][1] == found[name][1] * 5 / 8
    assert sparse["moments_kernel"][0] == found["moments_kernel"][0] - 4 * parts * 3 / 4
    assert sparse["apply_kernel"] == found["apply_kernel"]
    dead = traffic(specs, launch, 2, [1024, 0], [False, True])
    assert dead["backward_kernel"][0] - x == (backward[0] - x) / 2
