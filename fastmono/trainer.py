"""Training of one block between the places where something is written; it knows nothing of kernels.

Checkpoints lie after 1, 2, 4, 8, ... steps and the last. At each of them every model is measured, its parameters become
the snapshot that a later divergence falls back to, and the full state is saved, as it is every `save_every` seconds.
Where the steps are cut changes no bit of the result.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmono.block import Block, EngineError, Model
from fastmono.engines import engine_class
from fastmono.files import BadFile
from fastmono.metrics import NAMES, HeldOut, measure
from fastmono.spec import ModelSpec
from fastmono.store import LOG_EVERY, BlockHistory, RunDirectory, Saved, contract_tensors

SECONDS_A_CALL = 1.0
"""What one call of the engine should take: progress and Ctrl-C wait for it, and a model trains through a call's steps
before the next does, which keeps it in cache."""

Event = dict[str, Any]


@dataclass(frozen=True)
class BlockJob:
    """Models of one shape class and step that are trained together, and where each continues (None: from its start)."""

    specs: tuple[ModelSpec, ...]
    hashes: tuple[str, ...]
    saved: tuple[Saved | None, ...]


@dataclass(frozen=True)
class Options:
    """How a run is trained and what it keeps; nothing here changes a result."""

    engine: str
    precision: str
    checkpoints: str = "all"
    """all | last | none: which of the log-spaced checkpoints stay on disk."""
    save_every: float = 60.0
    """Seconds between full states."""


def keeps_checkpoint(policy: str, step: int, steps: int) -> bool:
    """Whether the checkpoint after a step is written."""
    return policy == "all" or (policy == "last" and step == steps)


class BlockTrainer:
    """Trains one block of a run to its end, or until it is told to stop.

    Args:
        directory: where checkpoints and states go.
        report: called with a dict for each event; "kind" is progress, checkpoint or diverged.
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
        self.engine = engine_class(options.engine)(options.precision)
        self.steps = job.specs[0].steps
        self.history = BlockHistory()
        self.held_out = HeldOut()
        self.block = self._start()

    def _start(self) -> Block:
        models: list[Model] = []
        losses, measures = [], []
        for spec, saved in zip(self.job.specs, self.job.saved, strict=True):
            if saved is None:
                models.append(Model(spec))
            else:
                model, *kept = self.directory.restore(spec, saved)
                models.append(model)
                losses.append(kept[0])
                measures.append(kept[1])
        if len(losses) == len(models):  # else the block is at step 0, where nothing has been logged
            self.history = BlockHistory([*torch.stack(losses).unbind(1)], [*torch.stack(measures).unbind(1)])
        first = self.job.saved[0]
        self.reported = {name for name, model in zip(self.job.hashes, models, strict=True) if model.diverged_step}
        return Block(models, first.step if first else 0)

    def run(self) -> bool:
        """Train. Returns whether the end was reached. Whatever happens, the newest saved state stays good."""
        block, last_save = self.block, time.monotonic()
        self.report({"kind": "start", "models": list(self.job.hashes), "step": block.step})
        if block.step == 0:
            self._checkpoint()
        steps_a_call = 1
        while block.step < self.steps:
            if self.should_stop():
                self._save()
                return False
            n = min(self._next_cut(), block.step + steps_a_call) - block.step
            started = time.monotonic()
            trained = len(block.active())
            self._log(n, self.engine.advance(block, n))
            self._freeze_diverged()
            seconds = time.monotonic() - started
            # Doubling at most: one call that was quick by chance must not make the next one last for minutes.
            steps_a_call = max(1, min(2 * n, int(n * SECONDS_A_CALL / max(seconds, 1e-9))))
            if block.step == self.steps or block.step & (block.step - 1) == 0:
                self._checkpoint()
                last_save = time.monotonic()
            elif all(model.diverged_step for model in block.models):
                block.step = self.steps  # nothing is left to train, and frozen models stay as they are
                self._checkpoint()
            elif time.monotonic() - last_save >= self.options.save_every:
                self._save()
                last_save = time.monotonic()
            self._progress(n, trained, seconds)
        return True

    def _next_cut(self) -> int:
        return min(self.steps, 1 << self.block.step.bit_length())

    def _log(self, n: int, losses: torch.Tensor) -> None:
        for step in range(self.block.step - n + 1, self.block.step + 1):
            if (step - 1) % LOG_EVERY == 0 or step == self.steps:
                self.history.losses.append(losses[:, step - self.block.step - 1].clone())

    def _freeze_diverged(self) -> None:
        for model, name in zip(self.block.models, self.job.hashes, strict=True):
            if model.diverged_step is not None and name not in self.reported:
                self.reported.add(name)
                model.freeze()
                self.report({"kind": "diverged", "model": name, "step": model.diverged_step})

    def _checkpoint(self) -> None:
        """Snapshot, measure, write the checkpoint where it is wanted, and the state."""
        block, hashes = self.block, self.job.hashes
        self.engine.fetch(block)
        for model in block.models:
            if model.diverged_step is None:
                model.snapshot.copy_(model.parameters)
        if block.step > 0:
            self.history.measures.append(torch.tensor([self._measure(m) for m in block.models], dtype=torch.float64))
        kept = keeps_checkpoint(self.options.checkpoints, block.step, self.steps)
        if kept:
            self.directory.write_checkpoint(block.models, hashes, block.step)
        self._save()
        last = block.step == self.steps
        self.report({"kind": "checkpoint", "step": block.step, "models": list(hashes), "kept": kept, "last": last})

    def _measure(self, model: Model) -> list[float]:
        if model.diverged_step is not None:
            return [float("nan")] * len(NAMES)
        params = contract_tensors(model.spec, model.parameters) | {"P": model.P}
        if model.P2 is not None:
            params["P2"] = model.P2
        return measure(params, model.spec, self.held_out)

    def _save(self) -> None:
        self.engine.fetch(self.block)
        self.directory.write_state(self.block.models, self.job.hashes, self.block.step, self.history)

    def _progress(self, n: int, trained: int, seconds: float) -> None:
        losses = self.history.losses[-1].tolist() if self.history.losses else []
        shares = self.history.measures[-1][:, NAMES.index("mono_per_feature")].tolist() if self.history.measures else []
        self.report(
            {
                "kind": "progress",
                "models": list(self.job.hashes),
                "step": self.block.step,
                "model_steps": n * trained,
                "flops": n * trained * self.job.specs[0].flops_per_step,
                "seconds": seconds,
                "best_loss": min((loss for loss in losses if loss == loss), default=None),
                "mono": max((share for share in shares if share == share), default=None),
            }
        )


def steps_left(spec: ModelSpec, saved: Saved | None) -> int:
    """Updates that a model still needs; none when it has diverged."""
    if saved is None:
        return spec.steps
    return 0 if saved.diverged_step is not None else spec.steps - saved.step


def train_blocks(
    directory: RunDirectory,
    jobs: Sequence[BlockJob],
    options: Options,
    report: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Train blocks one after another, halving one that memory does not hold. Returns whether all reached their end.

    A block that fails is reported (kind "block failed", its models, and what happened), and those after it are trained.
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
            states = [saved.get(name) for name in job.hashes]
            waiting[:0] = [
                BlockJob(job.specs[part], job.hashes[part], tuple(states[part]))
                for part in (slice(half), slice(half, None))
            ]
        except Exception as error:
            whole = False
            report({"kind": "block failed", "models": list(job.hashes), "text": describe_failure(error)})
    return whole


def describe_failure(error: BaseException) -> str:
    """One line for what the system refused (disk, memory, a damaged file, a GPU), else the traceback."""
    if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError | BadFile | EngineError):
        return f"{type(error).__name__}: {error}".strip(": ")
    return "".join(traceback.format_exception(error)).strip()
