"""Matrix products whose operands are rounded to nearest even, and whose sums are float32.

    fp32   not rounded, IEEE products          tf32   ten mantissa bits          bf16, fp16   that type

Triton hands float32 operands of a tf32 product to hardware that drops the low bits: so they are rounded here first.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_tf32(x):
    """float32 rounded to ten mantissa bits, ties to even; infinities and NaN are kept."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A float32 tile as an operand of a product."""
    if PRECISION == "tf32":
        x = round_to_tf32(x)
    elif PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    elif PRECISION == "fp16":
        x = x.to(tl.float16)
    return x


@triton.jit
def product(a, b, sum, PRECISION: tl.constexpr):
    """sum + a @ b, float32, for operands of one precision."""
    if PRECISION == "tf32":
        return tl.dot(a, b, sum, input_precision="tf32")
    else:
        return tl.dot(a, b, sum, input_precision="ieee")
