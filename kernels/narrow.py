"""Forward and backward pass of a narrow layer in one: the residual never leaves the chip.

    z = x W_in^T + b      h = phi(z)      e = h W_out^T - tau      dh = e W_out + (l1/2) sign(h)      dz = dh phi'(z)
    loss = sum e^2        dW_in = dz^T x      db = sum dz          dW_out^T = h^T e                   in units of 2/B

Where all neurons fit one tile, a program has all that y takes, and can form e, use it three times and drop it. In such
layers what is as wide as the outputs passes through the cache for longer than the products take: e once out and once
back, beside tau once in. A program that sees some of the outputs computes z again and adds its part of dh, as in the
backward pass.

B samples   k neurons, at most BK   o outputs   M tile of the embedding dimension
BR rows (samples) a chunk   BO outputs a tile   LO length of a row of W_out^T and tau in memory
"""

import triton
import triton.language as tl

from .activations import activate, derivative
from .products import operand, product
from .tables import HALF_L1, N_FACTORS, N_FIELDS, ROW, STREAM, is_active, whole_rows
from .windows import read, window, write


@triton.jit
def narrow_tile(
    row0, row1, column0, half_l1, p_x, p_tau, p_W_in, p_b, p_W_out, p_dW_in, p_db, p_dW_out, k, o, LO,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """One model's dW_in [k, M], db [k], dW_out^T [k, BO] at output column0, from samples row0 to row1; returns their
    sum of squares."""
    i_r, i_k = tl.arange(0, BR), tl.arange(0, BK)
    W_in = read(window(p_W_in, k, M, BK, M, False), 0, 0, BK, M, False)
    W_out = read(window(p_W_out, k, LO, BK, BO, False), 0, column0, BK, BO, False)
    b = tl.load(p_b + i_k, mask=i_k < k, other=0.0)
    w_x, w_tau = window(p_x, row1, M, BR, M, BULK), window(p_tau, row1, LO, BR, BO, BULK)
    m_o = (column0 + tl.arange(0, BO) < o)[None, :]
    penalty = tl.where(column0 == 0, half_l1, 0.0)  # once, not with every part of the outputs
    dW_in = tl.zeros([BK, M], tl.float32)
    db = tl.zeros([BK], tl.float32)
    dW_out = tl.zeros([BK, BO], tl.float32)
    loss = tl.zeros([BR], tl.float32)
    for r0 in range(row0, row1, BR):
        x = read(w_x, r0, 0, BR, M, BULK)
        tau = read(w_tau, r0, column0, BR, BO, BULK)
        m_r = (r0 + i_r < row1)[:, None]
        z = product(x, tl.trans(W_in), tl.zeros([BR, BK], tl.float32), PRECISION) + b[None, :]  # [BR, M] @ [M, BK]
        z = tl.where(m_r, z, 0.0)  # of no sample, where b alone may be where phi or phi' is infinite
        h = operand(activate(z, ACTIVATION), PRECISION)
        e = product(h, W_out, -tau, PRECISION)  # [BR, BK] @ [BK, BO] -> [BR, BO]
        e = tl.where(m_o, e, 0.0)
        loss += tl.sum(e * e, 1)
        e = operand(e, PRECISION)
        dh = product(e, tl.trans(W_out), tl.zeros([BR, BK], tl.float32), PRECISION)  # [BR, BO] @ [BO, BK] -> [BR, BK]
        if ACTIVATION == "relu":
            dz = tl.where(h > 0.0, dh + penalty, 0.0)
        else:
            dh += penalty * (tl.where(h > 0.0, 1.0, 0.0) - tl.where(h < 0.0, 1.0, 0.0))
            dz = dh * derivative(z, ACTIVATION)
        db += tl.sum(dz, 0)
        dW_in = product(tl.trans(operand(dz, PRECISION)), x, dW_in, PRECISION)  # [BK, BR] @ [BR, M] -> [BK, M]
        dW_out = product(tl.trans(h), e, dW_out, PRECISION)  # [BK, BR] @ [BR, BO] -> [BK, BO]
    write(window(p_dW_in, k, M, BK, M, False), 0, 0, dW_in, BK, M, False)
    tl.store(p_db + i_k, db, mask=i_k < k)
    write(window(p_dW_out, k, LO, BK, BO, False), 0, column0, dW_out, BK, BO, False)
    return tl.sum(loss)


@triton.jit(do_not_specialize=["o", "B", "LO", "rows", "row_parts", "loss_stride", "first", "total_rows"])
def narrow_kernel(
    p_models, p_used, p_factors, p_diverged, p_step, p_x, p_tau, p_W_in, p_b, p_W_out, p_loss, p_dW_in, p_db, p_dW_out,
    o, B, LO, rows, row_parts, loss_stride, first, total_rows,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Grid (output tiles x row parts, models), a program `rows` samples. The first p_used [A] rows of a model are its
    neurons'.

    Partial gradients, one for each part: dW_in [row parts x output tiles, total rows, M], db without M, and
    dW_out^T [row parts, total rows, LO]; each program's part of the loss, [A, parts].
    """
    LO, rows = whole_rows(LO), whole_rows(rows)
    model = (first + tl.program_id(1)).to(tl.int64)
    if is_active(p_models, p_diverged, model, tl.load(p_step)):
        stream = tl.load(p_models + model * N_FIELDS + STREAM)
        row = tl.load(p_models + model * N_FIELDS + ROW)
        part = tl.program_id(0) % row_parts
        both = tl.program_id(0).to(tl.int64)
        loss = narrow_tile(
            part * rows, tl.minimum((part + 1) * rows, B), tl.program_id(0) // row_parts * BO,
            tl.load(p_factors + model * N_FACTORS + HALF_L1), p_x + stream * B * M, p_tau + stream * B * LO,
            p_W_in + row * M, p_b + row, p_W_out + row * LO,
            p_dW_in + (both * total_rows + row) * M, p_db + both * total_rows + row,
            p_dW_out + (part.to(tl.int64) * total_rows + row) * LO, tl.load(p_used + model), o, LO,
            ACTIVATION, PRECISION, M, BR, BK, BO, BULK,
        )  # fmt: skip
        tl.store(p_loss + model * loss_stride + tl.program_id(0), loss)
