"""events.jsonl: what happened in a run, one JSON line an event, for people (`text`) and programs (all other fields).

    {"time": "2026-11-25T13:20:07.113+00:00", "kind": "checkpoint", "text": "...", "step": 64, "models": [3, 4]}

Times are those of the machine that wrote the line, and nothing is decided by them: a clock may jump.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastmono.files import BadFile, open_in_place, parse_json, read_tail

TAIL_BYTES = 2**20
"""What is read of a log's end."""


class EventLog:
    """A file to which events are appended. One that cannot be written is said once, and costs no more than the log.

    Args:
        warn: called with a line when the first event is lost.

    Raises `BadFile` where something else than a regular file lies, and `OSError`.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self.warn = path, warn
        self.descriptor = open_in_place(path, os.O_WRONLY | os.O_APPEND)
        self.lost = 0
        self.whole = True
        """The last line was written to its end."""

    def write(self, kind: str, text: str, **fields: Any) -> None:
        """Append an event."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "kind": kind, "text": text, **fields}, ensure_ascii=False) + "\n"
        data = (line if self.whole else "\n" + line).encode()
        try:
            self.whole = os.write(self.descriptor, data) == len(data)
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                self.warn(f"{self.path.name} cannot be written ({error.strerror}); the run goes on")

    def close(self) -> None:
        """Nothing is written any more."""
        os.close(self.descriptor)


def read_events(path: Path, last: int) -> list[dict[str, Any]]:
    """The last events of a file, at most so many; lines that are none are passed over."""
    found: list[dict[str, Any]] = []
    try:
        lines = read_tail(path, TAIL_BYTES).splitlines()
    except BadFile:
        return []
    for line in lines[::-1]:
        if len(found) == last:
            break
        with suppress(BadFile):
            event = parse_json(path, line)
            if isinstance(event, dict) and all(isinstance(event.get(name), str) for name in ("time", "kind", "text")):
                found.append(event)
    return found[::-1]
