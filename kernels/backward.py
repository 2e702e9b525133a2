"""Backward pass: the gradients of one tile of neurons and outputs, in units of 2/B.

    dh = e W_out + (l1/2) sign(h)      dz = dh phi'(z)      dW_in = dz^T x      db = sum dz      dW_out^T = h^T e

z and h are computed again from x: cheaper than reading them. dW_in and db are linear in dh, so a program that sees some
of the outputs adds its part of dh, and the parts are summed in index order where the gradient is used.

Beyond o, up to LO, W_out^T and e hold zeros, and so does dW_out^T: whole rows are read and written 16 bytes at a time.

B samples   k neurons   o outputs   M tile of the embedding dimension
BR rows (samples) a chunk   BK neurons a tile   BO outputs a tile   LO length of a row of W_out^T and e in memory
"""

import triton
import triton.language as tl

from .activations import activate, derivative
from .forward import hidden
from .products import operand, product
from .tables import HALF_L1, N_FACTORS, N_FIELDS, ROW, STREAM, K, is_active, row_start, whole_rows


@triton.jit
def backward_tile(
    row0, row1, k0, column0, half_l1, p_x, p_W_in, p_b, p_W_out, p_e, p_dW_in, p_db, p_dW_out, k, B, LO,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One model's dW_in [BK, M], db [BK], dW_out^T [BK, BO] at neuron k0, output column0, from samples row0 to row1."""
    i_m, i_k, i_o = tl.arange(0, M), k0 + tl.arange(0, BK), column0 + tl.arange(0, BO)
    m_k, m_o = i_k < k, i_o < LO
    p_W_out, p_dW_out, p_dW_in = p_W_out + row_start(k0, LO), p_dW_out + row_start(k0, LO), p_dW_in + row_start(k0, M)
    o_out = tl.arange(0, BK)[:, None] * LO + i_o[None, :]
    m_out = m_k[:, None] & m_o[None, :]
    W_out = tl.load(p_W_out + o_out, mask=m_out, other=0.0)  # [BK, BO]
    dW_in = tl.zeros([BK, M], tl.float32)
    db = tl.zeros([BK], tl.float32)
    dW_out = tl.zeros([BK, BO], tl.float32)
    for r0 in range(row0, row1, BR):
        i_r = r0 + tl.arange(0, BR)
        m_r = i_r < row1
        x = tl.load(p_x + i_r.to(tl.int64)[:, None] * M + i_m[None, :], mask=m_r[:, None], other=0.0)  # [BR, M]
        o_e = i_r.to(tl.int64)[:, None] * LO + i_o[None, :]
        e = tl.load(p_e + o_e, mask=m_r[:, None] & m_o[None, :], other=0.0)  # [BR, BO]
        z = hidden(x, p_W_in, p_b, k0, k, PRECISION, M, BK)  # [BR, BK]
        h = activate(z, ACTIVATION)
        dh = product(e, tl.trans(W_out), tl.zeros([BR, BK], tl.float32), PRECISION)  # [BR, BO] @ [BO, BK] -> [BR, BK]
        if column0 == 0:  # the penalty once, not with every part of the outputs
            dh += half_l1 * (tl.where(h > 0.0, 1.0, 0.0) - tl.where(h < 0.0, 1.0, 0.0))
        # Rows beyond the end have x = 0, but their z = b may be active.
        dz = tl.where(m_r[:, None], dh * derivative(z, ACTIVATION), 0.0)
        db += tl.sum(dz, 0)
        dW_in = product(tl.trans(operand(dz, PRECISION)), x, dW_in, PRECISION)  # [BK, BR] @ [BR, M] -> [BK, M]
        # Last, when z is done with: 255 to 172 registers on sm_80 (gelu, bf16), and no spills on sm_90.
        dW_out = product(tl.trans(operand(h, PRECISION)), e, dW_out, PRECISION)  # [BK, BR] @ [BR, BO] -> [BK, BO]
    tl.store(p_dW_in + tl.arange(0, BK)[:, None] * M + i_m[None, :], dW_in, mask=m_k[:, None])
    tl.store(p_db + i_k, db, mask=m_k)
    tl.store(p_dW_out + o_out, dW_out, mask=m_out)


@triton.jit(do_not_specialize=["B", "LO", "rows", "row_parts", "first", "total_rows"])
def backward_kernel(
    p_models, p_factors, p_diverged, p_step, p_x, p_W_in, p_b, p_W_out, p_e, p_dW_in, p_db, p_dW_out,
    B, LO, rows, row_parts, first, total_rows,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid (neuron tiles, output tiles x row parts, models), each program `rows` samples.

    Partial gradients, one for each part: dW_in [row parts x output tiles, total rows, M], db without M, and
    dW_out^T [row parts, total rows, LO].
    """
    LO = whole_rows(LO)
    model = (first + tl.program_id(2)).to(tl.int64)
    k = tl.load(p_models + model * N_FIELDS + K).to(tl.int32)
    k0 = tl.program_id(0) * BK
    if is_active(p_models, p_diverged, model, tl.load(p_step)) & (k0 < k):
        stream = tl.load(p_models + model * N_FIELDS + STREAM)
        row = tl.load(p_models + model * N_FIELDS + ROW)
        part = (tl.program_id(1) % row_parts).to(tl.int64)
        tile = tl.program_id(1) // row_parts
        both = tl.program_id(1).to(tl.int64)
        backward_tile(
            tl.program_id(1) % row_parts * rows, tl.minimum((part.to(tl.int32) + 1) * rows, B), k0, tile * BO,
            tl.load(p_factors + model * N_FACTORS + HALF_L1), p_x + stream * B * M,
            p_W_in + row * M, p_b + row, p_W_out + row * LO, p_e + model * B * LO,
            p_dW_in + (both * total_rows + row) * M, p_db + both * total_rows + row,
            p_dW_out + (part * total_rows + row) * LO, k, B, LO,
            ACTIVATION, PRECISION, M, BR, BK, BO,
        )  # fmt: skip
