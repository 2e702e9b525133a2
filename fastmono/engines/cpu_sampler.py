"""The CPU engine's sampler, compiled: the features of `fastmono.philox.FeatureSampler`, bitwise, as lists."""

from __future__ import annotations

import numpy as np

from fastmono.engines.simd import REGISTER, entry, inner, put_int
from fastmono.engines.simd_moves import keep_nonzero
from fastmono.philox import LARGEST_VALUE, M0, M1, MASK, ROUNDS, W0, W1

SOURCES = "c225291e8df55b95"
"""As in cpu_kernels.py, of simd.py, simd_moves.py and fastmono/philox.py."""
ZERO, HALF, LARGEST = np.float32(0.0), np.float32(0.5), np.float32(LARGEST_VALUE)


@inner
def draw(words, sample, step, seed, purpose):
    """The words of one sample's features, uint32 [4 groups] (fastmono/philox.py)."""
    mask = np.uint64(MASK)
    for g in range(len(words) // 4):
        c0, c1 = np.uint64(g), np.uint64(sample)
        c2, c3 = np.uint64(step) & mask, np.uint64(step) >> np.uint64(32)
        k0, k1 = np.uint64(seed), np.uint64(purpose)
        for _ in range(ROUNDS):
            p0, p1 = c0 * np.uint64(M0), c2 * np.uint64(M1)
            c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ k0, (p0 >> np.uint64(32)) ^ c3 ^ k1
            c1, c3 = p1 & mask, p0 & mask
            k0, k1 = (k0 + np.uint64(W0)) & mask, (k1 + np.uint64(W1)) & mask
        words[4 * g] = c0
        words[4 * g + 1] = c1
        words[4 * g + 2] = c2
        words[4 * g + 3] = c3


@entry
def sample(first_step, steps, B, seed, purpose, other, last, scale, row, words, starts, indices, values):
    """The present features of the batches of `steps` steps, bitwise those of `fastmono.philox.FeatureSampler`.

    purpose, other: of the features, and of those that are subtracted (-1: none). last: T - 1, uint32 [N]; scale:
    float32 [N]; row: float32 [N up to a multiple of 16], zeros at its end; words: uint32 [N up to a multiple of 4].
    starts, indices, values: addresses, as in `Problem`.
    """
    end = 0
    for step in range(steps):
        for r in range(B):
            put_int(starts, step * (B + 1) + r, end)
            draw(words, r, first_step + step, seed, purpose)
            for j in range(len(last)):
                value = min((np.float32(words[j]) + HALF) * scale[j], LARGEST)
                row[j] = value if words[j] <= last[j] else ZERO
            if other >= 0:
                draw(words, r, first_step + step, seed, other)
                for j in range(len(last)):
                    value = min((np.float32(words[j]) + HALF) * scale[j], LARGEST)
                    row[j] -= value if words[j] <= last[j] else ZERO
            for c in range(0, len(row), REGISTER):
                end = keep_nonzero(row.ctypes.data, c, c, indices, values, end)
        put_int(starts, step * (B + 1) + B, end)
    return end
