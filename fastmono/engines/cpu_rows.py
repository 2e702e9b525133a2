"""The inner loops of the CPU engine: sums of rows, over lists of numbers or the bits of a word, and products with rows.

A row is worked on in pieces of 128, 64, 32 or 16 numbers, whose sums stay in registers. The pieces that a row falls
into, and so the order of every sum, follow from its length and the processor's registers alone. Addresses and lengths
are as in cpu_kernels.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastmono.engines.simd import (
    REGISTER,
    WIDEST,
    active_lanes,
    add,
    dot,
    four_dots,
    get_float,
    get_int,
    inner,
    load,
    multiply_add,
    put_float,
    put_int,
    put_word,
    splat,
    store,
    trailing_zeros,
)
from fastmono.engines.simd_moves import keep_active

ZERO = np.float32(0.0)


def _row_kernels(lanes: int) -> tuple[Any, ...]:
    """The inner loops, for pieces of rows of so many lanes."""

    @inner
    def sum_of_rows(even, factors, numbers, first, last, rows, length, column):
        """even + sum over i of factors[i] rows[numbers[i], column:], for i from first to last."""
        odd = splat(ZERO, lanes)  # two sums: one would wait for itself
        i = first
        while i + 2 <= last:
            row, next_row = get_int(numbers, i) * length + column, get_int(numbers, i + 1) * length + column
            even = multiply_add(get_float(factors, i), load(rows, row, lanes), even)
            odd = multiply_add(get_float(factors, i + 1), load(rows, next_row, lanes), odd)
            i += 2
        if i < last:
            row = get_int(numbers, i) * length + column
            even = multiply_add(get_float(factors, i), load(rows, row, lanes), even)
        return add(even, odd)

    @inner
    def add_rows(factors, numbers, first, last, rows, length, column, out, at):
        """out[at:] += sum over i of factors[i] rows[numbers[i], column:], for i from first to last."""
        store(out, at, sum_of_rows(load(out, at, lanes), factors, numbers, first, last, rows, length, column))

    @inner
    def put_sum(start, factors, numbers, first, last, rows, length, column, out, at):
        """out[at:] = start[column:] + sum over i of factors[i] rows[numbers[i], column:], for i from first to last."""
        store(out, at, sum_of_rows(load(start, column, lanes), factors, numbers, first, last, rows, length, column))

    @inner
    def find_active(
        factors, numbers, first, last, rows, length, column, start, words, r, neurons, indices, values, end
    ):  # fmt: skip
        """Lists those of start + sum over i of factors[i] rows[numbers[i]], from `column` on, that are active.

        Their `neurons` and values go to `indices` and `values` from `end` on, and words[r] gets a bit for each. Returns
        where the list ends.
        """
        v = sum_of_rows(load(start, column, lanes), factors, numbers, first, last, rows, length, column)
        word = active_lanes(v)
        put_word(words, r, word)
        if word == 0:
            return end
        return keep_active(v, neurons, column, indices, values, end)

    @inner
    def add_marked_rows(word, factors, next_factor, rows, length, column, out, at):
        """out[at:] += sum over set bits r of a factor times rows[r, column:]; returns the factors' sum.

        The factor of r is factors[next_factor[r]], which moves on: called for one neuron after another, it takes each
        sample's list in its order.
        """
        even, odd = load(out, at, lanes), splat(ZERO, lanes)
        total, other = ZERO, ZERO
        while word != 0:
            r = trailing_zeros(word)
            word &= word - np.uint64(1)
            i = get_int(next_factor, r)
            put_int(next_factor, r, i + 1)
            factor = get_float(factors, i)
            total += factor
            even = multiply_add(factor, load(rows, r * length + column, lanes), even)
            if word == 0:
                break
            r = trailing_zeros(word)
            word &= word - np.uint64(1)
            i = get_int(next_factor, r)
            put_int(next_factor, r, i + 1)
            factor = get_float(factors, i)
            other += factor
            odd = multiply_add(factor, load(rows, r * length + column, lanes), odd)
        store(out, at, add(even, odd))
        return total + other

    @inner
    def dot_rows(e, at, numbers, first, last, rows, length, column, out, start):
        """out[i] = start + e[at:] . rows[numbers[i], column:], i from first to last; added to it but at column 0."""
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
            store(out, i, add(sums, splat(start, 4) if column == 0 else load(out, i, 4)))
            i += 4
        while i < last:
            total = dot(v, load(rows, get_int(numbers, i) * length + column, lanes))
            put_float(out, i, total + (start if column == 0 else get_float(out, i)))
            i += 1

    @inner
    def put_product(factors, count, rows, length, column, out, at):
        """out[at:] = sum over i of factors[i] rows[i, column:], for i from 0 to count, one after another."""
        total = splat(ZERO, lanes)
        for i in range(count):
            total = multiply_add(get_float(factors, i), load(rows, i * length + column, lanes), total)
        store(out, at, total)

    @inner
    def put_four_products(factors, count, rows, length, column, out, at, step):
        """The same sums for four lists of factors, one behind another, at at, at + step, ...: they share a row."""
        a, b, c, d = splat(ZERO, lanes), splat(ZERO, lanes), splat(ZERO, lanes), splat(ZERO, lanes)
        for i in range(count):
            row = load(rows, i * length + column, lanes)
            a = multiply_add(get_float(factors, i), row, a)
            b = multiply_add(get_float(factors, i + count), row, b)
            c = multiply_add(get_float(factors, i + 2 * count), row, c)
            d = multiply_add(get_float(factors, i + 3 * count), row, d)
        store(out, at, a)
        store(out, at + step, b)
        store(out, at + 2 * step, c)
        store(out, at + 3 * step, d)

    return add_rows, put_sum, find_active, add_marked_rows, dot_rows, put_product, put_four_products


add_rows_128, _, _, add_marked_rows_128, dot_rows_128, put_product_128, _ = _row_kernels(128)
(
    add_rows_64, put_sum_64, find_active_64, add_marked_rows_64, dot_rows_64, put_product_64, put_four_products_64
) = _row_kernels(64)  # fmt: skip
(
    add_rows_32, put_sum_32, find_active_32, add_marked_rows_32, dot_rows_32, put_product_32, put_four_products_32
) = _row_kernels(32)  # fmt: skip
(
    add_rows_16, put_sum_16, find_active_16, add_marked_rows_16, dot_rows_16, put_product_16, put_four_products_16
) = _row_kernels(16)  # fmt: skip


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
def put_sum(lanes, start, factors, numbers, first, last, rows, length, column, out, at):
    """`put_sum` of so many lanes, at most 64."""
    if lanes == 64:
        put_sum_64(start, factors, numbers, first, last, rows, length, column, out, at)
    elif lanes == 32:
        put_sum_32(start, factors, numbers, first, last, rows, length, column, out, at)
    else:
        put_sum_16(start, factors, numbers, first, last, rows, length, column, out, at)


@inner
def find_active(
    lanes, factors, numbers, first, last, rows, length, column, start, words, r, neurons, indices, values, end
):  # fmt: skip
    """`find_active` of so many lanes, at most 64."""
    if lanes == 64:
        return find_active_64(
            factors, numbers, first, last, rows, length, column, start, words, r, neurons, indices, values, end
        )  # fmt: skip
    elif lanes == 32:
        return find_active_32(
            factors, numbers, first, last, rows, length, column, start, words, r, neurons, indices, values, end
        )  # fmt: skip
    return find_active_16(
        factors, numbers, first, last, rows, length, column, start, words, r, neurons, indices, values, end
    )  # fmt: skip


@inner
def add_marked_rows(lanes, word, factors, next_factor, rows, length, column, out, at):
    """`add_marked_rows` of so many lanes."""
    if lanes == 128:
        return add_marked_rows_128(word, factors, next_factor, rows, length, column, out, at)
    elif lanes == 64:
        return add_marked_rows_64(word, factors, next_factor, rows, length, column, out, at)
    elif lanes == 32:
        return add_marked_rows_32(word, factors, next_factor, rows, length, column, out, at)
    return add_marked_rows_16(word, factors, next_factor, rows, length, column, out, at)


@inner
def dot_rows(lanes, e, at, numbers, first, last, rows, length, column, out, start):
    """`dot_rows` of so many lanes."""
    if lanes == 128:
        dot_rows_128(e, at, numbers, first, last, rows, length, column, out, start)
    elif lanes == 64:
        dot_rows_64(e, at, numbers, first, last, rows, length, column, out, start)
    elif lanes == 32:
        dot_rows_32(e, at, numbers, first, last, rows, length, column, out, start)
    else:
        dot_rows_16(e, at, numbers, first, last, rows, length, column, out, start)


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
def put_product(lanes, factors, count, rows, length, column, out, at):
    """`put_product` of so many lanes."""
    if lanes == 128:
        put_product_128(factors, count, rows, length, column, out, at)
    elif lanes == 64:
        put_product_64(factors, count, rows, length, column, out, at)
    elif lanes == 32:
        put_product_32(factors, count, rows, length, column, out, at)
    else:
        put_product_16(factors, count, rows, length, column, out, at)


@inner
def put_four_products(lanes, factors, count, rows, length, column, out, at, step):
    """`put_four_products` of so many lanes, at most 64."""
    if lanes == 64:
        put_four_products_64(factors, count, rows, length, column, out, at, step)
    elif lanes == 32:
        put_four_products_32(factors, count, rows, length, column, out, at, step)
    else:
        put_four_products_16(factors, count, rows, length, column, out, at, step)
