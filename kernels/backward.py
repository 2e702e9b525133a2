"""Backward pass: the gradients of one tile of neurons and outputs, in units of 2/B, transposed: neurons are rows.

    dh = e W_out + (l1/2) sign(h)      dz = dh phi'(z)      dW_in = dz^T x      db = sum dz      dW_out^T = h^T e

k neurons take part, as in the forward pass. h^T is read. phi' of ReLU follows from it; for the others z is computed
again. One chunk of e serves both dh and dW_out.
dW_in and db are linear in dh, so a program that sees some of the outputs adds its part of dh, and the parts are summed
in index order where the gradient is used.

CARRIED: dz of a chunk is multiplied with x in the turn of the next chunk, so that all products of a turn are under way
at once, and none from one turn to the next. On sm_90 the compiler otherwise waits for each, and lets the copy engine
overwrite an h that is being multiplied. Sums, and the order of their parts, are the same either way.

Rows of a linear path (LINEAR) have phi' = 1, no bias and no penalty.

Beyond o, up to LO, W_out^T and e hold zeros, and so does dW_out^T: whole rows are read and written 16 bytes at a time.
Beyond B, up to LB, h^T does.

B samples   k neurons   o outputs   M tile of the embedding dimension
BR rows (samples) a chunk   BK neurons a tile   BO outputs a tile
LO length of a row of W_out^T and e in memory   LB length of a row of h^T
"""

import triton
import triton.language as tl

from .activations import derivative
from .products import operand, product
from .tables import HALF_L1, N_FACTORS, N_FIELDS, STREAM, is_active, part_of, whole_rows
from .windows import read, window, write


@triton.jit
def backward_tile(
    row0, row1, k0, column0, half_l1, linear, p_x, p_W_in, p_b, p_W_out, p_h, p_e, p_dW_in, p_db, p_dW_out, k, LO, LB,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr, CARRIED: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """One model's dW_in [BK, M], db [BK], dW_out^T [BK, BO] at neuron k0, output column0, from samples row0 to row1.

    linear: whether the rows are a linear path's; its db is 0.
    """
    i_k, i_r = k0 + tl.arange(0, BK), tl.arange(0, BR)
    m_k = i_k < k
    w_x = window(p_x, row1, M, BR, M, BULK)
    w_e = window(p_e, row1, LO, BR, BO, BULK)
    w_h = window(p_h, k, LB, BK, BR, BULK)
    W_out = read(window(p_W_out, k, LO, BK, BO, BULK), k0, column0, BK, BO, BULK)
    if ACTIVATION != "relu":
        W_in = read(window(p_W_in, k, M, BK, M, BULK), k0, 0, BK, M, BULK)
        b = tl.load(p_b + i_k, mask=m_k, other=0.0)
    penalty = tl.where(column0 == 0, half_l1, 0.0)  # once, not with every part of the outputs
    if LINEAR:
        penalty = tl.where(linear, 0.0, penalty)
    dW_in = tl.zeros([BK, M], tl.float32)
    db = tl.zeros([BK], tl.float32)
    dW_out = tl.zeros([BK, BO], tl.float32)
    if CARRIED:
        # Carried as float32: what is carried as an operand goes through shared memory, and is waited for at once.
        dz = tl.zeros([BK, BR], tl.float32)
    for r0 in range(row0, row1, BR):
        e = read(w_e, r0, column0, BR, BO, BULK)
        if not CARRIED or ACTIVATION != "relu":
            x = read(w_x, r0, 0, BR, M, BULK)
        h = read(w_h, k0, r0, BK, BR, BULK)
        if CARRIED:
            x_before = read(w_x, tl.maximum(r0 - BR, row0), 0, BR, M, BULK)  # in the first turn any: dz is 0
            dW_in = product(operand(dz, PRECISION), x_before, dW_in, PRECISION)  # [BK, BR] @ [BR, M] -> [BK, M]
            dW_out = product(h, e, dW_out, PRECISION)  # [BK, BR] @ [BR, BO] -> [BK, BO]
            db += tl.sum(dz, 1)  # while they are under way
        dh = product(W_out, tl.trans(e), tl.zeros([BK, BR], tl.float32), PRECISION)  # [BK, BO] @ [BO, BR] -> [BK, BR]
        if ACTIVATION == "relu":
            active = h > 0.0
            if LINEAR:
                active = active | linear
            dz = tl.where(active, dh + penalty, 0.0)
        else:
            dh += penalty * (tl.where(h > 0.0, 1.0, 0.0) - tl.where(h < 0.0, 1.0, 0.0))
            z = product(W_in, tl.trans(x), tl.zeros([BK, BR], tl.float32), PRECISION)  # [BK, M] @ [M, BR] -> [BK, BR]
            # Samples beyond the end have dh = 0, but b alone may be where phi' is infinite.
            slope = derivative(tl.where((r0 + i_r < row1)[None, :], z + b[:, None], 0.0), ACTIVATION)
            if LINEAR:
                slope = tl.where(linear, 1.0, slope)
            dz = dh * slope
        if not CARRIED:
            db += tl.sum(dz, 1)
        if not CARRIED:
            dW_in = product(operand(dz, PRECISION), x, dW_in, PRECISION)
            dW_out = product(h, e, dW_out, PRECISION)
    if CARRIED:
        last = row0 + (row1 - 1 - row0) // BR * BR
        db += tl.sum(dz, 1)
        dW_in = product(operand(dz, PRECISION), read(w_x, last, 0, BR, M, BULK), dW_in, PRECISION)
    if LINEAR:
        db = tl.where(linear, 0.0, db)
    write(window(p_dW_in, k, M, BK, M, False), k0, 0, dW_in, BK, M, False)
    tl.store(p_db + i_k, db, mask=m_k)
    write(window(p_dW_out, k, LO, BK, BO, False), k0, column0, dW_out, BK, BO, False)


@triton.jit(do_not_specialize=["B", "LO", "LB", "rows", "row_parts", "first", "total_rows"])
def backward_kernel(
    p_models, p_used, p_factors, p_diverged, p_step, p_x, p_W_in, p_b, p_W_out, p_h, p_e, p_dW_in, p_db, p_dW_out,
    B, LO, LB, rows, row_parts, first, total_rows,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr, CARRIED: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of neurons, then of the linear path; output tiles x row parts; models), a program `rows` samples.

    Partial gradients, one for each part: dW_in [row parts x output tiles, total rows, M], db without M, and
    dW_out^T [row parts, total rows, LO].
    """
    LO, LB, rows = whole_rows(LO), whole_rows(LB), whole_rows(rows)
    model = (first + tl.program_id(2)).to(tl.int64)
    row, k, tile, linear, _ = part_of(p_models, model, tl.load(p_used + model), tl.program_id(0), BK, LINEAR)
    k0 = tile * BK
    if is_active(p_models, p_diverged, model, tl.load(p_step)) & (k0 < k):
        stream = tl.load(p_models + model * N_FIELDS + STREAM)
        part = tl.program_id(1) % row_parts
        both = tl.program_id(1).to(tl.int64)
        backward_tile(
            part * rows, tl.minimum((part + 1) * rows, B), k0, tl.program_id(1) // row_parts * BO,
            tl.load(p_factors + model * N_FACTORS + HALF_L1), linear, p_x + stream * B * M,
            p_W_in + row * M, p_b + row, p_W_out + row * LO, p_h + row * LB, p_e + model * B * LO,
            p_dW_in + (both * total_rows + row) * M, p_db + both * total_rows + row,
            p_dW_out + (part.to(tl.int64) * total_rows + row) * LO, k, LO, LB,
            ACTIVATION, LINEAR, PRECISION, CARRIED, M, BR, BK, BO, BULK,
        )  # fmt: skip
