"""The models that tests/test_gpu.py and the calls train, and so what has to be compiled beforehand."""

from __future__ import annotations

from typing import Any

import fastmono as fm
from benchmarks.suites import TINY as TINY_GRID
from fastmono.spec import ModelSpec

TINY = ModelSpec(n_features=64, d_embed=16, n_neurons=128, feature_prob=1 / 16, batch_size=256, steps=2**20, lr=0.01)
DEMO = fm.preset("demo")[4].replace(steps=2**20)
WIDE = DEMO.replace(n_neurons=2048)  # streamed
SHAPES = {
    "tiny": TINY, "demo": DEMO, "wide": WIDE, "odd": TINY.replace(n_features=45, d_embed=7, n_neurons=51),
    "tiny dead": TINY.replace(init_bias=-0.6), "wide dead": WIDE.replace(init_bias=-0.6),
    "narrow": TINY.replace(n_neurons=48, batch_size=2**14),  # in bf16 one kernel for both passes
    "wide waking": WIDE.replace(init_bias=-1.0, bias_decay=2.4, lr=0.01),  # no survey after some fifty steps
}  # fmt: skip
PRECISIONS = ("fp32", "tf32", "bf16")
AGREEMENT = [  # every task in both regimes; each further shape and task takes the compiler seconds
    *((shape, task) for shape in ("tiny", "wide") for task in ("decoder", "reprojector", "abs")),
    ("demo", "decoder"), ("odd", "abs"), ("tiny dead", "decoder"), ("wide dead", "abs"), ("narrow", "decoder"),
]  # fmt: skip
"""Shapes and tasks that are compared with float64, in every precision."""
ACTIVATIONS, OPTIMIZERS = ("gelu", "solu"), ("lamb", "adamw", "sgd")
"""Compared with the reference at the tiny shape, in fp32."""


def agreement_spec(shape: str, task: str) -> ModelSpec:
    """The model of a shape and task that is compared with float64."""
    base = SHAPES[shape]
    return base.replace(task=task, l1=0.01, init_bias=min(base.init_bias, -0.1), bias_decay=0.03)


def halved(shape: str, i: int = 0) -> ModelSpec:
    """Model i of a grid of a shape: rates and seeds differ, and every second model is half as wide."""
    base = SHAPES[shape]
    return base.replace(lr=0.001 * (1 + i % 7), seed=i // 100, n_neurons=base.n_neurons // (1 + i % 2))


Case = tuple[list[ModelSpec], str, dict[str, Any]]
"""Models of one block, their precision, and the switches of their engine."""


def published_grid(bias: float | None = None) -> list[ModelSpec]:
    """The paper's twelve models, as if they never ended; with a bias given, twelve rates at that one."""
    specs = [spec.replace(steps=2**30) for spec in fm.preset("published")]
    if bias is None:
        return specs
    own = [spec for spec in specs if spec.init_bias == bias]
    return own + [spec.replace(lr=1.1 * spec.lr) for spec in own]


def to_compile(call: int) -> list[Case]:
    """Blocks whose kernels are all that a call launches, the slowest to compile first in each."""
    grid = published_grid(0.0)[:1]
    if call != 1:
        return [(specs, precision, {}) for specs in (grid, [TINY_GRID]) for precision in PRECISIONS]
    found: list[Case] = [(published_grid()[::6], "bf16", {})]  # with the survey of the models at a negative bias
    for precision in PRECISIONS:
        found += [([agreement_spec(*case)], precision, {}) for case in AGREEMENT]
    found += [([TINY.replace(activation=a, optimizer=o)], "fp32", {}) for a in ACTIVATIONS for o in OPTIMIZERS]
    for precision in ("fp32", "bf16"):
        found += [([halved(shape, i) for i in range(2)], precision, {}) for shape in SHAPES]
    found += [([SHAPES[shape].replace(optimizer="sgd")], "bf16", {}) for shape in SHAPES]
    return found
