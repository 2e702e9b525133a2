"""A plugin of pytest for one group of tests: only those whose id matches --group, and one reported line for each."""

from __future__ import annotations

import json
import os
import re

import pytest

from benchmarks.gpu.jobs import report as tell

DEVICE_ERROR = 3
"""Exit code after the device has refused: tests that come after it belong in another process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --group, and --switches for tests that train with the Triton engine."""
    parser.addoption("--group", default="", help="regular expression: tests whose id it is found in")
    parser.addoption("--switches", type=json.loads, default={}, help="arguments of the engine, as a JSON object")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other groups."""
    pattern = re.compile(config.getoption("group"))
    items[:] = [item for item in items if pattern.search(item.nodeid)]
    tell(collected=[item.nodeid for item in items])


def kind_of(text: str) -> str:
    """What kind of failure a traceback tells of."""
    if "out of memory" in text.lower() or "OutOfMemoryError" in text:
        return "out of memory"
    if re.search(r"illegal memory access|illegal instruction|misaligned|launch failure|device-side assert", text):
        return "device error"
    return "wrong result" if "AssertionError" in text or re.search(r"^E\s+assert", text, re.M) else "error"


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say which test begins: one that ends its process is known by having no end."""
    tell(test=nodeid, outcome="begun")


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: passed, skipped, or how it failed."""
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            text = report.longreprtext
            said = re.findall(r"^E\s+(.+)$", text, re.M) or text.strip().splitlines()[-1:] or [""]
            line |= {"kind": kind_of(text), "message": said[0][:300], "tail": text[-1500:]}
        tell(**line)
        if line.get("kind") == "device error":  # whatever this process does on the device now fails as well
            os._exit(DEVICE_ERROR)
