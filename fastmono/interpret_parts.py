"""A trained model taken apart: neurons that serve one feature alone, the others, the linear path, and what each gives.

    y = W_out h + L_out L_in x  =  sum over monosemantic j  +  sum over the other j  +  linear path

"The output for feature i" is r_i . y, with r_i = e_i (decoder, abs) or P2 e_i, a unit vector (reprojector, whose
outputs are no features). A *probe* is one feature alone: the N vectors P e_i; for abs, whose features are signed, also
-P e_i, as probes N to 2 N - 1: a neuron for positive and one for negative values of a feature are told apart.
All but the split is in float64. Paper: section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastmono.block import single_thread
from fastmono.metrics import THRESHOLD, HeldOut, Parameters, monosemantic_neurons
from fastmono.metrics import single_feature_activations as activations
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec
from fastmono.tasks import ACTIVATION

INTERFERENCE_SAMPLES = 4096
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Split:
    """The neurons of a model in three groups, each neuron in one.

    Attributes:
        monosemantic: bool [k]; above the threshold (`fastmono.metrics`) on the probes, in |S| for gelu and solu.
        dead: bool [k]; of the rest, those that are 0 on every sample of the evaluation stream (gelu and solu: hardly
            ever, only where the activation underflows).
        polysemantic: bool [k]; all others.
        probe: int64 [k]; the probe that a monosemantic neuron serves, -1 for others.
        per_probe: int64 [N], for abs [2 N]; how many monosemantic neurons each probe has.
    """

    monosemantic: Tensor
    dead: Tensor
    polysemantic: Tensor
    probe: Tensor
    per_probe: Tensor

    def neurons_of(self, probe: int) -> list[int]:
        """The monosemantic neurons of a probe, ascending."""
        return (self.probe == probe).nonzero().flatten().tolist()

    def probes_with(self, count: int) -> list[int]:
        """The probes with so many monosemantic neurons, ascending."""
        return (self.per_probe == count).nonzero().flatten().tolist()


@single_thread()
@torch.no_grad()
def split(params: Parameters, spec: ModelSpec, threshold: float = THRESHOLD, held_out: HeldOut | None = None) -> Split:
    """Tell a model's neurons apart, in float32 as the measures of a run do.

    For relu, decoder and reprojector the monosemantic neurons are those that `metrics.counts` counts as mono_neurons;
    for abs its mono_neurons_signed; for gelu and solu its mono_neurons_abs, since the published ratio loses its
    meaning where activations can be negative.

    Args:
        params: W_in [k, m], b [k], P [m, N], as `run.parameters(i)` gives them.
        held_out: keeps the evaluation samples for the next model.
    """
    sfa = activations(params, spec.activation)
    if spec.task == "abs":
        sfa = torch.cat((sfa, activations(params, spec.activation, -1.0)), 1)
    if spec.activation != "relu":
        sfa = sfa.abs()
    mono = monosemantic_neurons(sfa, threshold)
    active = torch.zeros_like(mono)
    for f in (held_out or HeldOut()).tiles(spec):
        active |= (ACTIVATION[spec.activation](f @ params["P"].T @ params["W_in"].T + params["b"]) != 0).any(0)
    probe = torch.where(mono, sfa.argmax(1), -1)
    per_probe = torch.bincount(probe[mono], minlength=sfa.shape[1])
    return Split(mono, ~mono & ~active, ~mono & active, probe, per_probe)


class Parts:
    """A model in the terms of this module, float64; what the other functions of `fastmono.interpret` take.

    Args:
        params: W_in [k, m], b [k], W_out [o, k], P [m, N], P2 [m, N] for the reprojector, and L_in [r, m], L_out [o, r]
            where the model has a linear path; as `run.parameters(i)` gives them.
        spec: the model's own.
        threshold: of monosemanticity.
        held_out: keeps the evaluation samples for the next model.

    Attributes:
        weights: what was given, float32; params: the same in float64.
        split: the groups of neurons.
        overlaps: W_in P [k, N], what one unit of each feature adds to each neuron.
        readout: r_i . W_out [N, k], what one unit of each neuron adds to the output for each feature.
        path: r_i . L_out L_in P [N, N], or None for a model without a linear path.

    Raises:
        ValueError: a tensor is not finite (a model that diverged), shapes do not fit the spec, or no ratio can exceed
            the threshold.
    """

    def __init__(
        self, params: Parameters, spec: ModelSpec, threshold: float = THRESHOLD, held_out: HeldOut | None = None
    ) -> None:
        k, m, n, o = spec.n_neurons, spec.d_embed, spec.n_features, spec.d_output
        shapes = {"W_in": (k, m), "b": (k,), "W_out": (o, k), "P": (m, n)}
        if spec.task == "reprojector":
            shapes["P2"] = (m, n)
        for name, shape in shapes.items():
            if name not in params or params[name].shape != shape:
                found = list(params[name].shape) if name in params else "missing"
                raise ValueError(f"{name} is {found}: the model's spec asks for {list(shape)}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold!r}: must be a number from 0 to 1, and below 1")
        for name, value in params.items():
            if not value.isfinite().all():
                raise ValueError(f"{name} is not finite: there is nothing to interpret in a model that diverged so far")
        self.spec, self.weights, self.held_out = spec, params, held_out or HeldOut()
        self.split = split(params, spec, threshold, self.held_out)
        with single_thread(), torch.no_grad():
            self.params = {name: value.double() for name, value in params.items()}
            self.overlaps = self.params["W_in"] @ self.params["P"]
            read = self.params["P2"].T if spec.task == "reprojector" else None
            self.readout = self.params["W_out"] if read is None else read @ self.params["W_out"]
            self.path: Tensor | None = None
            if "L_in" in params:
                path = self.params["L_out"] @ (self.params["L_in"] @ self.params["P"])
                self.path = path if read is None else read @ path

    @property
    def n_probes(self) -> int:
        """N, or 2 N for abs."""
        return len(self.split.per_probe)

    def feature_and_sign(self, probe: int) -> tuple[int, float]:
        """The feature of a probe, and 1.0, or -1.0 for a negative one. `ValueError` for a probe that is not there."""
        if not 0 <= probe < self.n_probes:
            raise ValueError(f"probe={probe}: must be a whole number from 0 to {self.n_probes - 1}")
        return probe % self.spec.n_features, 1.0 if probe < self.spec.n_features else -1.0

    def rises(self, probe: int) -> bool:
        """Whether each monosemantic neuron of a probe gets more active with its amplitude, as it should.

        A neuron with a positive bias, on by itself, that every other feature turns off counts as monosemantic, too.
        """
        feature, sign = self.feature_and_sign(probe)
        return bool((sign * self.overlaps[self.split.neurons_of(probe), feature] > 0).all())

    def phi(self, z: Tensor) -> Tensor:
        """The model's nonlinearity."""
        return ACTIVATION[self.spec.activation](z)

    @cached_property
    def others(self) -> Tensor:
        """Features of the model's own distribution, float64 [4096, N]: the start of its evaluation stream."""
        return FeatureSampler(self.spec).evaluation(0, INTERFERENCE_SAMPLES).double()

    @cached_property
    def others_z(self) -> Tensor:
        """W_in P f of those samples, [4096, k], without the bias."""
        with single_thread(), torch.no_grad():
            return self.others @ self.overlaps.T

    def z_with(self, feature: int, value: Tensor | float) -> Tensor:
        """z [4096, k] of those samples with one feature set to a value, a number or one for each sample, [4096, 1]."""
        return self.others_z + (value - self.others[:, feature, None]) * self.overlaps[:, feature] + self.params["b"]

    def names(self) -> tuple[str, ...]:
        """The parts that the output has: whole, monosemantic, polysemantic, and linear path where there is one."""
        return ("whole", "monosemantic", "polysemantic", *(() if self.path is None else ("linear path",)))

    def outputs(self, feature: int, h: Tensor, linear: Tensor | None) -> dict[str, Tensor]:
        """The output for a feature by part, for activations h [..., k] and the linear path's own output [...]."""
        everyone = torch.ones_like(self.split.dead)  # a neuron that was dead on the evaluation stream may fire here
        groups = torch.stack((everyone, self.split.monosemantic, self.split.polysemantic)) * self.readout[feature]
        whole, mono, poly = (h @ groups.T).unbind(-1)
        found = {"whole": whole, "monosemantic": mono, "polysemantic": poly}
        return found if linear is None else found | {"whole": whole + linear, "linear path": linear}


@dataclass(frozen=True)
class Response:
    """The output for one feature as a function of its amplitude, by part (`Parts.names`).

    Attributes:
        feature, amplitudes: which, and the values it takes, float64 [A].
        alone: each part's output [A] with no other feature present.
        mean: each part's mean [A] with the others drawn from the model's own distribution.
        quantiles: each part's quantiles [Q, A] there, at `levels`.
        levels: the quantiles' levels.
    """

    feature: int
    amplitudes: Tensor
    alone: dict[str, Tensor]
    mean: dict[str, Tensor]
    quantiles: dict[str, Tensor]
    levels: tuple[float, ...]


@single_thread()
@torch.no_grad()
def responses(
    parts: Parts, feature: int, amplitudes: Tensor | None = None, levels: Sequence[float] = QUANTILES
) -> Response:
    """The output for a feature against its amplitude: alone, and under interference from the others (section 5).

    The interference is that of the first 4,096 samples of the model's evaluation stream, with this feature set to
    each amplitude in turn: features are independent, so that is the distribution given the amplitude.

    Args:
        amplitudes: [A]; 0 to 1 by default (abs: -1 to 1) in steps of 1/50.
        levels: of the quantiles, each in [0, 1].

    Raises:
        ValueError: a feature that the model does not have.
    """
    if not 0 <= feature < parts.spec.n_features:
        raise ValueError(f"feature={feature}: must be a whole number from 0 to {parts.spec.n_features - 1}")
    if amplitudes is None:
        amplitudes = torch.linspace(-1 if parts.spec.task == "abs" else 0, 1, 101 if parts.spec.task == "abs" else 51)
    amplitudes = amplitudes.double()
    own, b = parts.overlaps[:, feature], parts.params["b"]
    path = None if parts.path is None else parts.path[feature]
    alone = parts.outputs(
        feature, parts.phi(amplitudes[:, None] * own + b), None if path is None else amplitudes * path[feature]
    )
    levels_ = torch.tensor(levels, dtype=torch.float64)
    mean: dict[str, list[Tensor]] = {name: [] for name in parts.names()}
    quantiles: dict[str, list[Tensor]] = {name: [] for name in parts.names()}
    for a in amplitudes.tolist():
        linear = None
        if path is not None:
            linear = parts.others @ path + (a - parts.others[:, feature]) * path[feature]
        found = parts.outputs(feature, parts.phi(parts.z_with(feature, a)), linear)
        for name, values in found.items():
            mean[name].append(values.mean())
            quantiles[name].append(values.quantile(levels_))
    return Response(
        feature,
        amplitudes,
        alone,
        {name: torch.stack(values) for name, values in mean.items()},
        {name: torch.stack(values, 1) for name, values in quantiles.items()},
        tuple(levels),
    )
