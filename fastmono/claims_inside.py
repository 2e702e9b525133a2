"""Claims 6 and 7, about the insides of trained models: what `fastmono.interpret` finds, as numbers with thresholds.

Both are measured on the decoders of `lr-negative-bias`, claim 6 on the wider ones of `width` as well, since features
with two monosemantic neurons are rare where there are few neurons for a feature. The rule by which a number holds, and
which models count, are those of `fastmono.claims`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fastmono import interpret
from fastmono.claims import Claim, Number, Result, settled
from fastmono.files import BadFile, read_json, write_bytes
from fastmono.metrics import HeldOut, Parameters
from fastmono.presets import SWEEPS, sizes
from fastmono.spec import Grid, ModelSpec

if TYPE_CHECKING:
    from fastmono.run import Run

FEWEST_PAIRS = 5
"""Features with two monosemantic neurons that a seed's models must have together for them to be judged."""
SCHEMA = 1


@dataclass(frozen=True)
class Inside:
    """What is found in one model.

    Attributes:
        numbers: `interpret.summary`.
        singles: of each feature with one monosemantic neuron, where that has a positive gain, that is, recovers it:
            loss beside the rest of the model, the least that another threshold and gain would reach there, threshold,
            standard deviation of the interference.
        pairs: of each feature with two: AUC of both, of the better one, slope between their kinks, slope beyond both.
    """

    numbers: dict[str, float | None]
    singles: list[tuple[float, float, float, float]]
    pairs: list[tuple[float, float, float, float]]


def look_inside(params: Parameters, spec: ModelSpec, held_out: HeldOut | None = None) -> Inside:
    """Interpret one model; raises as `interpret.findings` does."""
    found = interpret.findings(params, spec, held_out=held_out)
    singles = [
        (one.measured_beside.loss, one.optimal_beside.loss, one.measured_beside.threshold, one.interference)
        for one in found.singles
        if one.measured.gain > 0
    ]
    return Inside(found.numbers(), singles, [(two.auc, two.auc_single, *two.slopes) for two in found.pairs])


def _fingerprint(params: Parameters, spec: ModelSpec) -> str:
    digest = hashlib.sha256(spec.content_hash(SCHEMA).encode())
    for name in sorted(params):
        digest.update(params[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


class Insides:
    """The insides of a run's models, kept in a JSON file, since a model of the paper's size takes minutes."""

    def __init__(self, run: Run, path: Path) -> None:
        self.run, self.path, self.held_out = run, path, HeldOut()
        self.known: dict[str, Any] = {}
        try:
            held = read_json(path) if path.exists() else {}
            if held.get("schema") == SCHEMA:
                self.known = held["models"]
        except (BadFile, AttributeError, KeyError):
            pass  # nothing that cannot be found again

    def of(self, results: Iterable[Result]) -> dict[ModelSpec, Inside]:
        """Look inside each of these models, unless that was done before."""
        found = {}
        for result in results:
            params = self.run.parameters(result.model)
            key = _fingerprint(params, result.spec)
            if key not in self.known:
                self.known[key] = asdict(look_inside(params, result.spec, self.held_out))
                text = json.dumps({"schema": SCHEMA, "models": self.known})
                write_bytes(self.path, text.encode())
            found[result.spec] = Inside(**self.known[key])
        return found


def models_to_look_into(run: Run, scale: str) -> tuple[list[Result], list[Result], tuple[str, ...], tuple[str, ...]]:
    """The models of claims 6 and 7, the further ones of claim 6, and notes on those of either that do not count."""
    (start,) = sizes(scale).starts("negative")
    narrow, notes = settled(run, SWEEPS["lr-negative-bias"].grid(scale))
    wide = [spec for spec in SWEEPS["width"].grid(scale)
            if spec.init_bias == start.init_bias and spec.n_neurons > start.n_neurons]  # fmt: skip
    wider, more = settled(run, Grid.of(wide))
    return narrow, wider, notes, more


def _by_seed(
    found: Mapping[ModelSpec, Inside], seeds: Iterable[int], measure: Callable[[list[Inside]], float]
) -> dict[int, float]:
    return {seed: measure([inside for spec, inside in found.items() if spec.seed == seed]) for seed in seeds}


def _median(values: Iterable[float], fewest: int = 1) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if len(known) >= fewest else math.nan


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _over_singles(of: Callable[[float, float, float, float], float]) -> Callable[[list[Inside]], float]:
    return lambda insides: _median(of(*one) for inside in insides for one in inside.singles)


def _over_pairs(of: Callable[[float, float, float, float], float]) -> Callable[[list[Inside]], float]:
    return lambda insides: _median((of(*two) for inside in insides for two in inside.pairs), FEWEST_PAIRS)


def balances_and_classifies(found: Mapping[ModelSpec, Inside], scale: str, notes: tuple[str, ...]) -> Claim:
    """Claim 6, from the insides of its models."""
    of = sizes(scale)
    one, two = "feature with one monosemantic neuron: ", "feature with two: "
    return Claim(
        "6",
        "A feature with one monosemantic neuron: that neuron balances recovery against interference. With two: the "
        "pair separates likely real from likely interference, and then recovers the strength of the real ones.",
        (
            Number(one + "its loss, beside the rest of the model, over the least that any threshold and gain would "
                   "reach, minus 1; median over features",
                   _by_seed(found, of.seeds, _over_singles(lambda loss, best, *_: _ratio(loss, best) - 1)),
                   0.1, at_least=False),
            Number(one + "its threshold over the standard deviation of the interference; median over features",
                   _by_seed(found, of.seeds, _over_singles(lambda _, __, t, deviation: _ratio(t, deviation))), 1.0),
            Number(two + "area under the ROC curve, present against absent, of both minus that of the better one; "
                   f"median over features, at least {FEWEST_PAIRS}",
                   _by_seed(found, of.seeds, _over_pairs(lambda auc, single, *_: auc - single)), 0.01),
            Number(two + "slope of the output between their kinks minus slope beyond both (a steep rise decides, a "
                   "flatter one recovers the strength); median over features",
                   _by_seed(found, of.seeds, _over_pairs(lambda _, __, between, beyond: between - beyond)), 0.0),
        ),
        notes, of.decides,
    )  # fmt: skip


def _number(*names: str) -> Callable[[list[Inside]], float]:
    """Median over models of the largest of some numbers of their summaries."""

    def value(inside: Inside) -> float:
        values = [x for name in names if (x := inside.numbers[name]) is not None]
        return max(values) if len(values) == len(names) else math.nan

    return lambda insides: _median(value(inside) for inside in insides)


def _share_of_low_slope(inside: Inside) -> float:
    poly, mono = inside.numbers["low_poly"] or 0.0, inside.numbers["low_mono"] or 0.0
    return _ratio(poly, poly + mono)


def kept_by_map(inside: Inside) -> float:
    """What the least-squares map in the place of the polysemantic neurons keeps of what they lower the loss by."""
    values = [inside.numbers[name] for name in ("loss_constant", "loss_fit", "loss")]
    constant, fit, whole = (math.nan if value is None else value for value in values)
    return _ratio(constant - fit, constant - whole)


def low_rank_identity(found: Mapping[ModelSpec, Inside], scale: str, notes: tuple[str, ...]) -> Claim:
    """Claim 7, from the insides of its models."""
    of = sizes(scale)
    m, n = of.base.d_embed, of.base.n_features
    return Claim(
        "7",
        "The polysemantic neurons, linearised, are a low-rank approximation to the identity, which gives the model "
        "confidence at low amplitudes.",
        (
            Number(f"distance of their linear map to the nearest multiple of a projection of rank at most m = {m} (N = "
                   f"{n}), over the map's norm: the larger of the map at rest and the least-squares map",
                   _by_seed(found, of.seeds, _number("tangent_identity_distance", "fit_identity_distance")),
                   0.5, at_least=False),
            Number("slope from amplitude 0 to 0.1 that they give to a feature's output (a perfect model: 1)",
                   _by_seed(found, of.seeds, _number("low_poly")), 0.1),
            Number("share of that in the slope which they and the monosemantic neurons give together",
                   _by_seed(found, of.seeds, lambda these: _median(map(_share_of_low_slope, these))), 0.5),
            Number("share of the variance of what they add to features with a monosemantic neuron that is linear",
                   _by_seed(found, of.seeds, _number("linear_share_served")), 0.5),
            Number("share that the least-squares map in their place keeps of what they lower the loss by",
                   _by_seed(found, of.seeds, lambda these: _median(map(kept_by_map, these))), 0.5),
        ),
        notes, of.decides,
    )  # fmt: skip


@dataclass(frozen=True)
class Section5:
    """What is found inside the models of a run, and what of it is shown.

    Attributes:
        claims: 6 and 7.
        inside: the insides of the models of `lr-negative-bias`; further: of the wider ones.
        typical: the model to show: of the lowest seed the most monosemantic of the former. None without any.
        paired: the one with the most features that have two monosemantic neurons, among both.
    """

    claims: tuple[Claim, Claim]
    inside: dict[ModelSpec, Inside]
    further: dict[ModelSpec, Inside]
    typical: ModelSpec | None
    paired: ModelSpec | None


def section_5(run: Run, scale: str, path: Path) -> Section5:
    """Look inside the models of claims 6 and 7, medians over the models of a seed; `path` keeps what is found."""
    narrow, wider, notes, more = models_to_look_into(run, scale)
    insides = Insides(run, path)
    inside, further = insides.of(narrow), insides.of(wider)
    both = inside | further
    first = min((result.spec.seed for result in narrow), default=0)
    of_first = [result for result in narrow if result.spec.seed == first]
    typical = max(of_first, key=lambda result: result.mono, default=None)
    return Section5(
        (balances_and_classifies(both, scale, (*notes, *more)), low_rank_identity(inside, scale, notes)),
        inside,
        further,
        typical.spec if typical else None,
        max(both, key=lambda spec: len(both[spec].pairs), default=None),
    )
