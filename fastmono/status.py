"""How a run is doing, seen from any machine that sees its directory: `python scripts/grid.py --status DIR`.

Whoever trains there rewrites status.json every two seconds, with a count that grows: a run is alive when the count
grows while one looks. That relies on no clock but the reader's own, and on no lock. On the machine where it runs the
process is looked up instead. How far each model is, is read from the states, the truth.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fastmono.events import read_events
from fastmono.files import BadFile, printable, read_json, write_bytes
from fastmono.halving import stopped_at
from fastmono.plan import content_hashes
from fastmono.store import RunDirectory
from fastmono.trainer import Options, steps_left

BEAT_SECONDS = 2.0
PATIENCE_SECONDS = 10.0
"""A run on another machine whose count has not grown for so long is taken for dead."""
LONGEST_LINE = 300
MOST_WORKERS = 256
"""Of what a status file says, what is shown: it may come from anybody."""
TOLD = ("retry", "failed", "diverged", "warning")
"""Kinds of events that a status repeats."""


def this_place() -> dict[str, Any]:
    """What tells this process from all others: the host, its start, the process and its start."""
    place: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place |= {"boot": f"{boot} {os.readlink('/proc/self/ns/pid')}", "born": _born(os.getpid())}
    return place


def _born(pid: int) -> str:
    """When a process started, in ticks since the machine did. OSError where there is none, or not any more."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return fields[19]


class Heartbeat:
    """Rewrites a file every two seconds while used as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = this_place()
        self.beats = 0
        self.said: Mapping[str, Any] = {}
        self.started = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def say(self, **fields: Any) -> None:
        """What the file says from the next beat on."""
        self.said = fields

    def _run(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            self._beat("running")

    def _beat(self, state: str) -> None:
        self.beats += 1
        seconds = round(time.monotonic() - self.started, 1)
        said = {"state": state, "beat": self.beats, **self.place, "seconds": seconds, **self.said}
        with suppress(OSError):  # a full disk costs the status alone
            write_bytes(self.path, json.dumps(said).encode())

    def __enter__(self) -> Heartbeat:
        self._beat("running")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()
        self._beat("ended" if kind is None else "stopped")


def is_alive(path: Path, said: Mapping[str, Any]) -> bool:
    """Whether who wrote this still runs."""
    here = this_place()
    if said.get("boot") and said.get("boot") == here.get("boot"):
        try:
            return _born(int(said["pid"])) == said.get("born")
        except (OSError, ValueError, KeyError, TypeError):
            return False
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        with suppress(BadFile):
            now = read_json(path)
            if isinstance(now, dict) and now.get("beat") != said.get("beat"):
                return True
    return False


def status_lines(path: str | Path) -> Iterator[str]:
    """The state of a run, a line at a time. Takes no lock and changes nothing.

    Raises `ValueError` when the directory holds no run.
    """
    directory = RunDirectory(path)
    about = directory.read_grid()
    grid = about["grid"]
    hashes = content_hashes(grid, Options(about["engine"], about["precision"]))
    directory.expected = dict(zip(hashes, grid, strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = directory.newest_states(hashes, verify=False)
    stopped = stopped_at(directory)
    counted: Counter[str] = Counter()
    steps = []
    for spec, name in zip(grid, hashes, strict=True):
        state = saved.get(name)
        if state is None:
            counted["not begun"] += 1
        elif state.diverged_step is not None:
            counted["diverged"] += 1
        elif steps_left(spec, state):
            counted["stopped" if stopped.get(name) == state.step else "begun"] += 1
            steps.append(state.step)
        else:
            counted["done"] += 1
    kinds = ("done", "diverged", "stopped", "begun", "not begun")
    said = ", ".join(f"{counted[kind]} {kind}" for kind in kinds if counted[kind])
    yield f"{directory.path}: {len(grid)} models, {said}; engine {about['engine']}, {about['precision']}"
    if steps:
        yield f"saved in training: steps {min(steps):,} to {max(steps):,}"
    if caught:
        yield f"{len(caught)} damaged state files, which the next run repairs; the first: {caught[0].message}"
    beats = sorted(directory.path.glob("status*.json"))
    if not beats:
        yield "nothing is known of who trains it"
    for beat in beats:
        yield from _driver_lines(beat)
    events = [event for log in directory.path.glob("events*.jsonl") for event in read_events(log, 10_000)]
    told = [event for event in events if event["kind"] in TOLD]
    if told:
        yield f"{len(told)} lately that are worth knowing (all are in events.jsonl), the last:"
        yield from (f"  {printable(event['time'], 19)}  {_said(event['text'])}" for event in told[-5:])


def _said(value: object) -> str:
    """What a file says, in one line that a terminal can show."""
    return printable(str(value).strip().partition("\n")[0], LONGEST_LINE)


def _driver_lines(path: Path) -> Iterator[str]:
    try:
        said = read_json(path)
        if not isinstance(said, dict):
            raise BadFile(path, "is not a status")
    except BadFile as error:
        yield str(error)
        return
    state = _said(said.get("state"))
    if state == "running" and not is_alive(path, said):
        state = "dead: the same command continues the run"
    part = printable(path.stem.removeprefix("status").removeprefix("-"))
    who = f"process {_said(said.get('pid'))} on {_said(said.get('host'))}"
    yield f"{f'part {part}: ' if part else ''}{who}: {state}, {_said(said.get('seconds'))} s after its start"
    if "line" in said:
        yield f"  {_said(said['line'])}"
    workers = said.get("workers")
    if state == "running" and isinstance(workers, dict):
        yield from (f"  worker {_said(worker)}: {_said(doing)}" for worker, doing in [*workers.items()][:MOST_WORKERS])
