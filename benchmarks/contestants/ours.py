"""fastmono's engines as contestants: through the interface that its trainer uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, Unavailable
from benchmarks.state import State
from fastmono.block import Block
from fastmono.engines import Engine, engine_class


def dense_cpu_engine() -> Engine:
    """The CPU engine without what it gains by skipping zeros."""
    from fastmono.engines.cpu import CpuEngine

    return CpuEngine(skips_zeros=False)


class Ours(Contestant):
    """The engine of that name and precision, the Triton engine with switches (fastmono/engines/switches.py)."""

    ours = True

    def __init__(self, name: str, precision: str, device: torch.device, switches: dict[str, Any] | None = None) -> None:
        self.precision = precision
        try:
            # Only the Triton engine has switches, and others are given none.
            self.engine = dense_cpu_engine() if name == "cpu-dense" else engine_class(name)(precision, **switches or {})
        except ValueError as error:
            raise Unavailable(str(error)) from None
        self.block: Block | None = None
        if name == "reference":
            self.most_models = 12  # one model after another: more cost more in proportion
        # The Triton engine captures its graph in the first call of more than 32 steps.
        self.warm_steps = 64 if name == "triton" else 4

    def load(self, state: State) -> None:
        self.block = state.to_block()

    def advance(self, n_steps: int) -> Tensor:
        assert self.block is not None
        return self.engine.advance(self.block, n_steps)

    def read(self) -> State:
        assert self.block is not None
        self.engine.fetch(self.block)
        return State.of_block(self.block)

    def unload(self) -> None:
        self.block = None
