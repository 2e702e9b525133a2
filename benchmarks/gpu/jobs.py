"""Processes with a time limit each, and what they report.

A child reports by lines on its standard output that begin with MARK and hold one JSON object. They are written to the
call's file as they come, so that nothing is lost when the call is cut off. Whatever a child does (it crashes, hangs, or
takes the device with it), the others go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "@ "
POLL_SECONDS = 0.05
DYING_SECONDS = 5.0
"""How long a killed process may take to end: one that waits for a stuck device is left behind."""
TAIL, LOG_BYTES = 1500, 100_000
PAGE_SECONDS = 2.0
"""Between two renewals of the page."""


def report(**fields: Any) -> None:
    """One line of a child's report."""
    print(f"\n{MARK}{json.dumps(fields)}", flush=True)


class Child:
    """A process in a session of its own, whose output goes to a file that is read while it grows."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.name, self.started = name, time.monotonic()
        handle, path = tempfile.mkstemp(prefix="child", dir=folder)
        self.path = Path(path)
        try:
            self.process = subprocess.Popen(
                list(command), cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=handle,
                stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(handle)
        self.output: TextIO = self.path.open(errors="replace")
        self.rest, self.said = "", ""

    def lines(self) -> list[dict[str, Any]]:
        """What it has reported since the last call."""
        text = self.rest + self.output.read()
        *whole, self.rest = text.split("\n")
        found = []
        for line in whole:
            try:
                found.append(json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else {})
            except ValueError:  # broken by what another thread printed
                found.append({})
            if not found[-1]:
                found.pop()
                self.said = (self.said + line + "\n")[-LOG_BYTES:]
        return found

    def kill(self) -> None:
        """End it and its children, and wait no longer than that may take."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            try:
                self.process.wait(DYING_SECONDS)
            except subprocess.TimeoutExpired:
                self.said += "\n(does not end when it is killed)"

    def close(self) -> None:
        """Let go of its pipe and its output."""
        assert self.process.stdin is not None
        with suppress(OSError):  # a command that it did not live to read
            self.process.stdin.close()
        self.output.close()

    @property
    def status(self) -> str:
        """passed, failed, or what ended it."""
        code = self.process.poll()
        if code is None:
            return "running"
        if code < 0:
            return f"crashed ({signal.Signals(-code).name})"
        if code and "out of memory" in self.said.lower():
            return "out of memory"
        return "failed" if code else "passed"


@dataclass
class Job:
    """One command with a limit in seconds."""

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a job: its status (passed, failed, crashed, out of memory, cut off, not begun) and its lines."""

    name: str
    status: str
    seconds: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)
    tail: str = ""


class Flight:
    """One call: its clock, its file of JSON lines, and its log.

    Args:
        out: folder for callN.jsonl, callN.log and callN.md.
        call: its number.
        seconds: for the whole call.
        rehearse: on the CPU, in Triton's interpreter, with tiny shapes.

    Attributes:
        on_record: called after a line, now and then, to renew the page.
    """

    def __init__(self, out: Path, call: int, seconds: float, rehearse: bool) -> None:
        self.out, self.call, self.seconds, self.rehearse = out, call, seconds, rehearse
        self.begun = time.monotonic()
        self.end = self.begun + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / f"call{call}.jsonl", out / f"call{call}.log"
        self.path.write_text("")
        self.log.write_text("")
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # a child that did not end may write on
        self.children: list[Child] = []
        self.records: list[dict[str, Any]] = []
        self.on_record: Callable[[], None] | None = None
        self.shown = self.begun
        # One thread a process in a rehearsal, where two cores stand for sixteen.
        self.environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if rehearse else {}

    @property
    def left(self) -> float:
        """Seconds until the call is over."""
        return max(0.0, self.end - time.monotonic())

    def record(self, part: str, **fields: Any) -> None:
        """Write one line, and say it."""
        line = {"at": round(time.monotonic() - self.begun, 2), "part": part, **fields}
        self.records.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{key} {value}" for key, value in fields.items() if key != "tail")
        if self.on_record is not None and time.monotonic() - self.shown > PAGE_SECONDS:
            self.shown = time.monotonic()
            self.on_record()
        print(f"{line['at']:7.1f} s  {self.left:5.0f} s left  {part}: {shown[:300]}", flush=True)

    def start(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> Child:
        """Start a child; the caller watches it."""
        child = Child(name, command, Path(self.folder.name), {**self.environment, **(environment or {})})
        self.children.append(child)
        return child

    def finished(self, child: Child, cut: str = "") -> None:
        """Kill what is left of a child and keep what it said."""
        child.kill()
        self.children.remove(child)
        with self.log.open("a") as file:
            file.write(f"\n==== {child.name}: {cut or child.status}\n{child.said}{child.rest}\n")
        child.close()

    def run(self, part: str, jobs: Sequence[Job], at_once: int = 1, reserve: float = 0.0) -> dict[str, Outcome]:
        """Run jobs, so many at once, until all have ended, or the call has only `reserve` seconds left.

        Every line that a job reports, and how it ended, is recorded at once.
        """
        waiting, running = list(jobs), list[tuple[Job, Child]]()
        found = {job.name: Outcome(job.name, "not begun") for job in jobs}
        while waiting or running:
            over = self.left <= reserve
            while waiting and len(running) < at_once and not over:
                job = waiting.pop(0)
                try:
                    running.append((job, self.start(job.name, job.command, job.environment)))
                except OSError as error:  # a program that is not installed here
                    found[job.name] = Outcome(job.name, "failed", tail=str(error))
                    self.record(part, job=job.name, status="failed", tail=str(error))
            if over:
                for job in waiting:
                    self.record(part, job=job.name, status="not begun")
                waiting = []
            for job, child in list(running):
                outcome, took = found[job.name], time.monotonic() - child.started
                ended = child.process.poll() is not None
                for line in child.lines():
                    outcome.lines.append(line)
                    self.record(part, job=job.name, **line)
                cut = (
                    "" if ended else "cut off" if took > job.limit else "cut off by the end of the call" if over else ""
                )
                if ended or cut:
                    running.remove((job, child))
                    self.finished(child, cut)
                    outcome.status, outcome.seconds = cut or child.status, round(took, 2)
                    outcome.tail = (child.said + child.rest).strip()[-TAIL:]
                    failed = outcome.status != "passed"
                    self.record(part, job=job.name, status=outcome.status, seconds=outcome.seconds,
                                **({"tail": outcome.tail} if failed else {}))  # fmt: skip
            time.sleep(POLL_SECONDS)
        return found

    def close(self) -> None:
        """End every child that is left."""
        for child in list(self.children):
            self.finished(child, "cut off by the end of the call")
        self.folder.cleanup()


def python(module: str, *arguments: str) -> list[str]:
    """The command of one of this project's modules."""
    return [sys.executable, "-m", module, *arguments]
