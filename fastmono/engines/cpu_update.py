"""The optimizer of the CPU engine: one step of a model from GRADIENT, and bias decay, compiled by Numba.

    lamb    m = .9 m + .1 g     v = .999 v + .001 g^2     u = m / (sqrt(v) + eps)     p -= lr min(|p|, 10) / |u| u
    adamw   p = (1 - .01 lr) p - lr m' / (sqrt(v') + eps), with the moments corrected for their start at 0
    sgd     p -= lr g                           norms are those of a tensor; g is `unit` times GRADIENT

LAMB leaves a neuron alone, exactly, whose rows of W_in and W_out^T have neither a gradient in this step nor a
first moment: its u is 0. That is most of a layer that starts at a negative bias. Its v alone decays; what it has not
seen it is multiplied by later, one step after another as it would have been, when the neuron moves again or the call
ends. So the bits do not depend on where calls cut the steps. A linear path is never at rest; its two tensors are those
from row k on.

`p` is a Problem (cpu_problem.py), whose fields in capitals are addresses.
"""

from __future__ import annotations

import numpy as np

from fastmono.engines.cpu_rows import ZERO, fill
from fastmono.engines.simd import (
    REGISTER,
    add,
    any_bit,
    any_nonzero,
    differing,
    divide,
    dot,
    either,
    entry,
    get_float,
    get_int,
    inner,
    load,
    multiply,
    multiply_add,
    put_float,
    put_int,
    splat,
    square_root,
    store,
    subtract,
)
from fastmono.optim import ADAMW_EPS, ADAMW_WEIGHT_DECAY, BETA1, BETA2, LAMB_EPS, LAMB_LARGEST_NORM

SOURCES = "fd8d9edbf52094a7"
"""As in cpu_kernels.py, of simd.py, cpu_problem.py, cpu_rows.py and fastmono/optim.py."""
ONE = np.float32(1.0)
COASTS = np.float32(2.0)
"""CHANGED of a neuron that moves without a gradient."""
FIRST_KEPT, FIRST_NEW = np.float32(BETA1), np.float32(1 - BETA1)
SECOND_KEPT, SECOND_NEW = np.float32(BETA2), np.float32(1 - BETA2)
SMALL_LAMB, SMALL_ADAMW = np.float32(LAMB_EPS), np.float32(ADAMW_EPS)
LARGEST_NORM, DECAY = np.float32(LAMB_LARGEST_NORM), np.float32(ADAMW_WEIGHT_DECAY)
LAMB, ADAMW = 0, 1
PER_NEURON, RATE = 1, 2


@inner
def fill_with(out, count, value):
    """`value`, `count` (a multiple of 16) times."""
    for i in range(0, count, REGISTER):
        store(out, i, splat(value, REGISTER))


@inner
def clear_row(p, j):
    """No gradient for the weights of neuron, or row of the linear path, j."""
    fill(p.GRADIENT, j * p.M, p.M)
    fill(p.GRADIENT, p.at_out + j * p.O, p.O)


@inner
def add_square(sum, x):
    """sum + x^2, lane by lane."""
    return add(sum, multiply(x, x))


@inner
def moments_at(p, i, g):
    """Update both moments of 16 numbers with their gradient; returns the first one, and LAMB's u."""
    m = multiply_add(FIRST_NEW, g, multiply(splat(FIRST_KEPT, REGISTER), load(p.FIRST, i, REGISTER)))
    kept = multiply(splat(SECOND_KEPT, REGISTER), load(p.SECOND, i, REGISTER))
    v = multiply_add(SECOND_NEW, multiply(g, g), kept)
    store(p.FIRST, i, m)
    store(p.SECOND, i, v)
    return m, divide(m, add(square_root(v), splat(SMALL_LAMB, REGISTER)))


@inner
def moments(p, first, last, unit):
    """Update both moments of a tensor, the numbers first to last, and leave LAMB's u in GRADIENT; returns sums of p^2
    and u^2, 16 of each."""
    norm_p, norm_u = splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    for i in range(first, last, REGISTER):
        _, u = moments_at(p, i, multiply(splat(unit, REGISTER), load(p.GRADIENT, i, REGISTER)))
        store(p.GRADIENT, i, u)
        norm_p, norm_u = add_square(norm_p, load(p.PARAMETERS, i, REGISTER)), add_square(norm_u, u)
    return norm_p, norm_u


@inner
def moments_of_row(p, first, last, unit, has_gradient, norm_u):
    """The same of one row, whose gradient may be 0 and not be there; returns norm_u with its u^2 added, and whether its
    first moment is not 0."""
    some, g = splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    for i in range(first, last, REGISTER):
        if has_gradient:
            g = multiply(splat(unit, REGISTER), load(p.GRADIENT, i, REGISTER))
        m, u = moments_at(p, i, g)
        store(p.GRADIENT, i, u)
        norm_u, some = add_square(norm_u, u), either(some, m)
    return norm_u, any_nonzero(some)


@inner
def lamb_scale(norm_p, norm_u, lr):
    """What u is multiplied by, from 16 sums of p^2 and u^2 of a tensor."""
    ones = splat(ONE, REGISTER)
    norm, other = np.sqrt(dot(norm_p, ones)), np.sqrt(dot(norm_u, ones))
    clamped = LARGEST_NORM if norm > LARGEST_NORM else norm  # a NaN stays
    return -lr * (ONE if norm == ZERO or other == ZERO else clamped / other)


@inner
def note_change(p, change):
    """Add 16 sums of squares to CHANGE, where that is asked for."""
    if p.decay == RATE:
        store(p.CHANGE, 0, add(load(p.CHANGE, 0, REGISTER), change))


@inner
def add_step(p, first, last, scale, factor):
    """Parameters first to last: `factor` times what `scale` times GRADIENT makes of them; 0, or NaN where they are not
    finite, 16 sums of their squares, and whether one is another number than before."""
    finite, squares, change = splat(ZERO, REGISTER), splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    bits = splat(ZERO, REGISTER)
    for i in range(first, last, REGISTER):
        old = load(p.PARAMETERS, i, REGISTER)
        x = multiply(splat(factor, REGISTER), multiply_add(scale, load(p.GRADIENT, i, REGISTER), old))
        store(p.PARAMETERS, i, x)
        finite = multiply_add(ZERO, x, finite)  # 0 inf and 0 NaN are NaN
        squares, bits = add_square(squares, x), differing(bits, x, old)
        if p.decay == RATE:
            change = add_square(change, subtract(x, old))
    note_change(p, change)
    return finite, squares, any_bit(bits)


@inner
def add_adamw_step(p, first, last, lr, corrections, step, factor):
    """`add_step`, AdamW's, from the moments."""
    scale, root = -lr / get_float(corrections, 2 * step), ONE / get_float(corrections, 2 * step + 1)
    finite, change = splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    for i in range(first, last, REGISTER):
        old = load(p.PARAMETERS, i, REGISTER)
        x = multiply(splat(ONE - lr * DECAY, REGISTER), old)
        v = multiply(splat(root, REGISTER), square_root(load(p.SECOND, i, REGISTER)))
        u = divide(load(p.FIRST, i, REGISTER), add(v, splat(SMALL_ADAMW, REGISTER)))
        x = multiply(splat(factor, REGISTER), multiply_add(scale, u, x))
        store(p.PARAMETERS, i, x)
        finite = multiply_add(ZERO, x, finite)
        if p.decay == RATE:
            change = add_square(change, subtract(x, old))
    note_change(p, change)
    return finite


@inner
def update_tensor(p, first, last, unit, lr, corrections, step, factor):
    """One optimizer step and `factor` on the tensor of the numbers first to last; whether they are finite."""
    if p.optimizer == LAMB:
        norm_p, norm_u = moments(p, first, last, unit)
        finite, _, _ = add_step(p, first, last, lamb_scale(norm_p, norm_u, lr), factor)
    elif p.optimizer == ADAMW:
        moments(p, first, last, unit)
        finite = add_adamw_step(p, first, last, lr, corrections, step, factor)
    else:
        finite, _, _ = add_step(p, first, last, -lr * unit, factor)
    return dot(finite, splat(ONE, REGISTER)) == ZERO


@inner
def update_weights(p, first, length, squares, unit, lr, last):
    """`update_tensor` of the rows of a tensor that may change (CHANGED), for LAMB; notes which are MOVING. All rows'
    sums of squares are at the address `squares`. With `last` rows that did not change are CHANGED no more: the step of
    a neuron that coasts is soon lost in rounding."""
    norm_p, norm_u, finite = splat(ZERO, REGISTER), splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    ones = splat(ONE, REGISTER)
    for j in range(0, p.k, REGISTER):
        norm_p = add(norm_p, load(squares, j, REGISTER))
    for j in range(p.k):
        changed = get_float(p.CHANGED, j)
        if changed != ZERO:
            row = first + j * length
            norm_u, moves = moments_of_row(p, row, row + length, unit, changed != COASTS, norm_u)
            if moves:
                put_float(p.MOVING, j, ONE)
    scale = lamb_scale(norm_p, norm_u, lr)
    for j in range(p.k - 1, -1, -1):  # the last ones are still in the cache
        if get_float(p.CHANGED, j) != ZERO:
            row_finite, row_squares, changes = add_step(p, first + j * length, first + (j + 1) * length, scale, ONE)
            finite = add(finite, row_finite)
            put_float(squares, j, dot(row_squares, ones))
            if last and not changes:
                put_float(p.CHANGED, j, ZERO)
    return dot(finite, ones) == ZERO


@inner
def look_at_row(p, first, last, squares, j):
    """Sets a row's sum of squares; returns 16 numbers that are 0 where its first moment is, and 16 that are 0 unless a
    weight is not finite."""
    total, some, finite = splat(ZERO, REGISTER), splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    for i in range(first, last, REGISTER):
        x = load(p.PARAMETERS, i, REGISTER)
        total, finite = add_square(total, x), multiply_add(ZERO, x, finite)
        some = either(some, load(p.FIRST, i, REGISTER))
    put_float(squares, j, dot(total, splat(ONE, REGISTER)))
    return some, finite


@inner
def look_at_rows(p):
    """MOVING, BEHIND and SQUARES before the first of several steps; whether the weights are finite, for LAMB, whose
    steps look at those alone that change."""
    finite = splat(ZERO, REGISTER)
    for j in range(p.k):
        put_int(p.BEHIND, j, 0)
        put_float(p.MOVING, j, ONE)
        if p.optimizer == LAMB:
            some, row_finite = look_at_row(p, j * p.M, (j + 1) * p.M, p.SQUARES, j)
            other, other_finite = look_at_row(p, p.at_out + j * p.O, p.at_out + (j + 1) * p.O, p.SQUARES + 4 * p.K, j)
            finite = add(finite, add(row_finite, other_finite))
            if not any_nonzero(either(some, other)):
                put_float(p.MOVING, j, ZERO)
    return dot(finite, splat(ONE, REGISTER)) == ZERO


@inner
def catch_up(p, first, last, steps):
    """The second moment of the numbers first to last, `steps` updates without a gradient later."""
    for i in range(first, last, REGISTER):
        v = load(p.SECOND, i, REGISTER)
        if any_nonzero(v):
            for _ in range(steps):
                v = multiply(splat(SECOND_KEPT, REGISTER), v)
            store(p.SECOND, i, v)


@inner
def catch_up_row(p, j):
    """The same for neuron j, and all the updates it has not seen."""
    behind = get_int(p.BEHIND, j)
    if behind > 0:
        catch_up(p, j * p.M, (j + 1) * p.M, behind)
        catch_up(p, p.at_out + j * p.O, p.at_out + (j + 1) * p.O, behind)
    put_int(p.BEHIND, j, 0)


@inner
def catch_up_all_rows(p):
    """The same for every neuron, after the last of several steps."""
    for j in range(p.k):
        catch_up_row(p, j)


@inner
def update_others(p, unit, lr, corrections, step, factor):
    """`update_tensor` of b, L_in and L_out^T; whether they are finite."""
    finite = update_tensor(p, p.at_b, p.at_out, unit, lr, corrections, step, factor)
    finite &= update_tensor(p, p.k * p.M, p.at_b, unit, lr, corrections, step, ONE)
    return finite & update_tensor(p, p.at_out + p.k * p.O, p.size, unit, lr, corrections, step, ONE)


@inner
def size_of_weights(p):
    """|W_in|^2 + |W_out|^2 for `rate`, else 0, with CHANGE at 0: before they are updated, and after all others are."""
    size = splat(ZERO, REGISTER)
    if p.decay == RATE:
        fill(p.CHANGE, 0, REGISTER)
        for i in range(0, p.k * p.M, REGISTER):
            size = add_square(size, load(p.PARAMETERS, i, REGISTER))
        for i in range(p.at_out, p.at_out + p.k * p.O, REGISTER):
            size = add_square(size, load(p.PARAMETERS, i, REGISTER))
    return dot(size, splat(ONE, REGISTER))


@inner
def spread_of_row(p, j):
    """How far neuron j's outputs are spread over features, 0 to 1: `fastmono.optim.spread`."""
    if p.N == 1:
        return ZERO
    squares, fourths = splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    for c in range(p.at_out + j * p.O, p.at_out + (j + 1) * p.O, REGISTER):
        w = load(p.PARAMETERS, c, REGISTER)
        square = multiply(w, w)
        squares, fourths = add(squares, square), add_square(fourths, square)
    ones = splat(ONE, REGISTER)
    total, share = dot(squares, ones), ZERO
    if total != ZERO:
        share = dot(fourths, ones) / total / total
    s = (ONE - share) * np.float32(1.0 / (1.0 - 1.0 / p.N))
    return ZERO if s < ZERO else ONE if s > ONE else s  # a NaN stays


@inner
def decay_biases(p, strength, size):
    """What `per_neuron` and `rate` make of b after the update, `size` being |W|^2 before it; whether b is finite."""
    finite, rate = ZERO, ZERO
    if strength == ZERO:
        return True
    if size != ZERO:
        rate = np.sqrt(dot(load(p.CHANGE, 0, REGISTER), splat(ONE, REGISTER)) / size)
    for j in range(p.k):
        factor = ONE - strength * (spread_of_row(p, j) if p.decay == PER_NEURON else rate)
        b = factor * get_float(p.PARAMETERS, p.at_b + j)
        put_float(p.PARAMETERS, p.at_b + j, b)
        finite += ZERO * b
    return finite == ZERO


@inner
def update_rows(p, unit, lr, corrections, step, factor, strength):
    """`update` of a model whose GRADIENT was written for the neurons CHANGED alone; afterwards those are CHANGED whose
    rows of W_in are not what they were."""
    for j in range(p.k):
        if get_float(p.CHANGED, j) == ZERO and get_float(p.MOVING, j) != ZERO:
            if p.optimizer != LAMB:
                clear_row(p, j)
            put_float(p.CHANGED, j, COASTS)
        if get_float(p.CHANGED, j) != ZERO:
            catch_up_row(p, j)
        else:
            put_int(p.BEHIND, j, get_int(p.BEHIND, j) + 1)
    if p.optimizer != LAMB:
        return update(p, unit, lr, corrections, step, factor, strength)
    fill(p.MOVING, 0, p.K)
    finite = update_others(p, unit, lr, corrections, step, factor)
    size = size_of_weights(p)
    finite &= update_weights(p, p.at_out, p.O, p.SQUARES + 4 * p.K, unit, lr, False)
    finite &= update_weights(p, 0, p.M, p.SQUARES, unit, lr, True)
    return finite & decay_biases(p, strength, size)


@entry
def update(p, unit, lr, corrections, step, factor, strength):
    """One optimizer step of a model from a whole GRADIENT, and bias decay; whether all of its parameters are finite."""
    finite = update_others(p, unit, lr, corrections, step, factor)
    size = size_of_weights(p)
    finite &= update_tensor(p, 0, p.k * p.M, unit, lr, corrections, step, ONE)
    finite &= update_tensor(p, p.at_out, p.at_out + p.k * p.O, unit, lr, corrections, step, ONE)
    return finite & decay_biases(p, strength, size)
