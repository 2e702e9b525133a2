"""What a model starts from (projections, initial values) and what a precision does to a number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from rounding import rounded_by_definition
from torch import nn

from fastmono.block import Model, initial_values, projection, round_to_bf16, round_to_tf32
from fastmono.philox import Purpose, normals
from fastmono.spec import ModelSpec

TASKS = ("decoder", "reprojector", "abs")
FLOAT32, FLOAT64 = torch.float32, torch.float64


def spec_of(**fields: object) -> ModelSpec:
    shape = {"n_features": 13, "d_embed": 5, "n_neurons": 11, "batch_size": 17, "feature_prob": 0.3, "steps": 64}
    return ModelSpec(**{**shape, **fields})  # type: ignore[arg-type]


# Rounding.


def interesting_floats(mantissa: int) -> np.ndarray:
    rng = np.random.default_rng(mantissa)
    dropped = 23 - mantissa
    heads = np.concatenate([rng.integers(0, 2**mantissa, 6), [0, 1, 2**mantissa - 1, 2**mantissa - 2]])
    half = 2 ** (dropped - 1)
    tails = np.array([0, 1, half - 1, half, half + 1, 2**dropped - 1])
    exponents = np.array([0, 1, 2, 100, 127, 128, 253, 254])
    sign = np.array([0, 1])
    parts = np.meshgrid(sign, exponents, heads, tails, indexing="ij")
    grid = (parts[0] << 31) | (parts[1] << 23) | (parts[2] << dropped) | parts[3]
    bits = np.concatenate([grid.ravel(), rng.integers(0, 2**32, 200_000), [0x7F7FFFFF, 0xFF7FFFFF, 0, 0x80000000, 1]])
    x = bits.astype(np.uint32).view(np.float32)
    return x[np.isfinite(x)]


@pytest.mark.parametrize(("rounding", "mantissa"), [(round_to_tf32, 10), (round_to_bf16, 7)])
def test_rounding_is_to_nearest_even_bit_by_bit(rounding: object, mantissa: int) -> None:
    assert callable(rounding)
    x = interesting_floats(mantissa)
    expected = rounded_by_definition(x, mantissa)
    found = rounding(torch.from_numpy(x))
    assert found.dtype == FLOAT32
    wrong = found.numpy().view(np.uint32) != expected.view(np.uint32)
    assert not wrong.any(), x[wrong][:5]
    # what the definition above must be: idempotent, at most half a unit away, to even at a tie, infinite beyond
    assert torch.equal(rounding(found), found)
    ties = torch.tensor([1 + 2.0 ** -(mantissa + 1), 1 + 3 * 2.0 ** -(mantissa + 1), -1 - 2.0 ** -(mantissa + 1)])
    assert rounding(ties).tolist() == [1.0, 1 + 2.0 ** (1 - mantissa), -1.0]
    assert rounding(torch.tensor([3.4028234663852886e38, -3.4028234663852886e38])).tolist() == [math.inf, -math.inf]
    assert rounding(torch.tensor([2.0**-149, 2.0 ** (-126 - mantissa)])).tolist() == [0.0, 2.0 ** (-126 - mantissa)]


@pytest.mark.parametrize("rounding", [round_to_tf32, round_to_bf16])
def test_rounding_keeps_nan_infinities_and_layout(rounding: object) -> None:
    assert callable(rounding)
    # NaN with the payload in the bits that are dropped, too: cutting them would make an infinity
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -0x7FFFFF, -1], dtype=torch.int32).view(FLOAT32)
    assert nans.isnan().all() and rounding(nans).isnan().all()
    assert rounding(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]
    table = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    before = table.clone()
    assert torch.equal(rounding(table.T), rounding(table).T)
    assert torch.equal(rounding(table[:, 1:3]), rounding(table)[:, 1:3])
    assert torch.equal(table, before)  # its argument is left alone


# Projections and initial values.

PROJECTIONS = [(1, 1), (7, 1), (7, 3), (9, 9), (128, 32), (200, 17)]


@pytest.mark.parametrize(("n", "m"), PROJECTIONS)
@pytest.mark.parametrize("purpose", [Purpose.PROJECTION, Purpose.SECOND_PROJECTION])
def test_projection_is_the_u_of_a_gaussian_with_unit_rows(n: int, m: int, purpose: Purpose) -> None:
    P = projection(3, purpose, n, m).double()
    assert P.shape == (m, n) and projection(3, purpose, n, m).dtype == FLOAT32
    # columns of unit length, to a float32 rounding of each entry
    torch.testing.assert_close(P.norm(dim=0), torch.ones(n, dtype=FLOAT64), rtol=0, atol=2.0**-23)
    # U = G M has orthonormal columns, so U U^T is the projection onto the columns of G, whatever signs the
    # decomposition gives: |u_i|^2 its diagonal, and P^T P its correlations.
    G = normals(3, purpose, 0, n * m).view(n, m).numpy()
    hat = G @ np.linalg.solve(G.T @ G, G.T)
    length = np.sqrt(np.diag(hat))
    rounding = 8 * m**0.5 * 2.0**-24
    np.testing.assert_allclose((P.T @ P).numpy(), hat / np.outer(length, length), atol=rounding)
    # Rows of P, once each column has its length back, are orthonormal: P's rows are orthogonal up to that scaling.
    U = P.numpy().T * length[:, None]
    np.testing.assert_allclose(U.T @ U, np.eye(m), atol=rounding)
    # and they are the principal directions, the largest first: U^T G G^T U = diag(S^2)
    gram = U.T @ G @ G.T @ U
    singular = np.linalg.svd(G, compute_uv=False)
    np.testing.assert_allclose(gram, np.diag(singular**2), atol=rounding * singular[0] ** 2)


def test_projection_is_deterministic_whatever_the_threads_and_second_is_another_draw() -> None:
    # At this size the bits of the decomposition do depend on the threads that it is given (MKL 2024.2).
    n, m = 1000, 256
    first = projection(3, Purpose.PROJECTION, n, m)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            projection.cache_clear()
            assert torch.equal(projection(3, Purpose.PROJECTION, n, m), first)
            assert torch.get_num_threads() == count  # and it is put back
    finally:
        torch.set_num_threads(threads)
    for other in (projection(3, Purpose.SECOND_PROJECTION, n, m), projection(4, Purpose.PROJECTION, n, m)):
        # Unit columns of independent draws: their products have mean 0 and standard deviation 1/sqrt(m), so that the
        # mean of n of them has 1/sqrt(m n); 4.5 of these is 1 in 100,000.
        cosine = (other * first).sum(0)
        assert float(cosine.abs().mean()) < 2 / m**0.5 and abs(float(cosine.mean())) < 4.5 / (m * n) ** 0.5


def test_models_take_the_projections_of_their_seed_and_purpose() -> None:
    model = Model(spec_of(task="reprojector", seed=8))
    assert torch.equal(model.P, projection(8, Purpose.PROJECTION, 13, 5))
    assert model.P2 is not None and torch.equal(model.P2, projection(8, Purpose.SECOND_PROJECTION, 13, 5))
    assert Model(spec_of(seed=8)).P2 is None and torch.equal(Model(spec_of(seed=8)).P, model.P)


@pytest.mark.parametrize("task", TASKS)
def test_initial_values_are_pytorch_linear_defaults_with_init_bias_added(task: str) -> None:
    spec = ModelSpec(task=task, n_features=96, d_embed=48, n_neurons=80, linear_path=24, init_bias=-1.5, seed=7)
    found = initial_values(spec)
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "W_in": (80, 48),
        "b": (80,),
        "W_outT": (80, spec.d_output),
        "L_in": (24, 48),
        "L_outT": (24, spec.d_output),
    }
    # 1/sqrt(fan_in)
    bounds = {"W_in": 48**-0.5, "b": 48**-0.5, "W_outT": 80**-0.5, "L_in": 48**-0.5, "L_outT": 24**-0.5}
    for name, value in found.items():
        assert value.dtype == FLOAT32
        centred = value.double().flatten().numpy() + (1.5 if name == "b" else 0.0)
        rounding = 2.0**-23 if name == "b" else 0.0  # b is rounded at -1.5
        assert np.abs(centred).max() <= bounds[name] * (1 + 2.0**-24) + rounding
        assert scipy.stats.kstest(centred, scipy.stats.uniform(-bounds[name], 2 * bounds[name]).cdf).pvalue > 1e-4 / 5
    linear = nn.Linear(48, 80)
    assert linear.weight.abs().max() <= bounds["W_in"] and linear.weight.abs().max() > 0.99 * bounds["W_in"]


def test_initial_values_depend_on_the_seed_and_shape_alone() -> None:
    spec = spec_of(seed=7)
    found = initial_values(spec)
    same = initial_values(spec.replace(lr=1.0, l1=0.1, activation="gelu", optimizer="sgd", feature_prob=0.9, steps=3))
    assert all(torch.equal(same[name], value) for name, value in found.items())
    shifted = initial_values(spec.replace(init_bias=-1.0))
    assert torch.equal(shifted["W_in"], found["W_in"]) and torch.equal(shifted["W_outT"], found["W_outT"])
    # added to the draw, in float64, then rounded once: both roundings are below 2**-24
    assert float((shifted["b"].double() + 1 - found["b"].double()).abs().max()) < 2.0**-23
    other = initial_values(spec.replace(seed=8))
    flat, others = (torch.cat([v.flatten() for v in values.values()]) for values in (found, other))
    assert not (flat == others).any() and len(flat.unique()) == len(flat)
    model = Model(spec)
    for name, value in found.items():
        assert torch.equal(model.tensors[name], value)
