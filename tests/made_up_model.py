"""Models made by hand, in the tensors that `run.parameters(i)` gives: neurons of one feature, and some of many."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmono.block import projection
from fastmono.philox import Purpose
from fastmono.spec import ModelSpec

TASKS, ACTIVATIONS = ("decoder", "reprojector", "abs"), ("relu", "gelu", "solu")


def spec_of(**fields: object) -> ModelSpec:
    shape = {"n_features": 13, "d_embed": 6, "n_neurons": 16, "feature_prob": 0.15, "seed": 3}
    return ModelSpec(**{**shape, **fields})  # type: ignore[arg-type]


def random_model(spec: ModelSpec, rank: int = 0) -> dict[str, Tensor]:
    """Random weights, float32: neurons 0 to 3 serve features 0, 1, 2, 2 alone, neuron 4 is dead, the rest serve many.

    With a rank, a linear path of it.
    """
    generator = torch.Generator().manual_seed(spec.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    k, m, o = spec.n_neurons, spec.d_embed, spec.d_output
    P = projection(spec.seed, Purpose.PROJECTION, spec.n_features, m)
    W_in, b, W_out = 0.7 * normal(k, m), 0.2 * normal(k), 0.3 * normal(o, k)
    read = projection(spec.seed, Purpose.SECOND_PROJECTION, spec.n_features, m) if o == m else torch.eye(o)
    for j, (i, gain, threshold) in enumerate([(0, 1.5, 0.1), (1, 2.0, 0.2), (2, 1.2, 0.05), (2, 0.8, 0.2)]):
        W_in[j] = gain * P[:, i] + 0.1 * normal(m)
        overlap = (W_in[j] @ P).abs()
        own, overlap[i] = float(overlap[i]), 0.0
        b[j] = -float(overlap.max()) - threshold * (own - float(overlap.max()))
        W_out[:, j] += read[:, i]
    b[4] = -100.0
    params = {"W_in": W_in, "b": b, "W_out": W_out, "P": P}
    if spec.task == "reprojector":
        params["P2"] = read
    if rank:
        params |= {"L_in": 0.3 * normal(rank, m), "L_out": 0.3 * normal(o, rank)}
    return params


def one_to_one(threshold: float, gain: float, feature_prob: float = 0.1) -> tuple[dict[str, Tensor], ModelSpec]:
    """Six features in six dimensions, a neuron each, no interference: y_i = gain relu(f_i - threshold)."""
    spec = spec_of(n_features=6, d_embed=6, n_neurons=6, feature_prob=feature_prob)
    eye = torch.eye(6)
    return {"W_in": 2 * eye, "b": torch.full((6,), -2 * threshold), "W_out": gain / 2 * eye, "P": eye}, spec
