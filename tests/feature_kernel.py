"""A kernel that writes out the features that the real ones only pass on."""

import triton
import triton.language as tl
from fastmono.kernels.philox import features


@triton.jit
def features_kernel(
    p_out, p_last, p_scale, p_seed, p_step, N, SIGNED: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr
):
    """Grid (row tiles, feature tiles). out: float32 [rows, N]."""
    row0, column0 = tl.program_id(0) * BR, tl.program_id(1) * BN
    f = features(tl.load(p_seed), tl.load(p_step), row0, column0, p_last, p_scale, N, SIGNED, BR, BN)
    i_n = column0 + tl.arange(0, BN)
    tl.store(p_out + (row0 + tl.arange(0, BR))[:, None] * N + i_n[None, :], f, mask=(i_n < N)[None, :])
