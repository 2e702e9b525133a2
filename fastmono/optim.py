"""LAMB, AdamW, SGD, learning rate schedules and bias decay, one tensor of one model at a time.

LAMB   m <- .9 m + .1 g     v <- .999 v + .001 g^2     u = m / (sqrt(v) + 1e-6)     p <- p - lr r u
       r = min(|p|, 10) / |u|, and 1 where either norm is 0; no bias correction, no weight decay    (recipe fact 5)
AdamW  p <- (1 - .01 lr) p,  then  p <- p - lr (m / (1 - .9^t)) / (sqrt(v / (1 - .999^t)) + 1e-8)
SGD    p <- p - lr g

published  lr (1 + cos(pi t / 512)) / 2, periodic                                                   (recipe fact 6)
cosine     lr (1 + cos(pi t / steps)) / 2
constant   lr                                                             t = updates already made, from 0

bias decay: while 2 t < steps, after the update, b <- b (1 - bias_decay lr) with the base lr        (recipe fact 7)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastmono.spec import LARGEST_FLOAT32, ModelSpec

BETA1, BETA2 = 0.9, 0.999
LAMB_EPS, ADAMW_EPS = 1e-6, 1e-8
LAMB_LARGEST_NORM = 10.0
ADAMW_WEIGHT_DECAY = 0.01
PUBLISHED_HALF_PERIOD = 512


def finite_or_inf(x: float) -> float:
    """A factor as PyTorch takes it: beyond float32 it is infinite (and the model diverges), not an error."""
    return math.copysign(math.inf, x) if abs(x) > LARGEST_FLOAT32 else x


def learning_rates(spec: ModelSpec, first: int, count: int) -> list[float]:
    """The learning rates of updates `first` to `first + count`: made in float64, rounded to float32."""
    t = np.arange(first, first + count)
    if spec.schedule == "constant":
        rates = np.full(count, spec.lr)
    elif spec.schedule == "cosine":
        rates = spec.lr * 0.5 * (1 + np.cos(np.pi * (t / spec.steps)))
    else:
        phase = t % (2 * PUBLISHED_HALF_PERIOD) / PUBLISHED_HALF_PERIOD  # whole periods first: exact for any t
        rates = spec.lr * 0.5 * (1 + np.cos(np.pi * phase))
    result: list[float] = rates.astype(np.float32).tolist()
    return result


def bias_factor(spec: ModelSpec, step: int) -> float:
    """What the bias is multiplied with after the update that `step` updates precede."""
    return finite_or_inf(1.0 - spec.bias_decay * spec.lr) if 2 * step < spec.steps else 1.0


def adam_corrections(step: int) -> tuple[float, float]:
    """1 - .9^t and sqrt(1 - .999^t) for the update that `step` updates precede, so t = step + 1."""
    return 1 - BETA1 ** (step + 1), (1 - BETA2 ** (step + 1)) ** 0.5


def lamb_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float) -> None:
    """One LAMB update of a tensor and its moments, in place; all of one shape."""
    m.mul_(BETA1).add_(g, alpha=1 - BETA1)
    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    u = m / (v.sqrt() + LAMB_EPS)
    norm_p, norm_u = torch.linalg.vector_norm(p), torch.linalg.vector_norm(u)
    ratio = torch.where((norm_p == 0) | (norm_u == 0), 1.0, norm_p.clamp(max=LAMB_LARGEST_NORM) / norm_u)
    p.sub_(u * (lr * ratio))


def adamw_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: float, step: int) -> None:
    """One AdamW update of a tensor and its moments, in place; all of one shape."""
    m.mul_(BETA1).add_(g, alpha=1 - BETA1)
    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    first, second = adam_corrections(step)
    p.mul_(1 - lr * ADAMW_WEIGHT_DECAY)
    p.addcdiv_(m, v.sqrt().div_(second).add_(ADAMW_EPS), value=finite_or_inf(-lr / first))


def sgd_(p: Tensor, g: Tensor, lr: float) -> None:
    """One gradient step, in place; both of one shape."""
    p.sub_(g, alpha=lr)
