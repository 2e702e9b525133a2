"""Vectors of float32 for Numba: what the CPU engine's inner loops are written in.

A vector of 16, 32, 64 or 128 lanes is one LLVM value; the compiler splits it into the registers that the processor has.
Memory is addressed by integers (a tensor's `data_ptr()`, and an offset in elements), because Numba counts references to
its arrays wherever a function takes one, which costs more than some of the rows that are multiplied here.

    load, store              a vector at base + offset          splat            a scalar in every lane
    add, subtract, ...       lane by lane                       multiply_add     acc + a v for a scalar a, rounded once
    either                   their bits together                larger           lane by lane, or NaN
    any_nonzero              whether a lane is not 0            count_nonzero    how many
    highest                  the largest lane, or NaN           any_bit          whether a bit is set
    differing                bits in which two vectors differ
    dot, four_dots           sums of v w                        get_*, put_*     single numbers
    active_lanes             a word with a bit for each lane that is active
    trailing_zeros           index of a word's lowest set bit
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
REGISTER = 16
"""Lanes of the widest register there is; rows are padded to whole ones."""
WIDEST = 128 if "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2] else 32
"""Lanes of a row worked on at a time: two sums of so many must fit the registers (32 of 16 lanes, or 16 of 8)."""


inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For functions that others here call: compiled with them, and of no use by themselves."""


class _Kept(FunctionCache):
    """Numba's files of compiled functions. Numba lets a disk that is full, or a file that a crash cut short, end the
    program; here the function is only compiled again.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever unpickling a damaged file raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(Exception):
            super().save_overload(sig, data)


def entry(function: Any) -> Any:
    """For functions that the engine calls: compiled once for a machine and kept, where a file can be."""
    try:
        compiled = njit(cache=True)(function)
        compiled._cache = _Kept(function)
    except RuntimeError:  # no folder to write to, not even the user's own
        return njit(function)
    return compiled


class Vector(types.Type):
    """Numba's type of a vector."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"float32x{lanes}")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM value."""

    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir_vector(vector.lanes))


def ir_vector(lanes: int, element: Any = FLOAT) -> Any:
    return ir.VectorType(element, lanes)


def ir_constant(lanes: int, element: Any, values: Any) -> Any:
    return ir.Constant(ir_vector(lanes, element), values)


def ir_pointer(builder: Any, base: Any, offset: Any, element: Any, lanes: int = 0) -> Any:
    pointer = builder.gep(builder.inttoptr(base, element.as_pointer()), [offset])
    return builder.bitcast(pointer, ir_vector(lanes, element).as_pointer()) if lanes else pointer


def ir_load(builder: Any, base: Any, offset: Any, lanes: int) -> Any:
    value = builder.load(ir_pointer(builder, base, offset, FLOAT, lanes))
    value.align = 4
    return value


def ir_store(builder: Any, value: Any, base: Any, offset: Any, element: Any, lanes: int) -> None:
    builder.store(value, ir_pointer(builder, base, offset, element, lanes)).align = 4


def ir_splat(builder: Any, x: Any, lanes: int) -> Any:
    first = builder.insert_element(ir_constant(lanes, x.type, ir.Undefined), x, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, first, ir_constant(lanes, INT32, [0] * lanes))


def ir_lanes(builder: Any, v: Any, first: int, count: int) -> Any:
    return builder.shuffle_vector(v, v, ir_constant(count, INT32, list(range(first, first + count))))


def ir_function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _fma(builder: Any, a: Any, b: Any, c: Any, lanes: int) -> Any:
    v = ir_vector(lanes)
    return builder.call(ir_function(builder, f"llvm.fma.v{lanes}f32", v, v, v, v), [a, b, c])


@intrinsic(prefer_literal=True)
def load(context, base, offset, lanes):
    """The vector of `lanes` (a literal) numbers at base + offset."""
    n = lanes.literal_value

    def generate(context, builder, signature, args):
        return ir_load(builder, args[0], args[1], n)

    return Vector(n)(types.int64, types.int64, lanes), generate


@intrinsic
def store(context, base, offset, v):
    """Write a vector to base + offset."""

    def generate(context, builder, signature, args):
        ir_store(builder, args[2], args[0], args[1], FLOAT, v.lanes)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, v), generate


@intrinsic(prefer_literal=True)
def splat(context, x, lanes):
    """A vector of `lanes` (a literal) times the float32 x."""
    n = lanes.literal_value

    def generate(context, builder, signature, args):
        return ir_splat(builder, args[0], n)

    return Vector(n)(types.float32, lanes), generate


@intrinsic
def multiply_add(context, a, v, acc):
    """acc + a v for a scalar a."""

    def generate(context, builder, signature, args):
        return _fma(builder, ir_splat(builder, args[0], v.lanes), args[1], args[2], v.lanes)

    return acc(types.float32, v, acc), generate


def _binary(instruction: str) -> Callable[..., Any]:
    @intrinsic
    def operate(context, v, w):
        def generate(context, builder, signature, args):
            return getattr(builder, instruction)(*args)

        return v(v, w), generate

    return operate


add, subtract, multiply, divide = map(_binary, ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def either(context, v, w):
    """The bits of v or w: 0 where both are 0 of either sign."""

    def generate(context, builder, signature, args):
        words = ir_vector(v.lanes, INT32)
        return builder.bitcast(builder.or_(*(builder.bitcast(x, words) for x in args)), ir_vector(v.lanes))

    return v(v, w), generate


def _larger(builder: Any, v: Any, w: Any) -> Any:
    return builder.select(builder.fcmp_unordered(">", v, w), v, w)


@intrinsic
def larger(context, v, w):
    """The larger number of each lane, or NaN if v has it, or w."""

    def generate(context, builder, signature, args):
        v, w = args
        return builder.select(builder.fcmp_unordered("!=", w, w), w, _larger(builder, v, w))

    return v(v, w), generate


@intrinsic
def highest(context, v):
    """The largest of 16 numbers, or NaN if one of them is."""

    def generate(context, builder, signature, args):
        (top,) = args
        count = REGISTER
        while count > 1:
            count //= 2
            a, b = ir_lanes(builder, top, 0, count), ir_lanes(builder, top, count, count)
            top = builder.select(builder.fcmp_unordered("!=", b, b), b, _larger(builder, a, b))
        return builder.extract_element(top, ir.Constant(INT32, 0))

    return types.float32(v), generate


def ir_nonzero(builder: Any, v: Any) -> Any:
    """A word of 16 bits: which of 16 numbers are not 0, or NaN."""
    mask = builder.fcmp_unordered("!=", v, ir_constant(REGISTER, FLOAT, [0.0] * REGISTER))
    return builder.bitcast(mask, ir.IntType(REGISTER))


@intrinsic
def any_nonzero(context, v):
    """Whether a lane of 16 is not 0, or NaN."""

    def generate(context, builder, signature, args):
        return builder.icmp_unsigned("!=", ir_nonzero(builder, *args), ir.Constant(ir.IntType(REGISTER), 0))

    return types.boolean(v), generate


@intrinsic
def count_nonzero(context, v):
    """How many of 16 lanes are not 0, or NaN."""

    def generate(context, builder, signature, args):
        return builder.zext(builder.ctpop(ir_nonzero(builder, *args)), INT64)

    return types.int64(v), generate


@intrinsic
def differing(context, bits, v, w):
    """`bits`, and those in which v and w differ, as numbers: of use to `any_bit` alone."""

    def generate(context, builder, signature, args):
        bits, v, w = (builder.bitcast(x, ir_vector(args[0].type.count, INT32)) for x in args)
        return builder.bitcast(builder.or_(bits, builder.xor(v, w)), ir_vector(args[0].type.count))

    return bits(bits, v, w), generate


@intrinsic
def any_bit(context, v):
    """Whether a bit of 16 numbers is set; `any_nonzero` takes denormal numbers for 0."""

    def generate(context, builder, signature, args):
        words = builder.bitcast(args[0], ir_vector(REGISTER, INT32))
        mask = builder.icmp_unsigned("!=", words, ir_constant(REGISTER, INT32, [0] * REGISTER))
        kind = ir.IntType(REGISTER)
        return builder.icmp_unsigned("!=", builder.bitcast(mask, kind), ir.Constant(kind, 0))

    return types.boolean(v), generate


@intrinsic
def square_root(context, v):
    """The square root of each lane, correctly rounded."""

    def generate(context, builder, signature, args):
        kind = ir_vector(v.lanes)
        return builder.call(ir_function(builder, f"llvm.sqrt.v{v.lanes}f32", kind, kind), args)

    return v(v), generate


def _products(builder: Any, v: Any, w: Any, lanes: int) -> Any:
    """16 partial sums of v w."""
    total = None
    for first in range(0, lanes, REGISTER):
        a, b = (ir_lanes(builder, x, first, REGISTER) for x in (v, w))
        total = builder.fmul(a, b) if total is None else _fma(builder, a, b, total, REGISTER)
    return total


def _fold(builder: Any, total: Any, width: int) -> Any:
    """16 lanes added to `width` of them, halves upon halves."""
    count = REGISTER
    while count > width:
        count //= 2
        total = builder.fadd(ir_lanes(builder, total, 0, count), ir_lanes(builder, total, count, count))
    return total


@intrinsic
def dot(context, v, w):
    """The sum of v w, in an order that depends on the number of lanes alone."""

    def generate(context, builder, signature, args):
        total = _fold(builder, _products(builder, *args, v.lanes), 1)
        return builder.extract_element(total, ir.Constant(INT32, 0))

    return types.float32(v, w), generate


@intrinsic
def four_dots(context, v, w0, w1, w2, w3):
    """The sums of v w0, v w1, v w2 and v w3, a vector of 4: their additions share instructions."""

    def generate(context, builder, signature, args):
        def pairs(a: Any, b: Any, order: list[int]) -> Any:
            # `order` picks four of a's lanes 0 to 3 and b's 4 to 7 in each quarter of a register.
            picked = [4 * q + i % 4 + (REGISTER if i > 3 else 0) for q in range(REGISTER // 4) for i in order]
            return builder.shuffle_vector(a, b, ir_constant(REGISTER, INT32, picked))

        sums = [_products(builder, args[0], w, v.lanes) for w in args[1:]]
        ab, cd = (
            builder.fadd(pairs(a, b, [0, 4, 1, 5]), pairs(a, b, [2, 6, 3, 7])) for a, b in (sums[:2], sums[2:])
        )  # a b a b in each quarter
        return _fold(builder, builder.fadd(pairs(ab, cd, [0, 1, 4, 5]), pairs(ab, cd, [2, 3, 6, 7])), 4)

    return Vector(4)(v, w0, w1, w2, w3), generate


@intrinsic
def active_lanes(context, v):
    """A word with a bit for each lane, at most 64, that is above 0 or NaN."""

    def generate(context, builder, signature, args):
        zeros = ir_constant(v.lanes, FLOAT, [0.0] * v.lanes)
        mask = builder.fcmp_unordered(">", args[0], zeros)
        bits = builder.bitcast(mask, ir.IntType(v.lanes))
        return bits if v.lanes == 64 else builder.zext(bits, INT64)

    return types.uint64(v), generate


def _scalars(element: Any, kind: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    integer = isinstance(element, ir.IntType)
    widens = element == INT32

    @intrinsic
    def get(context, base, offset):
        def generate(context, builder, signature, args):
            value = builder.load(ir_pointer(builder, args[0], args[1], element))
            return builder.sext(value, INT64) if widens else value

        return kind(types.int64, types.int64), generate

    @intrinsic
    def put(context, base, offset, value):
        def generate(context, builder, signature, args):
            value = builder.trunc(args[2], element) if integer and widens else args[2]
            builder.store(value, ir_pointer(builder, args[0], args[1], element))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), generate

    return get, put


get_float, put_float = _scalars(FLOAT, types.float32)
get_int, put_int = _scalars(INT32, types.int64)
get_word, put_word = _scalars(INT64, types.uint64)


@intrinsic
def trailing_zeros(context, word):
    """Index of a word's lowest set bit; 64 where there is none."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate
