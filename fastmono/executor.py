"""Has a plan's shards trained: hands them to a pool, listens, and decides what to do about those that crash.

A pool is where shards are trained: this process (`InProcess`), worker processes (processes.py), or the tasks of a Ray
cluster (on_ray.py). It starts one shard in each of its slots, and passes on what is heard of them. Everything else is
the same for all: the order, retries, halving, stopping.

A shard that crashes is tried again from its newest states. One that has crashed `TRIES` times without any progress in
between is halved, and each half tried as often, until it is known which model it is: that one is given up, and all
others are trained. An exception inside the training of a block is not a crash: it would only happen again. But a file
that was damaged or gone is: the next try uses an older state.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from fastmono.block import single_thread
from fastmono.shards import Shard, decode_shard, describe
from fastmono.store import RunDirectory
from fastmono.trainer import Event, Options, describe_failure, train_blocks

TRIES = 3
"""Crashes in a row, without progress, after which a shard is halved, or its single model given up."""
CRASHES_IN_A_ROW = 30
"""After so many crashes of any shards without progress of any, the fault is not a model's: the run ends."""
STOP_SECONDS = 30.0
"""How long workers may take to save their state when told to stop."""

Hear = Callable[[int, Event], None]


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


def train_shard(line: str, report: Callable[[Event], None], stop: Stop) -> None:
    """Train the shard that a line of JSON describes, and report its events and warnings; the last one is its end."""

    def warn(message: Warning | str, *_: object, **__: object) -> None:
        report({"kind": "warning", "text": str(message)})

    try:
        with warnings.catch_warnings(), single_thread():
            warnings.showwarning = warn
            train_blocks(*decode_shard(line), report, stop)
    except Exception as error:
        report({"kind": "crashed", "text": describe_failure(error)})
    else:
        report({"kind": "finished"})


class Pool(Protocol):
    """Where shards are trained."""

    @property
    def slots(self) -> int:
        """How many are trained at a time; may grow and shrink."""
        ...

    def start(self, slot: int, shard: Shard) -> None:
        """Begin to train a shard in a slot that is free."""
        ...

    def wait(self, hear: Hear, seconds: float) -> None:
        """Pass on what happens, `hear(slot, event)`, for about so long at most.

        Events are the trainer's, and one that ends the shard: "finished", or "crashed" (text: what is known of it).
        """
        ...

    def ask_to_stop(self) -> None:
        """Have every shard that is being trained save its state and finish."""
        ...

    def close(self) -> None:
        """End whatever is still running, at once."""
        ...


class _ListenerError(BaseException):
    """An exception of the listener on its way through the trainer, where it must not pass for a block's failure."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class InProcess:
    """Trains in this process, one shard after another."""

    slots = 1

    def __init__(self, directory: RunDirectory, options: Options, stop: Stop) -> None:
        self.directory, self.options, self.stop = directory, options, stop
        self.shard: Shard | None = None

    def start(self, slot: int, shard: Shard) -> None:
        """Keep the shard for `wait`."""
        self.shard = shard

    def wait(self, hear: Hear, seconds: float) -> None:
        """Train the shard to its end."""
        if self.shard is None:
            return
        jobs, self.shard = self.shard.jobs, None
        try:
            with single_thread():
                train_blocks(self.directory, jobs, self.options, functools.partial(self._report, hear), self.stop)
        except _ListenerError as error:
            raise error.cause from None
        except Exception as error:
            hear(0, {"kind": "crashed", "text": describe_failure(error)})
        else:
            hear(0, {"kind": "finished"})

    @staticmethod
    def _report(hear: Hear, event: Event) -> None:
        try:
            hear(0, event)
        except BaseException as error:
            raise _ListenerError(error) from error

    def ask_to_stop(self) -> None:
        """Nothing to do: the trainer asks `stop` itself."""

    def close(self) -> None:
        """Nothing to do."""


@dataclass
class _Attempt:
    """A shard that is being trained, and what was heard of it."""

    shard: Shard
    flops: int = 0
    model_steps: int = 0
    again: list[str] = field(default_factory=list)
    """Models whose block failed in a way that may pass."""
    text: str = ""


class Dispatcher:
    """Trains every shard in a pool, the longest first.

    Args:
        listener: hears of everything as `listener(worker, event)`, in this thread. Kinds besides the trainer's: shard
            (one is begun), retry (models, tries, and the flops and model_steps that are to be done again), finished,
            idle (shards: those that are left).
        then: asked when all shards are through, for those that follow from their results; none ends the run.
    """

    def __init__(
        self, directory: RunDirectory, shards: Sequence[Shard], pool: Pool, listener: Hear, stop: Stop,
        then: Callable[[], Sequence[Shard]] = tuple,
    ) -> None:  # fmt: skip
        self.directory, self.pool, self.listener, self.stop, self.then = directory, pool, listener, stop, then
        self.queue: deque[Shard] = deque()
        self._enqueue(shards)
        self.running: dict[int, _Attempt] = {}
        self.crashes: Counter[str] = Counter()
        self.crashes_in_a_row = 0

    def run(self) -> None:
        """Returns when every shard has finished, failed or stopped. An exception of the listener stops the workers,
        after they have saved their state, and is raised.
        """
        deadline = None
        try:
            while self.running or (not self.stop.requested and (self.queue or self._enqueue(self.then()))):
                self._fill()
                self.pool.wait(self._hear, 0.2)
                self.listener(-1, {"kind": "idle", "shards": len(self.queue) + len(self.running)})
                if self.stop.requested and deadline is None:
                    deadline = time.monotonic() + STOP_SECONDS
                    self.pool.ask_to_stop()
                if deadline is not None and time.monotonic() > deadline:
                    break
        except BaseException:
            self._drain()
            raise
        finally:
            self.pool.close()

    def _enqueue(self, shards: Sequence[Shard]) -> bool:
        """The longest first. Returns whether there are any."""
        self.queue += sorted(shards, key=lambda shard: -shard.seconds)
        return bool(shards)

    def _fill(self) -> None:
        for slot in range(self.pool.slots):
            if slot not in self.running and self.queue and not self.stop.requested:
                shard = self.queue.popleft()
                self.running[slot] = _Attempt(shard)
                self.listener(slot, {"kind": "shard", **describe(shard), "waiting": len(self.queue)})
                self.pool.start(slot, shard)

    def _drain(self) -> None:
        """Let what is running save its state, unheard."""

        def hear(slot: int, event: Event) -> None:
            if event["kind"] in ("finished", "crashed"):
                self.running.pop(slot, None)

        self.pool.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        while self.running and not isinstance(self.pool, InProcess) and time.monotonic() < deadline:
            self.pool.wait(hear, 0.2)

    def _hear(self, slot: int, event: Event) -> None:
        kind, attempt = event["kind"], self.running.get(slot)
        if attempt is None:  # a worker that died while it had nothing to do
            return
        if kind == "progress":
            attempt.flops += event["flops"]
            attempt.model_steps += event["model_steps"]
        if kind == "crashed":
            self._retry(slot, attempt, attempt.shard.hashes, event["text"])
        elif kind == "block failed" and event.get("again"):
            attempt.again += event["models"]
            attempt.text = event["text"]
        elif kind == "finished" and attempt.again:
            self._retry(slot, attempt, attempt.again, attempt.text, halve=False)
        elif kind == "finished":
            del self.running[slot]
            self.crashes_in_a_row = 0
            self.listener(slot, {"kind": "finished", "shard": attempt.shard.name})
        else:
            self.listener(slot, event)

    def _retry(self, slot: int, attempt: _Attempt, models: Sequence[str], text: str, halve: bool = True) -> None:
        """Put what is left of a shard back into the queue, whole or in halves, or give it up."""
        del self.running[slot]
        before = attempt.shard
        shard = before.only(models, self.directory.newest_states(models))
        if shard is None:  # all was done when it crashed
            return
        if shard.flops < before.flops:  # some of it was saved since
            self.crashes[before.name] = self.crashes_in_a_row = 0
        self.crashes[shard.name] = tries = self.crashes[before.name] + 1
        self.crashes_in_a_row += 1
        if self.crashes_in_a_row >= CRASHES_IN_A_ROW:
            raise ChildProcessError(f"{CRASHES_IN_A_ROW} crashes in a row without any progress, the last: {text}")
        halve = halve and tries >= TRIES and len(shard.hashes) > 1
        if tries >= TRIES and not halve:
            said = f"given up after {tries} tries: {text}"
            self.listener(slot, {"kind": "block failed", "models": list(shard.hashes), "tries": tries, "text": said})
            return
        half = len(shard.hashes) // 2
        saved = {name: state for job in shard.jobs for name, state in zip(job.hashes, job.saved, strict=True) if state}
        parts = [shard.only(names, saved) for names in (shard.hashes[:half], shard.hashes[half:])] if halve else [shard]
        self.queue += filter(None, parts)
        self.listener(
            slot,
            {
                "kind": "retry", "shard": shard.name, "models": list(shard.hashes), "tries": tries, "halved": halve,
                "text": text,
                # What was trained and not saved counts as not done.
                "flops": shard.flops - before.flops + attempt.flops,
                "model_steps": shard.model_steps - before.model_steps + attempt.model_steps,
            },
        )  # fmt: skip
