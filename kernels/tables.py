"""Where a model's numbers lie: the columns of the table of models, int64 [A, N_FIELDS], and of its factors.

Models of different widths k share a launch: the rows of their W_in and W_out^T stand one after another.
"""

import triton
import triton.language as tl

K = tl.constexpr(0)  # neurons
ROW = tl.constexpr(1)  # first row in the packed tensors
STREAM = tl.constexpr(2)  # which batches it sees
STEPS = tl.constexpr(3)  # optimizer steps in all
N_FIELDS = tl.constexpr(4)

HALF_L1 = tl.constexpr(0)  # l1 / 2: the penalty's gradient in units of 2/B
BIAS_FACTOR = tl.constexpr(1)  # 1 - bias_decay lr, in the first half of training
N_FACTORS = tl.constexpr(2)

ROW_NUMBERS = tl.constexpr(32)  # a row of W_out^T and of e is padded to a multiple of this, with zeros


@triton.jit
def is_active(p_models, p_diverged, model, step):
    """Whether a model still trains: it has not diverged, and has steps left."""
    return (tl.load(p_diverged + model) == 0) & (step < tl.load(p_models + model * N_FIELDS + STEPS))


@triton.jit
def row_start(i, length):
    """Where row i of an array begins, int64: in wide layers it lies beyond 2^31."""
    return tl.cast(i, tl.int64) * length


@triton.jit
def whole_rows(LO):
    """LO, which is a multiple of ROW_NUMBERS, as the compiler can see: so that rows are read 16 bytes at a time."""
    return LO // ROW_NUMBERS * ROW_NUMBERS
