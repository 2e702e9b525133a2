"""Which neurons the samples of a tile activate, and how much: the first half of a step of the CPU engine.

z is a sum over the features present, of columns of G = W_in P, and most of a layer with negative biases is not active.
So neurons stand in the order of their biases (`Model.order`), in blocks of 64, and each block has a bound:

    z_j = b_j + sum of f_i G[j, i]  <=  max_j b_j + sum of f_i max_j G[j, i]        j over the block, f_i >= 0

A sample leaves out the blocks whose bound is not above 0. That is exact in floating point too: the bound adds up in the
order in which z does, and rounding keeps the order of two numbers. (For a negative f_i, of the task abs, the least
G[j, i] takes the place of the largest.) Sums and lists are explained in cpu_kernels.py, p in cpu_problem.py.
"""

from __future__ import annotations

import numpy as np

from fastmono.engines.cpu_rows import (
    ZERO,
    add_rows,
    add_whole_rows,
    fill,
    find_active,
    piece,
    put_four_products,
    put_product,
    put_sum,
)
from fastmono.engines.simd import (
    REGISTER,
    WIDEST,
    active_lanes,
    any_nonzero,
    count_nonzero,
    get_float,
    get_int,
    get_word,
    highest,
    inner,
    larger,
    load,
    put_float,
    put_int,
    put_word,
    splat,
    store,
    subtract,
    trailing_zeros,
)
from fastmono.engines.simd_moves import transpose_bits, transpose_rows

TILE = 64
"""Samples worked on at a time: the bits of a word."""
BLOCK = 64
"""Neurons worked on at a time: so many rows of 128 numbers take 32 KiB, and stay in the first cache for a tile."""
SINGLE = 8
"""Neurons of 16 whose columns of G^T are computed one by one, at most: for more, it takes less time to compute all."""
LEAST_ACTIVE = 8
"""Active neurons of a sample that are worked on together, on average, where a block has fewer."""
NEVER = np.float32(-np.inf)
"""The bias of padding."""


@inner
def prepare(p):
    """What follows from the parameters: BIAS, W_in^T of the rows that have changed, and where z comes from them, G^T
    and the bounds."""
    neurons = p.at_out - p.at_b
    for column in range(neurons):
        j = get_int(p.NEURONS, column)
        put_float(p.BIAS, column, get_float(p.PARAMETERS, p.at_b + j) if column < p.k else NEVER)
        put_float(p.STALE, column, get_float(p.CHANGED, j))
    for column in range(0, neurons, REGISTER):
        if any_nonzero(load(p.STALE, column, REGISTER)):
            for c in range(0, p.M, REGISTER):
                transpose_rows(p.PARAMETERS, p.NEURONS + 4 * column, p.M, c, p.W_T, c * p.LK + column, p.LK)
    for i in range(p.r):
        for c in range(p.M):
            put_float(p.W_T, c * p.LK + neurons + i, get_float(p.PARAMETERS, (p.k + i) * p.M + c))
    if p.through_features:
        column = 0
        while column < neurons:
            stop, found = column, SINGLE + 1
            while stop < neurons and found > SINGLE:
                found = count_nonzero(load(p.STALE, stop, REGISTER))
                stop += REGISTER
            last = stop if found > SINGLE else stop - REGISTER
            prepare_features(p, column, last)
            for c in range(last, stop):
                if get_float(p.STALE, c) != ZERO:
                    prepare_neuron(p, get_int(p.NEURONS, c), c)
            column = stop
        prepare_features(p, neurons, p.K)
        for block in range(p.blocks):
            prepare_bounds(p, block, block * BLOCK, min((block + 1) * BLOCK, neurons))


@inner
def prepare_features(p, column, stop):
    """G^T from a column to another."""
    while column < stop:
        lanes = min(piece(stop - column), WIDEST // 2)
        for i in range(0, p.N - 3, 4):
            put_four_products(lanes, p.P_T + 4 * i * p.M, p.M, p.W_T, p.LK, column, p.G_T, i * p.LK + column, p.LK)
        for i in range(p.N // 4 * 4, p.N):
            put_product(lanes, p.P_T + 4 * i * p.M, p.M, p.W_T, p.LK, column, p.G_T, i * p.LK + column)
        column += lanes


@inner
def prepare_neuron(p, j, column):
    """The column of G^T of neuron j, with the same sums."""
    first = 0
    while first < p.NP:
        lanes = piece(p.NP - first)
        put_product(lanes, p.PARAMETERS + 4 * j * p.M, p.M, p.P, p.NP, first, p.ROW, 0)
        for i in range(min(lanes, p.N - first)):
            put_float(p.G_T, (first + i) * p.LK + column, get_float(p.ROW, i))
        first += lanes


@inner
def prepare_bounds(p, block, column, stop):
    """TOPS of a block of columns, and if one of them has changed, its BOUNDS."""
    top, stale = load(p.BIAS, column, REGISTER), ZERO
    for c in range(column, stop, REGISTER):
        top = larger(top, load(p.BIAS, c, REGISTER))
        stale += np.float32(count_nonzero(load(p.STALE, c, REGISTER)))
    put_float(p.TOPS, block, highest(top))
    if stale == ZERO:
        return
    for i in range(p.N):
        top = load(p.G_T, i * p.LK + column, REGISTER)
        for c in range(column + REGISTER, stop, REGISTER):
            top = larger(top, load(p.G_T, i * p.LK + c, REGISTER))
        put_float(p.BOUNDS, i * p.LB + block, highest(top))
        if p.task == 2:
            zero = splat(ZERO, REGISTER)
            top = subtract(zero, load(p.G_T, i * p.LK + column, REGISTER))
            for c in range(column + REGISTER, stop, REGISTER):
                top = larger(top, subtract(zero, load(p.G_T, i * p.LK + c, REGISTER)))
            put_float(p.BOUNDS, (p.N + i) * p.LB + block, -highest(top))


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
def sort_samples(p, starts, first, count):
    """SAMPLES of a tile: a loop over features that grows from sample to sample is predicted, and costs half."""
    for bucket in range(TILE):
        put_int(p.NEXT, bucket, 0)
    for r in range(count):
        bucket = min(get_int(starts, first + r + 1) - get_int(starts, first + r), TILE - 1)
        put_int(p.NEXT, bucket, get_int(p.NEXT, bucket) + 1)
    begin = 0
    for bucket in range(TILE):
        members = get_int(p.NEXT, bucket)
        put_int(p.NEXT, bucket, begin)
        begin += members
    for r in range(count):
        bucket = min(get_int(starts, first + r + 1) - get_int(starts, first + r), TILE - 1)
        place = get_int(p.NEXT, bucket)
        put_int(p.SAMPLES, place, r)
        put_int(p.NEXT, bucket, place + 1)


@inner
def find_needed(p, starts, first, count):
    """NEEDED of a tile: for each block the samples whose bound is above 0, by their places in SAMPLES."""
    for i in range(TILE):
        put_word(p.MASKS, i, np.uint64(0))
    column = 0
    while column < p.LB:
        lanes = min(piece(p.LB - column), BLOCK)
        for i in range(count):
            row = first + get_int(p.SAMPLES, i)
            begin, end = get_int(starts, row), get_int(starts, row + 1)
            factors, numbers = p.VALUES + 4 * begin, p.INDICES + 4 * begin
            if p.task == 2:
                for c in range(end - begin):
                    below = p.N if get_float(factors, c) < ZERO else 0
                    put_int(p.SIGNED, c, get_int(numbers, c) + below)
                numbers = p.SIGNED
            put_sum(lanes, p.TOPS, factors, numbers, 0, end - begin, p.BOUNDS, p.LB, column, p.ROW, 0)
            put_word(p.MASKS, i, active_word(lanes, p.ROW))
        transpose_bits(p.MASKS, p.NEEDED + 8 * column)
        column += lanes


@inner
def active_word(lanes, row):
    """`active_lanes` of the first numbers at an address."""
    if lanes == 64:
        return active_lanes(load(row, 0, 64))
    elif lanes == 32:
        return active_lanes(load(row, 0, 32))
    return active_lanes(load(row, 0, 16))


@inner
def hidden_tile(p, starts, first, count):
    """X and -tau (in E) of samples first to first + count, and their active neurons: ACTIVE, H, ENDS and WORDS.

    Returns how many groups of blocks there are, whose active neurons are worked on together (GROUPS).
    """
    for r in range(TILE):
        put_int(p.ENDS, r, r * p.LK)
    for r in range(count):
        embed_sample(p, starts, first + r, p.X + 4 * r * p.M, p.E + 4 * r * p.LE)
    sort_samples(p, starts, first, count)
    every = ~np.uint64(0) >> np.uint64(TILE - count)
    if p.through_features:
        find_needed(p, starts, first, count)
    groups, found = 0, 0
    put_int(p.GROUPS, 0, 0)
    for block in range(p.blocks):  # whose columns of G^T stay in the first cache
        ends = p.ENDS + 4 * TILE * block
        for r in range(0, TILE, REGISTER):
            store(ends, TILE + r, load(ends, r, REGISTER))
        needed = get_word(p.NEEDED, block) if p.through_features else every
        found += hidden_block(p, starts, first, needed, block, ends)
        if found >= LEAST_ACTIVE * count or block == p.blocks - 1:
            groups, found = groups + 1, 0
            put_int(p.GROUPS, groups, block + 1)
    if p.r > 0:
        linear_tile(p, starts, first, count)
    return groups


@inner
def hidden_block(p, starts, first, needed, block, ends):
    """The active neurons of a block for the samples that need it; returns how many pairs of both there are."""
    column, stop, found = block * BLOCK, min((block + 1) * BLOCK, p.at_out - p.at_b), 0
    for i in range(TILE):
        put_word(p.MASKS, i, np.uint64(0))
    while column < stop:
        lanes, word = min(piece(stop - column), BLOCK), needed
        while word != 0:
            r = get_int(p.SAMPLES, trailing_zeros(word))
            word &= word - np.uint64(1)
            factors, numbers, present, last, rows = inputs(p, starts, first, r)
            before = get_int(ends, TILE + r)
            end = find_active(
                lanes, factors, numbers, present, last, rows, p.LK, column, p.BIAS, p.MASKS, r, p.NEURONS, p.ACTIVE,
                p.H, before,
            )  # fmt: skip
            put_int(ends, TILE + r, end)
            found += end - before
        transpose_bits(p.MASKS, p.WORDS + 8 * column)  # also of columns beyond the piece, whose turn is later
        column += lanes
    return found


@inner
def inputs(p, starts, first, r):
    """What z of sample r of a tile is a sum of: factors, numbers of rows, where these begin and end, and the rows."""
    if p.through_features:
        return p.VALUES, p.INDICES, get_int(starts, first + r), get_int(starts, first + r + 1), p.G_T
    return p.X + 4 * r * p.M, p.COUNTING, 0, p.M, p.W_T


@inner
def linear_tile(p, starts, first, count):
    """The linear path of a tile, behind the active neurons of each sample: its z in H, and its rows in ACTIVE."""
    neurons = p.at_out - p.at_b
    for i in range(p.r):
        put_word(p.WORDS, neurons + i, ~np.uint64(0) >> np.uint64(TILE - count))
    for r in range(count):
        factors, numbers, present, last, rows = inputs(p, starts, first, r)
        end = get_int(p.ENDS, TILE * p.blocks + r)
        fill(p.H, end, p.K - neurons)
        column = neurons
        while column < p.K:
            lanes = piece(p.K - column)
            add_rows(lanes, factors, numbers, present, last, rows, p.LK, column, p.H, end + column - neurons)
            column += lanes
        for i in range(p.r):
            put_int(p.ACTIVE, end + i, p.k + i)
