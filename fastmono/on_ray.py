"""The pool of a Ray cluster: one task a shard, on one core or one GPU of whatever machine has it free.

The run directory lies where all machines see it. A task gets its shard as JSON, writes results into the run directory,
and what it reports into a file there (`reports/`), which the driver reads on: nothing of size passes through Ray's
object store, and `--status` sees the same. Ray's own retries are off: the executor's know what was saved meanwhile.
Crashes of a task, its worker or its machine come back from `ray.wait` like any end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastmono.executor import Hear, Stop, train_shard
from fastmono.plan import Machine, cores, this_machine
from fastmono.shards import Shard, encode_shard
from fastmono.store import RunDirectory
from fastmono.trainer import Event, Options

POLL_SECONDS = 0.1
"""Between two looks at the reports."""
ENDS = ("finished", "crashed")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to."""

    ray: Any
    """The module."""
    workers: int | str
    """Tasks at a time, or "auto": what the cluster has room for, also when it grows."""
    local: bool
    """It is of this machine alone, and ends with this process."""

    def room(self, resource: str) -> int:
        """How many CPUs or GPUs it has now."""
        return int(self.ray.cluster_resources().get(resource, 0))

    @property
    def trains_on_gpus(self) -> bool:
        """Whether it has GPUs, whatever this machine has."""
        return not self.local and self.room("GPU") > 0

    def on_gpu(self, function: Any, *arguments: Any) -> Any:
        """Have a function called on a machine that has a GPU, and wait for what it returns."""
        return self.ray.get(self.ray.remote(max_retries=0, num_gpus=1, num_cpus=0)(function).remote(*arguments))

    def machine(self) -> Machine:
        """Its cores, memory and GPUs, at the rate of this machine. Where this one has no GPU, theirs are not known: a
        block that one does not hold is halved there.
        """
        own, memory = this_machine(), self.ray.cluster_resources().get("memory")
        return dataclasses.replace(
            own,
            cores=max(1, self.room("CPU")),
            memory=own.memory if self.local or memory is None else int(memory),
            devices=self.room("GPU"),
            architecture=own.architecture or (90 if self.room("GPU") else 0),
        )


def connect(address: str, workers: int | str) -> Cluster:
    """Start a Ray of this machine ("local"), or join a cluster. An earlier connection of this process is used.

    Raises `ValueError` where Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("Ray is not installed here: pip install 'fastmono[ray]'") from None
    local = address == "local"
    if not ray.is_initialized():
        settings: dict[str, Any] = {"address": address, "log_to_driver": False, "configure_logging": False}
        if local:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports to Ray's makers, which nobody asked for
            settings |= {"num_cpus": cores() if workers == "auto" else int(workers), "include_dashboard": False}
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(**settings)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"ray={address!r}: no cluster was found ({error})") from None
        finally:
            for number, handler in before.items():  # Ray takes over SIGTERM
                with suppress(ValueError):  # not in the main thread
                    signal.signal(number, handler)
    return Cluster(ray, workers, local)


def run_task(line: str, reports: str) -> list[Event]:
    """The task itself: trains a shard, and reports to a file. Returns the few events that could not be written there,
    when the disk is full or the directory is gone.
    """
    stop = Stop()
    unwritten: list[Event] = []

    def ask(number: int, frame: FrameType | None) -> None:
        stop.requested = True

    def report(event: Event) -> None:
        try:
            with Path(reports).open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(event) + "\n")  # a line that was cut short spoils no other
        except OSError:
            if event["kind"] != "progress":
                unwritten.append(event)

    before = signal.signal(signal.SIGINT, ask)  # how Ray cancels a task
    try:
        train_shard(line, report, stop)
    finally:
        signal.signal(signal.SIGINT, before)
    return unwritten


class RayTasks:
    """A pool of Ray tasks."""

    def __init__(self, directory: RunDirectory, options: Options, cluster: Cluster) -> None:
        self.directory, self.options, self.cluster, self.ray = directory, options, cluster, cluster.ray
        self.resource = "GPU" if options.engine == "triton" and cluster.room("GPU") else "CPU"
        share = {"num_gpus": 1, "num_cpus": 0} if self.resource == "GPU" else {"num_cpus": 1}
        self.task = self.ray.remote(max_retries=0, **share)(run_task)
        self.tasks: dict[Any, _Task] = {}
        directory.reports.mkdir(exist_ok=True)

    @property
    def slots(self) -> int:
        """As many tasks as were asked for, or as the cluster has room for now."""
        if self.cluster.workers != "auto":
            return int(self.cluster.workers)
        return max(1, self.cluster.room(self.resource))

    def start(self, slot: int, shard: Shard) -> None:
        """Submit the shard."""
        path = self.directory.reports / f"{shard.name}-{time.time_ns()}.jsonl"
        line = encode_shard(self.directory, shard, self.options)
        self.tasks[self.task.remote(line, str(path.absolute()))] = _Task(slot, path)

    def wait(self, hear: Hear, seconds: float) -> None:
        """Pass on what the reports say, and the ends that Ray knows of."""
        deadline = time.monotonic() + seconds
        while self.tasks and time.monotonic() < deadline:
            try:
                ended, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=POLL_SECONDS)
            except Exception as error:  # of a task there is none here: this is Ray itself
                gone = (
                    f"the Ray cluster is gone ({str(error).partition(chr(10))[0]}); the same command continues the run"
                )
                raise ConnectionError(gone) from None
            for reference, task in list(self.tasks.items()):
                if reference in ended:
                    del self.tasks[reference]
                heard = task.read()
                if reference in ended:
                    if not any(event["kind"] in ENDS for event in heard):
                        heard += self._end(reference)
                    task.close()
                for event in heard:
                    hear(task.slot, event)
            if ended:
                return

    def _end(self, reference: Any) -> list[Event]:
        """What a task that did not report its end said instead, or what became of it."""
        try:
            unwritten: list[Event] = self.ray.get(reference)
        except self.ray.exceptions.TaskCancelledError:  # by us, before it began
            return [{"kind": "finished"}]
        except Exception as error:  # Ray's, for a worker or a machine that died
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            return [{"kind": "crashed", "text": f"{type(error).__name__}: {said[0] if said else ''}"}]
        if any(event["kind"] in ENDS for event in unwritten):
            return unwritten
        return [{"kind": "crashed", "text": "what it reported cannot be read"}]

    def ask_to_stop(self) -> None:
        """Cancel every task: one that has begun saves its state."""
        for reference in self.tasks:
            with suppress(Exception):  # the cluster may be gone
                self.ray.cancel(reference, force=False)

    def close(self) -> None:
        """End what is still running."""
        for reference, task in self.tasks.items():
            with suppress(Exception):  # the cluster may be gone
                self.ray.cancel(reference, force=True)
            task.close()
        self.tasks.clear()
        with suppress(OSError):
            self.directory.reports.rmdir()


class _Task:
    """A shard's task, and how far its reports have been read."""

    def __init__(self, slot: int, path: Path) -> None:
        self.slot, self.path = slot, path
        self.position = 0

    def read(self) -> list[Event]:
        """The events that are new, as far as their lines are whole."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = file.read()
        except OSError:  # not there yet
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        events = []
        for line in whole.splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        return [event for event in events if isinstance(event, dict) and "kind" in event]

    def close(self) -> None:
        """Delete the file."""
        with suppress(OSError):
            self.path.unlink()
