"""Features from counters: Philox4x32-10, presence and value, bitwise as in `fastmono.philox`.

    c0, c1, c2, c3  <-  hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)     ten rounds
    f_j = min((float(u) + 1/2) s_j, 1 - 2^-24)  where u < T_j,  else 0               u = word j % 4 of group j // 4

Counter: (feature // 4, sample, step low, step high); key: (seed, purpose). Launch with `enable_fp_fusion=False`.

BR rows (samples) of a tile          BN features of a tile, a multiple of 4
"""

import triton
import triton.language as tl

M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)
LARGEST_VALUE = tl.constexpr(1 - 2**-24)
FEATURES = tl.constexpr(3)  # fastmono.philox.Purpose
NEGATIVE_FEATURES = tl.constexpr(4)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four random words for each counter; all uint32, the counters of one shape."""
    for _ in tl.static_range(10):
        low0, high0 = c0 * M0, tl.umulhi(c0, M0)
        low1, high1 = c2 * M1, tl.umulhi(c2, M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += W0
        k1 += W1
    return c0, c1, c2, c3


@triton.jit
def unsigned_features(seed, purpose, step, row0, column0, last, scale, BR: tl.constexpr, BN: tl.constexpr):
    """One tile of non-negative features, [BR, BN].

    last: T_j - 1, uint32 [BN], so that a probability of 1 fits 32 bits; scale: s_j, float32 [BN].
    """
    group = (column0 // 4 + tl.arange(0, BN // 4)).to(tl.uint32)
    sample = (row0 + tl.arange(0, BR)).to(tl.uint32)
    zero = tl.zeros([BR, BN // 4], tl.uint32)
    step_low = (step & 0xFFFFFFFF).to(tl.uint32)
    step_high = (step >> 32).to(tl.uint32)
    k1 = tl.zeros([], tl.uint32) + purpose.to(tl.uint32)
    u0, u1, u2, u3 = philox4x32(
        zero + group[None, :], zero + sample[:, None], zero + step_low, zero + step_high, seed.to(tl.uint32), k1
    )
    pairs = tl.join(tl.join(u0, u2), tl.join(u1, u3))  # [BR, BN/4, 2, 2]: words in the order 0, 1, 2, 3
    u = tl.reshape(pairs, [BR, BN])
    value = tl.minimum((u.to(tl.float32) + 0.5) * scale[None, :], LARGEST_VALUE)
    return tl.where(u <= last[None, :], value, 0.0)


@triton.jit
def features(seed, step, row0, column0, p_last, p_scale, N, SIGNED: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """One tile of the batch of a step, [BR, BN]; 0 beyond the N features. p_last, p_scale: the stream's tables, [N]."""
    i_n = column0 + tl.arange(0, BN)
    m_n = i_n < N
    last = tl.load(p_last + i_n, mask=m_n, other=0).to(tl.uint32)
    scale = tl.load(p_scale + i_n, mask=m_n, other=0.0)
    f = unsigned_features(seed, tl.full([], FEATURES, tl.int32), step, row0, column0, last, scale, BR, BN)
    if SIGNED:
        f -= unsigned_features(seed, tl.full([], NEGATIVE_FEATURES, tl.int32), step, row0, column0, last, scale, BR, BN)
    return tl.where(m_n[None, :], f, 0.0)
