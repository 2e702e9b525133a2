"""Sampling and projection: a batch is drawn once, and what later phases need of it is stored.

    x = f P^T          tau = f (decoder), |f| (abs), f P2^T (reprojector)

Drawing f again where the residual is formed would cost more than reading tau: a draw is about 30 integer operations.

f comes from registers. As the first operand of an asynchronous product it makes sm_90 wait for each one, so there
x^T = P f^T is formed (ACROSS), with f^T as the second operand, through shared memory.

B samples   N features   m embedding dimensions, M its tile (a power of two, at least 16; P is zero beyond m)
BR rows (samples) a tile   BN features a chunk   LO length of a row of tau in memory
"""

import triton
import triton.language as tl

from .philox import features
from .products import operand, product
from .tables import row_start, whole_rows


@triton.jit
def add_projection(x, f, P, PRECISION: tl.constexpr, ACROSS: tl.constexpr):
    """x [BR, M] plus f [BR, BN] times P^T, given as P [BN, M]; x is held as [M, BR] where ACROSS."""
    if ACROSS:
        return product(tl.trans(P), tl.trans(f), x, PRECISION)  # [M, BN] @ [BN, BR] -> [M, BR]
    else:
        return product(f, P, x, PRECISION)  # [BR, BN] @ [BN, M] -> [BR, M]


@triton.jit
def upright(x, ACROSS: tl.constexpr):
    """x [BR, M]."""
    if ACROSS:
        return tl.trans(x)
    else:
        return x


@triton.jit
def project_tile(
    seed, step, row0, p_last, p_scale, p_P, p_P2, p_x, p_tau, N, B, LO,
    TASK: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows row0 to row0 + BR of one stream's x [B, M] (as an operand) and tau [B, LO] (float32).

    p_P, p_P2: the projections transposed, [N, M], as operands.
    """
    i_r, i_m = row0 + tl.arange(0, BR), tl.arange(0, M)
    m_r = (i_r < B)[:, None]
    p_row = p_tau + i_r.to(tl.int64)[:, None] * LO
    x = tl.zeros([M, BR] if ACROSS else [BR, M], tl.float32)
    tau = tl.zeros([M, BR] if ACROSS else [BR, M], tl.float32)
    for n0 in range(0, N, BN):
        i_n = n0 + tl.arange(0, BN)
        drawn = features(seed, step, row0, n0, p_last, p_scale, N, TASK == "abs", BR, BN)
        f = operand(drawn, PRECISION)
        o_P = row_start(n0, M) + tl.arange(0, BN)[:, None] * M + i_m[None, :]
        m_P = (i_n < N)[:, None]
        x = add_projection(x, f, tl.load(p_P + o_P, mask=m_P, other=0.0), PRECISION, ACROSS)
        if TASK == "reprojector":
            tau = add_projection(tau, f, tl.load(p_P2 + o_P, mask=m_P, other=0.0), PRECISION, ACROSS)
        else:
            tl.store(p_row + i_n[None, :], tl.abs(drawn) if TASK == "abs" else drawn, mask=m_r & (i_n < LO)[None, :])
    tl.store(p_x + i_r.to(tl.int64)[:, None] * M + i_m[None, :], operand(upright(x, ACROSS), PRECISION), mask=m_r)
    if TASK == "reprojector":
        tl.store(p_row + i_m[None, :], upright(tau, ACROSS), mask=m_r & (i_m < LO)[None, :])


@triton.jit(do_not_specialize=["N", "B", "LO", "first"])
def project_kernel(
    p_step, p_seeds, p_last, p_scale, p_P, p_P2, p_x, p_tau, N, B, LO, first,
    TASK: tl.constexpr, PRECISION: tl.constexpr, ACROSS: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, streams): each stream's batch is drawn once, for all models that share it."""
    LO = whole_rows(LO)
    stream = (first + tl.program_id(1)).to(tl.int64)
    project_tile(
        tl.load(p_seeds + stream), tl.load(p_step), tl.program_id(0) * BR,
        p_last + stream * N, p_scale + stream * N, p_P + stream * N * M, p_P2 + stream * N * M,
        p_x + stream * B * M, p_tau + stream * B * LO, N, B, LO, TASK, PRECISION, ACROSS, M, BR, BN,
    )  # fmt: skip
