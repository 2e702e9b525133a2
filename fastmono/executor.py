"""Runs a plan's shards: in this process when there is one, else in a worker process each.

Driver and worker speak JSON lines: the job goes to the worker's standard input, events come back on its standard
output. The input stays open: "stop" on it asks for a saved state, and its end means that the driver is gone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from fastmono.block import single_thread
from fastmono.spec import ModelSpec
from fastmono.store import RunDirectory, Saved
from fastmono.trainer import BlockJob, Event, Options, describe_failure, train_blocks

STOP_SECONDS = 30.0
"""How long workers may take to save their state when told to stop."""


class Stop:
    """Whether the run was asked to stop, by Ctrl-C or a termination signal; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT and SIGTERM, where that is possible (in the main thread)."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def encode_job(directory: RunDirectory, jobs: Sequence[BlockJob], options: Options) -> str:
    """A worker's task as one line of JSON."""
    blocks = [
        {
            "specs": [spec.to_dict() for spec in job.specs],
            "hashes": job.hashes,
            "saved": [None if saved is None else dataclasses.asdict(saved) for saved in job.saved],
        }
        for job in jobs
    ]
    return json.dumps({"out": str(directory.path.absolute()), "options": dataclasses.asdict(options), "blocks": blocks})


def decode_job(line: str) -> tuple[RunDirectory, list[BlockJob], Options]:
    """Inverse of `encode_job`."""
    job = json.loads(line)
    blocks = [
        BlockJob(
            tuple(ModelSpec.from_dict(spec) for spec in block["specs"]),
            tuple(block["hashes"]),
            tuple(None if saved is None else Saved(**saved) for saved in block["saved"]),
        )
        for block in job["blocks"]
    ]
    return RunDirectory(job["out"]), blocks, Options(**job["options"])


class _ListenerError(BaseException):
    """An exception of the listener on its way through the trainer, where it must not pass for a block's failure."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


def _report(listener: Callable[[int, Event], None], event: Event) -> None:
    try:
        listener(0, event)
    except BaseException as error:
        raise _ListenerError(error) from error


def execute(
    directory: RunDirectory,
    shards: Sequence[Sequence[BlockJob]],
    options: Options,
    listener: Callable[[int, Event], None],
    stop: Stop,
    lock_descriptor: int,
) -> None:
    """Train every shard. `listener(worker, event)` hears of everything, in this thread; kinds besides the trainer's:
    finished (whole: whether all of its blocks reached their end), failed (text: what ended the worker), idle.

    Returns when every shard has finished, failed or stopped. An exception of the listener stops the workers, after
    they have saved their state, and is raised.
    """
    if len(shards) == 1:
        try:
            with single_thread():
                whole = train_blocks(directory, shards[0], options, functools.partial(_report, listener), stop)
        except _ListenerError as error:
            raise error.cause from None
        except Exception as error:
            listener(0, {"kind": "failed", "text": describe_failure(error)})
        else:
            listener(0, {"kind": "finished", "whole": whole})
    elif shards:
        _Workers(directory, shards, options, lock_descriptor).run(listener, stop)


class _Workers:
    def __init__(
        self, directory: RunDirectory, shards: Sequence[Sequence[BlockJob]], options: Options, lock_descriptor: int
    ) -> None:
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()
        self.errors: list[IO[bytes]] = []
        self.processes: list[subprocess.Popen[str]] = []
        package = str(Path(__file__).resolve().parent.parent)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # a thread pool a worker would fight with the other workers
            "MKL_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package))),
        }
        for jobs in shards:
            errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
            process = subprocess.Popen(
                [sys.executable, "-m", "fastmono.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the driver alone, which asks the workers to save
                pass_fds=[lock_descriptor] if os.name == "posix" else [],
            )
            self.errors.append(errors)
            self.processes.append(process)
            self._send(process, encode_job(directory, jobs, options))
        self.listeners = [
            threading.Thread(target=self._listen, args=item, daemon=True) for item in enumerate(self.processes)
        ]
        for listener in self.listeners:
            listener.start()

    @staticmethod
    def _send(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        with suppress(OSError):  # a worker that has died is noticed where its events end
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def _listen(self, worker: int, process: subprocess.Popen[str]) -> None:
        """One thread a worker: passes its events on, and its end."""
        assert process.stdout is not None
        ended = False
        for line in process.stdout:
            with suppress(ValueError):
                event: Any = json.loads(line)
                if isinstance(event, dict):
                    ended = ended or event.get("kind") in ("finished", "failed")
                    self.events.put((worker, event))
        code = process.wait()
        if not ended:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self.errors[worker].seek(0)
            said = self.errors[worker].read()[-4000:].decode(errors="replace").strip()
            self.events.put((worker, {"kind": "failed", "text": f"worker {worker} died ({how})\n{said}".strip()}))

    def run(self, listener: Callable[[int, Event], None], stop: Stop) -> None:
        running, deadline = set(range(len(self.processes))), None
        try:
            while running:
                try:
                    worker, event = self.events.get(timeout=0.2)
                except queue.Empty:
                    worker, event = -1, {"kind": "idle"}
                if event["kind"] in ("finished", "failed"):
                    running.discard(worker)
                listener(worker, event)
                if stop.requested and deadline is None:
                    deadline = time.monotonic() + STOP_SECONDS
                    for process in self.processes:
                        self._send(process, "stop")
                if deadline is not None and time.monotonic() > deadline:
                    break
        except BaseException:
            for process in self.processes:
                self._send(process, "stop")
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            raise
        finally:
            for process, errors, thread in zip(self.processes, self.errors, self.listeners, strict=True):
                if process.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(2.0)
                if process.poll() is None:
                    process.kill()
                    process.wait()
                thread.join()
                for pipe in (process.stdin, process.stdout, errors):
                    assert pipe is not None
                    with suppress(OSError):
                        pipe.close()
