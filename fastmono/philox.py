"""Random numbers as a pure function of (key, counter): Philox4x32-10 (Salmon et al., SC'11) and what is drawn with it.

One round, on a counter (c0, c1, c2, c3) and a key (k0, k1) of 32-bit words, hi and lo being the halves of a product:

    c0, c1, c2, c3  <-  hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)
    k0, k1          <-  k0 + W0,  k1 + W1                                          (ten rounds, nine key changes)

There is no generator state, so resuming, sharding and reordering change nothing. Key: (seed, purpose). Counters:

    features   (feature // 4, sample, step low, step high)    four words, four neighbouring features
    weights    (index // 4, tensor number, 0, 0)              four words, four neighbouring entries

`step` is the number of updates already made: 0 for the first batch. Words are int64 tensors that hold values in
[0, 2**32): PyTorch's unsigned integers lack most operations.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from fastmono.frequencies import presence_probabilities, scales, thresholds
from fastmono.spec import ModelSpec

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
ROUNDS = 10

LARGEST_VALUE = 1 - 2**-24
"""Features lie in (0, 1): rounding may not lift one to 1."""
TILE = 2**15
"""Counters evaluated at a time: the handful of int64 temporaries then stays in cache (256 KiB each)."""


class Purpose(IntEnum):
    """The second word of the key: what the numbers are for. Never renumber: every stored run depends on it."""

    PROJECTION = 0
    SECOND_PROJECTION = 1
    INITIAL_WEIGHTS = 2
    FEATURES = 3
    NEGATIVE_FEATURES = 4
    EVALUATION_FEATURES = 5
    NEGATIVE_EVALUATION_FEATURES = 6
    ROUND_SEED = 7


Word = int | Tensor


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter. The counter's words are ints or int64 tensors that broadcast together."""
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps to a negative int64; its bits are right, and the mask undoes the
        # sign that the shift brings in.
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ (c1 ^ k0), p1 & MASK, (p0 >> 32 & MASK) ^ (c3 ^ k1), p0 & MASK
        k0, k1 = k0 + W0 & MASK, k1 + W1 & MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def weight_words(seed: int, purpose: Purpose, tensor: int, count: int) -> Tensor:
    """The first `count` words of a tensor's own stream, int64 [count]."""
    groups = torch.arange(-(-count // 4), dtype=torch.int64)
    return torch.stack(philox4x32((groups, tensor, 0, 0), (seed, purpose)), -1).flatten()[:count]


def uniforms(seed: int, purpose: Purpose, tensor: int, count: int) -> Tensor:
    """Uniform on (0, 1), float64 [count]: (word + 1/2) / 2**32."""
    return (weight_words(seed, purpose, tensor, count).double() + 0.5) / 2.0**32


def normals(seed: int, purpose: Purpose, tensor: int, count: int) -> Tensor:
    """Standard normals by Box-Muller, float64 [count]: words 2i and 2i + 1 give normals 2i and 2i + 1."""
    radius, angle = uniforms(seed, purpose, tensor, count + count % 2).view(-1, 2).unbind(-1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()[:count]


class FeatureSampler:
    """The feature vectors of every model that shares `stream_key(spec)`: batches of a step, or held-out samples.

    Args:
        spec: gives N, the probability and frequency of features, the seed, and whether features are signed (abs).
        device: where the features are wanted.
    """

    def __init__(self, spec: ModelSpec, device: torch.device | str = "cpu") -> None:
        self.n_features, self.seed, self.signed = spec.n_features, spec.seed, spec.task == "abs"
        share = spec.feature_prob / 2 if self.signed else spec.feature_prob
        p = presence_probabilities(spec.n_features, share, spec.frequency)
        self.thresholds = torch.from_numpy(thresholds(p)).to(device)
        self.scales = torch.from_numpy(scales(p)).to(device)
        self.groups = torch.arange(-(-spec.n_features // 4), dtype=torch.int64, device=device)

    def batch(self, step: int, first: int, count: int, out: Tensor | None = None) -> Tensor:
        """Samples `first` to `first + count` of the batch of a step: f, float32 [count, N]."""
        return self._signed(Purpose.FEATURES, Purpose.NEGATIVE_FEATURES, step, first, count, out)

    def evaluation(self, first: int, count: int, out: Tensor | None = None) -> Tensor:
        """Held-out samples, which no step trains on: f, float32 [count, N]."""
        purposes = Purpose.EVALUATION_FEATURES, Purpose.NEGATIVE_EVALUATION_FEATURES
        return self._signed(*purposes, 0, first, count, out)

    def _signed(
        self, positive: Purpose, negative: Purpose, step: int, first: int, count: int, out: Tensor | None
    ) -> Tensor:
        if out is None:
            out = self.scales.new_empty(count, self.n_features)
        rows = max(1, TILE // len(self.groups))
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            tile = self._unsigned(positive, step, first + start, stop - start)
            if self.signed:
                tile -= self._unsigned(negative, step, first + start, stop - start)
            out[start:stop] = tile
        return out

    def _unsigned(self, purpose: Purpose, step: int, first: int, count: int) -> Tensor:
        samples = torch.arange(first, first + count, dtype=torch.int64, device=self.groups.device)[:, None]
        words = torch.stack(
            philox4x32((self.groups, samples, step & MASK, step >> 32), (self.seed, purpose)), -1
        )  # [count, N / 4, 4]
        u = words.flatten(1)[:, : self.n_features]
        value = ((u.float() + 0.5) * self.scales).clamp_(max=LARGEST_VALUE)
        return value.mul_(u < self.thresholds)


def stream_key(spec: ModelSpec) -> tuple[int, int, float, str, bool]:
    """Models with equal keys and batch sizes see the same batches."""
    return spec.seed, spec.n_features, spec.feature_prob, spec.frequency, spec.task == "abs"
