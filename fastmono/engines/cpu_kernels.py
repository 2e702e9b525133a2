"""One core's work, compiled by Numba: sampling, and whole training steps of one ReLU model.

A step skips what is zero, exactly. Of the features only those present are touched, and of the neurons only those that a
sample activates: a pair of (sample, neuron) with z <= 0 has h = dz = 0 and adds nothing to y, dW_out, db or dW_in.

    G^T = P^T W_in^T           z = b + sum of f_i G^T[i]  over present features          x = sum of f_i P^T[i]
    e = -tau + sum of h_j W_out^T[j]          dz_j = e . W_out^T[j] + l1/2                over active neurons
    dW_out^T[j] = sum of h_j e                dW_in[j] = sum of dz_j x                    db_j = sum of dz_j
                                              over the samples that activate neuron j, all in units of 2/B

Where features are too many for that to pay, z is b + sum of x_c W_in^T[c]. Samples pass in tiles of 64, so that the
samples that activate a neuron are the bits of one word.

All arguments named in capitals or `at_...` are addresses (see simd.py). Rows are padded to 16 numbers with zeros:
N features, M, K, O the padded embedding dimension, neurons and outputs, B samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fastmono.engines.simd import (
    REGISTER,
    WIDEST,
    add,
    compress_active,
    compress_nonzero,
    divide,
    dot,
    four_dots,
    get_float,
    get_int,
    get_word,
    lane,
    load,
    mark,
    multiply,
    multiply_add,
    put_float,
    put_int,
    put_word,
    splat,
    square_root,
    store,
    subtract,
    trailing_zeros,
)
from fastmono.optim import ADAMW_EPS, ADAMW_WEIGHT_DECAY, BETA1, BETA2, LAMB_EPS, LAMB_LARGEST_NORM
from fastmono.philox import LARGEST_VALUE, M0, M1, MASK, W0, W1

SIMD = "06b239b0277cc7a1"
"""The first digits of simd.py's SHA-256: Numba keeps what it compiled until this file changes, and so must that one."""
TILE = 64
"""Samples worked on at a time: the bits of a word."""
BLOCK = 64
"""Neurons worked on at a time: so many rows of 128 numbers take 32 KiB, and stay in the first cache for a tile."""
ZERO, ONE, HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
FIRST_KEPT, FIRST_NEW = np.float32(BETA1), np.float32(1 - BETA1)
SECOND_KEPT, SECOND_NEW = np.float32(BETA2), np.float32(1 - BETA2)
SMALL_LAMB, SMALL_ADAMW = np.float32(LAMB_EPS), np.float32(ADAMW_EPS)
LARGEST_NORM, DECAY = np.float32(LAMB_LARGEST_NORM), np.float32(ADAMW_WEIGHT_DECAY)
LARGEST = np.float32(LARGEST_VALUE)


inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For functions that others here call: compiled with them, and of no use by themselves."""


def entry(function: Any) -> Any:
    """For functions that the engine calls: compiled once for a machine and kept, where a file can be."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # no folder to write to, not even the user's own
        return njit(function)


class Problem(NamedTuple):
    """One model, the batches it sees, and memory to work in: sizes, and addresses of float32 unless said otherwise."""

    task: int
    """0 decoder, 1 reprojector, 2 abs: its position in `fastmono.spec.TASKS`."""
    optimizer: int
    """0 lamb, 1 adamw, 2 sgd, as in `fastmono.spec.OPTIMIZERS`."""
    through_features: int
    """Whether z comes from G (1) or from x (0)."""
    N: int
    M: int
    k: int
    K: int
    O: int  # noqa: E741
    B: int
    LK: int
    """Length of a row of Z and DZ."""
    LE: int
    """Length of a row of E."""
    STARTS: int
    """int32 [steps, B + 1]: where each sample's present features begin in the next two."""
    INDICES: int
    """int32: the present features."""
    VALUES: int
    P_T: int
    """[N, M]"""
    P2_T: int
    """[N, O]; the reprojector's only."""
    PARAMETERS: int
    """W_in [k, M], b [K], W_out^T [k, O], as are the moments, GRADIENT and UPDATE."""
    FIRST: int
    SECOND: int
    GRADIENT: int
    at_b: int
    """Where b begins in them."""
    at_out: int
    """Where W_out^T begins."""
    size: int
    G_T: int
    """[N, K]"""
    W_T: int
    """[M, K]: W_in^T."""
    Z: int
    """[TILE, LK]"""
    DZ: int
    """[TILE, LK], where a neuron is active."""
    X: int
    """[TILE, M]"""
    E: int
    """[TILE, LE]"""
    ACTIVE: int
    """int32 [TILE K + 16]: the active neurons of each sample, one sample after another."""
    H: int
    """[TILE K + 16]: their activations."""
    ENDS: int
    """int32 [TILE, blocks + 1]: where those of each block of neurons begin."""
    blocks: int
    WORDS: int
    """uint64 [K]: for each neuron, the samples that activate it."""
    COUNTING: int
    """int32: 0, 1, 2, ... up to M."""


def _row_kernels(lanes: int) -> tuple[Any, Any, Any]:
    """The three inner loops, for pieces of rows of so many lanes."""

    @inner
    def add_rows(factors, numbers, first, last, rows, length, column, out, at):
        """out[at:] += sum over i of factors[i] rows[numbers[i], column:], for i from first to last."""
        even, odd = load(out, at, lanes), splat(ZERO, lanes)  # two sums: one would wait for itself
        i = first
        while i + 2 <= last:
            row, next_row = get_int(numbers, i) * length + column, get_int(numbers, i + 1) * length + column
            even = multiply_add(get_float(factors, i), load(rows, row, lanes), even)
            odd = multiply_add(get_float(factors, i + 1), load(rows, next_row, lanes), odd)
            i += 2
        if i < last:
            row = get_int(numbers, i) * length + column
            even = multiply_add(get_float(factors, i), load(rows, row, lanes), even)
        store(out, at, add(even, odd))

    @inner
    def add_marked_rows(word, factors, number, stride, rows, length, column, out, at):
        """out[at:] += sum over set bits r of factors[number + r stride] rows[r, column:]; returns the factors' sum."""
        even, odd = load(out, at, lanes), splat(ZERO, lanes)
        total, other = ZERO, ZERO
        while word != 0:
            r = trailing_zeros(word)
            word &= word - np.uint64(1)
            factor = get_float(factors, number + r * stride)
            total += factor
            even = multiply_add(factor, load(rows, r * length + column, lanes), even)
            if word == 0:
                break
            r = trailing_zeros(word)
            word &= word - np.uint64(1)
            factor = get_float(factors, number + r * stride)
            other += factor
            odd = multiply_add(factor, load(rows, r * length + column, lanes), odd)
        store(out, at, add(even, odd))
        return total + other

    @inner
    def dot_rows(e, at, numbers, first, last, rows, length, column, out, base, start):
        """out[base + j] = start + e[at:] . rows[j, column:], j in numbers[first:last]; added to it but at column 0."""
        v = load(e, at, lanes)
        i = first
        while i + 4 <= last:
            j0, j1, j2, j3 = (
                get_int(numbers, i),
                get_int(numbers, i + 1),
                get_int(numbers, i + 2),
                get_int(numbers, i + 3),
            )
            sums = four_dots(
                v, load(rows, j0 * length + column, lanes), load(rows, j1 * length + column, lanes),
                load(rows, j2 * length + column, lanes), load(rows, j3 * length + column, lanes),
            )  # fmt: skip
            put_float(out, base + j0, lane(sums, 0) + (start if column == 0 else get_float(out, base + j0)))
            put_float(out, base + j1, lane(sums, 1) + (start if column == 0 else get_float(out, base + j1)))
            put_float(out, base + j2, lane(sums, 2) + (start if column == 0 else get_float(out, base + j2)))
            put_float(out, base + j3, lane(sums, 3) + (start if column == 0 else get_float(out, base + j3)))
            i += 4
        while i < last:
            j = get_int(numbers, i)
            total = dot(v, load(rows, j * length + column, lanes))
            put_float(out, base + j, total + (start if column == 0 else get_float(out, base + j)))
            i += 1

    return add_rows, add_marked_rows, dot_rows


add_rows_128, add_marked_rows_128, dot_rows_128 = _row_kernels(128)
add_rows_64, add_marked_rows_64, dot_rows_64 = _row_kernels(64)
add_rows_32, add_marked_rows_32, dot_rows_32 = _row_kernels(32)
add_rows_16, add_marked_rows_16, dot_rows_16 = _row_kernels(16)


@inner
def piece(left):
    """Lanes of the next piece of a row that has so many numbers left."""
    lanes = WIDEST
    while lanes > left:
        lanes //= 2
    return lanes


@inner
def add_rows(lanes, factors, numbers, first, last, rows, length, column, out, at):
    """`add_rows` of so many lanes."""
    if lanes == 128:
        add_rows_128(factors, numbers, first, last, rows, length, column, out, at)
    elif lanes == 64:
        add_rows_64(factors, numbers, first, last, rows, length, column, out, at)
    elif lanes == 32:
        add_rows_32(factors, numbers, first, last, rows, length, column, out, at)
    else:
        add_rows_16(factors, numbers, first, last, rows, length, column, out, at)


@inner
def add_marked_rows(lanes, word, factors, number, stride, rows, length, column, out, at):
    """`add_marked_rows` of so many lanes."""
    if lanes == 128:
        return add_marked_rows_128(word, factors, number, stride, rows, length, column, out, at)
    elif lanes == 64:
        return add_marked_rows_64(word, factors, number, stride, rows, length, column, out, at)
    elif lanes == 32:
        return add_marked_rows_32(word, factors, number, stride, rows, length, column, out, at)
    return add_marked_rows_16(word, factors, number, stride, rows, length, column, out, at)


@inner
def dot_rows(lanes, e, at, numbers, first, last, rows, length, column, out, base, start):
    """`dot_rows` of so many lanes."""
    if lanes == 128:
        dot_rows_128(e, at, numbers, first, last, rows, length, column, out, base, start)
    elif lanes == 64:
        dot_rows_64(e, at, numbers, first, last, rows, length, column, out, base, start)
    elif lanes == 32:
        dot_rows_32(e, at, numbers, first, last, rows, length, column, out, base, start)
    else:
        dot_rows_16(e, at, numbers, first, last, rows, length, column, out, base, start)


@inner
def fill(out, at, count):
    """Zeros, `count` (a multiple of 16) of them."""
    for i in range(at, at + count, REGISTER):
        store(out, i, splat(ZERO, REGISTER))


@inner
def add_whole_rows(factors, numbers, first, last, rows, length, out, at):
    """out[at:] += sum over i of factors[i] rows[numbers[i]], rows of `length` numbers."""
    column = 0
    while column < length:
        lanes = piece(length - column)
        add_rows(lanes, factors, numbers, first, last, rows, length, column, out, at + column)
        column += lanes


@inner
def prepare(p):
    """W_in^T, and G^T where z comes from it."""
    for j in range(p.k):
        for c in range(p.M):
            put_float(p.W_T, c * p.K + j, get_float(p.PARAMETERS, j * p.M + c))
    if p.through_features:
        fill(p.G_T, 0, p.N * p.K)
        for i in range(p.N):
            add_whole_rows(p.P_T + 4 * i * p.M, p.COUNTING, 0, p.M, p.W_T, p.K, p.G_T, i * p.K)


@inner
def embed_sample(p, starts, r, x, e):
    """x [M] of sample r at the address x, and -tau [O] at e."""
    first, last = get_int(starts, r), get_int(starts, r + 1)
    fill(x, 0, p.M)
    add_whole_rows(p.VALUES, p.INDICES, first, last, p.P_T, p.M, x, 0)
    fill(e, 0, p.O)
    if p.task == 1:
        add_whole_rows(p.VALUES, p.INDICES, first, last, p.P2_T, p.O, e, 0)
        for c in range(0, p.O, REGISTER):
            store(e, c, subtract(splat(ZERO, REGISTER), load(e, c, REGISTER)))
    else:
        for i in range(first, last):
            f = get_float(p.VALUES, i)
            put_float(e, get_int(p.INDICES, i), -abs(f) if p.task == 2 else -f)


@inner
def hidden_tile(p, starts, first, count):
    """Z, X and -tau (in E) of samples first to first + count, and who is active: ACTIVE, H, ENDS, WORDS."""
    for j in range(p.K):
        put_word(p.WORDS, j, np.uint64(0))
    end = 0
    for r in range(count):
        embed_sample(p, starts, first + r, p.X + 4 * r * p.M, p.E + 4 * r * p.LE)
        z = r * p.LK
        for c in range(0, p.K, REGISTER):
            store(p.Z, z + c, load(p.PARAMETERS, p.at_b + c, REGISTER))
        if p.through_features:
            present, last = get_int(starts, first + r), get_int(starts, first + r + 1)
            add_whole_rows(p.VALUES, p.INDICES, present, last, p.G_T, p.K, p.Z, z)
        else:
            add_whole_rows(p.X + 4 * r * p.M, p.COUNTING, 0, p.M, p.W_T, p.K, p.Z, z)
        bit = np.uint64(1) << np.uint64(r)
        for c in range(0, p.K, REGISTER):
            if c % BLOCK == 0:
                put_int(p.ENDS, r * (p.blocks + 1) + c // BLOCK, end)
            mark(p.Z, z + c, p.WORDS, c, bit)
            end = compress_active(p.Z, z + c, c, p.ACTIVE, p.H, end)
        put_int(p.ENDS, r * (p.blocks + 1) + p.blocks, end)


@inner
def output_tile(p, count):
    """E = y - tau of a tile; returns its sum of squares."""
    column, total = 0, 0.0
    while column < p.O:
        lanes = piece(p.O - column)
        for block in range(p.blocks):
            for r in range(count):
                ends = r * (p.blocks + 1) + block
                add_rows(
                    lanes, p.H, p.ACTIVE, get_int(p.ENDS, ends), get_int(p.ENDS, ends + 1),
                    p.PARAMETERS + 4 * p.at_out, p.O, column, p.E, r * p.LE + column,
                )  # fmt: skip
        column += lanes
    for r in range(count):
        for c in range(0, p.O, REGISTER):
            e = load(p.E, r * p.LE + c, REGISTER)
            total += dot(e, e)
    return total


@inner
def backward_tile(p, count, half_l1):
    """DZ of a tile, and its part of GRADIENT."""
    column = 0
    while column < p.O:
        lanes = piece(p.O - column)
        for block in range(p.blocks):
            for r in range(count):
                ends = r * (p.blocks + 1) + block
                dot_rows(
                    lanes, p.E, r * p.LE + column, p.ACTIVE, get_int(p.ENDS, ends), get_int(p.ENDS, ends + 1),
                    p.PARAMETERS + 4 * p.at_out, p.O, column, p.DZ, r * p.LK, half_l1,
                )  # fmt: skip
        column += lanes
    column = 0
    while column < p.O:
        lanes = piece(p.O - column)
        for j in range(p.k):
            word = get_word(p.WORDS, j)
            if word != 0:
                out = p.at_out + j * p.O + column
                add_marked_rows(lanes, word, p.Z, j, p.LK, p.E, p.LE, column, p.GRADIENT, out)
        column += lanes
    column = 0
    while column < p.M:
        lanes = piece(p.M - column)
        for j in range(p.k):
            word = get_word(p.WORDS, j)
            if word != 0:
                db = add_marked_rows(
                    lanes, word, p.DZ, j, p.LK, p.X, p.M, column, p.GRADIENT, j * p.M + column
                )  # fmt: skip
                if column == 0:
                    put_float(p.GRADIENT, p.at_b + j, get_float(p.GRADIENT, p.at_b + j) + db)
        column += lanes


@inner
def moments(p, first, last, unit):
    """Update both moments of the numbers first to last of a model; returns |p|^2 and |u|^2, and leaves LAMB's u in
    GRADIENT."""
    norm_p, norm_u = splat(ZERO, REGISTER), splat(ZERO, REGISTER)
    for i in range(first, last, REGISTER):
        g = multiply(splat(unit, REGISTER), load(p.GRADIENT, i, REGISTER))
        m = multiply_add(FIRST_NEW, g, multiply(splat(FIRST_KEPT, REGISTER), load(p.FIRST, i, REGISTER)))
        kept = multiply(splat(SECOND_KEPT, REGISTER), load(p.SECOND, i, REGISTER))
        v = multiply_add(SECOND_NEW, multiply(g, g), kept)
        store(p.FIRST, i, m)
        store(p.SECOND, i, v)
        u = divide(m, add(square_root(v), splat(SMALL_LAMB, REGISTER)))
        store(p.GRADIENT, i, u)
        x = load(p.PARAMETERS, i, REGISTER)
        norm_p, norm_u = add(norm_p, multiply(x, x)), add(norm_u, multiply(u, u))
    ones = splat(ONE, REGISTER)
    return dot(norm_p, ones), dot(norm_u, ones)


@inner
def update_tensor(p, first, last, unit, lr, corrections, step, factor):
    """One optimizer step and `factor` on the numbers first to last of a model; whether they are finite."""
    scale = -lr
    if p.optimizer == 0:
        square_p, square_u = moments(p, first, last, unit)
        norm_p, norm_u = np.sqrt(square_p), np.sqrt(square_u)
        clamped = LARGEST_NORM if norm_p > LARGEST_NORM else norm_p  # a NaN stays
        scale = -lr * (ONE if norm_p == ZERO or norm_u == ZERO else clamped / norm_u)
    elif p.optimizer == 1:
        moments(p, first, last, unit)
        scale = -lr / get_float(corrections, 2 * step)
        root = ONE / get_float(corrections, 2 * step + 1)
    finite = splat(ZERO, REGISTER)
    for i in range(first, last, REGISTER):
        x = load(p.PARAMETERS, i, REGISTER)
        if p.optimizer == 0:
            x = multiply_add(scale, load(p.GRADIENT, i, REGISTER), x)
        elif p.optimizer == 1:
            x = multiply(splat(ONE - lr * DECAY, REGISTER), x)
            v = multiply(splat(root, REGISTER), square_root(load(p.SECOND, i, REGISTER)))
            u = divide(load(p.FIRST, i, REGISTER), add(v, splat(SMALL_ADAMW, REGISTER)))
            x = multiply_add(scale, u, x)
        else:
            x = multiply_add(scale, multiply(splat(unit, REGISTER), load(p.GRADIENT, i, REGISTER)), x)
        x = multiply(splat(factor, REGISTER), x)
        store(p.PARAMETERS, i, x)
        finite = multiply_add(ZERO, x, finite)  # 0 inf and 0 NaN are NaN
    return dot(finite, splat(ONE, REGISTER)) == ZERO


@entry
def update(p, unit, lr, corrections, step, factor):
    """One optimizer step of a model from GRADIENT, and bias decay; whether all of its parameters are finite."""
    finite = update_tensor(p, 0, p.at_b, unit, lr, corrections, step, ONE)
    finite &= update_tensor(p, p.at_b, p.at_out, unit, lr, corrections, step, factor)
    return finite & update_tensor(p, p.at_out, p.size, unit, lr, corrections, step, ONE)


@entry
def train(p, steps, unit, half_l1, rates, corrections, factors, losses):
    """Train one ReLU model for so many steps, and return how many of them went well: a step whose loss or parameters
    are not finite is the last.

    rates, factors, losses: addresses of float32 [steps], learning rates, factors of the bias, and the losses to be
    written; corrections: float32 [steps, 2], AdamW's.
    """
    for step in range(steps):
        starts = p.STARTS + 4 * step * (p.B + 1)
        prepare(p)
        fill(p.GRADIENT, 0, p.size)
        total = 0.0
        for first in range(0, p.B, TILE):
            count = min(TILE, p.B - first)
            hidden_tile(p, starts, first, count)
            total += output_tile(p, count)
            backward_tile(p, count, half_l1)
        loss = np.float32(total / p.B)
        put_float(losses, step, loss)
        finite = update(p, unit, get_float(rates, step), corrections, step, get_float(factors, step))
        if not (finite and np.isfinite(loss)):
            return step
    return steps


@entry
def embed(p, step, x, e):
    """x [B, M] and -tau [B, O] of the batch of a step, at the addresses x and e."""
    starts = p.STARTS + 4 * step * (p.B + 1)
    for r in range(p.B):
        embed_sample(p, starts, r, x + 4 * r * p.M, e + 4 * r * p.O)


@inner
def draw(words, sample, step, seed, purpose):
    """The words of one sample's features, uint32 [4 groups] (fastmono/philox.py)."""
    mask = np.uint64(MASK)
    for g in range(len(words) // 4):
        c0, c1 = np.uint64(g), np.uint64(sample)
        c2, c3 = np.uint64(step) & mask, np.uint64(step) >> np.uint64(32)
        k0, k1 = np.uint64(seed), np.uint64(purpose)
        for _ in range(10):
            p0, p1 = c0 * np.uint64(M0), c2 * np.uint64(M1)
            c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ k0, (p0 >> np.uint64(32)) ^ c3 ^ k1
            c1, c3 = p1 & mask, p0 & mask
            k0, k1 = (k0 + np.uint64(W0)) & mask, (k1 + np.uint64(W1)) & mask
        words[4 * g] = c0
        words[4 * g + 1] = c1
        words[4 * g + 2] = c2
        words[4 * g + 3] = c3


@entry
def sample(first_step, steps, B, seed, purpose, other, last, scale, row, words, starts, indices, values):
    """The present features of the batches of `steps` steps, bitwise those of `fastmono.philox.FeatureSampler`.

    purpose, other: of the features, and of those that are subtracted (-1: none). last: T - 1, uint32 [N]; scale:
    float32 [N]; row: float32 [N up to a multiple of 16], zeros at its end; words: uint32 [N up to a multiple of 4].
    starts, indices, values: addresses, as in `Problem`.
    """
    end = 0
    for step in range(steps):
        for r in range(B):
            put_int(starts, step * (B + 1) + r, end)
            draw(words, r, first_step + step, seed, purpose)
            for j in range(len(last)):
                value = min((np.float32(words[j]) + HALF) * scale[j], LARGEST)
                row[j] = value if words[j] <= last[j] else ZERO
            if other >= 0:
                draw(words, r, first_step + step, seed, other)
                for j in range(len(last)):
                    value = min((np.float32(words[j]) + HALF) * scale[j], LARGEST)
                    row[j] -= value if words[j] <= last[j] else ZERO
            for c in range(0, len(row), REGISTER):
                end = compress_nonzero(row.ctypes.data, c, c, indices, values, end)
        put_int(starts, step * (B + 1) + B, end)
    return end
