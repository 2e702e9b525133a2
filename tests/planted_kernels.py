"""Kernels for sm_90 with and without the faults that benchmarks/machine_code.py looks for."""

import triton
import triton.language as tl


@triton.jit
def sums_and_product(p_a, p_b, p_sums, p_out, n, USED: tl.constexpr, WAITED: tl.constexpr):
    """a^T b for a, b [n, 64], and how many numbers of a are positive where a is USED in registers besides.

    WAITED: a second product, whose result is needed at once, comes after the first: nothing is in flight when the next
    copies are made.
    """
    w_a = tl.make_tensor_descriptor(p_a, [n, 64], [64, 1], [64, 64])
    w_b = tl.make_tensor_descriptor(p_b, [n, 64], [64, 1], [64, 64])
    out = tl.zeros([64, 64], tl.float32)
    sums = tl.zeros([64, 64], tl.float32)
    for i in range(0, n, 64):
        a = w_a.load([i, 0])
        b = w_b.load([i, 0])
        if USED:
            sums += tl.where(a > 0.0, 1.0, 0.0)
        out = tl.dot(a, b, out)
        if WAITED:
            sums += tl.abs(tl.dot(b, a))
    i_64 = tl.arange(0, 64)
    offsets = i_64[:, None] * 64 + i_64[None, :]
    tl.store(p_out + offsets, out)
    tl.store(p_sums + offsets, sums)
