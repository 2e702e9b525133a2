"""Where a model's numbers lie: the columns of the table of models, int64 [A, N_FIELDS], and of its factors.

Models of different widths k share a launch: the rows of their W_in and W_out^T stand one after another, and behind
those of a model its linear path's, L_in and L_out^T, as r further rows.
"""

import triton
import triton.language as tl

K = tl.constexpr(0)  # neurons
ROW = tl.constexpr(1)  # first row in the packed tensors
STREAM = tl.constexpr(2)  # which batches it sees
STEPS = tl.constexpr(3)  # optimizer steps in all
RANK = tl.constexpr(4)  # of the linear path
LAST_SURVEY = tl.constexpr(5)  # step up to which neurons that are dead in its batch are left out (survey.py), or -1
N_FIELDS = tl.constexpr(6)

HALF_L1 = tl.constexpr(0)  # l1 / 2: the penalty's gradient in units of 2/B
BIAS_FACTOR = tl.constexpr(1)  # 1 - bias_decay lr, in the first half of training; 1 where DECAY is not "global"
STRENGTH = tl.constexpr(2)  # what the spread (per_neuron) or the rate of change (rate) is multiplied with
N_FACTORS = tl.constexpr(3)

ROW_NUMBERS = tl.constexpr(32)  # a row of W_out^T and of e is padded to a multiple of this, with zeros


@triton.jit
def is_active(p_models, p_diverged, model, step):
    """Whether a model still trains: it has not diverged, and has steps left."""
    return (tl.load(p_diverged + model) == 0) & (step < tl.load(p_models + model * N_FIELDS + STEPS))


@triton.jit
def part_of(p_models, model, k, tile, B: tl.constexpr, LINEAR: tl.constexpr):
    """What the tile `tile` of B rows of a model belongs to, its k neurons or, behind them, its linear path: first row
    of that part in the packed tensors, its number of rows, the tile's number in it, whether it is the linear path, and
    tiles before it."""
    row = tl.load(p_models + model * N_FIELDS + ROW)
    if LINEAR:
        before = tl.cdiv(k, B)
        linear = tile >= before
        before = tl.where(linear, before, 0)
        row += tl.where(linear, k, 0)
        rank = tl.load(p_models + model * N_FIELDS + RANK).to(tl.int32)
        return row, tl.where(linear, rank, k), tile - before, linear, before
    else:
        return row, k, tile, False, 0


@triton.jit
def neurons_of(p_models, model):
    """A model's number of neurons, int32."""
    return tl.load(p_models + model * N_FIELDS + K).to(tl.int32)


@triton.jit
def part_start(p_models, model, part: tl.constexpr, M, LO):
    """Where a model's neurons (part 0) or its linear path (1) begin: first row, offsets of it in W_in and in W_out^T;
    and how many rows they are."""
    row, k = tl.load(p_models + model * N_FIELDS + ROW), neurons_of(p_models, model)
    if part == 1:
        row += k
        k = tl.load(p_models + model * N_FIELDS + RANK).to(tl.int32)
    return row, row * M, row * LO, k


@triton.jit
def chunks_before(p_models, model, part: tl.constexpr, B: tl.constexpr):
    """Chunks of B rows that come before those of a part."""
    if part == 1:
        return tl.cdiv(neurons_of(p_models, model), B)
    else:
        return 0


@triton.jit
def rows_and_chunks(p_models, model, B: tl.constexpr):
    """A model's number of neurons, and of its tiles of B rows, the linear path's included."""
    k = neurons_of(p_models, model)
    return k, tl.cdiv(k, B) + tl.cdiv(tl.load(p_models + model * N_FIELDS + RANK).to(tl.int32), B)


@triton.jit
def is_surveyed(p_models, model, step):
    """Whether a step begins with a survey of the model's neurons."""
    return step <= tl.load(p_models + model * N_FIELDS + LAST_SURVEY)


@triton.jit
def takes_all(p_models, model, step):
    """Whether it is the last such step, in which no neuron is left out: from there on every one stands in its place."""
    return step == tl.load(p_models + model * N_FIELDS + LAST_SURVEY)


@triton.jit
def decay_of(p_models, p_factors, model, step):
    """What the bias is multiplied with at this step, and the strength of its decay in the other modes."""
    decays = 2 * step < tl.load(p_models + model * N_FIELDS + STEPS)
    factor = tl.load(p_factors + model * N_FACTORS + BIAS_FACTOR)
    strength = tl.load(p_factors + model * N_FACTORS + STRENGTH)
    return tl.where(decays, factor, 1.0), tl.where(decays, strength, 0.0)


@triton.jit
def sum_of(p, stride, n, BLOCK: tl.constexpr):
    """The sum of n numbers, each `stride` behind the last: BLOCK of them at a time, for whom the memory is far."""
    i = tl.arange(0, BLOCK)
    sums = tl.load(p + i * stride, mask=i < n, other=0)
    for first in range(BLOCK, n, BLOCK):
        sums += tl.load(p + (first + i) * stride, mask=first + i < n, other=0)
    return tl.sum(sums)


@triton.jit
def row_start(i, length):
    """Where row i of an array begins, int64: in wide layers it lies beyond 2^31."""
    return tl.cast(i, tl.int64) * length


@triton.jit
def offsets_at(rows, columns, length):
    """Offsets [rows, columns] of these rows and columns of an array, 64 bits."""
    return rows.to(tl.int64)[:, None] * length + columns[None, :]


@triton.jit
def whole_rows(LO):
    """LO, which is a multiple of ROW_NUMBERS, as the compiler can see: so that rows are read 16 bytes at a time."""
    return LO // ROW_NUMBERS * ROW_NUMBERS
