"""What the tests of the reference and CPU engines share: small models that differ, and comparisons bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastmono.block import Block, Model
from fastmono.engines.cpu import CpuEngine
from fastmono.engines.reference import ReferenceEngine
from fastmono.spec import ModelSpec

TASKS = ("decoder", "reprojector", "abs")
ACTIVATIONS = ("relu", "gelu", "solu")
OPTIMIZERS = ("lamb", "adamw", "sgd")
ENGINES = pytest.mark.parametrize("engine", [ReferenceEngine, CpuEngine])
Engine = type[ReferenceEngine] | type[CpuEngine]

SMALL = {"n_features": 13, "d_embed": 5, "n_neurons": 19, "batch_size": 77, "feature_prob": 0.3}
LINEAR = {**SMALL, "linear_path": 3}
TILED = {"n_features": 24, "d_embed": 9, "n_neurons": 530, "batch_size": 600, "feature_prob": 0.1}
RATES = {"lamb": 0.01, "adamw": 0.01, "sgd": 0.02}


def spec_of(**fields: object) -> ModelSpec:
    return ModelSpec(**{**SMALL, "steps": 64, "lr": 0.01, **fields})  # type: ignore[arg-type]


def mixed_specs(base: ModelSpec) -> list[ModelSpec]:
    """Models of one shape that differ in all else; the first and the last two share a seed."""
    lr = RATES[base.optimizer]
    mode = "rate" if base.task == "reprojector" else "per_neuron"
    return [
        base.replace(lr=lr, seed=1),
        base.replace(lr=lr / 3, seed=2, init_bias=-0.2, bias_decay=2.0, l1=0.05),
        base.replace(lr=lr / 2, seed=1, schedule="constant", frequency="power_law", init_bias=0.1,
                     bias_decay=2.0, bias_decay_mode=mode),
        base.replace(lr=lr / 2, seed=1, schedule="cosine", l1=0.2, init_bias=-0.1, bias_decay=1.5,
                     bias_decay_mode="rate"),
    ]  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def same_state(a: Model, b: Model) -> bool:
    parts = ("parameters", "first_moment", "second_moment")
    same = all(same_bits(getattr(a, part), getattr(b, part)) for part in parts) and torch.equal(a.order, b.order)
    return same and a.diverged_step == b.diverged_step


def train(engine: Engine, specs: Sequence[ModelSpec], *cuts: int) -> tuple[list[Model], Tensor]:
    block, trainer = Block.new(specs), engine()
    losses = torch.cat([trainer.advance(block, n) for n in cuts], 1)
    assert block.step == sum(cuts)
    return block.models, losses
