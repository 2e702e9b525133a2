"""`train`: plans a grid, has it trained, and keeps the run directory's tables up to date meanwhile."""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console

from fastmono.engines import resolve
from fastmono.executor import Stop, execute
from fastmono.files import BadFile, DirectoryLock, read_json, remove_temporaries
from fastmono.monitor import GpuMonitor
from fastmono.plan import Plan, content_hashes, make_plan, this_machine
from fastmono.progress import Progress, duration
from fastmono.run import Run
from fastmono.spec import FIELDS, Grid, ModelSpec
from fastmono.store import RunDirectory, checkpoint_steps, free_space
from fastmono.tables import Telemetry, write_tables
from fastmono.trainer import Event, Options, keeps_checkpoint, steps_left

CHECKPOINT_POLICIES = ("all", "last", "none")
TABLE_SECONDS = 15.0
"""Least time between two writings of the tables, but for the last."""

OnCheckpoint = Callable[[Run, int], None]


def plan_run(
    grid: Grid | ModelSpec,
    out: str | Path,
    engine: str = "auto",
    precision: str = "auto",
    workers: int | str = "auto",
    resume: bool = True,
    checkpoints: str = "all",
    save_every: float = 60.0,
) -> Plan:
    """What `train` would do with the same arguments; writes nothing. Raises as `train` does."""
    grid = as_grid(grid)
    directory, options, reason = _options(grid, out, engine, precision, workers, resume, checkpoints, save_every)
    directory.expected = dict(zip(content_hashes(grid, options), grid, strict=True))
    saved = directory.newest_states(directory.expected, verify=False) if resume else {}
    return make_plan(grid, options, reason, saved, workers, this_machine())


def train(
    grid: Grid | ModelSpec,
    out: str | Path,
    engine: str = "auto",
    precision: str = "auto",
    workers: int | str = "auto",
    resume: bool = True,
    on_checkpoint: OnCheckpoint | None = None,
    *,
    checkpoints: str = "all",
    save_every: float = 60.0,
    quiet: bool = False,
    console: Console | None = None,
) -> Run:
    """Train every model of a grid, and return the run.

    A directory that holds part of the grid already is continued, bitwise as if nothing had happened; models that are
    done are not trained again. Ctrl-C saves the state and raises `KeyboardInterrupt`.

    Args:
        grid: the models.
        out: the run directory.
        engine: auto | reference | cpu | triton.
        precision: auto | fp32 | tf32 | bf16.
        workers: processes, or "auto": one for each core, or this process alone for a run of seconds.
        resume: False discards what the directory holds of an earlier run.
        on_checkpoint: called as `on_checkpoint(run, step)`, in this process, when every model that has a checkpoint
            at that step has reached it, or has diverged or failed before; only for checkpoints that are kept, and
            not again for those that an earlier call of `train` came to.
        checkpoints: which of the log-spaced checkpoints stay on disk: all | last | none.
        save_every: seconds between full states.
        quiet: show nothing; the log file is written all the same.
        console: where to show progress; by default standard error.

    Raises:
        ValueError: a bad argument; the directory holds models that the grid lacks, or was trained with another engine
            or precision; a file of it is damaged; the run does not fit memory or disk.
        BlockingIOError: another process is using the directory.

    Models that fail, and those of a worker that dies, are warned of and have the status "failed"; the others are
    finished.
    """
    grid = as_grid(grid)
    arguments = (out, engine, precision, workers, resume, checkpoints, save_every)
    _options(grid, *arguments)  # before anything is made or deleted
    directory = RunDirectory(out)
    directory.path.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(directory.path)
    try:
        directory, options, reason = _options(grid, *arguments)
        for folder in (directory.path, directory.checkpoints, directory.figures):
            remove_temporaries(folder)
        directory.expected = dict(zip(content_hashes(grid, options), grid, strict=True))
        saved = directory.newest_states(directory.expected) if resume else {}
        plan = make_plan(grid, options, reason, saved, workers, this_machine())
        if plan.disk > (free := free_space(directory.path)):
            raise ValueError(
                f"the run needs {plan.disk / 2**30:,.1f} GiB of disk, and {free / 2**30:,.1f} GiB are free in "
                f"{directory.path}: choose another directory, or keep fewer checkpoints"
            )
        if not resume:  # last of all: a run that cannot be trained costs no earlier one
            directory.clear()
        session = _Session(directory, plan, on_checkpoint, None if quiet else console or Console(stderr=True))
        session.run(lock.descriptor)
    finally:
        lock.release()
    return Run(directory.path)


def as_grid(grid: Grid | ModelSpec) -> Grid:
    """A grid, also of a single model. `ValueError` for anything else."""
    if isinstance(grid, ModelSpec):
        return Grid(grid)
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a Grid or a ModelSpec, not {type(grid).__name__}")
    return grid


def _options(
    grid: Grid, out: str | Path, engine: str, precision: str, workers: object, resume: bool, checkpoints: str,
    save_every: float,
) -> tuple[RunDirectory, Options, str]:  # fmt: skip
    """Validated options, with "auto" decided: by what the directory was trained with, else by the machine."""
    if not isinstance(out, str | Path) or not str(out).strip():
        raise ValueError(f"out={out!r}: must be a directory")
    if workers != "auto" and (not isinstance(workers, int) or isinstance(workers, bool) or not 1 <= workers <= 4096):
        raise ValueError(f"workers={workers!r}: must be auto or a whole number from 1 to 4096")
    if checkpoints not in CHECKPOINT_POLICIES:
        raise ValueError(f"checkpoints={checkpoints!r}: must be one of {', '.join(CHECKPOINT_POLICIES)}")
    if isinstance(save_every, bool) or not isinstance(save_every, int | float) or not save_every >= 0:
        raise ValueError(f"save_every={save_every!r}: must be a number of seconds, at least 0")
    directory = RunDirectory(out)
    if directory.path.exists() and not directory.path.is_dir():
        raise ValueError(f"out={out!r}: is a file, and must be a directory")
    engine_name, precision_name, reason = resolve(engine, precision)
    path = directory.path / "grid.json"
    if not path.exists():
        return directory, Options(engine_name, precision_name, checkpoints, float(save_every)), reason
    if not resume:
        values = read_json(path) if _is_json(path) else {"schema": 1}
        if not isinstance(values, dict) or "schema" not in values:
            raise BadFile(path, "was not written by fastmono, and is not overwritten")
    else:
        if not _is_json(path):
            raise BadFile(
                path,
                "is truncated or corrupted: remove it, and the same command goes on from the states of its models, "
                "or discard that run (--no-resume)",
            )
        held = directory.read_grid()
        if engine == "auto" and precision in ("auto", held["precision"]):
            engine_name, precision_name, reason = held["engine"], held["precision"], "as this directory was begun"
            resolve(engine_name, precision_name)
        for what, asked in (("engine", engine_name), ("precision", precision_name)):
            if held[what] != asked:
                raise ValueError(
                    f"{directory.path} was trained with {what} {held[what]}, and {asked} is asked for: "
                    f"choose another directory, or discard that run (--no-resume)"
                )
        _refuse_other_models(directory, held["grid"], grid)
    return directory, Options(engine_name, precision_name, checkpoints, float(save_every)), reason


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except BadFile:
        return False
    return True


def _refuse_other_models(directory: RunDirectory, held: Grid, asked: Grid) -> None:
    wanted = set(asked)
    missing = [spec for spec in held if spec not in wanted]
    if not missing:
        return
    differences = []
    for field in FIELDS:
        there, here = ({getattr(spec, field): None for spec in specs} for specs in (missing, asked))
        if there.keys() - here.keys():
            differences.append(f"{field} {_some(there)} there, {_some(here)} here")
    raise ValueError(
        f"{directory.path} holds {len(missing)} models that this grid lacks"
        + (f" ({'; '.join(differences)})" if differences else " (other combinations of the same values)")
        + ": choose another directory, add them to the grid, or discard that run (--no-resume)"
    )


def _some(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")


class _Session:
    """One call of `train`, from the plan to the last table."""

    def __init__(
        self, directory: RunDirectory, plan: Plan, on_checkpoint: OnCheckpoint | None, console: Console | None
    ) -> None:
        self.directory, self.plan, self.on_checkpoint = directory, plan, on_checkpoint
        self.stop = Stop()
        self.statuses = {
            name: "pending" if steps_left(spec, plan.saved.get(name)) else "done" for spec, name in plan.items()
        }
        self.failures: list[str] = []
        self.telemetry = Telemetry(directory, {name: spec.flops_per_step for spec, name in plan.items()})
        self.last_table, self.table_cost = time.monotonic(), 0.0
        self.awaited, self.reached = self._awaited_checkpoints(), set[int]()
        directory.write_grid(
            plan.grid, plan.options.engine, plan.options.precision, about_this_process(plan.options.engine)
        )
        self.monitor = GpuMonitor() if plan.options.engine == "triton" else None
        self.joules = 0.0
        more = self.monitor.line if self.monitor else str
        self.progress = Progress(plan.model_steps, plan.flops, directory.path / "run.log", console, more)

    def _awaited_checkpoints(self) -> dict[int, set[str]]:
        """For each checkpoint that is kept and still to come, the models that will pass it."""
        awaited: dict[int, set[str]] = {}
        for spec, name in self.plan.items():
            saved = self.plan.saved.get(name)
            if self.on_checkpoint is not None and steps_left(spec, saved):
                for step in checkpoint_steps(spec.steps):
                    if step > (saved.step if saved else 0) and keeps_checkpoint(
                        self.plan.options.checkpoints, step, spec.steps
                    ):
                        awaited.setdefault(step, set()).add(name)
        return awaited

    def run(self, lock_descriptor: int) -> None:
        plan, started = self.plan, time.monotonic()
        try:
            with self.progress, self.stop.listening():
                self.progress.log(describe_plan(plan))
                if self.monitor and self.monitor.note:
                    self.progress.log(self.monitor.note)
                self._write_tables()
                execute(self.directory, plan.shards, plan.options, self._hear, self.stop, lock_descriptor)
                self._settle()
                counted = Counter(self.statuses.values())
                said = ", ".join(f"{count} {status}" for status, count in counted.items())
                self.progress.log(f"ended after {duration(time.monotonic() - started)}: {said}")
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
        """The last tables: nothing is running any more."""
        saved = self.directory.newest_states(self.plan.hashes, verify=False)
        for spec, name in self.plan.items():
            if not steps_left(spec, saved.get(name)):
                self.statuses[name] = "done"
            elif self.statuses[name] == "running":
                self.statuses[name] = "stopped" if self.stop.requested else "pending"
        self._write_tables()
        self.directory.prune(self.plan.hashes)

    def _write_tables(self) -> None:
        started = time.monotonic()
        write_tables(self.directory, self.plan.grid, self.plan.hashes, self.statuses)
        self.telemetry.write()
        self.last_table = time.monotonic()
        self.table_cost = self.last_table - started

    def _hear(self, worker: int, event: Event) -> None:
        kind = event["kind"]
        if kind == "start":
            self.statuses |= dict.fromkeys(event["models"], "running")
            self.telemetry.started(event["models"], worker, device_name(self.plan.options.engine))
            self.progress.log(f"worker {worker}: {len(event['models'])} models from step {event['step']:,}")
        elif kind == "progress":
            self.telemetry.add(event["trained"], event["model_steps"], event["seconds"], self._joules_since())
        elif kind == "checkpoint":
            self.progress.log(
                f"worker {worker}: checkpoint after step {event['step']:,}, {len(event['models'])} models"
            )
            if event["last"]:
                self.statuses |= dict.fromkeys(event["models"], "done")
            self._reach(event["step"], event["models"])
        elif kind == "diverged":
            model = self.plan.hashes.index(event["model"])
            self.progress.log(f"model {model} diverged at step {event['step']:,}", show=True)
            self._await_no_more([event["model"]])
        elif kind == "warning":
            self.progress.log(event["text"], show=True)
        elif kind == "block failed":
            self._fail(event["models"], event["text"])
        elif kind == "failed":
            self._fail([name for job in self.plan.shards[worker] for name in job.hashes], event["text"])
        self.progress.update(event)
        if time.monotonic() - self.last_table > max(TABLE_SECONDS, 20 * self.table_cost):
            self._write_tables()

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
        self.progress.log(self.failures[-1])
        # At once, and not at the end alone: a run may last for days.
        gist = text.splitlines()[-1 if text.startswith("Traceback") else 0]
        self.progress.show(f"{len(lost)} model{'s' * (len(lost) > 1)} failed: {gist}")
        self._await_no_more(names)
        self._reach(0, ())

    def _await_no_more(self, models: Iterable[str]) -> None:
        """These models will not come to their next checkpoints."""
        for waiting in self.awaited.values():
            waiting.difference_update(models)

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
        f"{plan.options.precision} ({plan.reason}); {len(plan.shards)} workers; {plan.model_steps:,} model-steps left"
    )


def device_name(engine: str) -> str:
    """What an engine computes on, for the records."""
    if engine == "triton" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return platform.processor() or platform.machine()


def about_this_process(engine: str) -> dict[str, Any]:
    """Versions, device and command line, for grid.json."""
    from fastmono import __version__

    return {
        "versions": {
            "fastmono": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "device": device_name(engine),
        "platform": platform.platform(),
        "command": sys.argv,
    }
