"""The gate: a contestant is timed only if it trains as the reference does, within the noise of its random streams.

From one state, the reference trains copies of a few models on R streams and the contestant on R streams of its own.
For each model these are two samples of R independent runs of the same length. Compared are their means of

    the loss over each quarter of the run, at the steps that the contestant logs (with fewer than four, each alone)
    the mean bias, and the distance that W_in and W_out went, at the end

Were both the same recipe, each difference of means over s sqrt(2 / R), with s the pooled standard deviation over
streams, would follow Student's t distribution with 2 R - 2 degrees of freedom (each is a mean over many samples, so
close to normal). The bound is the quantile at which a contestant that is right fails at any of its K comparisons, over
both starting states, once in 1 / ALPHA times at most (Bonferroni). With R = 16 that is about two standard deviations
of a single run. A contestant of another precision, or another order of summation, is also systematically off by
rounding: ROUNDING of the value is allowed for that, and no more.

What it cannot see is what the loss and the weights do not show within a run's noise (moments dropped at the start, say:
LAMB divides their scale out). That each step's arithmetic is the reference's is tested on common batches, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant
from benchmarks.state import State

ALPHA = 1e-4
QUARTERS = 4
ROUNDING = {"fp32": 2.0**-16, "tf32": 2.0**-9, "bf16": 2.0**-6}
"""Relative allowance for rounding: a few units in the last place of an operand (fp32: 128), as a run amplifies it."""
REFERENCE_SEED, CONTESTANT_SEED = 2**20, 2**21
"""First seeds of the two sets of streams, far from the suites' own."""
MOVED = ("mean bias", "W_in moved", "W_out moved")


def student_quantile(tail: float, dof: int) -> float:
    """Student's t with probability `tail` above it: t = sqrt(dof) tan(a), and a has cos(a)^(dof-1)."""
    angle = np.linspace(0, math.pi / 2, 400_001)
    # Integrated from the far end, so that a small tail keeps its digits.
    density = np.cos(angle[::-1]) ** (dof - 1)
    above = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(dof) * math.tan(float(np.interp(tail, above / (2 * above[-1]), angle[::-1])))


def statistics(start: State, end: State, losses: Tensor, logged: Tensor) -> Tensor:
    """What is compared, float64 [S, G, K]: of losses [A, n] only the steps that are logged, a mask [n]."""
    found = losses[:, logged].double()
    quarters = [part.mean(1) for part in found.tensor_split(min(QUARTERS, found.shape[1]), 1)]
    moved = [
        (end.parameters[name] - start.parameters[name]).double().flatten(1).norm(dim=1) for name in ("W_in", "W_outT")
    ]
    compared = torch.stack([*quarters, end.parameters["b"].double().mean(1), *moved], 1)
    return compared.view(start.n_streams, start.group, -1)


@dataclass
class Verdict:
    """What the gate found; `worst` is the largest difference over its bound, at most 1 to pass."""

    passed: bool
    worst: float
    where: str
    bound_t: float
    streams: int
    models: int
    steps: int
    comparisons: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "worst": round(self.worst, 4), "bound_t": round(self.bound_t, 2), "alpha": ALPHA}


@dataclass
class Gate:
    """The gate of one shape: the reference's runs are made once and serve every contestant.

    Args:
        starts: states of a few models of one stream, at the steps to begin from.
        reference: trains what the contestants are compared with.
        streams: R.
        steps: length of a run; in 64 steps, a contestant that logs every 16 has a loss in each quarter.
        runs: what came of the reference from each start, its state and losses; made when they are first needed.
    """

    starts: Sequence[State]
    reference: Contestant
    streams: int
    steps: int
    runs: list[tuple[State, Tensor]] = field(default_factory=list)

    def run(self, contestant: Contestant, start: State, first_seed: int) -> tuple[State, State, Tensor]:
        """The state that a contestant begins from on streams of its own, the one that it reaches, and its losses."""
        begun = start.on_streams(range(first_seed, first_seed + self.streams))
        contestant.load(begun)
        losses = contestant.advance(self.steps)
        end = contestant.read()
        contestant.unload()
        return begun, end, losses

    def check(self, contestant: Contestant) -> Verdict:
        """Run the contestant and compare."""
        if not self.runs:
            for start in self.starts:
                _, end, losses = self.run(self.reference, start, REFERENCE_SEED)
                self.runs.append((end, losses))
        models, R = self.starts[0].group, self.streams
        comparisons = len(self.starts) * models * (QUARTERS + len(MOVED))
        quantile = student_quantile(ALPHA / comparisons / 2, 2 * R - 2)
        worst, where = 0.0, "nowhere"
        for start, (end, losses) in zip(self.starts, self.runs, strict=True):
            begun, its_end, its_losses = self.run(contestant, start, CONTESTANT_SEED)
            logged = ~its_losses[0].isnan()
            if its_losses[:, logged].isnan().any() or not logged.any() or not is_finite(its_end):
                return Verdict(False, math.inf, "not finite", quantile, R, models, self.steps, comparisons)
            x = statistics(begun, end, losses, logged)
            y = statistics(begun, its_end, its_losses, logged)
            spread = ((x.var(0) + y.var(0)) / 2).sqrt()  # [G, K]
            bound = quantile * spread * math.sqrt(2 / R) + ROUNDING[contestant.precision] * x.mean(0).abs()
            difference = (y.mean(0) - x.mean(0)).abs()
            over = torch.where(difference == 0, 0.0, difference / bound)  # nothing moves where no neuron is active
            i = int(over.argmax())
            if float(over.flatten()[i]) > worst:
                model, column = divmod(i, over.shape[1])
                losses_compared = over.shape[1] - len(MOVED)
                what = (
                    f"loss {column + 1}/{losses_compared}"
                    if column < losses_compared
                    else MOVED[column - losses_compared]
                )
                spec, worst = start.specs[model], float(over[model, column])
                where = f"{what} from step {start.step}, lr {spec.lr:g}, bias {spec.init_bias:g}"
        return Verdict(worst <= 1, worst, where, quantile, R, models, self.steps, comparisons)


def is_finite(state: State) -> bool:
    """Whether every parameter is."""
    return all(bool(tensor.isfinite().all()) for tensor in state.parameters.values())
