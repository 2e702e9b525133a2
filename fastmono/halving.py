"""Successive halving: every so many steps the models that fall behind their rivals stop, and the best go on.

    rung       every multiple of `every` below a model's own steps
    rivals     models that see the same batches and solve the same problem for as many steps: task, N, m, the features'
               distribution, batch size, steps and seed agree. What else there is (width, nonlinearity, optimizer,
               rates, biases, l1) is what is compared
    survivors  of n rivals that come to a rung the best ceil(keep n), ties by the grid's order, diverged models last

Losses of other tasks or distributions cannot be compared, and seeds are repetitions, not candidates. It decides when a
model stops, never what it computes. A decision needs all rivals at its rung. So every model is trained to the rung, in
whatever shards, and then the survivors go on, dealt to shards anew. halving.json records a decision before anything
follows from it, and one that was taken stands.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization" (2016), with
rungs at equal distances.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from fastmono.files import BadFile, read_json, write_bytes
from fastmono.layout import LOG_EVERY, is_whole
from fastmono.metrics import counts
from fastmono.philox import stream_key
from fastmono.shards import Shard
from fastmono.spec import LARGEST_STEPS, ModelSpec
from fastmono.store import FINAL_STEPS, RunDirectory, Saved, contract_tensors, logged_steps
from fastmono.trainer import steps_left

ShardsTo = Callable[[Mapping[str, Saved], int | None, Collection[str]], Sequence[Shard]]
"""Makes shards, of (the newest states, the step to train to, the models to leave out)."""
MEASURES = ("loss", "mono")
FILE = "halving.json"


@dataclass(frozen=True)
class Halving:
    """Which rivals go on at which steps. Raises `ValueError` for a bad value."""

    keep: float
    """The share of rivals that goes on at a rung, rounded up."""
    every: int
    """Steps between two rungs."""
    by: str = "loss"
    """loss: the mean of those logged in the last 1,024 steps, a whole period of the published schedule, or since the
    last rung where that is less; mono: monosemantic neurons per feature at the rung."""

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep!r}: must be a number between 0 and 1, the share of models that go on")
        if not is_whole(self.every, LOG_EVERY, LARGEST_STEPS):
            raise ValueError(f"every={self.every!r}: must be a whole number of steps from {LOG_EVERY} on")
        if self.by not in MEASURES:
            raise ValueError(f"by={self.by!r}: must be one of {', '.join(MEASURES)}")

    def survivors(self, n: int) -> int:
        """How many of n rivals go on."""
        share = Fraction(self.keep).limit_denominator(10**6)  # 0.7 of 10 is 7, as a float a little more
        return max(min(n, 1), math.ceil(share * n))

    def best(self, values: Sequence[float | None]) -> set[int]:
        """The indices of those that go on, for what they measured; None for a diverged model."""
        sign = 1 if self.by == "loss" else -1
        order = sorted(range(len(values)), key=lambda i: math.inf if (v := values[i]) is None else sign * v)
        return set(order[: self.survivors(len(values))])


@dataclass(frozen=True)
class Forecast:
    """What is left to do when models stop. An expectation where rivals differ in width: any of them may stop."""

    stops: tuple[tuple[int, int], ...]
    """(step, how many models stop there)."""
    model_steps: int
    flops: int


def rivals(spec: ModelSpec) -> tuple[object, ...]:
    """What models that are compared have in common."""
    return stream_key(spec), spec.task, spec.d_embed, spec.batch_size, spec.steps


class Rungs:
    """The decisions of a run: those that were taken, and those to come.

    Args:
        specs: the run's models by content hash, in the grid's order.
        fresh: as if nothing had been decided.

    Raises `ValueError` when the directory's models were halved in another way, or nothing could ever stop, and
    `BadFile` for a record that is damaged.
    """

    def __init__(
        self, directory: RunDirectory, specs: Mapping[str, ModelSpec], halving: Halving, fresh: bool = False
    ) -> None:
        self.directory, self.specs, self.halving = directory, specs, halving
        self.path = directory.path / FILE
        self.taken: dict[int, dict[str, tuple[float | None, bool]]] = {}
        """For each rung and model: what it measured, and whether it went on."""
        if self.path.exists() and not fresh:
            held, self.taken = read_record(self.path)
            if held != halving:
                raise ValueError(
                    f"{self.path}: decided with keep={held.keep}, every={held.every}, by={held.by!r}: ask for the "
                    "same, train all models of that run (without keep), or discard it (--no-resume)"
                )
        if not self._groups(specs, at=halving.every):
            raise ValueError(
                f"keep={halving.keep}, every={halving.every}: would stop nothing, since no group of models can be "
                "compared (same task, sizes, features, batch size, steps and seed) in which one could fall behind"
            )

    @property
    def stopped(self) -> set[str]:
        """The models that fell behind."""
        return {name for models in self.taken.values() for name, (_, on) in models.items() if not on}

    def next_shards(
        self,
        shards_to: ShardsTo,
        failed: Collection[str],
        tell: Callable[[int, list[str], Forecast], None],
    ) -> Sequence[Shard]:
        """Decide at each rung that its models have come to, and return the shards that are to be trained now.

        Args:
            shards_to: makes them.
            failed: models that do not train any more.
            tell: hears of each decision: the rung, the models that stop, and what is left to do.
        """
        while True:
            out = self.stopped.union(failed)
            saved = self.directory.newest_states(self.specs.keys() - out)
            rung = self._next_rung(saved, out)
            shards = shards_to(saved, rung, out)
            if shards or rung is None:
                return shards
            stopped = self._decide(rung, saved)
            tell(rung, stopped, self.forecast(saved, out))

    def _groups(self, names: Iterable[str], at: int = 0) -> list[list[str]]:
        """Rivals with more steps than that, of which one at least would stop."""
        groups: dict[object, list[str]] = {}
        for name in names:
            if self.specs[name].steps > at:
                groups.setdefault(rivals(self.specs[name]), []).append(name)
        return [group for group in groups.values() if self.halving.survivors(len(group)) < len(group)]

    def _next_rung(self, saved: Mapping[str, Saved], out: Collection[str]) -> int | None:
        """The first rung before a model in training at which rivals would stop."""
        every, rungs = self.halving.every, []
        contest = [name for name in self.specs if name not in out and self._contends(name, saved.get(name))]
        for group in self._groups(contest):
            for name in group:
                step = saved[name].step if name in saved else 0
                rung = -(-step // every) * every
                rung += every * (rung == 0 or name in self.taken.get(rung, ()))
                if steps_left(self.specs[name], saved.get(name)) and rung < self.specs[name].steps:
                    rungs.append(rung)
        return min(rungs, default=None)

    def _contends(self, name: str, saved: Saved | None) -> bool:
        """Whether a model still trains, or is counted as the last of its rivals."""
        return steps_left(self.specs[name], saved) > 0 or (saved is not None and saved.diverged_step is not None)

    def _decide(self, rung: int, saved: Mapping[str, Saved]) -> list[str]:
        """Judge the models that are at a rung, and record it. Returns those that stop.

        One that comes later than its rivals, since it failed or was added to the grid, is ranked among all of them.
        """
        held = self.taken.get(rung, {})
        here = {
            name: state
            for name, state in saved.items()
            if name not in held and name not in self.stopped and self.specs[name].steps > rung
            and (state.step == rung or (state.diverged_step is not None and state.diverged_step <= rung))
        }  # fmt: skip
        values = {name: value for name, (value, _) in held.items()}
        for name in sorted(here, key=lambda name: here[name].path):  # a file holds many models, and is read once
            values[name] = self._measure(self.specs[name], here[name], rung)
        decided = dict(held)
        groups: dict[object, list[str]] = {}
        for name in self.specs:
            if name in values:
                groups.setdefault(rivals(self.specs[name]), []).append(name)
        for group in groups.values():
            on = self.halving.best([values[name] for name in group])
            decided |= {name: (values[name], i in on) for i, name in enumerate(group) if name in here}
        self.taken[rung] = decided
        write_record(self.path, self.halving, self.taken)
        return [name for name in self.specs if name in here and not decided[name][1]]

    def _measure(self, spec: ModelSpec, saved: Saved, rung: int) -> float | None:
        if saved.diverged_step is not None:
            return None
        model, losses, _ = self.directory.restore(spec, saved)
        if self.halving.by == "mono":
            return counts(contract_tensors(spec, model.parameters) | {"P": model.P}, spec)["mono_per_feature"]
        lately = logged_steps(spec.steps)[: len(losses)] > rung - min(self.halving.every, FINAL_STEPS)
        return float(losses[lately].double().mean())

    def forecast(self, saved: Mapping[str, Saved], out: Collection[str]) -> Forecast:
        """What is left for the models that are not `out` and have not stopped."""
        halving, done = self.halving, self.stopped.union(out)
        groups: dict[object, list[str]] = {}
        for name, spec in self.specs.items():
            if name not in done and steps_left(spec, saved.get(name)):
                groups.setdefault(rivals(spec), []).append(name)
        stops: Counter[int] = Counter()
        model_steps = flops = 0.0
        for group in groups.values():
            at = {name: saved[name].step if name in saved else 0 for name in group}
            weight, last = dict.fromkeys(group, 1.0), self.specs[group[0]].steps
            low = 0
            while low < last:
                n = round(sum(weight.values()))
                rung = low + halving.every if halving.survivors(n) < n else last
                rung = min(rung, last)
                for name in group:
                    steps = weight[name] * max(0, rung - max(low, at[name]))
                    model_steps += steps
                    flops += steps * self.specs[name].flops_per_step
                here = [name for name in group if at[name] <= rung and name not in self.taken.get(rung, ())]
                n = round(sum(weight[name] for name in here))
                if rung < last and n:
                    stops[rung] += n - halving.survivors(n)
                    weight |= {name: weight[name] * halving.survivors(n) / n for name in here}
                low = rung
        found = tuple((rung, n) for rung, n in sorted(stops.items()) if n)
        return Forecast(found, round(model_steps), round(flops))


def write_record(path: Path, halving: Halving, taken: Mapping[int, Mapping[str, tuple[float | None, bool]]]) -> None:
    """Write halving.json: for each rung and model [what it measured, whether it went on]."""
    rungs = ",\n".join(f'  "{rung}": {json.dumps(models)}' for rung, models in sorted(taken.items()))
    head = json.dumps({"keep": halving.keep, "every": halving.every, "by": halving.by})
    write_bytes(path, f'{head[:-1]}, "rungs": {{\n{rungs}\n}}}}\n'.encode())


def read_record(path: Path) -> tuple[Halving, dict[int, dict[str, tuple[float | None, bool]]]]:
    """Inverse of `write_record`. `BadFile` for anything else."""
    record: Any = read_json(path)
    try:
        halving = Halving(record["keep"], record["every"], record["by"])
        taken = {
            int(rung): {name: _decision(*found) for name, found in models.items()}
            for rung, models in record["rungs"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise BadFile(path, "is not a record of successive halving") from None
    return halving, taken


def _decision(value: object, on: object) -> tuple[float | None, bool]:
    if not isinstance(on, bool) or not (value is None or (isinstance(value, float) and math.isfinite(value))):
        raise ValueError(value)
    return value, on


def stopped_at(directory: RunDirectory) -> dict[str, int]:
    """For each model that fell behind the step of that rung, of a run that may have none."""
    path = directory.path / FILE
    taken = read_record(path)[1] if path.exists() else {}
    return {name: rung for rung, models in taken.items() for name, (_, on) in models.items() if not on}
