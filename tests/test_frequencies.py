"""How often each feature is present."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastmono.frequencies import presence_probabilities, rarest_probability


@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
@pytest.mark.parametrize("prob", [1 / 64, 0.9])
def test_rarest_probability_is_the_last_of_all(frequency: str, prob: float) -> None:
    sizes = [*range(1, 70), 512, 1000, 4095, 9999, 10_000, 10_001, 10_007, 20_000, 131_071, 1_000_000, 5_000_000]
    for n in sizes:
        p = presence_probabilities(n, prob, frequency)
        # Up to 10,000 terms the same sum, so only the order of float64 additions may differ. Beyond, Euler-Maclaurin
        # leaves out 1.1/12 * 10000**-2.1 = 3.7e-10 of a sum that is above 5.
        tolerance = 1e-13 if n <= 10_000 else 1e-10
        assert rarest_probability(n, prob, frequency) == pytest.approx(p[-1], rel=tolerance), n
        assert p[-1] == p.min()


def test_power_law_probabilities_have_the_published_shape() -> None:
    n, prob = 512, 1 / 64
    p = presence_probabilities(n, prob, "power_law")
    raw = np.array([(j + 1) ** -1.1 for j in range(n)])
    raw *= n * prob / math.fsum(raw)
    assert raw[0] > 1 > raw[1]  # at the paper's size the commonest feature is clipped
    np.testing.assert_allclose(p, np.minimum(raw, 1), rtol=1e-13)  # float64 sums of 512 terms
    unclipped = presence_probabilities(40, 1 / 64, "power_law")
    assert unclipped.max() < 1 and unclipped.sum() == pytest.approx(40 / 64, rel=1e-13)
