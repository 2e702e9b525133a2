"""Which neurons a batch activates, and their rows one after another: the step is trained on those alone.

A neuron of ReLU that no sample of a batch activates has h = 0 throughout: it adds nothing to y, and its gradients are
0. In layers that start at a negative bias most neurons are like that at any one step. `survey` computes z of every
sample and neuron and keeps a flag for each neuron; `gather` copies W_in, b and W_out^T of those that are active, in
their order, to where forward and backward read their operands, and notes for the update in which row each one stands.

Nothing is remembered from step to step: who is left out follows from the parameters and the batch, and for how many
steps neurons are looked at from the spec alone (fastmono/engines/launch.py). In the last of these all are taken, which
puts each in its place again. A z that is NaN counts as active, so that it reaches the loss.

k neurons   M tile of the embedding dimension   LO length of a row of W_out^T
BR samples a chunk of the survey   BK neurons a tile of it   BG neurons a chunk of the gathering   BO outputs a piece
"""

import triton
import triton.language as tl

from .products import operand, product
from .tables import (
    N_FIELDS,
    ROW,
    STREAM,
    is_active,
    is_surveyed,
    neurons_of,
    offsets_at,
    row_start,
    takes_all,
    whole_rows,
)
from .windows import read, window

COUNTED = tl.constexpr(1024)  # neurons whose flags a program reads at once


@triton.jit
def survey_tile(
    every, row0, row1, k0, p_x, p_W_in, p_b, p_flags, k,
    PRECISION: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Flags, int8, of the neurons k0 to k0 + BK: 1 where z is above 0, or NaN, for a sample of row0 to row1; of `every`
    neuron if asked.

    Samples that fill the last chunk have z = b: such a flag may be 1 for nothing, which leaves out less.
    """
    i_k = k0 + tl.arange(0, BK)
    W_in = operand(read(window(p_W_in, k, M, BK, M, False), k0, 0, BK, M, False), PRECISION)
    b = tl.load(p_b + i_k, mask=i_k < k, other=0.0)
    w_x = window(p_x, row1, M, BR, M, False)
    top = tl.full([BK, BR], float("-inf"), tl.float32)
    for r0 in range(row0, row1, BR):
        x = read(w_x, r0, 0, BR, M, False)
        z = product(W_in, tl.trans(x), tl.zeros([BK, BR], tl.float32), PRECISION)  # [BK, M] @ [M, BR] -> [BK, BR]
        top = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
    # Adding b after the largest is found changes nothing: a rounded sum grows with its summand.
    found = tl.sum(tl.where(top + b[:, None] <= 0.0, 0.0, 1.0), 1)
    tl.store(p_flags + i_k, tl.where(every | (found > 0.0), 1, 0).to(tl.int8), mask=i_k < k)


@triton.jit
def flags_of(p_flags, parts, stride, i_k, mask):
    """Whether any part of the samples activates the neurons i_k, int32, 0 beyond the mask."""
    found = tl.load(p_flags + i_k, mask=mask, other=0)
    for part in range(1, parts):
        found |= tl.load(p_flags + part * stride + i_k, mask=mask, other=0)
    return found.to(tl.int32)


@triton.jit
def gather_tile(
    k0, before, p_flags, parts, stride, p_place, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, k, LO,
    PRECISION: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Copy the active neurons of k0 to k0 + BG as operands, behind the `before` that come first; returns how many.

    p_place: int32 [k], the row that each now stands in, or -1.
    """
    i_k, i_m = k0 + tl.arange(0, BG), tl.arange(0, M)
    m_k = i_k < k
    flags = flags_of(p_flags, parts, stride, i_k, m_k)
    at = before + tl.cumsum(flags, 0) - flags
    active = flags != 0
    tl.store(p_place + i_k, tl.where(active, at, -1), mask=m_k)
    tl.store(p_q_b + at, tl.load(p_b + i_k, mask=active, other=0.0), mask=active)
    m_in = active[:, None] & (i_m < M)[None, :]
    W_in = tl.load(p_W_in + offsets_at(i_k, i_m, M), mask=m_in, other=0.0)
    tl.store(p_q_in + offsets_at(at, i_m, M), operand(W_in, PRECISION), mask=m_in)
    for c0 in range(0, LO, BO):
        i_o = c0 + tl.arange(0, BO)
        m_out = active[:, None] & (i_o < LO)[None, :]
        W_out = tl.load(p_W_out + offsets_at(i_k, i_o, LO), mask=m_out, other=0.0)
        tl.store(p_q_out + offsets_at(at, i_o, LO), operand(W_out, PRECISION), mask=m_out)
    return tl.sum(flags)


@triton.jit(do_not_specialize=["B", "rows", "total_rows", "first"])
def survey_kernel(
    p_models, p_diverged, p_step, p_x, p_W_in, p_b, p_flags, B, rows, total_rows, first,
    PRECISION: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of neurons, parts of `rows` samples, models). p_flags: int8 [parts, total rows]."""
    model = (first + tl.program_id(2)).to(tl.int64)
    k, k0 = neurons_of(p_models, model), tl.program_id(0) * BK
    step = tl.load(p_step)
    if is_surveyed(p_models, model, step) & (k0 < k) & is_active(p_models, p_diverged, model, step):
        row = tl.load(p_models + model * N_FIELDS + ROW)
        part = tl.program_id(1)
        survey_tile(
            takes_all(p_models, model, step), part * rows, tl.minimum((part + 1) * rows, B), k0,
            p_x + tl.load(p_models + model * N_FIELDS + STREAM) * B * M, p_W_in + row * M, p_b + row,
            p_flags + row_start(part, total_rows) + row, k, PRECISION, M, BR, BK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "total_rows", "LO", "first"])
def gather_kernel(
    p_models, p_diverged, p_step, p_flags, p_place, p_used, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out,
    parts, total_rows, LO, first, PRECISION: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid (chunks of neurons, models). Each program counts the active neurons before its own; the last writes how many
    there are in all to p_used, int32 [A]."""
    LO = whole_rows(LO)
    model = (first + tl.program_id(1)).to(tl.int64)
    k, k0 = neurons_of(p_models, model), tl.program_id(0) * BG
    step = tl.load(p_step)
    if is_surveyed(p_models, model, step) & (k0 < k) & is_active(p_models, p_diverged, model, step):
        row = tl.load(p_models + model * N_FIELDS + ROW)
        p_flags, stride = p_flags + row, total_rows.to(tl.int64)
        seen = tl.zeros([COUNTED], tl.int32)
        for j0 in range(0, k0, COUNTED):
            i_k = j0 + tl.arange(0, COUNTED)
            seen += flags_of(p_flags, parts, stride, i_k, i_k < k0)
        before = tl.sum(seen)
        i, out = row * M, row * LO
        own = gather_tile(
            k0, before, p_flags, parts, stride, p_place + row, p_W_in + i, p_b + row, p_W_out + out,
            p_q_in + i, p_q_b + row, p_q_out + out, k, LO, PRECISION, M, BG, BO,
        )  # fmt: skip
        if k0 + BG >= k:
            tl.store(p_used + model, before + own)
