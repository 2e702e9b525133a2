"""Forward pass: from embeddings to the residual and the loss.

    z = x W_in^T + b        h = phi(z)        y = h W_out^T        e = y - tau        loss = (1/B) sum e^2

k neurons take part: all, or those that are active in the batch, whose rows stand one after another (survey.py).
A linear path (LINEAR) is r further rows of W_in and W_out^T behind the k of the neurons, with h = z and b = 0.

CARRIED: the product of a chunk's h with W_out is followed by that of z of the next chunk, so that both are under way at
once: on sm_90 the compiler otherwise waits for each, or comes close to it. Sums, and the order of their parts, are the
same either way.

x is so much narrower than h that each tile of outputs computes z again rather than read h; the programs of a row tile
share out the chunks of h^T that they store for the backward pass.

B samples   k neurons   o outputs   M tile of the embedding dimension
BR rows (samples) a tile   BK neurons a chunk   BO outputs a tile
LO length of a row of W_out^T, tau and e in memory   LB length of a row of h^T
"""

import triton
import triton.language as tl

from .activations import activate
from .products import operand, product
from .tables import N_FIELDS, RANK, ROW, STREAM, is_active, whole_rows
from .windows import read, window, write


@triton.jit
def inputs_of(
    x, w_W_in, p_b, k0, k, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """z [BR, BK] of the neurons k0 to k0 + BK, 0 beyond k."""
    i_k = k0 + tl.arange(0, BK)
    W_in = read(w_W_in, k0, 0, BK, M, BULK)
    b = tl.load(p_b + i_k, mask=i_k < k, other=0.0)
    return product(x, tl.trans(W_in), tl.zeros([BR, BK], tl.float32), PRECISION) + b[None, :]  # [BR, M] @ [M, BK]


@triton.jit
def add_outputs(
    e, x, row0, tile, tiles, p_W_in, p_b, p_W_out, p_h, k, B, LO, LB,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, CARRIED: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """e [BR, BO] plus what k neurons, or rows of a linear path, make of x [BR, M]; stores the tile's share of h^T."""
    m_r = (row0 + tl.arange(0, BR) < B)[:, None]
    rows = tl.maximum(k, 1)  # no descriptor is of nothing
    w_W_in = window(p_W_in, rows, M, BK, M, BULK)
    w_W_out = window(p_W_out, rows, LO, BK, BO, BULK)
    w_h = window(p_h, rows, LB, BK, BR, BULK)
    if CARRIED:
        first = tl.where(k > 0, 0, 1)  # beyond the descriptor's one row where there is no neuron to be read
        z = inputs_of(x, w_W_in, p_b, first, k, PRECISION, M, BR, BK, BULK)
    for k0 in range(0, k, BK):
        if not CARRIED:
            z = inputs_of(x, w_W_in, p_b, k0, k, PRECISION, M, BR, BK, BULK)
        h = operand(activate(z, ACTIVATION), PRECISION)
        if k0 // BK % tiles == tile:
            write(w_h, k0, row0, tl.trans(tl.where(m_r, h, 0.0)), BK, BR, BULK)
        W_out = read(w_W_out, k0, tile * BO, BK, BO, BULK)
        e = product(h, W_out, e, PRECISION)  # [BR, BK] @ [BK, BO] -> [BR, BO]
        if CARRIED:
            z = inputs_of(x, w_W_in, p_b, k0 + BK, k, PRECISION, M, BR, BK, BULK)
    return e


@triton.jit
def forward_tile(
    row0, tile, tiles, p_x, p_tau, p_W_in, p_b, p_W_out, p_h, p_e, k, rank, o, B, LO, LB,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr, CARRIED: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Tile `tile` of `tiles` of e [B, LO] of one model, its chunks of h^T [k + rank, LB] (both as operands, zero beyond
    o and B); returns the tile's sum of squares, float32."""
    column0 = tile * BO
    m_r = (row0 + tl.arange(0, BR) < B)[:, None]
    x = read(window(p_x, B, M, BR, M, BULK), row0, 0, BR, M, BULK)
    # The sum begins at -tau: a tile of tau beside one of y at the end would take twice the registers.
    tau = read(window(p_tau, B, LO, BR, BO, False), row0, column0, BR, BO, False)
    inside = m_r & (column0 + tl.arange(0, BO) < o)[None, :]
    e = tl.where(inside, -tau, 0.0)
    e = add_outputs(
        e, x, row0, tile, tiles, p_W_in, p_b, p_W_out, p_h, k, B, LO, LB,
        ACTIVATION, PRECISION, CARRIED, M, BR, BK, BO, BULK,
    )  # fmt: skip
    if LINEAR:
        after = k.to(tl.int64)
        e = add_outputs(
            e, x, row0, tile, tiles, p_W_in + after * M, p_b + after, p_W_out + after * LO, p_h + after * LB, rank,
            B, LO, LB, "identity", PRECISION, CARRIED, M, BR, BK, BO, BULK,
        )  # fmt: skip
    e = tl.where(inside, e, 0.0)
    write(window(p_e, B, LO, BR, BO, BULK), row0, column0, operand(e, PRECISION), BR, BO, BULK)
    return tl.sum(e * e)


@triton.jit(do_not_specialize=["o", "B", "LO", "LB", "parts", "tiles", "beside", "first", "count"])
def forward_kernel(
    p_models, p_used, p_diverged, p_step, p_x, p_tau, p_W_in, p_b, p_W_out, p_h, p_e, p_loss,
    o, B, LO, LB, parts, tiles, beside, first, count,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr, CARRIED: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles x output tiles, each for `beside` models; as often as it takes for `count` models).

    Models side by side read the same x and tau at the same time, where they share a stream. Of the rows of a model the
    first p_used [A] are its neurons'. Writes h^T, e [A, B, LO] and each program's part of the loss, [A, parts].
    """
    LO, LB = whole_rows(LO), whole_rows(LB)
    place = tl.program_id(1) * beside + tl.program_id(0) % beside
    own = tl.program_id(0) // beside
    model = (first + tl.minimum(place, count - 1)).to(tl.int64)
    if (place < count) & is_active(p_models, p_diverged, model, tl.load(p_step)):
        stream = tl.load(p_models + model * N_FIELDS + STREAM)
        row = tl.load(p_models + model * N_FIELDS + ROW)
        loss = forward_tile(
            own // tiles * BR, own % tiles, tiles,
            p_x + stream * B * M, p_tau + stream * B * LO, p_W_in + row * M, p_b + row, p_W_out + row * LO,
            p_h + row * LB, p_e + model * B * LO, tl.load(p_used + model),
            tl.load(p_models + model * N_FIELDS + RANK).to(tl.int32), o, B, LO, LB,
            ACTIVATION, LINEAR, PRECISION, CARRIED, M, BR, BK, BO, BULK,
        )  # fmt: skip
        tl.store(p_loss + model * parts + own, loss)
