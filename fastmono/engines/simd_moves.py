"""Vectors of float32 for Numba, as in simd.py: numbers that change their places.

keep_nonzero             those of 16 numbers that are not 0, one after another, with their indices
keep_active              the active ones of a vector, with names of theirs
transpose_bits           64 words of 64 bits
transpose_rows           16 numbers of each of 16 rows that lie anywhere
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastmono.engines.simd import (
    FLOAT,
    INT32,
    INT64,
    REGISTER,
    ir_constant,
    ir_function,
    ir_lanes,
    ir_load,
    ir_pointer,
    ir_splat,
    ir_store,
    ir_vector,
)


def _positive(builder: Any, v: Any) -> Any:
    """Which of 16 numbers are above 0 or NaN."""
    return builder.fcmp_unordered(">", v, ir_constant(REGISTER, FLOAT, [0.0] * REGISTER))


def _pack(builder: Any, v: Any, mask: Any, numbers: Any, indices: Any, values: Any, at: Any) -> Any:
    """Those of 16 numbers whose flag is set go to `values` at `at`, and of 16 `numbers` to `indices`. Writes 16 of
    both; returns the next `at`."""
    n = REGISTER
    for data, to, element, name in ((numbers, indices, INT32, "i32"), (v, values, FLOAT, "f32")):
        kind, flags = ir_vector(n, element), ir_vector(n, ir.IntType(1))
        function = ir_function(builder, f"llvm.experimental.vector.compress.v{n}{name}", kind, kind, flags, kind)
        packed = builder.call(function, [data, mask, ir_constant(n, element, ir.Undefined)])
        ir_store(builder, packed, to, at, element, n)
    return builder.add(at, builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(n))), INT64))


@intrinsic
def keep_nonzero(context, source, offset, number, indices, values, at):
    """Of the 16 numbers at source + offset those that are not 0 go to `values` at `at`, and their numbers, from
    `number` on, to `indices`. Writes 16 of both; returns the next `at`."""

    def generate(context, builder, signature, args):
        source, offset, *rest = args
        v = ir_load(builder, source, offset, REGISTER)
        mask = builder.fcmp_unordered("!=", v, ir_constant(REGISTER, FLOAT, [0.0] * REGISTER))
        number, *rest = rest
        counting = ir_constant(REGISTER, INT32, list(range(REGISTER)))
        numbers = builder.add(ir_splat(builder, builder.trunc(number, INT32), REGISTER), counting)
        return _pack(builder, v, mask, numbers, *rest)

    return types.int64(*[types.int64] * 6), generate


@intrinsic
def keep_active(context, v, numbers, number, indices, values, at):
    """Of a vector the active numbers (above 0 or NaN) go to `values` at `at`, and so many of the int32 at `numbers`,
    from `number` on, to `indices`. Writes 16 of both at least; returns the next `at`."""

    def generate(context, builder, signature, args):
        whole, numbers, number, indices, values, at = args
        for first in range(0, v.lanes, REGISTER):
            part = ir_lanes(builder, whole, first, REGISTER)
            here = builder.add(number, ir.Constant(INT64, first))
            named = builder.load(ir_pointer(builder, numbers, here, INT32, REGISTER))
            named.align = 4
            at = _pack(builder, part, _positive(builder, part), named, indices, values, at)
        return at

    return types.int64(v, *[types.int64] * 5), generate


@intrinsic
def transpose_bits(context, source, out):
    """Bit c of word r of the 64 words at `source` becomes bit r of word c of the 64 at `out`."""

    def generate(context, builder, signature, args):
        n = 64
        kind = ir_vector(n, INT64)
        source, out = (builder.inttoptr(address, kind.as_pointer()) for address in args)
        x = builder.load(source)
        x.align = 8
        for j in (32, 16, 8, 4, 2, 1):  # blocks of j bits and words change places across the diagonal
            low = sum(1 << i for i in range(n) if not i & j)
            y = builder.shuffle_vector(x, x, ir_constant(n, INT32, [i ^ j for i in range(n)]))
            shift, keep, move = (ir_constant(n, INT64, [value] * n) for value in (j, low, low << j & 2**n - 1))
            above = builder.or_(builder.and_(x, keep), builder.shl(builder.and_(y, keep), shift))
            below = builder.or_(builder.and_(x, move), builder.and_(builder.lshr(y, shift), keep))
            first = ir_constant(n, ir.IntType(1), [not i & j for i in range(n)])
            x = builder.select(first, above, below)
        builder.store(x, out).align = 8
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def transpose_rows(context, rows, numbers, length, column, out, at, step):
    """The 16 numbers from `column` on of the rows numbers[0] to numbers[15] go, as columns of 16, to out[at:],
    out[at + step:], ..."""

    def generate(context, builder, signature, args):
        rows, numbers, length, column, out, at, step = args
        n = REGISTER
        v = []
        for i in range(n):
            number = builder.load(ir_pointer(builder, numbers, ir.Constant(INT64, i), INT32))
            v.append(ir_load(builder, rows, builder.add(builder.mul(builder.sext(number, INT64), length), column), n))
        for j in (8, 4, 2, 1):  # blocks of j x j change places across the diagonal
            above = ir_constant(n, INT32, [i if not i & j else n + i - j for i in range(n)])
            below = ir_constant(n, INT32, [i + j if not i & j else n + i for i in range(n)])
            for i in range(n):
                if not i & j:
                    a, b = v[i], v[i | j]
                    v[i], v[i | j] = builder.shuffle_vector(a, b, above), builder.shuffle_vector(a, b, below)
        for i in range(n):
            ir_store(builder, v[i], out, builder.add(at, builder.mul(step, ir.Constant(INT64, i))), FLOAT, n)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate
