"""How monosemantic a model is, and how well it does its task.

The probes are the N single features: h of neuron j for the input P e_i, a k x N table S. A neuron is monosemantic when
max_i S_ji / (1e-10 + sum_i S_ji) > 0.999 (recipe fact 13). Dead neurons have no activations and so are not.
gelu and solu can be negative, where that ratio loses its meaning: there max|S| / sum|S| is also given. For abs, whose
features are signed, a neuron that fires for f_i > 0 alone looks the same as one that also fires for other features'
negative values: there the probes -P e_i are also used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastmono.block import single_thread
from fastmono.philox import FeatureSampler, stream_key
from fastmono.spec import ModelSpec
from fastmono.tasks import ACTIVATION, target

THRESHOLD = 0.999
EVALUATION_SAMPLES = 8192
TILE_NUMBERS = 2**19

Parameters = Mapping[str, Tensor]


def single_feature_activations(params: Parameters, activation: str = "relu", amplitude: float = 1.0) -> Tensor:
    """S [k, N]: the activation of each neuron for the input `amplitude` P e_i, one feature at a time.

    Args:
        params: W_in [k, m], b [k], P [m, N].
        activation: relu | gelu | solu.
        amplitude: the feature's value; -1 gives the negative probes of the abs task.

    Raises:
        ValueError: unknown activation, or shapes that do not fit together.
    """
    if activation not in ACTIVATION:
        raise ValueError(f"activation={activation!r}: must be one of {', '.join(ACTIVATION)}")
    W_in, b, P = params["W_in"], params["b"], params["P"]
    if W_in.dim() != 2 or P.dim() != 2 or W_in.shape[1] != P.shape[0] or b.shape != W_in.shape[:1]:
        raise ValueError(f"W_in {list(W_in.shape)}, b {list(b.shape)}, P {list(P.shape)}: must be [k, m], [k], [m, N]")
    return ACTIVATION[activation](amplitude * (W_in @ P) + b[:, None])


def monosemanticity(sfa: Tensor) -> Tensor:
    """max_i S_i / (1e-10 + sum_i S_i) of each neuron, [k], for S [k, N]: 1 when one feature alone activates it.

    Raises `ValueError` when S is not a table with at least one feature.
    """
    if sfa.dim() != 2 or sfa.shape[1] == 0:
        raise ValueError(f"single-feature activations have shape [k, N], not {list(sfa.shape)}")
    return sfa.amax(1) / (1e-10 + sfa.sum(1))


def monosemantic_neurons(sfa: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Which neurons are monosemantic, bool [k], for S [k, N]."""
    return monosemanticity(sfa) > threshold


def features_by_neurons(sfa: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """How many monosemantic neurons each feature has, int64 [N], for S [k, N]: a neuron counts for its strongest."""
    strongest = sfa.argmax(1)[monosemantic_neurons(sfa, threshold)]
    return torch.bincount(strongest, minlength=sfa.shape[1])


def counts(params: Parameters, spec: ModelSpec, threshold: float = THRESHOLD) -> dict[str, float]:
    """The measures that need no samples.

    mono_neurons, and the same per feature (count / N) and per neuron (count / k); features_0, _1, _2, _more: features
    with that many monosemantic neurons; mean_bias. For gelu and solu mono_neurons_abs, counted on |S|. For abs
    mono_neurons_signed, counted on the probes P e_i and -P e_i together.
    """
    with single_thread(), torch.no_grad():
        sfa = single_feature_activations(params, spec.activation)
        count = int(monosemantic_neurons(sfa, threshold).sum())
        per_feature = features_by_neurons(sfa, threshold)
        found = {
            "mono_neurons": float(count),
            "mono_per_feature": count / spec.n_features,
            "mono_per_neuron": count / spec.n_neurons,
            **{f"features_{n}": float((per_feature == n).sum()) for n in range(3)},
            "features_more": float((per_feature > 2).sum()),
            "mean_bias": float(params["b"].double().mean()),
        }
        if spec.activation != "relu":
            found["mono_neurons_abs"] = float(monosemantic_neurons(sfa.abs(), threshold).sum())
        if spec.task == "abs":
            both = torch.cat((sfa, single_feature_activations(params, spec.activation, -1.0)), 1)
            found["mono_neurons_signed"] = float(monosemantic_neurons(both, threshold).sum())
        return found


def _held_out(spec: ModelSpec) -> Iterator[Tensor]:
    sampler = FeatureSampler(spec)
    widest = max(spec.n_features, spec.n_neurons)
    rows = max(1, min(EVALUATION_SAMPLES, TILE_NUMBERS // widest))
    for first in range(0, EVALUATION_SAMPLES, rows):
        yield sampler.evaluation(first, min(rows, EVALUATION_SAMPLES - first))


class HeldOut:
    """The evaluation stream: 8,192 samples that no step trains on, the same for all models that share a seed.

    Keeps the last stream's samples when they are small (64 MiB at most), since models are measured one after another.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._tiles: list[Tensor] = []

    def tiles(self, spec: ModelSpec) -> Iterator[Tensor]:
        """Features, float32 [rows, N], until the samples are through."""
        key = stream_key(spec), spec.n_neurons
        if self._key == key:
            yield from self._tiles
        elif 4 * EVALUATION_SAMPLES * spec.n_features > 2**26:
            yield from _held_out(spec)
        else:
            self._tiles = list(_held_out(spec))
            self._key = key
            yield from self._tiles

    def measure(self, params: Parameters, spec: ModelSpec) -> dict[str, float]:
        """eval_loss (squared error summed over outputs, mean over samples), density (share of activations that are
        not zero) and dead_neurons (zero on every sample), in float32.

        Args:
            params: W_in [k, m], b [k], W_out [o, k], P [m, N], P2 [m, N] for the reprojector, and L_in [r, m],
                L_out [o, r] of a linear path: the loss is that of the whole model, the others are of neurons.
        """
        loss, active = 0.0, torch.zeros(spec.n_neurons, dtype=torch.int64)
        with single_thread(), torch.no_grad():
            for f in self.tiles(spec):
                x = f @ params["P"].T
                h = ACTIVATION[spec.activation](x @ params["W_in"].T + params["b"])
                e = h @ params["W_out"].T - target(spec.task, f, params.get("P2"))
                if "L_in" in params:
                    e += x @ params["L_in"].T @ params["L_out"].T
                loss += float(e.square().sum())
                active += (h != 0).sum(0)
        return {
            "eval_loss": loss / EVALUATION_SAMPLES,
            "density": int(active.sum()) / (EVALUATION_SAMPLES * spec.n_neurons),
            "dead_neurons": float((active == 0).sum()),
        }


NAMES = (
    "eval_loss", "mono_neurons", "mono_per_feature", "mono_per_neuron", "mono_neurons_abs", "mono_neurons_signed",
    "features_0", "features_1", "features_2", "features_more", "dead_neurons", "mean_bias", "density",
)  # fmt: skip
"""Every measure taken at a checkpoint, in the order in which runs store them."""


def measure(params: Parameters, spec: ModelSpec, held_out: HeldOut) -> list[float]:
    """All of `NAMES` for one model; NaN for a measure that its task and activation do not have."""
    found = counts(params, spec) | held_out.measure(params, spec)
    return [found.get(name, float("nan")) for name in NAMES]
