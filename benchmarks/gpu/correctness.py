"""Call 1: is it right, and the first numbers.

device     what the machine is
compile    every kernel that the tests and the paper's grid need, in many processes, into one cache; meanwhile the
           machine's own rates, products and copies
tests      tests/test_gpu.py in groups, each a process of its own, several at a time
floors     the paper's grid at zero bias: steps a second, and each kernel's time beside its floor
suspects   the tests that failed, again: with one switch at a time, with launches that block, under memcheck
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.jobs import Flight, Job, Outcome, python

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
ONE_WARP_GROUP = {"num_warps": 4, "forward_warps": 4, "backward_warps": 4, "narrow_warps": 4}
NOT_CARRIED = {"forward_carried": False, "backward_carried": False, "project_across": False}
Suspects = dict[str, tuple[dict[str, object], dict[str, str]]]
SUSPECTS: Suspects = {  # switches of the engine, and variables of the process
    "nothing changed": ({}, {}),  # what passes now changes from run to run
    "copy engine off": ({"bulk": False}, {}),
    "graphs off": ({"graphs": False}, {}),
    "streamed": ({"regime": "streamed"}, {}),
    "resident": ({"regime": "resident"}, {}),
    # Without the copy engine, forward of two warp groups has a write that no barrier guards (Triton 3.6 needs one).
    "copy engine off, one warp group": ({"bulk": False, "launch": ONE_WARP_GROUP}, {}),
    "one warp group": ({"launch": ONE_WARP_GROUP}, {}),
    "forms of other chips": ({"launch": NOT_CARRIED}, {}),
    "narrow layers by the streamed kernels": ({"launch": {"fused": False}}, {}),
    "launches block": ({}, {"CUDA_LAUNCH_BLOCKING": "1"}),
}
WORKERS, AT_ONCE = 14, 6
COMPILE_SECONDS, GROUP_SECONDS, AGAIN_SECONDS, RATES_SECONDS, FLOORS_SECONDS = 100.0, 60.0, 25.0, 60.0, 35.0
"""Limits. The floors are measured before the suspects are tried, in time that the tests may not take."""
MEMCHECK_SECONDS, REPORT_SECONDS, MOST_AGAIN = 60.0, 3.0, 12
"""Most tests of a group that are run again."""


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


def suspects(ptxas: str) -> Suspects:
    """What failed tests are run again with; `ptxas` is another assembler's path, or empty."""
    return {**SUSPECTS, **({"another ptxas": ({}, {"TRITON_PTXAS_PATH": ptxas})} if ptxas else {})}


def again(found: dict[str, Outcome], tests: Path, chosen: Suspects, limit: float) -> Iterator[Job]:
    """The failed tests of every group once with each suspect, the first suspect of all groups first."""
    for name, (switches, environment) in chosen.items():
        for group, outcome in found.items():
            failed = unfinished(outcome)[:MOST_AGAIN]
            if failed:
                own = ["--switches", json.dumps(switches)] if switches else []
                nodes = [f"{tests}::{test.split('::', 1)[1]}" for test in failed]
                command = pytest_command(tests, *own)[:-1] + nodes
                yield Job(f"{group} | {name}", command, limit, {**PLUGINS_OFF, **environment})


def memcheck(found: dict[str, Outcome], tests: Path) -> Iterator[Job]:
    """The first failed test of each group under compute-sanitizer."""
    for group, outcome in found.items():
        for test in unfinished(outcome)[:1]:
            command = [*pytest_command(tests)[:-1], f"{tests}::{test.split('::', 1)[1]}"]
            yield Job(
                f"{group} | memcheck",
                ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *command],
                MEMCHECK_SECONDS, {**PLUGINS_OFF, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )  # fmt: skip


PLUGINS_OFF = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def compiling_command(call: int, worker: int) -> list[str]:
    """One of the processes that compile."""
    return python("benchmarks.gpu.compiling", "--call", str(call), "--worker", str(worker), "--workers", str(WORKERS))


def fly(flight: Flight, tests: Path, groups: dict[str, str], ptxas: str) -> None:
    """The whole call. In a rehearsal nothing is compiled, and two suspects are enough."""
    rehearse, at_once = flight.rehearse, min(AT_ONCE, os.cpu_count() or 1)
    small = ["--small"] if rehearse else []
    flight.run("device", [Job("device", python("benchmarks.gpu.device"), 20.0)])
    workers = range(WORKERS)
    compiling = [Job(f"worker {i}", compiling_command(1, i), COMPILE_SECONDS) for i in workers]
    rates = Job("rates", python("benchmarks.gpu.device", "--rates", *small), RATES_SECONDS)
    flight.run("compile", [rates, *([] if rehearse else compiling)], at_once=WORKERS + 1)
    seconds, again_seconds = (40.0, 25.0) if rehearse else (GROUP_SECONDS, AGAIN_SECONDS)
    jobs = [
        Job(name, pytest_command(tests, "--group", pattern), seconds, PLUGINS_OFF) for name, pattern in groups.items()
    ]
    found = flight.run("tests", jobs, at_once, reserve=FLOORS_SECONDS + REPORT_SECONDS)
    flight.run("floors", [Job("floors", python("benchmarks.gpu.floors", *small), FLOORS_SECONDS)])
    chosen = suspects(ptxas)
    if rehearse:
        chosen = {name: chosen[name] for name in ("nothing changed", "copy engine off")}
    flight.run("suspects", list(again(found, tests, chosen, again_seconds)), at_once, reserve=REPORT_SECONDS)
    if not rehearse:
        flight.run("suspects", list(memcheck(found, tests)), 2, reserve=REPORT_SECONDS)
