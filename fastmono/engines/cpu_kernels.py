"""Whole training steps of one ReLU model on one core, compiled by Numba.

A step skips what is zero, exactly. Of the features only those present are touched, and of the neurons only those that a
sample activates: a pair of (sample, neuron) with z <= 0 has h = dz = 0 and adds nothing to y, dW_out, db or dW_in.

    G^T = P^T W_in^T           z = b + sum of f_i G^T[i]  over present features          x = sum of f_i P^T[i]
    e = -tau + sum of h_j W_out^T[j]          dz_j = e . W_out^T[j] + l1/2                over active neurons
    dW_out^T[j] = sum of h_j e                dW_in[j] = sum of dz_j x                    db_j = sum of dz_j
                                              over the samples that activate neuron j, all in units of 2/B

Where features are too many for that to pay, z is b + sum of x_c W_in^T[c]. Samples pass in tiles of 64, so that the
samples that activate a neuron are the bits of one word. The update (cpu_update.py) leaves out neurons at rest.

A linear path is r further rows of W_in and W_out^T, those from k on, that every sample activates: h = z without a
bias, dz = e . W_out^T[j] without a penalty.

p is a Problem (cpu_problem.py, which explains its fields); arguments in capitals are addresses.
"""

from __future__ import annotations

import numpy as np

from fastmono.engines.cpu_hidden import TILE, embed_sample, hidden_tile, prepare
from fastmono.engines.cpu_problem import Problem as Problem  # where what Numba kept before it was moved looks for it
from fastmono.engines.cpu_rows import ZERO, add_marked_rows, add_rows, add_whole_rows, dot_rows, fill, piece
from fastmono.engines.cpu_update import ONE, catch_up_all_rows, clear_row, fill_with, look_at_rows, update_rows
from fastmono.engines.simd import (
    REGISTER,
    dot,
    entry,
    get_float,
    get_int,
    get_word,
    inner,
    load,
    multiply_add,
    put_float,
    put_int,
    splat,
    store,
)

SOURCES = "754a533dab9a19e0"
"""The first digits of the SHA-256 of simd.py, simd_moves.py, cpu_problem.py, cpu_rows.py, cpu_hidden.py, cpu_update.py
and fastmono/optim.py. Numba keeps what it compiled until this file changes, and cannot see that those have: with them,
this line must."""


@inner
def output_tile(p, count, groups):
    """E = y - tau of a tile; returns its sum of squares."""
    column, total = 0, 0.0
    while column < p.O:
        lanes = piece(p.O - column)
        for group in range(groups):
            begin, stop = TILE * get_int(p.GROUPS, group), TILE * get_int(p.GROUPS, group + 1)
            for r in range(count):
                first, last = get_int(p.ENDS, begin + r), get_int(p.ENDS, stop + r)
                if first < last:
                    add_rows(
                        lanes, p.H, p.ACTIVE, first, last, p.PARAMETERS + 4 * p.at_out, p.O, column,
                        p.E, r * p.LE + column,
                    )  # fmt: skip
        for r in range(count if p.r > 0 else 0):
            first = get_int(p.ENDS, TILE * p.blocks + r)
            add_rows(
                lanes, p.H, p.ACTIVE, first, first + p.r, p.PARAMETERS + 4 * p.at_out, p.O, column,
                p.E, r * p.LE + column,
            )  # fmt: skip
        column += lanes
    for r in range(count):
        for c in range(0, p.O, REGISTER):
            e = load(p.E, r * p.LE + c, REGISTER)
            total += dot(e, e)
    return total


@inner
def first_factors(p, count):
    """NEXT at the beginning of each sample's list."""
    for r in range(count):
        put_int(p.NEXT, r, r * p.LK)


@inner
def backward_tile(p, count, groups, half_l1):
    """DZ of a tile, and its part of GRADIENT."""
    neurons, column = p.at_out - p.at_b, 0
    while column < p.O:
        lanes = piece(p.O - column)
        for group in range(groups):
            begin, stop = TILE * get_int(p.GROUPS, group), TILE * get_int(p.GROUPS, group + 1)
            for r in range(count):
                first, last = get_int(p.ENDS, begin + r), get_int(p.ENDS, stop + r)
                if first < last:
                    dot_rows(
                        lanes, p.E, r * p.LE + column, p.ACTIVE, first, last, p.PARAMETERS + 4 * p.at_out, p.O, column,
                        p.DZ, half_l1,
                    )  # fmt: skip
        for r in range(count if p.r > 0 else 0):
            first = get_int(p.ENDS, TILE * p.blocks + r)
            dot_rows(
                lanes, p.E, r * p.LE + column, p.ACTIVE, first, first + p.r, p.PARAMETERS + 4 * p.at_out, p.O, column,
                p.DZ, ZERO,
            )  # fmt: skip
        column += lanes
    column = 0
    while column < p.O:
        lanes = piece(p.O - column)
        first_factors(p, count)
        for place in range(neurons + p.r):
            word = get_word(p.WORDS, place)
            if word != 0:
                j = get_int(p.NEURONS, place)
                if place < neurons and get_float(p.CHANGED, j) == ZERO:
                    put_float(p.CHANGED, j, ONE)
                    clear_row(p, j)
                out = p.at_out + j * p.O + column
                add_marked_rows(lanes, word, p.H, p.NEXT, p.E, p.LE, column, p.GRADIENT, out)
        column += lanes
    column = 0
    while column < p.M:
        lanes = piece(p.M - column)
        first_factors(p, count)
        for place in range(neurons + p.r):
            word = get_word(p.WORDS, place)
            if word != 0:
                j = get_int(p.NEURONS, place)
                db = add_marked_rows(lanes, word, p.DZ, p.NEXT, p.X, p.M, column, p.GRADIENT, j * p.M + column)
                if column == 0 and place < neurons:
                    put_float(p.GRADIENT, p.at_b + j, get_float(p.GRADIENT, p.at_b + j) + db)
        column += lanes


@entry
def train(p, steps, unit, half_l1, rates, corrections, factors, strengths, losses):
    """Train one ReLU model for so many steps, and return how many of them went well: a step whose loss or parameters
    are not finite is the last.

    rates, factors, strengths, losses: addresses of float32 [steps], learning rates, factors of the bias, strengths of
    its decay in the modes per_neuron and rate, and the losses to be written; corrections: float32 [steps, 2], AdamW's.
    """
    sound = look_at_rows(p)
    fill_with(p.CHANGED, p.K, ONE)
    well = 0
    while well < steps:
        starts = p.STARTS + 4 * well * (p.B + 1)
        prepare(p)
        fill(p.CHANGED, 0, p.K)
        fill(p.GRADIENT, p.at_b, p.at_out - p.at_b)
        for j in range(p.k, p.k + p.r):
            clear_row(p, j)
        total = 0.0
        for first in range(0, p.B, TILE):
            count = min(TILE, p.B - first)
            groups = hidden_tile(p, starts, first, count)
            total += output_tile(p, count, groups)
            backward_tile(p, count, groups, half_l1)
        loss = np.float32(total / p.B)
        put_float(losses, well, loss)
        lr, factor, strength = get_float(rates, well), get_float(factors, well), get_float(strengths, well)
        finite = update_rows(p, unit, lr, corrections, well, factor, strength)
        if not (sound and finite and np.isfinite(loss)):
            break
        well += 1
    catch_up_all_rows(p)
    return well


@entry
def embed(p, step, x, e):
    """x [B, M] and -tau [B, O] of the batch of a step, at the addresses x and e."""
    starts = p.STARTS + 4 * step * (p.B + 1)
    for r in range(p.B):
        embed_sample(p, starts, r, x + 4 * r * p.M, e + 4 * r * p.O)


@entry
def embed_narrow(p, step, x, t):
    """x [B, M] and tau W_out [B, K] of the batch of a step, for decoder and abs; returns the sum of tau^2.

    W_out, [N, K], is at the address p.G_T.
    """
    starts, total = p.STARTS + 4 * step * (p.B + 1), 0.0
    for r in range(p.B):
        first, last = get_int(starts, r), get_int(starts, r + 1)
        fill(x, r * p.M, p.M)
        add_whole_rows(p.VALUES, p.INDICES, first, last, p.P_T, p.M, x, r * p.M)
        for c in range(0, p.K, REGISTER):
            row = splat(ZERO, REGISTER)
            for i in range(first, last):
                tau = abs(get_float(p.VALUES, i))
                row = multiply_add(tau, load(p.G_T, get_int(p.INDICES, i) * p.K + c, REGISTER), row)
            store(t, r * p.K + c, row)
        for i in range(first, last):
            tau = get_float(p.VALUES, i)
            total += tau * tau
    return total


@entry
def add_target_products(p, step, first, count, h, out):
    """out [N, K] += tau^T h for samples first to first + count, with their h [count, K] at the address h."""
    starts = p.STARTS + 4 * step * (p.B + 1)
    for r in range(count):
        for i in range(get_int(starts, first + r), get_int(starts, first + r + 1)):
            tau, row = abs(get_float(p.VALUES, i)), get_int(p.INDICES, i) * p.K
            for c in range(0, p.K, REGISTER):
                store(out, row + c, multiply_add(tau, load(h, r * p.K + c, REGISTER), load(out, row + c, REGISTER)))
