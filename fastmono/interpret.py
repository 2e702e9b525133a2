"""What a trained model computes, neuron by neuron: the paper's section 5 as numbers. `interpret_plots` draws them.

parts = interpret.Parts(run.parameters(i), run.specs[i])
interpret.responses(parts, feature)      the output for a feature against its amplitude, by part
interpret.single_neuron(parts, probe)    one neuron's threshold and gain against the best ones
interpret.pair(parts, probe)             two neurons: kinks, ROC
interpret.linear_part(parts)             the polysemantic neurons as a linear map; losses without them
interpret.kinks(parts)                   how many kinks the neurons add
interpret.definition(parts)              how far the monosemanticity count depends on its definition
interpret.findings(params, spec)         all of it; .numbers() as a flat dict, which interpret.summary gives at once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fastmono.block import single_thread
from fastmono.interpret_linear import Kinks, LinearMap, LinearPart, kinks, linear_part
from fastmono.interpret_neurons import Pair, Setting, SingleNeuron, auc, best_setting, pair, roc, single_neuron
from fastmono.interpret_parts import Parts, Response, Split, responses, split
from fastmono.metrics import THRESHOLD, HeldOut, Parameters, monosemanticity, single_feature_activations
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec

__all__ = [
    "Definition",
    "Findings",
    "Kinks",
    "LinearMap",
    "LinearPart",
    "Pair",
    "Parts",
    "Response",
    "Setting",
    "SingleNeuron",
    "Split",
    "auc",
    "best_setting",
    "definition",
    "findings",
    "kinks",
    "linear_part",
    "low_slopes",
    "pair",
    "responses",
    "roc",
    "single_neuron",
    "split",
    "summary",
]

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, THRESHOLD, 0.9995, 0.9998, 0.9999)
AMPLITUDES = tuple(i / 20 for i in range(1, 41))
PRESENCE = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
PRESENCE_SAMPLES = 512
LOW_AMPLITUDE = 0.1
PAIR_NUMBERS = (
    "cosine", "loss", "loss_best_single", "loss_beside", "loss_best_single_beside", "auc", "auc_single", "auc_linear",
    "auc_linear_single",
)  # fmt: skip
MAP_NUMBERS = (
    "effective_rank", "identity_distance", "identity_rank", "identity_scale", "target_distance", "target_scale",
)  # fmt: skip
LINEAR_NUMBERS = (
    "linear_share", "linear_share_served", "loss", "loss_fit", "loss_tangent", "loss_constant", "loss_removed",
    "loss_linear_model",
)  # fmt: skip


@dataclass(frozen=True)
class Definition:
    """How many neurons are monosemantic under other definitions than the published one.

    Attributes:
        thresholds: [T]; amplitudes: [A] of the probe; presence: [C] of the other features, as a share of their own
            frequency.
        by_amplitude: int64 [A, T], counts at each amplitude and threshold, no other feature present.
        by_presence: int64 [C, T], counts at amplitude 1, others present.
    """

    thresholds: tuple[float, ...]
    amplitudes: tuple[float, ...]
    presence: tuple[float, ...]
    by_amplitude: Tensor
    by_presence: Tensor


def _effects(parts: Parts, presence: float) -> Tensor:
    """|E h(feature at 1) - E h(feature absent)| of every neuron and probe, [k, n_probes], the others thinned out."""
    spec, b = parts.spec, parts.params["b"]
    f = torch.zeros(1, spec.n_features, dtype=torch.float64)
    if presence > 0:  # the sampler's word decides presence and value: rarer features are a subset of the samples'
        sampler = FeatureSampler(spec.replace(feature_prob=min(1.0, presence * spec.feature_prob)))
        f = sampler.evaluation(0, PRESENCE_SAMPLES).double()
    z = f @ parts.overlaps.T + b
    effects = torch.empty(spec.n_neurons, parts.n_probes, dtype=torch.float64)
    for i in range(spec.n_features):
        own = parts.overlaps[:, i]
        absent = z - f[:, i, None] * own
        without = parts.phi(absent).mean(0)
        for probe in range(i, parts.n_probes, spec.n_features):
            effects[:, probe] = parts.phi(absent + parts.feature_and_sign(probe)[1] * own).mean(0) - without
    return effects.abs()


@single_thread()
@torch.no_grad()
def definition(
    parts: Parts,
    thresholds: Sequence[float] = THRESHOLDS,
    amplitudes: Sequence[float] = AMPLITUDES,
    presence: Sequence[float] = PRESENCE,
) -> Definition:
    """Count monosemantic neurons under other definitions: how much does the headline depend on it?

    At another amplitude the table is that of the published measure (as `split` takes it: |S| for gelu and solu, both
    signs for abs), with probes of that amplitude. With other features present an entry is what the feature changes,
    |E h(f_i = 1) - E h(f_i = 0)| over 512 evaluation samples of the others, each at `presence` times its own frequency:
    what other features do by themselves is then not held against a neuron. At presence 0 this is the published measure
    but for a neuron that is on without any feature.

    Args:
        thresholds: of the largest entry over the sum.
        amplitudes: of the probes, above 0; features lie in (0, 1).
        presence: at least 0; 1 is the model's own distribution.

    Raises:
        ValueError: an amplitude that is not above 0, or a presence below 0.
    """
    if any(not a > 0 for a in amplitudes) or any(not c >= 0 for c in presence):
        raise ValueError(f"amplitudes={list(amplitudes)}, presence={list(presence)}: must be above 0, and at least 0")

    def counts(table: Tensor) -> list[int]:
        scores = monosemanticity(table)
        return [int((scores > threshold).sum()) for threshold in thresholds]

    by_amplitude = []
    for a in amplitudes:
        signs = (a, -a) if parts.spec.task == "abs" else (a,)
        table = torch.cat([single_feature_activations(parts.weights, parts.spec.activation, s) for s in signs], 1)
        by_amplitude.append(counts(table if parts.spec.activation == "relu" else table.abs()))
    by_presence = [counts(_effects(parts, c)) for c in presence]
    return Definition(
        tuple(thresholds), tuple(amplitudes), tuple(presence), torch.tensor(by_amplitude), torch.tensor(by_presence)
    )


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


@dataclass(frozen=True)
class Findings:
    """All that is found in one model; `numbers` is its summary, `interpret_plots` draws it.

    Attributes:
        singles, pairs: of every probe with one or with two monosemantic neurons; empty where the nonlinearity is not
            relu.
        kinks: None where the nonlinearity is not relu.
        notes: what does not apply to this model, a line each.
    """

    parts: Parts
    singles: list[SingleNeuron]
    pairs: list[Pair]
    linear: LinearPart
    kinks: Kinks | None
    notes: tuple[str, ...]

    def numbers(self) -> dict[str, float | None]:
        """See `summary`."""
        split, linear, kinks = self.parts.split, self.linear, self.kinks
        found: dict[str, float | None] = {
            "neurons_mono": float(split.monosemantic.sum()),
            "neurons_poly": float(split.polysemantic.sum()),
            "neurons_dead": float(split.dead.sum()),
            **{f"probes_{n}": float((split.per_probe == n).sum()) for n in range(3)},
            "probes_more": float((split.per_probe > 2).sum()),
        }
        settings = {"": "measured", "optimal_": "optimal", "beside_": "measured_beside",
                    "optimal_beside_": "optimal_beside"}  # fmt: skip
        singles = [one for one in self.singles if one.measured.gain > 0]
        found["singles_recovering"] = float(len(singles))
        found["singles_correcting"] = float(len(self.singles) - len(singles))
        for prefix, setting in settings.items():
            for name in ("threshold", "gain", "loss"):
                found[f"single_{prefix}{name}"] = _median([getattr(getattr(one, setting), name) for one in singles])
        for name in ("nothing", "interference", "auc", "auc_linear"):
            found[f"single_{name}"] = _median([getattr(one, name) for one in singles])
        for place, (kink, slope) in enumerate((("kink_low", "slope_between"), ("kink_high", "slope_beyond"))):
            found[f"pair_{kink}"] = _median([two.thresholds[place] for two in self.pairs])
            found[f"pair_{slope}"] = _median([two.slopes[place] for two in self.pairs])
        for name in PAIR_NUMBERS:
            found[f"pair_{name}"] = _median([getattr(two, name) for two in self.pairs])
        values = {f"{kind}_{name}": getattr(getattr(linear, kind), name)
                  for kind in ("tangent", "fit") for name in MAP_NUMBERS}  # fmt: skip
        values |= {name: getattr(linear, name) for name in LINEAR_NUMBERS}
        found |= {name: None if value is None else float(value) for name, value in values.items()}
        for group in ("monosemantic", "polysemantic"):
            for visible in ("", "_visible"):
                counts = None if kinks is None else getattr(kinks, group + visible).double()
                found[f"kinks_{group[:4]}{visible}"] = None if counts is None else float(counts.mean())
        return found | low_slopes(self.parts)


def findings(
    params: Parameters, spec: ModelSpec, threshold: float = THRESHOLD, held_out: HeldOut | None = None
) -> Findings:
    """Interpret one model: everything but `responses` and `definition`, which are made where they are drawn.

    Args:
        params, spec: as `run.parameters(i)` and `run.specs[i]` give them.
        threshold: of monosemanticity.
        held_out: keeps the evaluation samples for the next model.

    Raises:
        ValueError: as `Parts` does.
    """
    parts, notes = Parts(params, spec, threshold, held_out), []
    relu = spec.activation == "relu"
    if not relu:
        notes.append(f"{spec.activation} is smooth: no thresholds, no kinks; monosemantic neurons are counted in |S|")
    if spec.task == "abs":
        notes.append("abs: a probe is a feature and a sign; no linear map approximates |f|, so no distance from one")
    if spec.task == "reprojector":
        notes.append("reprojector: the output for a feature is read along P2 e_i, and P2 takes the identity's place")
    probes = [[p for p in parts.split.probes_with(n) if parts.rises(p)] if relu else [] for n in (1, 2)]
    return Findings(
        parts,
        [single_neuron(parts, probe) for probe in probes[0]],
        [pair(parts, probe) for probe in probes[1]],
        linear_part(parts),
        kinks(parts) if relu else None,
        tuple(notes),
    )


@single_thread()
@torch.no_grad()
def low_slopes(parts: Parts) -> dict[str, float | None]:
    """low_mono, low_poly, low_path: mean slope, from amplitude 0 to 0.1 of a feature alone, of each part of its output.

    The mean over probes, in the direction of the target: a perfect model has slopes that add up to 1. low_path is None
    without a linear path.
    """
    signs = (1.0, -1.0) if parts.spec.task == "abs" else (1.0,)
    b, slopes = parts.params["b"][:, None], []
    for sign in signs:
        rise = parts.phi(sign * LOW_AMPLITUDE * parts.overlaps + b) - parts.phi(b)  # [k, N]
        slopes.append((rise * parts.readout.T) / LOW_AMPLITUDE)
    each = torch.stack(slopes).mean((0, 2))  # [k]
    path = None if parts.path is None else float(parts.path.diagonal().mean()) if len(signs) == 1 else 0.0
    return {
        "low_mono": float(each[parts.split.monosemantic].sum()),
        "low_poly": float(each[parts.split.polysemantic].sum()),
        "low_path": path,
    }


def summary(
    params: Parameters, spec: ModelSpec, threshold: float = THRESHOLD, held_out: HeldOut | None = None
) -> dict[str, float | None]:
    """One model in numbers, for tables over many: claims 6 and 7 of the paper. None where a notion does not apply.

    Neurons   neurons_mono, neurons_poly, neurons_dead; probes_0, _1, _2, _more: probes with so many monosemantic ones
    One       singles_recovering, singles_correcting: probes with one, of positive and of negative gain; single_*:
              medians over the former: threshold, gain, loss; optimal_*: at the best setting; both also beside_*: for
              what the rest of the model leaves to do; nothing (loss without), interference, auc, auc_linear
              (`SingleNeuron`)
    Two       pair_*: medians over the probes with two: kink_low, kink_high, slope_between, slope_beyond, and the
              cosine, losses and AUCs of `Pair`
    Others    tangent_*, fit_*: effective_rank, identity_distance, _rank, _scale, target_distance, _scale (`LinearMap`);
              linear_share, linear_share_served, loss, loss_fit, loss_tangent, loss_constant, loss_removed,
              loss_linear_model (`LinearPart`); kinks_mono, kinks_poly, the same with _visible: means over probes
              (`Kinks`); low_mono, low_poly, low_path (`low_slopes`)

    Arguments and errors: those of `findings`.
    """
    return findings(params, spec, threshold, held_out).numbers()
