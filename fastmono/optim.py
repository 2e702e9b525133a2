"""LAMB, AdamW, SGD, learning rate schedules and bias decay, one tensor of one model at a time.

LAMB   m <- .9 m + .1 g     v <- .999 v + .001 g^2     u = m / (sqrt(v) + 1e-6)     p <- p - lr r u
       r = min(|p|, 10) / |u|, and 1 where either norm is 0; no bias correction, no weight decay    (recipe fact 5)
AdamW  p <- (1 - .01 lr) p,  then  p <- p - lr (m / (1 - .9^t)) / (sqrt(v / (1 - .999^t)) + 1e-8)
SGD    p <- p - lr g

published  lr (1 + cos(pi t / 512)) / 2, periodic                                                   (recipe fact 6)
cosine     lr (1 + cos(pi t / steps)) / 2
constant   lr                                                             t = updates already made, from 0

bias decay, while 2 t < steps, after the update; lr is the base learning rate throughout
global      b   <- b (1 - bias_decay lr)                                                            (recipe fact 7)
per_neuron  b_j <- b_j (1 - bias_decay lr s_j)     s_j in [0, 1]: how far neuron j's outputs are spread over features
rate        b   <- b (1 - bias_decay rho)          rho = |dW| / |W|, of W_in and W_out together, in this update

Nothing bounds the factor, as in the published code: above 1 / lr (or 1 / rho) bias_decay turns the sign of b at every
step, and above twice that b grows until the model diverges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
    rates: list[float] = rate_table([spec], first, count)[0].tolist()
    return rates


def rate_table(specs: Sequence[ModelSpec], first: int, count: int) -> np.ndarray:
    """The learning rates of many models, float32 [models, count]: each schedule is computed once."""
    t = np.arange(first, first + count)
    waves: dict[tuple[str, int], np.ndarray] = {}
    table = np.empty((len(specs), count), np.float32)
    for row, spec in zip(table, specs, strict=True):
        key = spec.schedule, spec.steps if spec.schedule == "cosine" else 0
        if key not in waves:
            waves[key] = _wave(spec, t)
        row[:] = spec.lr * 0.5 * waves[key]
    return table


def _wave(spec: ModelSpec, t: np.ndarray) -> np.ndarray:
    """1 + cos of a schedule's phase at the updates t, float64: twice its share of the base rate."""
    if spec.schedule == "constant":
        return np.full(len(t), 2.0)
    if spec.schedule == "cosine":
        return 1 + np.cos(np.pi * (t / spec.steps))
    phase = t % (2 * PUBLISHED_HALF_PERIOD) / PUBLISHED_HALF_PERIOD  # whole periods first: exact for any t
    return 1 + np.cos(np.pi * phase)


def bias_factor(spec: ModelSpec, step: int) -> float:
    """What `global` multiplies the bias with after the update that `step` updates precede; 1 in the other modes."""
    decays = spec.bias_decay_mode == "global" and 2 * step < spec.steps
    return finite_or_inf(1.0 - spec.bias_decay * spec.lr) if decays else 1.0


def decay_strength(spec: ModelSpec, step: int) -> float:
    """What s_j is multiplied with in `per_neuron`, and rho in `rate`, after the same update; 0 where b stays."""
    if spec.bias_decay_mode == "global" or 2 * step >= spec.steps:
        return 0.0
    return finite_or_inf(spec.bias_decay * (spec.lr if spec.bias_decay_mode == "per_neuron" else 1.0))


def spread(W_outT: Tensor) -> Tensor:
    """s [k], how many features the outputs of each neuron are spread over, for W_outT [k, o]: from 0, one, to 1, all.

    A row w has p = (sum w^2)^2 / sum w^4 outputs that matter, its participation ratio: n for n equal weights, whatever
    their signs and size. s = (1 - 1/p) / (1 - 1/o) is 0 where p = 1 and 1 where p = o. With fourth powers the small
    weights by which a monosemantic neuron compensates interference hardly count: w = (1, .05, ..., .05) of 100 outputs
    has s = .36, where 1 - max|w| / sum|w|, scaled alike, is .84. A row that is zero (or too small for its squares to be
    float32) has s = 1; where o = 1 there is nothing to be spread over, and s = 0. There is no other parameter than
    bias_decay.

    Why it should help. A strongly negative initial bias keeps every neuron silent that is not aligned with a single
    feature; decay releases neurons until enough are active. A neuron that is silent has no gradient: its row of W_out
    is as it was drawn, spread over all features (s = 1 - .8/o), and only decay can bring it back: at the whole rate.
    Once it has found its feature, the gradient concentrates its row there, s falls, and decay leaves it alone, which
    would move its threshold from where the gradient holds it and let interference in. A polysemantic neuron goes on
    being pulled towards b = 0: out of too negative a bias, and out of a positive one, with which it is never silent.
    """
    squares = W_outT.square()
    total, o = squares.sum(1), W_outT.shape[1]
    if o == 1:
        return torch.zeros_like(total)
    share = torch.where(total == 0, 0.0, squares.square().sum(1) / total / total)  # 1/p
    return ((1 - share) * (1 / (1 - 1 / o))).clamp(0, 1)


def relative_change(before: Iterable[Tensor], after: Iterable[Tensor]) -> Tensor:
    """rho = |dW| / |W|, a scalar, over pairs of tensors before and after an update; 0 where they were zero.

    LAMB moves a tensor by lr_t min(|W|, 10), lr_t being the scheduled rate: so rho = lr_t where neither |W_in| nor
    |W_out| is above 10, and less in wide layers (about .6 lr_t at the paper's initial values, with norms 18 and 13).
    `rate` is thus `global` with the scheduled rate in place of the base rate, half as much over a period of the
    published schedule, and with what the weights really do in place of both: where they stand still, so does b.
    """
    pairs = list(zip(before, after, strict=True))
    change = torch.stack([(new - old).square().sum() for old, new in pairs]).sum()
    size = torch.stack([old.square().sum() for old, _ in pairs]).sum()
    return torch.where(size == 0, 0.0, (change / size).sqrt())


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
