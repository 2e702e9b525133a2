"""The three tasks and the three nonlinearities (recipe facts 3 and 10).

decoder      tau(f) = f           recover the features
reprojector  tau(f) = P2 f        recover another random projection of them
abs          tau(f) = |f|         recover the absolute value of signed features f = f+ - f-

relu  max(z, 0)                   gelu  z Phi(z), exact                solu  z exp(z), as published
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def relu_derivative(z: Tensor) -> Tensor:
    """1 where z > 0, else 0, the shape of z."""
    return (z > 0).to(z.dtype)


def gelu_derivative(z: Tensor) -> Tensor:
    """Phi(z) + z phi(z), with the normal distribution Phi and its density phi, the shape of z."""
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def solu(z: Tensor) -> Tensor:
    """z exp(z), the shape of z."""
    return z * torch.exp(z)


def solu_derivative(z: Tensor) -> Tensor:
    """(1 + z) exp(z), the shape of z."""
    return (1 + z) * torch.exp(z)


Elementwise = Callable[[Tensor], Tensor]

ACTIVATION: dict[str, Elementwise] = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "solu": solu}
DERIVATIVE: dict[str, Elementwise] = {"relu": relu_derivative, "gelu": gelu_derivative, "solu": solu_derivative}


def target(task: str, f: Tensor, P2: Tensor | None, rounded: Elementwise = lambda operand: operand) -> Tensor:
    """What the output should be, [B, o], for features f [B, N] and, for the reprojector, P2 [m, N].

    `rounded` is applied to the operands of the reprojector's product.
    """
    if task == "reprojector":
        assert P2 is not None
        return rounded(f) @ rounded(P2).T
    return f.abs() if task == "abs" else f
