"""Call 1: is it right, and the first numbers.

device     what the machine is
compile    every kernel that the tests and the paper's grid need, in many processes, into one cache; meanwhile the
           machine's own rates, products and copies
tests      tests/test_gpu.py in groups, each a process of its own, several at a time; after an error of the device the
           rest of a group goes to another process
apart      how far each gradient is from float64 after one step, whether the tests passed or not
floors     the paper's grid at zero bias: steps a second, and each kernel's time beside its floor
self-check what a run of the paper's grid finds out by itself before its first result
suspects   the tests that failed, again: as they are, under memcheck, with launches that block, with one switch at a
           time; if the floors failed as well, they are measured with what mended the tests
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.jobs import DEVICE_SECONDS, ROOT, Flight, Job, Outcome, python
from fastmono.engines.switches import SAFER

GROUPS = {
    "features": r"test_features_are",
    **{
        f"float64 {precision} {name}": rf"test_kernels_are_no_further.*\[({shapes})-\w+-{precision}\]"
        for precision in ("bf16", "fp32", "tf32")
        for name, shapes in (("small", "tiny|demo|odd|tiny dead"), ("large", "wide|wide dead"), ("narrow", "narrow"))
    },
    "nonlinearities and optimizers": r"test_every_nonlinearity",
    **{
        f"alone {precision} {name}": rf"test_a_model_alone.*\[\d+-({shapes})-{precision}\]"
        for precision in ("bf16", "fp32")
        for name, shapes in (("small", "tiny|demo|odd|tiny dead"), ("large", "wide.*|narrow"))
    },
    "graphs and cuts": r"test_launches_graphs",
    "divergence": r"test_a_diverging",
    "stopped and continued": r"test_a_run_stopped",
}
"""Tests of tests/test_gpu.py by name of group: a regular expression on their ids. Each test is in one group."""
Suspects = dict[str, tuple[dict[str, object], dict[str, str]]]
SUSPECTS: Suspects = {  # switches of the engine, and variables of the process
    "nothing changed": ({}, {}),  # what passes now changes from run to run
    "launches block": ({}, {"CUDA_LAUNCH_BLOCKING": "1"}),
    "graphs off": ({"graphs": False}, {}),
    "streamed": ({"regime": "streamed"}, {}),
    "resident": ({"regime": "resident"}, {}),
    **{name: (switches, {}) for name, switches in SAFER.items()},
}
WORKERS, AT_ONCE = 14, 6
COMPILE_SECONDS, GROUP_SECONDS, AGAIN_SECONDS, RATES_SECONDS, FLOORS_SECONDS = 100.0, 60.0, 25.0, 60.0, 35.0
"""Limits. The floors are measured before the suspects are tried, in time that the tests may not take."""
SILENT_SECONDS, APART_SECONDS, SELF_CHECK_SECONDS = 30.0, 20.0, 45.0
"""How long a group may report nothing: a kernel that does not end takes no more of the call."""
MEMCHECK_SECONDS, REPORT_SECONDS, MOST_AGAIN = 60.0, 3.0, 2
"""Most tests of a group that are run again: a switch asks for kernels that are not compiled yet."""


def pytest_command(tests: Path, *arguments: str) -> list[str]:
    """pytest without the plugins that are installed beside it, without -x, its warnings no errors."""
    return python(
        "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes", "-W", "default", "-m",
        "not slow", "--tb=short", *arguments, str(tests),
    )  # fmt: skip


def unfinished(outcome: Outcome) -> list[str]:
    """The tests of a group that failed, or were running when their process ended."""
    begun, ended, failed = [], set(), []
    for line in outcome.lines:
        if line.get("outcome") == "begun":
            begun.append(line["test"])
        elif "test" in line:
            ended.add(line["test"])
            if line["outcome"] == "failed":
                failed.append(line["test"])
    return failed + [test for test in begun if test not in ended]


def not_reached(outcome: Outcome) -> list[str]:
    """The tests of a group whose turn did not come, since the device had refused before."""
    if not any(line.get("kind") == "device error" for line in outcome.lines):
        return []
    collected = [test for line in outcome.lines for test in line.get("collected", [])]
    begun = {line["test"] for line in outcome.lines if "test" in line}
    return [test for test in collected if test not in begun]


def mending(found: dict[str, Outcome], chosen: Suspects) -> dict[str, object]:
    """The switches that mend most of the groups in which they were tried; empty where none does."""
    counted = {
        name: sum(outcome.status == "passed" for job, outcome in found.items() if job.endswith(f"| {name}"))
        for name, (switches, environment) in chosen.items() if switches and not environment
    }  # fmt: skip
    best = max(counted, key=lambda name: counted[name], default="")
    return chosen[best][0] if counted.get(best) else {}


def suspects(ptxas: str) -> Suspects:
    """What failed tests are run again with; `ptxas` is another assembler's path, or empty."""
    return {**SUSPECTS, **({"another ptxas": ({}, {"TRITON_PTXAS_PATH": ptxas})} if ptxas else {})}


def nodes(tests: Path, ids: list[str]) -> list[str]:
    """Tests as arguments of pytest."""
    return [f"{tests}::{test.split('::', 1)[1]}" for test in ids]


def again(found: dict[str, Outcome], tests: Path, chosen: Suspects, limit: float) -> Iterator[Job]:
    """The failed tests of every group once with each suspect, the first suspect of all groups first."""
    for name, (switches, environment) in chosen.items():
        for group, outcome in found.items():
            failed = unfinished(outcome)[:MOST_AGAIN]
            if failed:
                own = ["--switches", json.dumps(switches)] if switches else []
                command = pytest_command(tests, *own)[:-1] + nodes(tests, failed)
                yield Job(f"{group} | {name}", command, limit, {**PLUGINS_OFF, **environment})


def memcheck(found: dict[str, Outcome], tests: Path) -> Iterator[Job]:
    """The first failed test of each group under compute-sanitizer."""
    for group, outcome in found.items():
        for test in unfinished(outcome)[:1]:
            command = pytest_command(tests)[:-1] + nodes(tests, [test])
            yield Job(
                f"{group} | memcheck",
                ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *command],
                MEMCHECK_SECONDS, {**PLUGINS_OFF, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )  # fmt: skip


PLUGINS_OFF = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "2"}
"""Six processes of two threads, since the reference computes on the same cores."""


def compiling_command(call: int, worker: int) -> list[str]:
    """One of the processes that compile."""
    return python("benchmarks.gpu.compiling", "--call", str(call), "--worker", str(worker), "--workers", str(WORKERS))


def checked(flight: Flight) -> Job:
    """A run of one step, as a user begins it: the self-check of the paper's grid, with what it falls back to."""
    more = ["--steps", "1", "--self-check", "always", "--no-plots", "--out", str(Path(flight.folder.name) / "checked")]
    return Job("self-check", [sys.executable, str(ROOT / "scripts" / "grid.py"), *more], SELF_CHECK_SECONDS)


def fly(flight: Flight, tests: Path, groups: dict[str, str], ptxas: str) -> None:
    """The whole call. In a rehearsal nothing is compiled, and two suspects are enough."""
    rehearse, at_once = flight.rehearse, min(AT_ONCE, os.cpu_count() or 1)
    small = ["--small"] if rehearse else []
    own = ["--switches", json.dumps(flight.switches)] if flight.switches else []
    flight.run("device", [Job("device", python("benchmarks.gpu.device"), DEVICE_SECONDS)])
    workers = range(WORKERS)
    one_thread = {"OMP_NUM_THREADS": "1"}
    compiling = [Job(f"worker {i}", compiling_command(1, i), COMPILE_SECONDS, one_thread) for i in workers]
    rates = Job("rates", python("benchmarks.gpu.device", "--rates", *small), RATES_SECONDS)
    flight.run("compile", [rates, *([] if rehearse else compiling)], at_once=WORKERS + 1)

    seconds, again_seconds = (40.0, 25.0) if rehearse else (GROUP_SECONDS, AGAIN_SECONDS)
    reserve = APART_SECONDS + FLOORS_SECONDS + REPORT_SECONDS

    def job(name: str, *arguments: str) -> Job:
        silent = math.inf if rehearse else SILENT_SECONDS
        return Job(name, pytest_command(tests, *own, *arguments), seconds, PLUGINS_OFF, silent)

    found = flight.run("tests", [job(name, "--group", pattern) for name, pattern in groups.items()], at_once, reserve)
    rest = [
        replace(job(f"{name}, after a device error"), command=pytest_command(tests, *own)[:-1] + nodes(tests, others))
        for name, outcome in found.items() if (others := not_reached(outcome))
    ]  # fmt: skip
    found |= flight.run("tests", rest, at_once, reserve)

    flight.run("apart", [Job("apart", python("benchmarks.gpu.apart", *small, *own), APART_SECONDS)])
    measured = flight.run("floors", [Job("floors", python("benchmarks.gpu.floors", *small, *own), FLOORS_SECONDS)])
    if not rehearse:
        flight.run("self-check", [checked(flight)], reserve=REPORT_SECONDS)
    chosen = suspects(ptxas)
    if rehearse:
        chosen = {name: chosen[name] for name in ("nothing changed", "copy engine off")}
    first = {"nothing changed": chosen.pop("nothing changed")}
    tried = flight.run("suspects", list(again(found, tests, first, again_seconds)), at_once, reserve=REPORT_SECONDS)
    if not rehearse:
        flight.run("suspects", list(memcheck(found, tests)), 2, reserve=REPORT_SECONDS)
    again_floors = 0.0 if measured["floors"].status == "passed" or rehearse else FLOORS_SECONDS
    jobs = list(again(found, tests, chosen, again_seconds))
    tried |= flight.run("suspects", jobs, at_once, reserve=again_floors + REPORT_SECONDS)
    if again_floors and (switches := mending(tried, chosen)):
        command = python("benchmarks.gpu.floors", "--switches", json.dumps(switches))
        flight.run("floors", [Job(f"floors with {json.dumps(switches)}", command, FLOORS_SECONDS)])
