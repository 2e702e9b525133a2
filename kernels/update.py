"""From partial gradients to new parameters: sums in index order, moments, norms, update, bias decay, the finite check.

    g = (2/B) sum of parts     m <- .9 m + .1 g     v <- .999 v + .001 g^2
    lamb    p <- p - lr r u,   u = m / (sqrt(v) + 1e-6),   r = min(|p|, 10) / |u|, 1 where either norm is 0
    adamw   p <- (1 - .01 lr) p - (lr / c1) m / (sqrt(v) / c2 + 1e-8),   c1 = 1 - .9^t,  c2 = sqrt(1 - .999^t)
    sgd     p <- p - lr g
    b <- b (1 - bias_decay lr) while 2 step < steps; DECAY "per_neuron" and "rate": the rules of fastmono/optim.py

Two passes, since LAMB needs the norms of whole tensors: `moments` over all neurons, then `apply`. A linear path is two
tensors of its own: its chunks of rows come behind those of the neurons, with a bias that stays 0. What "rate" makes of
b has to wait until all of W_in and W_out has changed: it is done in `finish`.

p_place says in which row of the parts a neuron's gradient stands; it is 0 where that is negative, for a neuron that was
left out of the step. Each new parameter is written twice, the second time as an operand for the next step.

BA neurons a chunk   M tile of the embedding dimension   BO outputs a piece   LO length of a row of W_out^T
Padding has gradient 0 and stays 0: updated like the rest, so that rows are read and written 16 bytes at a time.
"""

import triton
import triton.language as tl

from .products import operand
from .tables import (
    N_FIELDS,
    ROW,
    decay_of,
    is_active,
    neurons_of,
    offsets_at,
    part_of,
    row_start,
    rows_and_chunks,
    sum_of,
    whole_rows,
)

BETA1, BETA2 = tl.constexpr(0.9), tl.constexpr(0.999)
REST1, REST2 = tl.constexpr(1 - 0.9), tl.constexpr(1 - 0.999)
LAMB_EPS, ADAMW_EPS = tl.constexpr(1e-6), tl.constexpr(1e-8)
LARGEST_NORM = tl.constexpr(10.0)
WEIGHT_DECAY = tl.constexpr(0.01)
SUMMED = tl.constexpr(256)  # numbers of one kind that a program reads at once
N_NORMS = tl.constexpr(6)  # |p|^2 and |u|^2 of W_in, b and W_out, for each chunk


@triton.jit
def gradient(p_parts, parts, stride, offsets, mask, unit):
    """unit times the sum of the parts, in their order, at `offsets`."""
    sum = tl.load(p_parts + offsets, mask=mask, other=0.0)
    for part in range(1, parts):
        sum += tl.load(p_parts + part * stride + offsets, mask=mask, other=0.0)
    return unit * sum


@triton.jit
def lamb_direction(m, v):
    """u, the shape of m."""
    return tl.math.div_rn(m, tl.sqrt_rn(v) + LAMB_EPS)


@triton.jit
def moments_piece(p_parts, parts, stride, o_parts, m_parts, p_p, p_m, p_v, offsets, mask, unit):
    """Update the moments of one piece of a tensor, whose gradient stands at o_parts; returns its |p|^2 and |u|^2."""
    g = gradient(p_parts, parts, stride, o_parts, mask & m_parts, unit)
    m = BETA1 * tl.load(p_m + offsets, mask=mask, other=0.0) + REST1 * g
    v = BETA2 * tl.load(p_v + offsets, mask=mask, other=0.0) + REST2 * g * g
    tl.store(p_m + offsets, m, mask=mask)
    tl.store(p_v + offsets, v, mask=mask)
    p = tl.load(p_p + offsets, mask=mask, other=0.0)
    u = lamb_direction(m, v)
    return tl.sum(p * p), tl.sum(u * u)


@triton.jit
def moments_tile(
    k0, k, unit, p_place, p_dW_in, p_db, p_dW_out, in_parts, out_parts, rows,
    p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, o, LO,
    M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The moments of the neurons, or rows of a linear path, k0 to k0 + BA, and their part of the norms, [N_NORMS]."""
    i_k, i_m = k0 + tl.arange(0, BA), tl.arange(0, M)
    m_k = i_k < k
    o_in = row_start(k0, M) + tl.arange(0, BA)[:, None] * M + i_m[None, :]
    m_in = m_k[:, None] & (i_m < M)[None, :]
    at = tl.load(p_place + i_k, mask=m_k, other=-1)
    took_part = (at >= 0)[:, None]
    p2, u2 = moments_piece(
        p_dW_in, in_parts, rows * M, offsets_at(at, i_m, M), took_part, p_W_in, p_m_in, p_v_in, o_in, m_in, unit
    )
    tl.store(p_norms + 0, p2)
    tl.store(p_norms + 1, u2)
    p2, u2 = moments_piece(p_db, in_parts, rows, at, at >= 0, p_b, p_m_b, p_v_b, i_k, m_k, unit)
    tl.store(p_norms + 2, p2)
    tl.store(p_norms + 3, u2)
    p2_out, u2_out = 0.0, 0.0
    for c0 in range(0, o, BO):
        i_o = c0 + tl.arange(0, BO)
        o_out = row_start(k0, LO) + tl.arange(0, BA)[:, None] * LO + i_o[None, :]
        m_out = m_k[:, None] & (i_o < LO)[None, :]
        p2, u2 = moments_piece(
            p_dW_out, out_parts, rows * LO, offsets_at(at, i_o, LO), took_part,
            p_W_out, p_m_out, p_v_out, o_out, m_out, unit,
        )  # fmt: skip
        p2_out += p2
        u2_out += u2
    tl.store(p_norms + 4, p2_out)
    tl.store(p_norms + 5, u2_out)


@triton.jit
def trust_ratio(p_norms, chunks, tensor: tl.constexpr):
    """min(|p|, 10) / |u| of one tensor from its chunks' norms, [chunks, N_NORMS]."""
    p2 = sum_of(p_norms + 2 * tensor, N_NORMS, chunks, SUMMED)
    u2 = sum_of(p_norms + 2 * tensor + 1, N_NORMS, chunks, SUMMED)
    norm_p, norm_u = tl.sqrt_rn(p2), tl.sqrt_rn(u2)
    clamped = tl.where(norm_p > LARGEST_NORM, LARGEST_NORM, norm_p)  # a NaN stays: not (NaN > 10)
    ratio = tl.math.div_rn(clamped, tl.where(norm_u == 0.0, 1.0, norm_u))
    return tl.where((norm_p == 0.0) | (norm_u == 0.0), 1.0, ratio)


@triton.jit
def trust_ratios(p_norms, chunks, OPTIMIZER: tl.constexpr):
    """Those of W_in, b and W_out; 1 where the optimizer has none."""
    r_in, r_b, r_out = 1.0, 1.0, 1.0
    if OPTIMIZER == "lamb":
        r_in = trust_ratio(p_norms, chunks, 0)
        r_b = trust_ratio(p_norms, chunks, 1)
        r_out = trust_ratio(p_norms, chunks, 2)
    return r_in, r_b, r_out


@triton.jit
def apply_piece(
    p_parts, parts, stride, o_parts, m_parts, p_p, p_operand, p_m, p_v, offsets, mask, unit, lr, ratio, c1, c2, factor,
    OPTIMIZER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """New parameters of one piece of a tensor, also as operands; returns those before and after."""
    if OPTIMIZER == "sgd":  # the gradient first: with p held meanwhile, sm_90 spills
        step = lr * gradient(p_parts, parts, stride, o_parts, mask & m_parts, unit)
        old = tl.load(p_p + offsets, mask=mask, other=0.0)
        p = old - step
    else:
        old = tl.load(p_p + offsets, mask=mask, other=0.0)
        p = old
        m = tl.load(p_m + offsets, mask=mask, other=0.0)
        v = tl.load(p_v + offsets, mask=mask, other=0.0)
        if OPTIMIZER == "lamb":
            p -= lr * ratio * lamb_direction(m, v)
        else:
            u = tl.math.div_rn(m, tl.math.div_rn(tl.sqrt_rn(v), c2) + ADAMW_EPS)
            p = p * (1.0 - lr * WEIGHT_DECAY) - tl.math.div_rn(lr, c1) * u
    p *= factor
    tl.store(p_p + offsets, p, mask=mask)
    tl.store(p_operand + offsets, operand(p, PRECISION), mask=mask)
    return old, p


@triton.jit
def not_finite(p):
    """How many numbers of a tile are not finite."""
    return tl.sum(tl.where(tl.abs(p) < float("inf"), 0, 1))  # a NaN is not below infinity


@triton.jit
def spread(squares, fourths, o):
    """How far the outputs of neurons are spread over o features, from their sums of w^2 and w^4 (fastmono/optim.py)."""
    total = tl.where(squares == 0.0, 1.0, squares)
    share = tl.math.div_rn(tl.math.div_rn(fourths, total), total)
    most = tl.math.div_rn(1.0, 1.0 - tl.math.div_rn(1.0, tl.maximum(o, 2).to(tl.float32)))
    s = (1.0 - share) * most
    s = tl.where(s < 0.0, 0.0, tl.where(s > 1.0, 1.0, s))  # a NaN stays
    return tl.where(o == 1, 0.0, s)


@triton.jit
def apply_tile(
    k0, k, unit, lr, r_in, r_b, r_out, c1, c2, factor, strength,
    p_place, p_dW_in, p_db, p_dW_out, in_parts, out_parts, rows,
    p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_change, o, LO,
    OPTIMIZER: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Update the neurons, or rows of a linear path, k0 to k0 + BA; returns how many parameters are not finite.

    For "rate" the squares of what their weights changed by and were are written to p_change [2].
    """
    i_k, i_m = k0 + tl.arange(0, BA), tl.arange(0, M)
    m_k = i_k < k
    o_in = row_start(k0, M) + tl.arange(0, BA)[:, None] * M + i_m[None, :]
    m_in = m_k[:, None] & (i_m < M)[None, :]
    at = tl.load(p_place + i_k, mask=m_k, other=-1)
    took_part = (at >= 0)[:, None]
    old_in, new_in = apply_piece(
        p_dW_in, in_parts, rows * M, offsets_at(at, i_m, M), took_part, p_W_in, p_q_in, p_m_in, p_v_in, o_in, m_in,
        unit, lr, r_in, c1, c2, 1.0, OPTIMIZER, PRECISION,
    )  # fmt: skip
    bad = not_finite(new_in)
    if DECAY == "rate":
        change, size = tl.sum((new_in - old_in) * (new_in - old_in)), tl.sum(old_in * old_in)
    if DECAY == "per_neuron":  # b waits for W_out
        squares, fourths = tl.zeros([BA], tl.float32), tl.zeros([BA], tl.float32)
    else:
        _, new_b = apply_piece(
            p_db, in_parts, rows, at, at >= 0, p_b, p_q_b, p_m_b, p_v_b, i_k, m_k,
            unit, lr, r_b, c1, c2, factor, OPTIMIZER, "fp32",
        )  # fmt: skip
        bad += not_finite(new_b)
    for c0 in range(0, o, BO):
        i_o = c0 + tl.arange(0, BO)
        o_out = row_start(k0, LO) + tl.arange(0, BA)[:, None] * LO + i_o[None, :]
        m_out = m_k[:, None] & (i_o < LO)[None, :]
        old, new = apply_piece(
            p_dW_out, out_parts, rows * LO, offsets_at(at, i_o, LO), took_part,
            p_W_out, p_q_out, p_m_out, p_v_out, o_out, m_out, unit, lr, r_out, c1, c2, 1.0, OPTIMIZER, PRECISION,
        )  # fmt: skip
        bad += not_finite(new)
        if DECAY == "rate":
            change += tl.sum((new - old) * (new - old))
            size += tl.sum(old * old)
        if DECAY == "per_neuron":
            square = new * new
            squares += tl.sum(square, 1)
            fourths += tl.sum(square * square, 1)
    if DECAY == "rate":
        tl.store(p_change, change)
        tl.store(p_change + 1, size)
    if DECAY == "per_neuron":
        own = tl.where(strength == 0.0, 1.0, 1.0 - strength * spread(squares, fourths, o))
        _, new_b = apply_piece(
            p_db, in_parts, rows, at, at >= 0, p_b, p_q_b, p_m_b, p_v_b, i_k, m_k,
            unit, lr, r_b, c1, c2, own, OPTIMIZER, "fp32",
        )  # fmt: skip
        bad += not_finite(new_b)
    return bad


@triton.jit
def decay_with_rate(p_b, p_q_b, k, strength, p_changes, chunks, BA: tl.constexpr):
    """b [k] times 1 - strength |dW| / |W|, from the chunks' squares [chunks, 2]; how many of it are not finite."""
    change, size = sum_of(p_changes, 2, chunks, SUMMED), sum_of(p_changes + 1, 2, chunks, SUMMED)
    rate = tl.where(size == 0.0, 0.0, tl.sqrt_rn(tl.math.div_rn(change, tl.where(size == 0.0, 1.0, size))))
    bad = 0
    for k0 in range(0, k, BA):
        i_k = k0 + tl.arange(0, BA)
        b = (1.0 - strength * rate) * tl.load(p_b + i_k, mask=i_k < k, other=0.0)
        tl.store(p_b + i_k, b, mask=i_k < k)
        tl.store(p_q_b + i_k, b, mask=i_k < k)
        bad += not_finite(tl.where(i_k < k, b, 0.0))
    return bad


@triton.jit(noinline=True)
def finish_model(
    p_models, model, p_factors, step, t, n_steps, p_loss, loss_parts, loss_stride, p_bad, p_losses, p_diverged, B,
    p_b, p_q_b, p_changes, chunks, DECAY: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """The loss of a step from its parts p_loss [A, loss_parts], what "rate" makes of b, and whether the model diverged:
    p_bad [A, chunks]."""
    k, own = rows_and_chunks(p_models, model, BA)
    loss = sum_of(p_loss + model * loss_stride, 1, loss_parts, SUMMED)
    loss = tl.math.div_rn(loss, B.to(tl.float32))
    bad = 0
    if DECAY == "rate":
        _, strength = decay_of(p_models, p_factors, model, step)
        if strength != 0.0:
            row = tl.load(p_models + model * N_FIELDS + ROW)
            p_changes += model * chunks * 2
            bad = decay_with_rate(p_b + row, p_q_b + row, k, strength, p_changes, tl.cdiv(k, BA), BA)
    bad += sum_of(p_bad + model * chunks, 1, own, SUMMED)
    tl.store(p_losses + model * n_steps + t, loss)
    if (bad > 0) | (not (tl.abs(loss) < float("inf"))):
        tl.store(p_diverged + model, step + 1)


@triton.jit(do_not_specialize=["in_parts", "out_parts", "rows", "o", "LO", "chunks", "first"])
def moments_kernel(
    p_models, p_diverged, p_step, unit, p_place, p_dW_in, p_db, p_dW_out, in_parts, out_parts, rows,
    p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, o, LO, chunks, first,
    LINEAR: tl.constexpr, M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, models). p_norms: float32 [A, chunks, N_NORMS]; the rest as in `moments_tile`, for all models."""
    LO = whole_rows(LO)
    model = (first + tl.program_id(1)).to(tl.int64)
    row, k, chunk, _, _ = part_of(p_models, model, neurons_of(p_models, model), tl.program_id(0), BA, LINEAR)
    k0 = chunk * BA
    if is_active(p_models, p_diverged, model, tl.load(p_step)) & (k0 < k):
        i, out = row * M, row * LO
        moments_tile(
            k0, k, unit, p_place + row, p_dW_in + i, p_db + row, p_dW_out + out, in_parts, out_parts, rows.to(tl.int64),
            p_W_in + i, p_b + row, p_W_out + out, p_m_in + i, p_m_b + row, p_m_out + out,
            p_v_in + i, p_v_b + row, p_v_out + out, p_norms + (model * chunks + tl.program_id(0)) * N_NORMS,
            o, LO, M, BA, BO,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_steps", "in_parts", "out_parts", "rows", "o", "LO", "chunks", "first"])
def apply_kernel(
    p_models, p_factors, p_diverged, p_step, p_rates, p_corrections, n_steps, unit,
    p_place, p_dW_in, p_db, p_dW_out, in_parts, out_parts, rows, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out,
    p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, p_bad, p_changes, o, LO, chunks, first,
    OPTIMIZER: tl.constexpr, DECAY: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, models). p_rates: float32 [A, n_steps]; p_corrections: [n_steps, 2]; p_bad: int32 [A, chunks];
    p_changes: float32 [A, chunks, 2]."""
    LO = whole_rows(LO)
    model = (first + tl.program_id(1)).to(tl.int64)
    step, t = tl.load(p_step), tl.load(p_step) - tl.load(p_step + 1)
    row, k, chunk, _, before = part_of(p_models, model, neurons_of(p_models, model), tl.program_id(0), BA, LINEAR)
    k0 = chunk * BA
    if is_active(p_models, p_diverged, model, step) & (k0 < k):
        i, out = row * M, row * LO
        factor, strength = decay_of(p_models, p_factors, model, step)
        own = model * chunks + tl.program_id(0)
        ratios = trust_ratios(p_norms + (model * chunks + before) * N_NORMS, tl.cdiv(k, BA), OPTIMIZER)
        bad = apply_tile(
            k0, k, unit, tl.load(p_rates + model * n_steps + t), ratios[0], ratios[1], ratios[2],
            tl.load(p_corrections + 2 * t), tl.load(p_corrections + 2 * t + 1), factor, strength,
            p_place + row, p_dW_in + i, p_db + row, p_dW_out + out, in_parts, out_parts, rows.to(tl.int64),
            p_W_in + i, p_b + row, p_W_out + out, p_q_in + i, p_q_b + row, p_q_out + out,
            p_m_in + i, p_m_b + row, p_m_out + out, p_v_in + i, p_v_b + row, p_v_out + out,
            p_changes + 2 * own, o, LO, OPTIMIZER, DECAY, PRECISION, M, BA, BO,
        )  # fmt: skip
        tl.store(p_bad + own, bad)


@triton.jit(do_not_specialize=["n_steps", "loss_parts", "loss_stride", "chunks", "B", "first"])
def finish_kernel(
    p_models, p_factors, p_diverged, p_step, p_loss, p_bad, p_losses, p_b, p_q_b, p_changes,
    n_steps, loss_parts, loss_stride, chunks, B, first, DECAY: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Grid (models). Writes losses [A, n_steps] at this step, and the diverged step."""
    model = (first + tl.program_id(0)).to(tl.int64)
    step, t = tl.load(p_step), tl.load(p_step) - tl.load(p_step + 1)
    if is_active(p_models, p_diverged, model, step):
        finish_model(
            p_models, model, p_factors, step, t, n_steps, p_loss, loss_parts, loss_stride, p_bad, p_losses, p_diverged,
            B, p_b, p_q_b, p_changes, chunks, DECAY, BA,
        )  # fmt: skip


@triton.jit
def tick_kernel(p_step):
    """One program: the next step. A node of its own, so that nothing that reads the counter writes it."""
    tl.store(p_step, tl.load(p_step) + 1)
