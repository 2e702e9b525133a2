"""The pool of worker processes of this machine: each has one core, or one GPU, and trains one shard after another.

Driver and worker speak JSON lines: a shard goes to the worker's standard input, events come back on its standard
output. The input stays open: "stop" on it asks for a saved state, and its end means that the driver is gone.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastmono.executor import Hear
from fastmono.shards import Shard, encode_shard
from fastmono.store import RunDirectory
from fastmono.trainer import Event, Options

END_SECONDS = 2.0
"""How long a worker may take to end when its input does."""


def visible_devices(count: int) -> list[str]:
    """The names of this process's first GPUs, as CUDA_VISIBLE_DEVICES takes them: a worker gets one of them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(i) for i in range(count)])[:count]


class Processes:
    """A pool of worker processes, started when they are first needed and again when they die.

    Args:
        slots: how many.
        devices: a GPU for each slot in turn; none where the engine uses none.
        descriptors: open files of the directory's lock, which a worker holds for as long as it lives.
    """

    def __init__(
        self, directory: RunDirectory, options: Options, slots: int, devices: Sequence[str], descriptors: Sequence[int]
    ) -> None:
        self.directory, self.options, self.slots = directory, options, slots
        self.devices, self.descriptors = devices, descriptors
        self.events: queue.Queue[tuple[_Worker, Event]] = queue.Queue()
        self.workers: dict[int, _Worker] = {}

    def start(self, slot: int, shard: Shard) -> None:
        """Send the shard to the slot's worker."""
        if slot not in self.workers:
            package = str(Path(__file__).resolve().parent.parent)
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",  # a thread pool a worker would fight with the other workers
                "MKL_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package))),
            }
            if self.devices:
                environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
            self.workers[slot] = _Worker(slot, environment, self.descriptors, self.events)
        self.workers[slot].send(encode_shard(self.directory, shard, self.options))

    def wait(self, hear: Hear, seconds: float) -> None:
        """Pass on what the workers say."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                worker, event = self.events.get(timeout=left)
            except queue.Empty:
                return
            if self.workers.get(worker.slot) is not worker:
                continue  # its end has been heard already
            if event["kind"] == "crashed":
                del self.workers[worker.slot]
                worker.close()
            hear(worker.slot, event)
            if event["kind"] in ("finished", "crashed"):
                return  # there is room for another shard

    def ask_to_stop(self) -> None:
        """Have every worker save and finish."""
        for worker in self.workers.values():
            worker.send("stop")

    def close(self) -> None:
        """End all workers: those that are idle end by themselves."""
        for worker in self.workers.values():
            worker.end()
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


class _Worker:
    """One worker process, and the thread that listens to it."""

    def __init__(
        self, slot: int, environment: dict[str, str], descriptors: Sequence[int],
        events: queue.Queue[tuple[_Worker, Event]],
    ) -> None:  # fmt: skip
        self.slot, self.events = slot, events
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastmono.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the driver alone, which asks the workers to save
            pass_fds=list(descriptors) if os.name == "posix" else [],
        )
        self.closing = False
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def send(self, line: str) -> None:
        """Write a line to the worker. One that has died is noticed where its events end."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        """Pass on its events, and its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(ValueError):
                event: Any = json.loads(line)
                if isinstance(event, dict):
                    self.events.put((self, event))
        code = self.process.wait()
        if not self.closing:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self.errors.seek(0)
            said = self.errors.read()[-4000:].decode(errors="replace").strip()
            self.events.put((self, {"kind": "crashed", "text": f"worker {self.slot} died ({how})\n{said}".strip()}))

    def end(self) -> None:
        """The end of its input ends the process."""
        self.closing = True
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def close(self) -> None:
        """Wait for the end, kill what does not end, and release what is held."""
        self.end()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.listener.join()
        assert self.process.stdout is not None
        for pipe in (self.process.stdout, self.errors):
            with suppress(OSError):
                pipe.close()
