"""What a contestant is: it loads a state, trains it for n steps by the published recipe, and gives the state back."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.state import State

LOG_EVERY = 16
"""Losses are logged every so many steps, as published."""


class Unavailable(Exception):
    """A contestant cannot run here; the message says why in a few words."""


class Contestant(ABC):
    """One way of training a stack of models.

    Attributes:
        ours: whether it is an engine of fastmono.
        precision: fp32, tf32 or bf16, of the operands of its matrix products.
        most_models: models that are enough to time it, for one that trains them one after another; None for all.
        warm_steps: steps after `load` that are not timed: the first may compile, capture, pack or allocate.
    """

    ours: ClassVar[bool] = False
    precision: str = "fp32"
    most_models: int | None = None
    warm_steps: int = 2

    @abstractmethod
    def load(self, state: State) -> None:
        """Take over parameters, moments and step, and restart the random streams from the seeds of its specs."""

    @abstractmethod
    def advance(self, n_steps: int) -> Tensor:
        """Train n steps, wait until that is done, and return the losses, float32 [A, n]: NaN where none was logged."""

    @abstractmethod
    def read(self) -> State:
        """The state that training has reached."""

    def advance_on(self, batches: Tensor) -> Tensor:
        """Train on given features, float32 [n, S, B, N], for tests of the arithmetic. Returns losses [A, n]."""
        raise NotImplementedError(f"{type(self).__name__} samples its own batches only")

    def unload(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give memory back until the next `load`."""


def stream_seed(seed: int, step: int) -> int:
    """Seed of a generator that starts at a step of a stream, below 2**32: PyTorch's on a CPU reads no more bits."""
    return zlib.crc32(f"{seed} {step}".encode())


def rate_table(lr: Tensor, step: int, n_steps: int) -> Tensor:
    """Learning rates of the published schedule for updates `step` on: float32 [n, A] for base rates lr, float64 [A]."""
    t = torch.arange(step, step + n_steps, dtype=torch.float64) % 1024
    return (0.5 * (1 + torch.cos(math.pi * t / 512))[:, None] * lr).float()


def factor_table(state: State, step: int, n_steps: int) -> Tensor:
    """What each bias is multiplied with after each update, float32 [n, A]."""
    factor = torch.tensor([1 - spec.bias_decay * spec.lr for spec in state.specs], dtype=torch.float64)
    decays = 2 * torch.arange(step, step + n_steps) < state.specs[0].steps
    return torch.where(decays[:, None], factor, 1.0).float()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
