"""How often each feature is present, and what the sampler compares its random words with.

    uniform    p_j = eps
    power_law  p_j = min(1, N eps (j+1)**-1.1 / sum_i (i+1)**-1.1)        j from 0

(the paper's code; recipe fact 3). A 32-bit word u makes feature j present when u < T_j = floor(p_j 2**32), and is
then worth (float32(u) + 1/2) s_j with s_j = float32(1 / (p_j 2**32)): uniform on (0, 1) given presence.
"""

from __future__ import annotations

import numpy as np

EXPONENT = 1.1
WORDS = 2.0**32


def presence_probabilities(n_features: int, feature_prob: float, frequency: str) -> np.ndarray:
    """p, float64 [N]: the probability that each feature is present in a sample."""
    if frequency == "uniform":
        return np.full(n_features, feature_prob)
    weights = np.arange(1, n_features + 1, dtype=np.float64) ** -EXPONENT
    return np.minimum(1.0, n_features * feature_prob * weights / weights.sum())


def rarest_probability(n_features: int, feature_prob: float, frequency: str) -> float:
    """p of the last feature, the rarest, without building all N of them (a spec may name a huge N)."""
    if frequency == "uniform":
        return feature_prob
    exact = min(n_features, 10_000)
    total = float((np.arange(1, exact + 1, dtype=np.float64) ** -EXPONENT).sum())
    if n_features > exact:  # Euler-Maclaurin for the rest; the next term is below 1e-9 of the sum
        start, end = (n ** (1 - EXPONENT) / (1 - EXPONENT) + 0.5 * n**-EXPONENT for n in (exact, n_features))
        total += end - start
    return min(1.0, n_features * feature_prob * float(n_features) ** -EXPONENT / total)


def thresholds(p: np.ndarray | float) -> np.ndarray:
    """T = floor(p 2**32), int64, the shape of p: 2**32 where p is 1, which no 32-bit word reaches."""
    return np.floor(np.asarray(p, dtype=np.float64) * WORDS).astype(np.int64)


def scales(p: np.ndarray | float) -> np.ndarray:
    """s = 1 / (p 2**32), computed in float64 and rounded to float32, the shape of p."""
    return (1.0 / (np.asarray(p, dtype=np.float64) * WORDS)).astype(np.float32)
