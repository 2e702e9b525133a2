"""Training of one block between the places where something is written; it knows nothing of kernels.

Checkpoints lie after 1, 2, 4, 8, ... steps and a model's last. At each of them the model is measured, its parameters
become the snapshot that a later divergence falls back to, and its full state is saved, as it is every `save_every`
seconds. Where the steps are cut changes no bit of the result.

Files stack models of equal shape. So a block of several widths or numbers of steps is written in parts, each until its
own steps are done.
"""

from __future__ import annotations

import errno
import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastmono.block import Block, EngineError, Model, parts, share_projections
from fastmono.engines import engine_class
from fastmono.files import BadFile
from fastmono.layout import LOG_EVERY
from fastmono.metrics import NAMES, HeldOut, measure
from fastmono.spec import ModelSpec
from fastmono.store import BlockHistory, RunDirectory, Saved, contract_tensors

SECONDS_A_CALL = 1.0
"""What one call of the engine should take: progress and Ctrl-C wait for it, and a model trains through a call's steps
before the next does, which keeps it in cache."""

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR)
"""What a network file system says when it is out of reach for a while."""

Event = dict[str, Any]
SavedModel = tuple[ModelSpec, str, Saved | None]
"""A model, its content hash, and where it continues (None: from its start)."""


@dataclass(frozen=True)
class BlockJob:
    """Models of one shape class and step that are trained together, and where each continues (None: from its start)."""

    specs: tuple[ModelSpec, ...]
    hashes: tuple[str, ...]
    saved: tuple[Saved | None, ...]
    until: int | None = None
    """The step at which those that have more are measured, saved, and left for a decision about them; None: none."""

    def part(self, which: slice) -> BlockJob:
        """Some of the models."""
        return BlockJob(self.specs[which], self.hashes[which], self.saved[which], self.until)

    def steps_left(self) -> list[int]:
        """Updates that each of its models still gets."""
        return [steps_left(*model, self.until) for model in zip(self.specs, self.saved, strict=True)]


def jobs_by_step(models: Iterable[SavedModel], until: int | None = None) -> list[BlockJob]:
    """Models of one shape class as blocks, one for each step that some of them are at, without those at their end."""

    def step(model: SavedModel) -> int:
        return model[2].step if model[2] else 0

    left = sorted((model for model in models if step(model) < end(model[0], until)), key=step)
    columns = [zip(*group, strict=True) for _, group in itertools.groupby(left, step)]
    return [BlockJob(specs, hashes, saved, until) for specs, hashes, saved in columns]


@dataclass(frozen=True)
class Options:
    """How a run is trained and what it keeps; nothing here changes a result."""

    engine: str
    precision: str
    checkpoints: str = "all"
    """all | last | none: which of the log-spaced checkpoints stay on disk."""
    save_every: float = 60.0
    """Seconds between full states."""
    switches: dict[str, Any] = field(default_factory=dict)
    """Arguments of the Triton engine that the self-check found to be needed."""


def keeps_checkpoint(policy: str, step: int, steps: int) -> bool:
    """Whether the checkpoint after a step is written."""
    return policy == "all" or (policy == "last" and step == steps)


@dataclass(eq=False)
class Part:
    """The models of a block that have one width and one number of steps."""

    rows: list[int]
    """Their indices in the block."""
    models: list[Model]
    hashes: list[str]
    steps: int
    history: BlockHistory = field(default_factory=BlockHistory)
    done: bool = False
    """Its last checkpoint is written: nothing more is."""

    def all_diverged(self) -> bool:
        """Whether none of the models trains any more."""
        return all(model.diverged_step is not None for model in self.models)


class BlockTrainer:
    """Trains one block of a run to its end, or until it is told to stop.

    Args:
        directory: where checkpoints and states go.
        report: called with a dict for each event; "kind" is start, progress, checkpoint or diverged.
        should_stop: asked between engine calls; when it says so, the state is saved and `run` returns False.
    """

    def __init__(
        self,
        directory: RunDirectory,
        job: BlockJob,
        options: Options,
        report: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.directory, self.job, self.options = directory, job, options
        self.report, self.should_stop = report, should_stop
        self.engine = engine_class(options.engine)(options.precision, **options.switches)
        self.held_out = HeldOut()
        self.block, self.parts = self._start()
        self.reported = {name for name, m in zip(job.hashes, self.block.models, strict=True) if m.diverged_step}

    def _start(self) -> tuple[Block, list[Part]]:
        job = self.job
        models: list[Model] = []
        logged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for i, (spec, saved) in enumerate(zip(job.specs, job.saved, strict=True)):
            if saved is None:
                models.append(Model(spec))
            else:
                model, *kept = self.directory.restore(spec, saved)
                models.append(model)
                logged[i] = kept[0], kept[1]
        share_projections(models)
        found = []
        for rows in parts(job.specs):
            part = Part(rows, [models[i] for i in rows], [job.hashes[i] for i in rows], job.specs[rows[0]].steps)
            if logged.keys() >= set(rows):  # else the block is at step 0, where nothing has been logged
                losses, measures = (torch.stack(each).unbind(1) for each in zip(*map(logged.get, rows), strict=True))
                part.history = BlockHistory([*losses], [*measures])
            found.append(part)
        first = job.saved[0]
        return Block(models, first.step if first else 0), found

    def run(self) -> bool:
        """Train. Returns whether the end was reached. Whatever happens, the newest saved state stays good."""
        block, last_save = self.block, time.monotonic()
        self.report({"kind": "start", "models": list(self.job.hashes), "step": block.step})
        if block.step == 0:
            self._checkpoint(self.parts, 0)
        steps_a_call = 1
        while training := [part for part in self.parts if not part.done]:
            if block.step == self.job.until:
                self._rest(training)
                return True
            if self.should_stop():
                self._save(training)
                return False
            n = min(block.step + steps_a_call, *self._cuts(training)) - block.step
            started = time.monotonic()
            trained = block.active()
            self._log(training, n, self.engine.advance(block, n))
            self._freeze_diverged()
            seconds = time.monotonic() - started
            # Doubling at most: one call that was quick by chance must not make the next one last for minutes.
            # But a call that was short for the sake of a checkpoint says nothing against those before.
            steps_a_call = max(1, min(max(2 * n, steps_a_call), int(n * SECONDS_A_CALL / max(seconds, 1e-9))))
            if self._checkpoints(training):
                last_save = time.monotonic()
            elif time.monotonic() - last_save >= self.options.save_every and block.step != self.job.until:
                self._save([part for part in training if not part.done])
                last_save = time.monotonic()
            self._progress(n, trained, seconds)
        return True

    def _cuts(self, training: Sequence[Part]) -> list[int]:
        """The steps that no call of the engine passes: the next power of two, and where each part ends."""
        return [1 << self.block.step.bit_length(), *(end(part.models[0].spec, self.job.until) for part in training)]

    def _log(self, training: Sequence[Part], n: int, losses: torch.Tensor) -> None:
        for part in training:
            own = losses[part.rows]
            for step in range(self.block.step - n + 1, self.block.step + 1):
                if (step - 1) % LOG_EVERY == 0 or step == part.steps:
                    part.history.losses.append(own[:, step - self.block.step - 1].clone())

    def _freeze_diverged(self) -> None:
        for model, name in zip(self.block.models, self.job.hashes, strict=True):
            if model.diverged_step is not None and name not in self.reported:
                self.reported.add(name)
                model.freeze()
                self.report({"kind": "diverged", "model": name, "step": model.diverged_step})

    def _checkpoints(self, training: Sequence[Part]) -> bool:
        """Write what is due at this step. Returns whether that was all parts that still trained."""
        step = self.block.step
        # Nothing of these is left to train, and frozen models stay as they are until their last step.
        frozen = [part for part in training if part.all_diverged()]
        for part in frozen:
            self._checkpoint([part], part.steps)
        power = step & (step - 1) == 0
        due = [part for part in training if part not in frozen and (power or step == part.steps)]
        self._checkpoint(due, step)
        return len(due) + len(frozen) == len(training)

    def _checkpoint(self, due: Sequence[Part], step: int) -> None:
        """Snapshot, measure, write the checkpoint where it is wanted, and the state."""
        if due:
            self.engine.fetch(self.block)
        for part in due:
            for model in part.models:
                if model.diverged_step is None:
                    model.snapshot.copy_(model.parameters)
            if step > 0:
                part.history.measures.append(self._measures(part))
            kept, last = keeps_checkpoint(self.options.checkpoints, step, part.steps), step == part.steps
            if kept:
                self.directory.write_checkpoint(part.models, part.hashes, step)
            self.directory.write_state(part.models, part.hashes, step, part.history)
            part.done = last
            self.report({"kind": "checkpoint", "step": step, "models": part.hashes, "kept": kept, "last": last})

    def _measures(self, part: Part) -> torch.Tensor:
        return torch.tensor([self._measure(model) for model in part.models], dtype=torch.float64)

    def _measure(self, model: Model) -> list[float]:
        if model.diverged_step is not None:
            return [float("nan")] * len(NAMES)
        params = contract_tensors(model.spec, model.parameters) | {"P": model.P}
        if model.P2 is not None:
            params["P2"] = model.P2
        return measure(params, model.spec, self.held_out)

    def _rest(self, training: Sequence[Part]) -> None:
        """Save those that will go on later, or not at all: between two checkpoints with one more row of measures, which
        whoever continues them leaves out."""
        step = self.block.step
        if step & (step - 1) == 0:
            return  # a checkpoint: all is written
        self.engine.fetch(self.block)
        for part in training:
            history = BlockHistory(part.history.losses, [*part.history.measures, self._measures(part)])
            self.directory.write_state(part.models, part.hashes, step, history)

    def _save(self, training: Sequence[Part]) -> None:
        self.engine.fetch(self.block)
        for part in training:
            self.directory.write_state(part.models, part.hashes, self.block.step, part.history)

    def _progress(self, n: int, trained: Sequence[int], seconds: float) -> None:
        """`trained`: indices of the models that took part in the last n steps."""
        mono = NAMES.index("mono_per_feature")
        losses = [x for part in self.parts if part.history.losses for x in part.history.losses[-1].tolist()]
        shares = [
            x for part in self.parts if part.history.measures for x in part.history.measures[-1][:, mono].tolist()
        ]
        self.report(
            {
                "kind": "progress",
                "models": list(self.job.hashes),
                "trained": [self.job.hashes[i] for i in trained],
                "step": self.block.step,
                "model_steps": n * len(trained),
                "flops": n * sum(self.job.specs[i].flops_per_step for i in trained),
                "seconds": seconds,
                "best_loss": min((loss for loss in losses if loss == loss), default=None),
                "mono": max((share for share in shares if share == share), default=None),
            }
        )


def end(spec: ModelSpec, until: int | None) -> int:
    """The step a model trains to: its last, or one before it."""
    return spec.steps if until is None else min(until, spec.steps)


def steps_left(spec: ModelSpec, saved: Saved | None, until: int | None = None) -> int:
    """Updates that a model still needs to its last step, or to one before it; none when it has diverged."""
    if saved is None:
        return end(spec, until)
    return 0 if saved.diverged_step is not None else max(0, end(spec, until) - saved.step)


def train_blocks(
    directory: RunDirectory,
    jobs: Sequence[BlockJob],
    options: Options,
    report: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Train blocks one after another, halving one that memory does not hold. Returns whether all reached their end.

    A block that fails is reported (kind "block failed", its models, what happened, and whether that may pass: "again"),
    and those after it are trained.
    """
    waiting, whole = list(jobs), True
    while waiting:
        job = waiting.pop(0)
        try:
            if not BlockTrainer(directory, job, options, report, should_stop).run():
                return False
        except (MemoryError, torch.OutOfMemoryError) as error:
            if len(job.specs) == 1:
                whole = False
                report({"kind": "block failed", "models": list(job.hashes), "text": describe_failure(error)})
                continue
            half = len(job.specs) // 2
            report({"kind": "warning", "text": f"out of memory with {len(job.specs)} models; on with {half} ({error})"})
            saved = directory.newest_states(job.hashes)
            models = [(spec, name, saved.get(name)) for spec, name in zip(job.specs, job.hashes, strict=True)]
            # Parts of the block may have come to their end, or been saved, before others.
            waiting[:0] = [*jobs_by_step(models[:half], job.until), *jobs_by_step(models[half:], job.until)]
        except Exception as error:
            whole = False
            event = {"kind": "block failed", "models": list(job.hashes), "text": describe_failure(error)}
            report(event | {"again": may_pass(error)})
    return whole


def may_pass(error: BaseException) -> bool:
    """Whether the next try may go better: a file was damaged or replaced meanwhile, or storage was out of reach."""
    return isinstance(error, BadFile) or (isinstance(error, OSError) and error.errno in PASSING)


def describe_failure(error: BaseException) -> str:
    """One line for what the system refused (disk, memory, a damaged file, a GPU), else the traceback."""
    if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError | BadFile | EngineError):
        return f"{type(error).__name__}: {error}".strip(": ")
    return "".join(traceback.format_exception(error)).strip()
