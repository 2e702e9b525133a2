"""What the paper claims of trained models, each claim as numbers with thresholds that were set before the results.

A *number* is measured once for each seed: models of one seed see the same batches and start from the same values, so
whatever is compared is paired. It holds when every seed passes the threshold, it does not hold when none does, and it
is not decided when seeds disagree, when fewer than two of them can be measured, or when the scale cannot tell. That all
of three seeds fall on one side of a threshold by chance, were both sides equally likely, has a probability of 1/4.
A *claim* holds when all of its numbers do, and does not hold when one does not.

Losses are `final_loss`, means over the last whole period of the schedule. Only models that are done and have settled
count: one is *still learning* when its loss over the last period is more than 5 % below that over the period which
ended at three quarters of its steps. Those left out are named. mono/N is the number of monosemantic neurons over the
number of features (recipe fact 13).

Claims 6 and 7, which are about the insides of models, are in `fastmono.claims_inside`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from fastmono.metrics import monosemantic_neurons, single_feature_activations
from fastmono.presets import SWEEPS, sizes
from fastmono.spec import TASKS, Grid, ModelSpec
from fastmono.store import FINAL_STEPS

if TYPE_CHECKING:
    from fastmono.run import Run

STILL_LEARNING = 0.05
EQUAL_LOSS = 0.02
"""How far apart two losses may be, over the smaller, to be called essentially equal."""
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"


@dataclass(frozen=True)
class Number:
    """One measured number of a claim.

    Attributes:
        what: its definition, for a reader who wants to check it.
        by_seed: its value for each seed; NaN where it cannot be measured.
        threshold: where it begins to speak for the claim.
        at_least: whether that is at or above the threshold, or else at or below.
    """

    what: str
    by_seed: Mapping[int, float]
    threshold: float
    at_least: bool = True

    @property
    def verdict(self) -> str:
        """holds | does not hold | not decided, by the rule of this module."""
        known = [value for value in self.by_seed.values() if not math.isnan(value)]
        passed = sum(value >= self.threshold if self.at_least else value <= self.threshold for value in known)
        if len(known) < 2 or 0 < passed < len(known):
            return OPEN
        return HOLDS if passed else FAILS


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and what was measured for it.

    Attributes:
        name: its number in the paper's order, with what it was measured on where that is more than one thing.
        text: the claim.
        numbers: what was measured; all must hold.
        notes: which models were left out, and why.
        decides: whether the scale can decide it at all.
    """

    name: str
    text: str
    numbers: tuple[Number, ...]
    notes: tuple[str, ...] = ()
    decides: bool = True

    @property
    def verdict(self) -> str:
        """holds | does not hold | not decided."""
        found = [number.verdict for number in self.numbers]
        if not self.decides or not found:
            return OPEN
        return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


@dataclass(frozen=True)
class Result:
    """A finished model of a run, by its place in it."""

    model: int
    spec: ModelSpec
    mono: float
    """mono/N."""
    loss: float
    mean_bias: float


def still_learning(run: Run, model: int) -> bool:
    """Whether a model's loss still falls at its end (module docstring); never in runs shorter than four periods."""
    steps, losses = run.logged_steps, run.losses[model].double()
    last = run.specs[model].steps
    if last < 4 * FINAL_STEPS:
        return False
    ends = last, last * 3 // 4
    now, before = (float(losses[(steps > end - FINAL_STEPS) & (steps <= end)].nanmean()) for end in ends)
    return now < (1 - STILL_LEARNING) * before


def settled(run: Run, models: Iterable[ModelSpec]) -> tuple[list[Result], tuple[str, ...]]:
    """Those of the models that count as results, and a note for each kind of those that do not."""
    place = {spec: i for i, spec in enumerate(run.specs)}
    found: list[Result] = []
    left_out: dict[str, list[ModelSpec]] = {}
    for spec in models:
        if (i := place.get(spec)) is None:
            left_out.setdefault("not trained", []).append(spec)
        elif (row := run.table[i])["status"] != "done":
            left_out.setdefault(row["status"], []).append(spec)
        elif still_learning(run, i):
            left_out.setdefault("still learning", []).append(spec)
        else:
            found.append(Result(i, spec, row["mono_per_feature"], row["final_loss"], row["mean_bias"]))
    return found, tuple(f"left out, {why}: {_named(specs)}" for why, specs in left_out.items())


def _named(specs: Sequence[ModelSpec]) -> str:
    """Models by learning rate and bias, counted over seeds."""
    kinds: dict[str, int] = {}
    for spec in specs:
        name = f"{spec.task} k {spec.n_neurons} lr {spec.lr:g} init_bias {spec.init_bias:g}"
        kinds[name] = kinds.get(name, 0) + 1
    shown = [f"{name} ({count} seed{'s' * (count > 1)})" for name, count in kinds.items()]
    return "; ".join(shown[:4]) + (f"; and {len(shown) - 4} other kinds" if len(shown) > 4 else "")


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean rank; NaN for fewer than three pairs or a constant.

    Args:
        x, y: as many numbers each, finite.
    """

    def ranks(values: Sequence[float]) -> np.ndarray:
        found = np.asarray(values, float)
        return (found[:, None] > found).sum(1) + ((found[:, None] == found).sum(1) - 1) / 2

    a, b = (ranks(values) - (len(x) - 1) / 2 for values in (x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if len(x) > 2 and scale else math.nan


def by_seed(
    results: Iterable[Result], seeds: Iterable[int], measure: Callable[[list[Result]], float]
) -> dict[int, float]:
    """A measure of each seed's models, NaN where it has too few to measure."""
    groups: dict[int, list[Result]] = {seed: [] for seed in seeds}
    for result in results:
        groups[result.spec.seed].append(result)
    return {seed: measure(group) for seed, group in groups.items()}


def _along(field: str) -> Callable[[Result], float]:
    return lambda result: float(getattr(result.spec, field))


def correlation_with(field: str) -> Callable[[list[Result]], float]:
    """Rank correlation of mono/N with a field."""
    return lambda found: rank_correlation([_along(field)(r) for r in found], [r.mono for r in found])


def mono_gain(field: str, least: float = -math.inf) -> Callable[[list[Result]], float]:
    """mono/N at the highest value of a field minus that at the lowest, of those that are not below `least`."""

    def measure(found: list[Result]) -> float:
        ranked = sorted((r for r in found if _along(field)(r) >= least), key=_along(field))
        return ranked[-1].mono - ranked[0].mono if len(ranked) > 1 else math.nan

    return measure


def loss_gain_of_upper_half(found: list[Result]) -> float:
    """1 - mean loss of the higher learning rates / that of the lower ones; of an odd number the middle one is left
    out."""
    ranked = [r.loss for r in sorted(found, key=_along("lr"))]
    half = len(ranked) // 2
    return 1 - float(np.mean(ranked[-half:])) / float(np.mean(ranked[:half])) if half else math.nan


def equal_loss_pair(found: Sequence[Result]) -> tuple[Result, Result] | None:
    """Of two models of one seed with losses within 2 %, those that differ most in mono/N, the lower first; or none."""
    pairs = [
        (a, b) if a.mono <= b.mono else (b, a)
        for a, b in combinations(found, 2)
        if abs(a.loss - b.loss) <= EQUAL_LOSS * min(a.loss, b.loss) and a.spec.seed == b.spec.seed
    ]
    return max(pairs, key=lambda pair: pair[1].mono - pair[0].mono, default=None)


def bias_of_monosemantic(run: Run, model: int) -> float:
    """Mean bias of a model's monosemantic neurons; NaN when it has none."""
    params = run.parameters(model)
    chosen = monosemantic_neurons(single_feature_activations(params, run.specs[model].activation))
    return float(params["b"][chosen].double().mean())


def learning_rate_rises(run: Run, scale: str, frequency: str = "uniform") -> Claim:
    """Claim 1, for one kind of frequencies."""
    of, suffix = sizes(scale), "" if frequency == "uniform" else "-power-law"
    found, notes = settled(run, SWEEPS["lr-zero-bias" + suffix].grid(scale))
    return Claim(
        "1" if frequency == "uniform" else "1, power law",
        "Zero mean initial bias: the number of monosemantic neurons rises with the learning rate, with slightly lower "
        "loss.",
        (
            Number("rank correlation (Spearman) of mono/N with the learning rate",
                   by_seed(found, of.seeds, correlation_with("lr")), 0.8),
            Number("mono/N at the highest learning rate minus mono/N at the lowest",
                   by_seed(found, of.seeds, mono_gain("lr")), 0.1),
            Number("1 - (mean final loss of the higher half of the learning rates) / (of the lower half)",
                   by_seed(found, of.seeds, loss_gain_of_upper_half), 0.0),
        ),
        notes, of.decides,
    )  # fmt: skip


def negative_bias_is_monosemantic(run: Run, scale: str, frequency: str = "uniform") -> Claim:
    """Claim 2, for one kind of frequencies."""
    of, suffix = sizes(scale), "" if frequency == "uniform" else "-power-law"
    negative, notes = settled(run, SWEEPS["lr-negative-bias" + suffix].grid(scale))
    zero, more = settled(run, SWEEPS["lr-zero-bias" + suffix].grid(scale))
    loss_at_zero = {(r.spec.lr, r.spec.seed): r.loss for r in zero}

    def gain(found: list[Result]) -> float:
        ratios = [r.loss / loss_at_zero[key] for r in found if (key := (r.spec.lr, r.spec.seed)) in loss_at_zero]
        return 1 - float(np.mean(ratios)) if ratios else math.nan

    return Claim(
        "2" if frequency == "uniform" else "2, power law",
        "Negative mean initial bias: all learning rates end highly monosemantic, with slightly better loss than zero "
        "bias.",
        (
            Number("lowest mono/N over the learning rates",
                   by_seed(negative, of.seeds, lambda found: min((r.mono for r in found), default=math.nan)), 0.5),
            Number("1 - (final loss with negative bias) / (with zero bias, same learning rate), mean over the rates",
                   by_seed(negative, of.seeds, gain), 0.0),
        ),
        (*notes, *more), of.decides,
    )  # fmt: skip


def equal_loss_differs(run: Run, scale: str) -> Claim:
    """Claim 3."""
    of = sizes(scale)
    found, notes = settled(run, SWEEPS["lr-zero-bias"].grid(scale) + SWEEPS["lr-negative-bias"].grid(scale))

    def difference(these: list[Result]) -> float:
        pair = equal_loss_pair(these)
        return pair[1].mono - pair[0].mono if pair else math.nan

    what = "largest difference in mono/N between two models, of any learning rate and either bias, with final losses "
    return Claim(
        "3", "Models of essentially equal loss have clearly different single-feature activations.",
        (Number(f"{what}within {EQUAL_LOSS:.0%}", by_seed(found, of.seeds, difference), 0.2),), notes, of.decides,
    )  # fmt: skip


def moderate_negative_bias(run: Run, scale: str) -> Claim:
    """Claim 4: each number is that of the task where it speaks least for the claim."""
    of = sizes(scale)
    found, notes = settled(run, (spec for spec in SWEEPS["task"].grid(scale)))
    free = [r for r in found if r.spec.init_bias == 0]
    worst: list[dict[int, float]] = [{}, {}, {}]
    for seed in of.seeds:
        correlations, biases = [], []
        for task in TASKS:
            here = [r for r in free if (r.spec.task, r.spec.seed) == (task, seed)]
            correlations.append(rank_correlation([r.mean_bias for r in here], [r.mono for r in here]))
            candidates = [r for r in found if (r.spec.task, r.spec.seed) == (task, seed)]
            best = max(candidates, key=lambda r: r.mono, default=None)
            biases.append(bias_of_monosemantic(run, best.model) if best else math.nan)
        # NaN when a task has none: then the claim, which is about all three, is not decided.
        for values, number in zip(worst, (np.max(correlations), np.max(biases), np.min(biases)), strict=True):
            values[seed] = float(number)
    most = "mean bias of the monosemantic neurons of the most monosemantic model of each task: that of the task where "
    return Claim(
        "4", "The more monosemantic minima have moderate negative biases, in all three tasks.",
        (
            Number("rank correlation of mono/N with the mean bias over the learning rates, zero initial bias: the "
                   "highest of the three tasks", worst[0], -0.5, at_least=False),
            Number(most + "it is highest", worst[1], -0.05, at_least=False),
            Number(most + "it is lowest (a feature is at most 1)", worst[2], -1.0),
        ),
        notes, of.decides,
    )  # fmt: skip


def wider_is_more_monosemantic(run: Run, scale: str) -> Claim:
    """Claim 5, on the models with a negative initial bias."""
    of = sizes(scale)
    (start,) = of.starts("negative")
    grid = Grid.of(spec for spec in SWEEPS["width"].grid(scale) if spec.init_bias == start.init_bias)
    found, notes = settled(run, grid)
    return Claim(
        "5", "More neurons per layer make models more monosemantic.",
        (
            Number("rank correlation of mono/N with the number of neurons, negative initial bias",
                   by_seed(found, of.seeds, correlation_with("n_neurons")), 0.8),
            # For fewer neurons than features the count is bounded by k, and rises for that reason alone.
            Number(f"mono/N at the largest k minus mono/N at k = N = {start.n_features}",
                   by_seed(found, of.seeds, mono_gain("n_neurons", start.n_features)), 0.1),
        ),
        notes, of.decides,
    )  # fmt: skip


def claims_of(run: Run, scale: str) -> list[Claim]:
    """Claims 1 to 5 as far as the run goes; what is not trained yet leaves them not decided."""
    return [
        learning_rate_rises(run, scale),
        learning_rate_rises(run, scale, "power_law"),
        negative_bias_is_monosemantic(run, scale),
        negative_bias_is_monosemantic(run, scale, "power_law"),
        equal_loss_differs(run, scale),
        moderate_negative_bias(run, scale),
        wider_is_more_monosemantic(run, scale),
    ]
