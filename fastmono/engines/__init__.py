"""Engines: `reference` is the truth, `cpu` is fast without a GPU, `triton` is for CUDA GPUs.

A trainer calls `advance`, and `fetch` before it looks at the parameters. A block holds models of equal width and number
of steps, or, for an engine that `mixes_widths`, of any.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmono.block import PRECISIONS, Block
from fastmono.engines.reference import ReferenceEngine
from fastmono.spec import ModelSpec


class Engine(Protocol):
    """What trains a block."""

    name: str
    precision: str

    def __init__(self, precision: str, **switches: Any) -> None: ...

    def advance(self, block: Block, n_steps: int) -> Tensor:
        """Train every model of the block for n steps, in place, and return the losses, float32 [A, n].

        Where a model did not train (it has diverged, or has no steps left) its loss is NaN. A model whose loss or
        updated parameters are not finite gets its `diverged_step` and trains no further. Where calls cut the steps
        changes no bit.
        """
        ...

    def fetch(self, block: Block) -> None:
        """Bring the parameters and moments of the block's models to the host, where an engine keeps them elsewhere."""
        ...

    @staticmethod
    def workspace_bytes(spec: ModelSpec, n_streams: int) -> int:
        """Memory beyond the models' own state, for a block of so many streams whose widest model is `spec`."""
        ...


ENGINES = ("reference", "cpu", "triton")


def mixes_widths(name: str) -> bool:
    """Whether an engine's blocks mix numbers of neurons and of steps.

    For Triton a block is a launch, and the more models it holds, the fuller the device. The others train one model
    after another, and gain nothing by it.
    """
    return name == "triton"


def engine_class(name: str) -> type[Engine]:
    """An engine by name. Triton is imported only when it is asked for: the library works where it cannot be."""
    if name == "triton":
        try:
            from fastmono.engines.triton import TritonEngine
        except ImportError as error:
            raise ValueError(f"engine='triton': Triton is not installed here ({error})") from None
        return TritonEngine
    if name == "cpu":  # loads a compiler, which other engines do without
        from fastmono.engines.cpu import CpuEngine

        return CpuEngine
    return ReferenceEngine


def has_gpu() -> bool:
    """Whether the Triton engine is the one to use here: a CUDA device, Triton, and not its interpreter."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None and not interpreting


def resolve(engine: str, precision: str, gpus_elsewhere: bool = False) -> tuple[str, str, str]:
    """Engine and precision by name, with "auto" decided, and the reason in a few words.

    `gpus_elsewhere`: the machines that train have GPUs, whatever this one has.

    Raises `ValueError` for an unknown name, or a precision that the engine does not have.
    """
    if engine not in ("auto", *ENGINES):
        raise ValueError(f"engine={engine!r}: must be one of auto, {', '.join(ENGINES)}")
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision={precision!r}: must be one of auto, {', '.join(PRECISIONS)}")
    reason = "as asked"
    on_gpu = has_gpu() or gpus_elsewhere
    if engine == "auto" and on_gpu:
        engine = "triton"
    if precision == "auto":
        if engine == "triton" and on_gpu:
            precision, reason = "bf16", "bf16 on a GPU, for its matrix units"
        else:
            precision, reason = "fp32", "fp32 on a CPU, where rounding operands saves nothing"
    if engine == "auto":
        engine = "cpu" if precision == "fp32" else "reference"
        if engine == "reference":
            reason = f"{precision} without a GPU is emulated by the reference engine"
    if engine == "triton" and gpus_elsewhere and not has_gpu():
        return engine, precision, f"{reason}; on the cluster's GPUs"
    made = engine_class(engine)(precision)
    if note := getattr(made, "note", ""):
        reason = f"{reason}; {note}"
    return engine, precision, reason
