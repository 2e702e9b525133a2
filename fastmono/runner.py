"""`train`: from the arguments to a plan, the directory's lock, and the session that trains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fastmono.engines import mixes_widths, resolve
from fastmono.files import BadFile, DirectoryLock, read_json, remove_temporaries
from fastmono.halving import Halving, Rungs
from fastmono.on_ray import Cluster, connect
from fastmono.plan import Machine, Plan, content_hashes, make_plan, this_machine
from fastmono.run import Run
from fastmono.self_check import MODES, Outcome, check
from fastmono.session import OnCheckpoint, Session
from fastmono.shards import array_part, part_name
from fastmono.spec import FIELDS, Grid, ModelSpec
from fastmono.store import RunDirectory, Saved, free_space
from fastmono.trainer import Options

CHECKPOINT_POLICIES = ("all", "last", "none")


def plan_run(
    grid: Grid | ModelSpec,
    out: str | Path,
    engine: str = "auto",
    precision: str = "auto",
    workers: int | str = "auto",
    resume: bool = True,
    checkpoints: str = "all",
    save_every: float = 60.0,
    ray: str | None = None,
    part: tuple[int, int] | None = None,
    keep: float | None = None,
    every: int | None = None,
    by: str = "loss",
) -> Plan:
    """What `train` would do with the same arguments; writes nothing. Raises as `train` does."""
    grid = as_grid(grid)
    _check(out, workers, resume, checkpoints, save_every, part)
    halving = _halving(keep, every, by, part)
    cluster = connect(ray, workers) if ray is not None and ray != "local" else None  # none is started for a plan
    directory, options, reason = _options(grid, out, engine, precision, resume, checkpoints, save_every, cluster)
    directory.expected = dict(zip(content_hashes(grid, options), grid, strict=True))
    saved = directory.newest_states(directory.expected, verify=False) if resume else {}
    rungs = Rungs(directory, directory.expected, halving, fresh=not resume) if halving else None
    machine = cluster.machine() if cluster else this_machine()
    return _plan(grid, options, reason, saved, workers, machine, part, rungs)


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
    ray: str | None = None,
    part: tuple[int, int] | None = None,
    keep: float | None = None,
    every: int | None = None,
    by: str = "loss",
    self_check: str = "once",
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
        workers: processes, or "auto": one for each core or GPU, or this process alone for a run of seconds.
        resume: False discards what the directory holds of an earlier run.
        on_checkpoint: called as `on_checkpoint(run, step)`, in this process, when every model that has a checkpoint
            at that step has reached it, or has diverged or failed before; only for checkpoints that are kept, and
            not again for those that an earlier call of `train` came to.
        checkpoints: which of the log-spaced checkpoints stay on disk: all | last | none.
        save_every: seconds between full states.
        ray: "local" trains in the tasks of a Ray that is started here, an address in those of a cluster whose machines
            all see `out`; `workers` is then how many tasks at a time, "auto" as many as there is room for.
        part: (i, n) trains the i-th of n parts of the grid, i from 0: for array tasks, which may run at the same time
            in one directory. Whoever finishes last has the whole table.
        keep, every, by: every so many steps the best share `keep` of the models that can be compared goes on, by their
            "loss" or by their monosemantic neurons, "mono" (`fastmono.halving`). The others have the status "stopped";
            a later call without `keep` trains them to their end.
        self_check: once | always | never: whether the Triton engine's kernels are compared with float64 before the
            first result (`fastmono.self_check`). Where they fail, safer settings train, or with engine="auto" another
            engine.
        quiet: show nothing; the log file is written all the same.
        console: where to show progress; by default standard error.

    Raises:
        ValueError: a bad argument; the directory holds models that the grid lacks, or was trained with another engine
            or precision; a file of it is damaged; the run does not fit memory or disk; the self-check failed.
        BlockingIOError: another process is using the directory.

        ChildProcessError: worker after worker crashes.

    A worker that dies costs what it had not saved. Models that fail, and one that crashes whatever trains it, are
    warned of and have the status "failed"; the others are finished.
    """
    grid = as_grid(grid)
    _check(out, workers, resume, checkpoints, save_every, part)
    if self_check not in MODES:
        raise ValueError(f"self_check={self_check!r}: must be one of {', '.join(MODES)}")
    halving = _halving(keep, every, by, part)
    cluster = connect(ray, workers) if ray is not None else None
    console = None if quiet else console or Console(stderr=True)
    arguments = (out, engine, precision, resume, checkpoints, save_every, cluster)
    _options(grid, *arguments)  # before anything is made or deleted
    directory = RunDirectory(out)
    directory.path.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(directory.path, part_name(part) if part else None)
    try:
        directory, options, reason = _options(grid, *arguments)
        checked = None
        if options.engine == "triton":
            begun = resume and (directory.path / "grid.json").exists()
            options, reason, checked = _checked(grid, options, reason, self_check, engine, begun, cluster, console)
        hashes = content_hashes(grid, options)
        directory.expected = dict(zip(hashes, grid, strict=True))
        own = hashes
        if part is None:
            for folder in (directory.path, directory.checkpoints, directory.figures):
                remove_temporaries(folder)
            for left in directory.path.glob("status-*.json"):  # of array tasks that this run takes over from
                left.unlink(missing_ok=True)
        else:
            own = tuple(hashes[i] for i in array_part(grid, mixes_widths(options.engine), part))
        saved = {}
        if resume:
            others = directory.newest_states(set(hashes).difference(own), verify=False)
            saved = others | directory.newest_states(own)
        rungs = Rungs(directory, directory.expected, halving, fresh=not resume) if halving else None
        machine = cluster.machine() if cluster else this_machine()
        plan = _plan(grid, options, reason, saved, workers, machine, part, rungs)
        if plan.disk > (free := free_space(directory.path)):
            raise ValueError(
                f"the run needs {plan.disk / 2**30:,.1f} GiB of disk, and {free / 2**30:,.1f} GiB are free in "
                f"{directory.path}: choose another directory, or keep fewer checkpoints"
            )
        if not resume:  # last of all: a run that cannot be trained costs no earlier one
            directory.clear()
        Session(directory, plan, on_checkpoint, console, cluster, rungs, checked).run(lock.descriptors)
    finally:
        lock.release()
    return Run(directory.path)


def _checked(
    grid: Grid, options: Options, reason: str, mode: str, engine: str, begun: bool, cluster: Cluster | None,
    console: Console | None,
) -> tuple[Options, str, Outcome]:  # fmt: skip
    """Options and reason as the self-check leaves them, and what it came to. `engine` is what was asked for, and
    `begun` says that the directory holds results of this engine.

    Raises `ValueError` where it failed with all settings, and no other engine may train instead.
    """
    if cluster is not None and cluster.trains_on_gpus:
        outcome: Outcome = cluster.on_gpu(check, list(grid), options.precision, mode)
    else:
        outcome = check(grid.specs, options.precision, mode, console.print if console else lambda text: None)
    if outcome.result != "failed":
        return dataclasses.replace(options, switches=outcome.switches), reason, outcome
    if engine != "auto" or begun:
        raise ValueError(
            f"{outcome.line()}: a newer Triton or another ptxas (TRITON_PTXAS_PATH) may do; "
            "--engine cpu trains without it, in a directory of its own"
        )
    precision = options.precision if reason.startswith("as asked") else "fp32"
    options = dataclasses.replace(options, engine="cpu" if precision == "fp32" else "reference", precision=precision)
    return options, "the triton engine's self-check failed", outcome


def _halving(keep: float | None, every: int | None, by: str, part: tuple[int, int] | None) -> Halving | None:
    """The three arguments as one; None where halving is not asked for."""
    if keep is None:
        if every is not None or by != "loss":
            raise ValueError("every and by: say when models stop, and need keep, the share of them that goes on")
        return None
    if every is None:
        raise ValueError(f"keep={keep!r}: needs every, the steps after which that share of the models goes on")
    if part is not None:
        raise ValueError("part and keep: which models go on is decided over all of them, and a part sees only its own")
    return Halving(keep, every, by)


def _plan(
    grid: Grid, options: Options, reason: str, saved: Mapping[str, Saved], workers: int | str, machine: Machine,
    part: tuple[int, int] | None, rungs: Rungs | None,
) -> Plan:  # fmt: skip
    """The plan of all that is left, and what halving is expected to leave of it."""
    if rungs is None:
        return make_plan(grid, options, reason, saved, workers, machine, part)
    plan = make_plan(grid, options, reason, saved, workers, machine, without=rungs.stopped)
    return dataclasses.replace(plan, forecast=rungs.forecast(saved, ()))


def as_grid(grid: Grid | ModelSpec) -> Grid:
    """A grid, also of a single model. `ValueError` for anything else."""
    if isinstance(grid, ModelSpec):
        return Grid(grid)
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a Grid or a ModelSpec, not {type(grid).__name__}")
    return grid


def _check(
    out: str | Path, workers: object, resume: bool, checkpoints: str, save_every: float, part: tuple[int, int] | None
) -> None:
    """The arguments that can be judged by themselves."""
    if not isinstance(out, str | Path) or not str(out).strip():
        raise ValueError(f"out={out!r}: must be a directory")
    if workers != "auto" and (not isinstance(workers, int) or isinstance(workers, bool) or not 1 <= workers <= 4096):
        raise ValueError(f"workers={workers!r}: must be auto or a whole number from 1 to 4096")
    if checkpoints not in CHECKPOINT_POLICIES:
        raise ValueError(f"checkpoints={checkpoints!r}: must be one of {', '.join(CHECKPOINT_POLICIES)}")
    if isinstance(save_every, bool) or not isinstance(save_every, int | float) or not save_every >= 0:
        raise ValueError(f"save_every={save_every!r}: must be a number of seconds, at least 0")
    if part is not None and not 0 <= part[0] < part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: must be I/N, with I from 0 to N - 1")
    if part is not None and not resume:
        raise ValueError(
            "part and no-resume: one part would discard what others have trained; empty the directory first"
        )


def _options(
    grid: Grid, out: str | Path, engine: str, precision: str, resume: bool, checkpoints: str, save_every: float,
    cluster: Cluster | None,
) -> tuple[RunDirectory, Options, str]:  # fmt: skip
    """Options, with "auto" decided: by what the directory was trained with, else by the machine or the cluster."""
    directory = RunDirectory(out)
    if directory.path.exists() and not directory.path.is_dir():
        raise ValueError(f"out={out!r}: is a file, and must be a directory")
    gpus = cluster is not None and cluster.trains_on_gpus
    engine_name, precision_name, reason = resolve(engine, precision, gpus)
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
            resolve(engine_name, precision_name, gpus)
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
