"""Engines: `reference` is the truth, `cpu` is fast without a GPU; `advance` is all that a trainer calls."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastmono.block import PRECISIONS, Block
from fastmono.engines.cpu import CpuEngine
from fastmono.engines.reference import ReferenceEngine
from fastmono.spec import ModelSpec


class Engine(Protocol):
    """What trains a block."""

    name: str
    precision: str

    def advance(self, block: Block, n_steps: int) -> Tensor:
        """Train every model of the block for n steps, in place, and return the losses, float32 [A, n].

        Where a model did not train (it has diverged, or has no steps left) its loss is NaN. A model whose loss or
        updated parameters are not finite gets its `diverged_step` and trains no further. Where calls cut the steps
        changes no bit.
        """
        ...

    @staticmethod
    def workspace_bytes(spec: ModelSpec, n_streams: int) -> int:
        """Memory beyond the models' own state, for models of one shape that see so many streams."""
        ...


ENGINES: dict[str, type[CpuEngine] | type[ReferenceEngine]] = {"reference": ReferenceEngine, "cpu": CpuEngine}


def resolve(engine: str, precision: str) -> tuple[str, str, str]:
    """Engine and precision by name, with "auto" decided, and the reason in a few words.

    Raises `ValueError` for an unknown name, or a precision that the engine does not have.
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine={engine!r}: must be one of auto, {', '.join(ENGINES)}")
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision={precision!r}: must be one of auto, {', '.join(PRECISIONS)}")
    reason = "as asked"
    if precision == "auto":
        precision, reason = "fp32", "fp32 on a CPU, where rounding operands saves nothing"
    if engine == "auto":
        engine = "cpu" if precision == "fp32" else "reference"
        if engine == "reference":
            reason = f"{precision} without a GPU is emulated by the reference engine"
    ENGINES[engine](precision)
    return engine, precision, reason
