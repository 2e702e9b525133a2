"""Forward pass: from embeddings to the residual and the loss.

    z = x W_in^T + b        h = phi(z)        y = h W_out^T        e = y - tau        loss = (1/B) sum e^2

tau is drawn again where it is compared (decoder: f, abs: |f|), or read (reprojector).

B samples   N features   k neurons   o outputs   M tile of the embedding dimension
BR rows (samples) a tile   BK neurons a chunk   BO outputs a tile   LO length of a row of W_out^T and e in memory
"""

import triton
import triton.language as tl

from .activations import activate
from .philox import features
from .products import operand, product
from .tables import N_FIELDS, ROW, STREAM, K, is_active, row_start, whole_rows


@triton.jit
def hidden(x, p_W_in, p_b, k0, k, PRECISION: tl.constexpr, M: tl.constexpr, BK: tl.constexpr):
    """z for the BK neurons from k0 and embeddings x [BR, M]; 0 beyond k. p_W_in: operands [k, M]; p_b: float32 [k]."""
    i_k = k0 + tl.arange(0, BK)
    m_k = i_k < k
    o_W = tl.arange(0, BK)[None, :] * M + tl.arange(0, M)[:, None]
    W_in = tl.load(p_W_in + row_start(k0, M) + o_W, mask=m_k[None, :], other=0.0)  # [M, BK]
    b = tl.load(p_b + i_k, mask=m_k, other=0.0)
    zero = tl.zeros([x.shape[0], BK], tl.float32)
    return product(x, W_in, zero, PRECISION) + b[None, :]  # [BR, M] @ [M, BK] -> [BR, BK]


@triton.jit
def forward_tile(
    seed, step, row0, column0, p_last, p_scale, p_x, p_tau, p_W_in, p_b, p_W_out, p_e, k, o, N, B, LO,
    TASK: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One tile of e [B, LO] (as an operand) of one model; returns its sum of squares, float32."""
    i_r, i_o = row0 + tl.arange(0, BR), column0 + tl.arange(0, BO)
    m_r, m_o = i_r < B, i_o < LO
    o_x = i_r.to(tl.int64)[:, None] * M + tl.arange(0, M)[None, :]
    x = tl.load(p_x + o_x, mask=m_r[:, None], other=0.0)  # [BR, M]
    y = tl.zeros([BR, BO], tl.float32)
    for k0 in range(0, k, BK):
        z = hidden(x, p_W_in, p_b, k0, k, PRECISION, M, BK)
        h = operand(activate(z, ACTIVATION), PRECISION)
        o_W = tl.arange(0, BK)[:, None] * LO + i_o[None, :]
        m_W = (k0 + tl.arange(0, BK) < k)[:, None] & m_o[None, :]
        W_out = tl.load(p_W_out + row_start(k0, LO) + o_W, mask=m_W, other=0.0)  # [BK, BO]
        y = product(h, W_out, y, PRECISION)  # [BR, BK] @ [BK, BO] -> [BR, BO]
    m_e = m_r[:, None] & (i_o < o)[None, :]
    if TASK == "reprojector":
        tau = tl.load(p_tau + i_r.to(tl.int64)[:, None] * M + i_o[None, :], mask=m_e, other=0.0)
    else:
        tau = features(seed, step, row0, column0, p_last, p_scale, N, TASK == "abs", BR, BO)
        if TASK == "abs":
            tau = tl.abs(tau)
    e = tl.where(m_e, y - tau, 0.0)
    tl.store(
        p_e + i_r.to(tl.int64)[:, None] * LO + i_o[None, :],
        operand(e, PRECISION),
        mask=m_r[:, None] & m_o[None, :],
    )
    return tl.sum(e * e)


@triton.jit(do_not_specialize=["o", "N", "B", "LO", "parts", "first"])
def forward_kernel(
    p_models, p_diverged, p_step, p_seeds, p_last, p_scale, p_x, p_tau, p_W_in, p_b, p_W_out, p_e, p_loss,
    o, N, B, LO, parts, first,
    TASK: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, output tiles, models). Writes e [A, B, LO] and each program's part of the loss, [A, parts]."""
    LO = whole_rows(LO)
    model = (first + tl.program_id(2)).to(tl.int64)
    step = tl.load(p_step)
    if is_active(p_models, p_diverged, model, step):
        stream = tl.load(p_models + model * N_FIELDS + STREAM)
        row = tl.load(p_models + model * N_FIELDS + ROW)
        loss = forward_tile(
            tl.load(p_seeds + stream), step, tl.program_id(0) * BR, tl.program_id(1) * BO,
            p_last + stream * N, p_scale + stream * N, p_x + stream * B * M, p_tau + stream * B * M,
            p_W_in + row * M, p_b + row, p_W_out + row * LO, p_e + model * B * LO,
            tl.load(p_models + model * N_FIELDS + K).to(tl.int32), o, N, B, LO,
            TASK, ACTIVATION, PRECISION, M, BR, BK, BO,
        )  # fmt: skip
        tl.store(p_loss + model * parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), loss)
