"""The nonlinearities and their derivatives, and a product's worth of them.

    relu  max(z, 0)              1 where z > 0
    gelu  z Phi(z)               Phi(z) + z phi(z)            Phi, phi: the normal distribution and its density
    solu  z exp(z)               (1 + z) exp(z)
    identity, of a linear path

A NaN in z must reach the loss, where divergence is seen: a plain maximum would hide it.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """phi(z), the shape of z."""
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == "identity":
        return z
    else:
        return z * tl.exp(z)


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """phi'(z), the shape of z."""
    if ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * DENSITY_AT_0 * tl.exp(-0.5 * z * z)
    else:
        return (1.0 + z) * tl.exp(z)
