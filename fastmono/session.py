"""One call of `train`, from the plan to the last table: hears of everything, and keeps the run's records."""

from __future__ import annotations

import dataclasses
import functools
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import torch
from rich.console import Console

from fastmono.events import EventLog
from fastmono.executor import Dispatcher, InProcess, Pool, Stop
from fastmono.files import turn
from fastmono.halving import Forecast, Rungs
from fastmono.monitor import GpuMonitor
from fastmono.on_ray import Cluster, RayTasks
from fastmono.plan import Plan, shards_to
from fastmono.processes import Processes, visible_devices
from fastmono.progress import Progress, duration
from fastmono.run import Run
from fastmono.self_check import Outcome
from fastmono.shards import Shard, describe, part_name
from fastmono.status import BEAT_SECONDS, Heartbeat
from fastmono.store import RunDirectory, checkpoint_steps
from fastmono.tables import Telemetry, write_tables
from fastmono.trainer import Event, keeps_checkpoint, steps_left

TABLE_SECONDS = 15.0
"""Least time between two writings of the tables, but for the last."""

OnCheckpoint = Callable[[Run, int], None]


class Session:
    """One call of `train`, from the plan to the last table."""

    def __init__(
        self, directory: RunDirectory, plan: Plan, on_checkpoint: OnCheckpoint | None, console: Console | None,
        cluster: Cluster | None, rungs: Rungs | None, checked: Outcome | None = None,
    ) -> None:  # fmt: skip
        self.directory, self.plan, self.on_checkpoint, self.cluster = directory, plan, on_checkpoint, cluster
        self.rungs, self.stop, self.checked = rungs, Stop(), checked
        self.statuses = {
            name: "pending" if steps_left(spec, plan.saved.get(name)) else "done" for spec, name in plan.items()
        }
        if rungs is not None:
            self.statuses |= {name: "stopped" for name in rungs.stopped if self.statuses.get(name) == "pending"}
        self.own = {name for shard in plan.shards for name in shard.hashes}
        self.numbers = {name: i for i, name in enumerate(plan.hashes)}
        self.failures: list[str] = []
        self.telemetry = Telemetry(directory, {name: spec.flops_per_step for spec, name in plan.items()})
        self.last_table, self.table_cost, self.last_said = time.monotonic(), 0.0, 0.0
        self.awaited, self.reached = self._awaited_checkpoints(), set[int]()
        about = about_this_process(plan.options.engine)
        if checked is not None:
            about["self_check"] = dataclasses.asdict(checked)
        directory.write_grid(plan.grid, plan.options.engine, plan.options.precision, about)
        alone = plan.workers == 1 and cluster is None
        self.monitor = GpuMonitor() if plan.options.engine == "triton" and alone else None
        self.joules = 0.0
        more = self.monitor.line if self.monitor else str
        part = f"-{part_name(plan.part)}" if plan.part else ""
        log = EventLog(directory.path / f"events{part}.jsonl", lambda text: self.progress.show(text))
        left = plan.forecast or plan
        self.progress = Progress(left.model_steps, left.flops, log, console, more, len(plan.shards))
        self.heartbeat = Heartbeat(directory.path / f"status{part}.json")
        self.doing: dict[int, str] = {}

    def _pool(self, descriptors: Sequence[int]) -> Pool:
        """Where this plan's shards are trained."""
        plan = self.plan
        if self.cluster is not None:
            return RayTasks(self.directory, plan.options, self.cluster)
        if plan.workers == 1:
            return InProcess(self.directory, plan.options, self.stop)
        gpus = torch.cuda.device_count() if plan.options.engine == "triton" else 0
        return Processes(self.directory, plan.options, plan.workers, visible_devices(gpus), descriptors)

    def _awaited_checkpoints(self) -> dict[int, set[str]]:
        """For each checkpoint that is kept and still to come, the models that will pass it."""
        awaited: dict[int, set[str]] = {}
        for spec, name in self.plan.items():
            saved = self.plan.saved.get(name)
            if self.on_checkpoint is not None and name in self.own and steps_left(spec, saved):
                for step in checkpoint_steps(spec.steps):
                    if step > (saved.step if saved else 0) and keeps_checkpoint(
                        self.plan.options.checkpoints, step, spec.steps
                    ):
                        awaited.setdefault(step, set()).add(name)
        return awaited

    def run(self, descriptors: Sequence[int]) -> None:
        """Train, and write everything down. `descriptors`: of the directory's lock."""
        plan, started = self.plan, time.monotonic()
        try:
            with self.heartbeat, self.progress, self.stop.listening():
                self.progress.log("plan", describe_plan(plan), shards=[describe(shard) for shard in plan.shards])
                if self.checked is not None:
                    shown = bool(self.checked.failed) or not self.checked.remembered
                    self.progress.log("self-check", self.checked.line(), show=shown, **dataclasses.asdict(self.checked))
                if self.monitor and self.monitor.note:
                    self.progress.log("note", self.monitor.note)
                if plan.part is None:
                    self._write_tables()
                if plan.shards:
                    shards, then = (plan.shards, tuple) if self.rungs is None else ((), self._next_shards)
                    Dispatcher(self.directory, shards, self._pool(descriptors), self._hear, self.stop, then).run()
                self._settle()
                self._pass_unreported()
                counted = Counter(self.statuses.values())
                said = ", ".join(f"{count} {status}" for status, count in counted.items())
                self.last_said = 0.0
                self._say()
                self.progress.log("ended", f"ended after {duration(time.monotonic() - started)}: {said}")
        except BaseException:
            self._settle()
            raise
        finally:
            if self.monitor:
                self.monitor.close()
        for text in self.failures:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        if self.stop.requested:
            raise KeyboardInterrupt(f"stopped; the state is saved in {self.directory.path}")

    def _settle(self) -> None:
        """The last tables: nothing of ours is running any more."""
        saved = self.directory.newest_states(self.plan.hashes, verify=False)
        for spec, name in self.plan.items():
            if not steps_left(spec, saved.get(name)):
                self.statuses[name] = "done"
            elif self.statuses[name] == "running":
                self.statuses[name] = "stopped" if self.stop.requested else "pending"
        self._write_tables()
        if self.plan.part is None or "pending" not in self.statuses.values():
            self.directory.prune(self.plan.hashes)

    def _write_tables(self) -> None:
        started = time.monotonic()
        if self.plan.part is None:
            write_tables(self.directory, self.plan.grid, self.plan.hashes, self.statuses)
            self.telemetry.write()
        else:  # one task after another, so that the last one's tables hold the results of all
            with turn(self.directory.path / "lock-tables"):
                self._look_at_others()
                write_tables(self.directory, self.plan.grid, self.plan.hashes, self.statuses)
                self.telemetry.write(self.own)
        self.last_table = time.monotonic()
        self.table_cost = self.last_table - started

    def _look_at_others(self) -> None:
        saved = self.directory.newest_states(self.plan.hashes, verify=False)
        for spec, name in self.plan.items():
            if name not in self.own and not steps_left(spec, saved.get(name)):
                self.statuses[name] = "done"

    def _hear(self, worker: int, event: Event) -> None:
        kind = event["kind"]
        log = functools.partial(self.progress.log, kind, worker=worker)
        models = [self.numbers[name] for name in event.get("models", ())] if kind != "shard" else []
        if kind == "shard":
            self.doing[worker] = f"shard {event['shard']}, {event['models']} models"
            log(f"worker {worker}: {self.doing[worker]}", **{k: v for k, v in event.items() if k != "kind"})
        elif kind == "start":
            self.statuses |= dict.fromkeys(event["models"], "running")
            self.telemetry.started(event["models"], worker, device_name(self.plan.options.engine))
            log(f"worker {worker}: {len(models)} models from step {event['step']:,}", step=event["step"], models=models)
            self._pass(event["step"], event["models"])
        elif kind == "progress":
            self.telemetry.add(event["trained"], event["model_steps"], event["seconds"], self._joules_since())
            self.doing[worker] = f"{len(models)} models, step {event['step']:,}"
        elif kind == "checkpoint":
            said = f"worker {worker}: checkpoint after step {event['step']:,}, {len(models)} models"
            log(said, step=event["step"], models=models, last=event["last"])
            if event["last"]:
                self.statuses |= dict.fromkeys(event["models"], "done")
            self._reach(event["step"], event["models"])
        elif kind == "diverged":
            model = self.numbers[event["model"]]
            log(f"model {model} diverged at step {event['step']:,}", show=True, step=event["step"], models=[model])
            self._await_no_more([event["model"]])
        elif kind == "warning":
            log(event["text"], show=True)
        elif kind == "retry":
            self.statuses |= dict.fromkeys(event["models"], "pending")
            again = "in halves" if event["halved"] else "again"
            said = f"{len(models)} models are trained {again} (try {event['tries']} failed): {event['text']}"
            log(said, models=models, tries=event["tries"])
            self.progress.show(said.splitlines()[0])
        elif kind == "finished":
            log(f"worker {worker}: shard {event['shard']} is finished", shard=event["shard"])
        elif kind == "block failed":
            self._fail(event["models"], event["text"])
        if kind in ("retry", "finished"):
            self.doing.pop(worker, None)
        self.progress.update(event)
        self._say()

    def _next_shards(self) -> Sequence[Shard]:
        """What follows when all models have come to a rung of successive halving."""
        assert self.rungs is not None
        failed = [name for name, status in self.statuses.items() if status == "failed"]
        return self.rungs.next_shards(functools.partial(shards_to, self.plan), failed, self._halved)

    def _halved(self, rung: int, stopped: list[str], left: Forecast) -> None:
        models = [self.numbers[name] for name in stopped]
        self.statuses |= dict.fromkeys(stopped, "stopped")
        said = f"step {rung:,}: {len(models)} models fall behind and stop"
        self.progress.log("halved", said, show=True, step=rung, models=models)
        self.progress.expect(left.model_steps, left.flops)
        self._await_no_more(stopped)
        self._reach(0, ())

    def _say(self) -> None:
        """Tell the heartbeat, and write the tables, when it is time to."""
        now = time.monotonic()
        if now - self.last_said > BEAT_SECONDS / 2:
            self.last_said = now
            self.heartbeat.say(line=self.progress.line(), workers=dict(self.doing), failed=len(self.failures))
        if self.plan.part is None and now - self.last_table > max(TABLE_SECONDS, 20 * self.table_cost):
            try:
                self._write_tables()
            except OSError as error:  # what they are made of is safe, and the last ones are still to be written
                self.last_table = now
                self.progress.log("warning", f"the tables could not be written: {error}", show=True)

    def _joules_since(self) -> float | None:
        """Energy that the GPU took since the last call, None where it is not known."""
        now = self.monitor.read().get("joules") if self.monitor else None
        if now is None:
            return None
        since, self.joules = now - self.joules, now
        return since

    def _fail(self, models: Sequence[str], text: str) -> None:
        """What was to be trained and will not be; the models of a worker that died may have been done before."""
        saved = self.directory.newest_states(models, verify=False)
        among = {name for name in models if self.statuses[name] != "failed"}
        lost = [i for i, (spec, name) in enumerate(self.plan.items())
                if name in among and steps_left(spec, saved.get(name))]  # fmt: skip
        if not lost:
            return
        names = [self.plan.hashes[i] for i in lost]
        self.statuses |= dict.fromkeys(names, "failed")
        numbers = ", ".join(map(str, lost[:12])) + (", ..." if len(lost) > 12 else "")
        self.failures.append(f"model{'s' * (len(lost) > 1)} {numbers} failed: {text}")
        self.progress.log("failed", self.failures[-1], models=lost)
        # At once, and not at the end alone: a run may last for days.
        gist = text.splitlines()[-1 if text.startswith("Traceback") else 0]
        self.progress.show(f"{len(lost)} model{'s' * (len(lost) > 1)} failed: {gist}")
        self._await_no_more(names)
        self._reach(0, ())

    def _await_no_more(self, models: Iterable[str]) -> None:
        """These models will not come to their next checkpoints."""
        for waiting in self.awaited.values():
            waiting.difference_update(models)

    def _pass(self, step: int, models: Sequence[str]) -> None:
        """These models are past a step: also past checkpoints that a worker wrote and did not live to report."""
        for passed in sorted(s for s, waiting in self.awaited.items() if s <= step and not waiting.isdisjoint(models)):
            self._reach(passed, models)

    def _pass_unreported(self) -> None:
        """The same at the end, for models that nobody reported since."""
        if not any(self.awaited.values()):
            return
        saved = self.directory.newest_states(self.plan.hashes, verify=False)
        for spec, name in self.plan.items():
            if self.statuses[name] == "done":
                diverged = saved[name].diverged_step if name in saved else None
                self._pass(spec.steps if diverged is None else diverged - 1, [name])
                self._await_no_more([name])
        self._reach(0, ())

    def _reach(self, step: int, models: Iterable[str]) -> None:
        if self.on_checkpoint is None:
            return
        if models:
            self.reached.add(step)
        if step in self.awaited:
            self.awaited[step].difference_update(models)
        # A step that nobody reached, since all who were to have failed, is waited for by none and stays.
        for ready in sorted(step for step in self.reached & self.awaited.keys() if not self.awaited[step]):
            del self.awaited[ready]
            self._write_tables()
            self.on_checkpoint(Run(self.directory.path), ready)


def describe_plan(plan: Plan) -> str:
    """The plan in one line."""
    return (
        f"{len(plan.grid)} models, {plan.finished} finished; engine {plan.options.engine}, precision "
        f"{plan.options.precision} ({plan.reason}); {len(plan.shards)} shards, {plan.workers} workers; "
        f"{(plan.forecast or plan).model_steps:,} model-steps left"
    )


def device_name(engine: str) -> str:
    """What an engine computes on, for the records."""
    if engine == "triton" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return platform.processor() or platform.machine()


def about_this_process(engine: str) -> dict[str, Any]:
    """Versions, device and command line, for grid.json."""
    from fastmono import __version__

    compilers: dict[str, str] = {}
    if engine == "triton":
        from fastmono.engines.assembler import compiler_versions

        compilers = compiler_versions()
    return {
        "versions": {
            "fastmono": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            **compilers,
        },
        "device": device_name(engine),
        "platform": platform.platform(),
        "command": sys.argv,
    }
