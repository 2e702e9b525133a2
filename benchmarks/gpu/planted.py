"""Faults for a rehearsal: contestants and tests that go wrong in every way that the real ones may.

wrong    trains, with rates that are too high        crash    ends its process by an error of the machine's
hang     does not come back                          kill     is killed, as by a system without memory
memory   runs out of the device's memory
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant
from benchmarks.contestants.bmm import Bmm
from benchmarks.state import State

PLANTED = "planted-"
FAULTS = ("wrong", "crash", "hang", "kill", "memory")


def go_wrong(fault: str) -> None:
    """Do what a fault is named after."""
    if fault == "crash":
        os.abort()
    if fault == "hang":
        time.sleep(3600)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB.")


class Planted(Contestant):
    """Stacked bmm with a fault."""

    def __init__(self, fault: str) -> None:
        self.fault, self.inner = fault, Bmm(torch.device("cpu"), "fp32")
        self.state: State | None = None

    def load(self, state: State) -> None:
        self.state = state
        specs = tuple(spec.replace(lr=3 * spec.lr) for spec in state.specs) if self.fault == "wrong" else state.specs
        self.inner.load(replace(state, specs=specs))

    def advance(self, n_steps: int) -> Tensor:
        go_wrong(self.fault)
        return self.inner.advance(n_steps)

    def read(self) -> State:
        assert self.state is not None
        return replace(self.inner.read(), specs=self.state.specs)

    def unload(self) -> None:
        self.inner.unload()
