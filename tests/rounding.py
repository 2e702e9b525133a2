"""Rounding to fewer bits as it is defined, for comparison."""

from __future__ import annotations

import numpy as np


def rounded_by_definition(x: np.ndarray, mantissa: int) -> np.ndarray:
    """float32 to `mantissa` stored bits, ties to even, through float64: exact, since a float32 has 24 bits."""
    wide = x.astype(np.float64)
    _, exponent = np.frexp(wide)  # |x| in [2**(e - 1), 2**e)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, -126) - mantissa)  # subnormals share the grid of 2**-126
    with np.errstate(invalid="ignore", over="ignore"):
        return (np.rint(wide / unit) * unit).astype(np.float32)
