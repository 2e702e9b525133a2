"""Processes with a time limit each, and what they report.

A child reports by lines on its standard output that begin with MARK and hold one JSON object. They are written to the
call's file as they come, so that nothing is lost when the call is cut off. Whatever a child does (it crashes, hangs, or
takes the device with it), the others go on.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "@ "
POLL_SECONDS = 0.05
DYING_SECONDS = 5.0
"""How long a killed process may take to end: one that waits for a stuck device is left behind."""
TAIL = 1500
HEAD_BYTES, LOG_BYTES, MOST_LOG_BYTES = 20_000, 80_000, 12 * 2**20
"""Of each child's output, its first and last characters are kept (compilers say what is wrong first, or last), and of
all of it so much."""
DEVICE_SECONDS = 45.0
"""How long a call may take to find out what the machine is: the first import of PyTorch there, from a cold disk."""
PAGE_SECONDS = 2.0
"""Between two renewals of the page."""


def report(**fields: Any) -> None:
    """One line of a child's report."""
    print(f"\n{MARK}{json.dumps(fields)}", flush=True)


def own_group() -> dict[str, Any]:
    """Arguments of Popen for a process that can be killed with its children. It stays in this session where Python can
    do that (3.11): a machine that ends the session's processes when the call is killed then ends these too."""
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class Child:
    """A process in a group of its own, whose output goes to a file that is read while it grows."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.name, self.started = name, time.monotonic()
        handle, path = tempfile.mkstemp(prefix="child", dir=folder)
        self.path = Path(path)
        try:
            self.process = subprocess.Popen(
                list(command), cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=handle,
                stderr=subprocess.STDOUT, text=True, **own_group(),
            )  # fmt: skip
        finally:
            os.close(handle)
        self.output: TextIO = self.path.open(errors="replace")
        self.rest, self.said, self.first_said = "", "", ""
        self.last_line = self.started

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
                if len(self.first_said) < HEAD_BYTES:
                    self.first_said += line[:HEAD_BYTES] + "\n"
                self.said = (self.said + line + "\n")[-LOG_BYTES:]
        if found:
            self.last_line = time.monotonic()
        return found

    @property
    def text(self) -> str:
        """The beginning and the end of what it has said."""
        if self.said.startswith(self.first_said):
            return self.said + self.rest
        return f"{self.first_said}[...]\n{self.said}{self.rest}"

    def end(self) -> None:
        """Kill it and its children, without waiting."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it and its children, and wait no longer than that may take."""
        if self.process.poll() is None:
            self.end()
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
    """One command with a limit in seconds, and another to the time in which it reports nothing."""

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    silent: float = math.inf


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
        switches: arguments of our engine in everything that is measured.

    Attributes:
        on_record: called after a line, now and then, to renew the page.
    """

    def __init__(
        self, out: Path, call: int, seconds: float, rehearse: bool, switches: dict[str, Any] | None = None
    ) -> None:
        self.out, self.call, self.seconds, self.rehearse = out, call, seconds, rehearse
        self.switches = switches or {}
        self.begun = time.monotonic()
        self.end = self.begun + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / f"call{call}.jsonl", out / f"call{call}.log"
        self.unfinished = out / f"call{call}.running.log"
        """What running children have said, renewed with the page: it is there if this process is killed."""
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
            self._renew()
        print(f"{line['at']:7.1f} s  {self.left:5.0f} s left  {part}: {shown[:300]}", flush=True)

    def _renew(self) -> None:
        """The page, and what running children have said. An error in either must not end the call."""
        try:
            assert self.on_record is not None
            self.on_record()
            said = "".join(f"\n==== {child.name}: running\n{child.text[-20_000:]}\n" for child in self.children)
            self.unfinished.write_text(said)
        except Exception:
            self.note(traceback.format_exc())

    def note(self, text: str) -> None:
        """A text in the log, as far as there is room."""
        if self.log.stat().st_size < MOST_LOG_BYTES:
            with self.log.open("a") as file:
                file.write(text)

    def start(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> Child:
        """Start a child; the caller watches it."""
        child = Child(name, command, Path(self.folder.name), {**self.environment, **(environment or {})})
        self.children.append(child)
        return child

    def finished(self, child: Child, cut: str = "") -> None:
        """Kill what is left of a child and keep what it said."""
        child.kill()
        self.children.remove(child)
        self.note(f"\n==== {child.name}: {cut or child.status}\n{child.text}\n")
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
                late = took > job.limit or time.monotonic() - child.last_line > job.silent
                cut = "" if ended else "cut off" if late else "cut off by the end of the call" if over else ""
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
        """End every child that is left: all at once, since each may take seconds."""
        for child in self.children:
            child.end()
        for child in list(self.children):
            self.finished(child, "cut off by the end of the call")
        self.folder.cleanup()
        self.unfinished.unlink(missing_ok=True)

    @contextmanager
    def guarded(self, part: str) -> Iterator[None]:
        """An error of our own in a part is written down, and the next part begins."""
        try:
            yield
        except Exception as error:
            self.note(f"\n==== {part}\n{traceback.format_exc()}\n")
            self.record(part, job=part, status="failed", tail=f"{type(error).__name__}: {error}"[-TAIL:])


def python(module: str, *arguments: str) -> list[str]:
    """The command of one of this project's modules."""
    return [sys.executable, "-m", module, *arguments]
