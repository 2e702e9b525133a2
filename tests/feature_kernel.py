"""Kernels for the tests alone: one writes out the features that the real ones pass on, one works far from row 0."""

import triton
import triton.language as tl
from fastmono.kernels.backward import backward_tile
from fastmono.kernels.philox import features
from fastmono.kernels.survey import gather_tile
from fastmono.kernels.tables import whole_rows
from fastmono.kernels.update import apply_tile, moments_tile


@triton.jit
def features_kernel(
    p_out, p_last, p_scale, p_seed, p_step, N, SIGNED: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr
):
    """Grid (row tiles, feature tiles). out: float32 [rows, N]."""
    row0, column0 = tl.program_id(0) * BR, tl.program_id(1) * BN
    f = features(tl.load(p_seed), tl.load(p_step), row0, column0, p_last, p_scale, N, SIGNED, BR, BN)
    i_n = column0 + tl.arange(0, BN)
    tl.store(p_out + (row0 + tl.arange(0, BR))[:, None] * N + i_n[None, :], f, mask=(i_n < N)[None, :])


@triton.jit
def far_rows_kernel(
    p_x, p_h, p_e, p_flags, p_place, p_q_in, p_q_b, p_q_out, p_W_in, p_b, p_W_out, p_dW_in, p_db, p_dW_out,
    p_m, p_norms, p_bad, k0, B, LO,
):  # fmt: skip
    """Operands, gradients, moments and SGD's update of 16 neurons, the last of k0 + 16; arrays hold just their rows."""
    LO, i = whole_rows(LO), tl.cast(k0, tl.int64)
    p_W_in, p_b, p_W_out = p_W_in - i * 16, p_b - i, p_W_out - i * LO
    p_dW_in, p_db, p_dW_out = p_dW_in - i * 16, p_db - i, p_dW_out - i * LO
    p_h, p_flags, p_place = p_h - i * 32, p_flags - i, p_place - i
    p_q_in, p_q_b, p_q_out = p_q_in - i * 16, p_q_b - i, p_q_out - i * LO
    p_m_in, p_m_b, p_m_out = p_m - i * 16, p_m + 256 - i, p_m + 272 - i * LO
    gather_tile(
        k0, k0, p_flags, 1, 0, p_place, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, k0 + 16, LO, "fp32", 16, 16, 16
    )  # fmt: skip
    backward_tile(
        0, B, k0, 0, 0.0, False, p_x, p_q_in, p_q_b, p_q_out, p_h, p_e, p_dW_in, p_db, p_dW_out, k0 + 16, LO, 32,
        "relu", False, "fp32", False, 16, 16, 16, 16, False,
    )  # fmt: skip
    moments_tile(
        k0, k0 + 16, 0.5, p_place, p_dW_in, p_db, p_dW_out, 1, 1, 16, p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out,
        p_m_in, p_m_b, p_m_out, p_norms, 16, LO, 16, 16, 16,
    )  # fmt: skip
    bad = apply_tile(
        k0, k0 + 16, 0.5, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, p_place, p_dW_in, p_db, p_dW_out, 1, 1, 16,
        p_W_in, p_b, p_W_out, p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out, p_m_in, p_m_b, p_m_out,
        p_norms, 16, LO,
        "sgd", "global", "fp32", 16, 16, 16,
    )  # fmt: skip
    tl.store(p_bad, bad)
