"""Linear maps and losses against NumPy's least squares, exact cases, and random alternatives that must be worse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_up_model import ACTIVATIONS, TASKS, one_to_one, random_model, spec_of

from fastmono.interpret import Parts, kinks, linear_part
from fastmono.interpret_linear import (
    FIT_SAMPLES,
    best_linear_map,
    distance_up_to_scale,
    effective_rank,
    feature_moments,
    nearest_projection,
    target_mean,
)
from fastmono.metrics import HeldOut
from fastmono.philox import FeatureSampler
from fastmono.tasks import ACTIVATION, target


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_fit_and_losses_equal_numpy_over_all_samples_at_once(task, activation, rank):
    spec = spec_of(task=task, activation=activation)
    params = random_model(spec, rank)
    parts = Parts(params, spec)
    found, poly = linear_part(parts), parts.split.polysemantic
    p = {name: value.double() for name, value in params.items()}

    def outputs(first, count):
        f = FeatureSampler(spec).evaluation(first, count).double()
        x = f @ p["P"].T
        h = ACTIVATION[activation](x @ p["W_in"].T + p["b"])
        rest = h[:, ~poly] @ p["W_out"][:, ~poly].T + (x @ p["L_in"].T @ p["L_out"].T if rank else 0.0)
        return f, x, h[:, poly] @ p["W_out"][:, poly].T, rest

    _, x, y_p, _ = outputs(8192, FIT_SAMPLES)
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    solution = np.linalg.lstsq(torch.cat((x, ones), 1).numpy(), y_p.numpy(), rcond=None)[0]
    assert found.fit.A.numpy() == pytest.approx(solution[:-1].T, abs=1e-10)
    assert found.fit.constant.numpy() == pytest.approx(solution[-1], abs=1e-10)
    assert found.fit.singular_values.numpy() == pytest.approx(
        np.linalg.svd(solution[:-1].T @ p["P"].numpy(), compute_uv=False), abs=1e-9
    )
    f, x, y_p, rest = outputs(0, 8192)
    tau = target(task, f, p.get("P2"))

    def loss(y):
        return float((y - tau).square().sum(1).mean())

    linear = x @ found.fit.A.T + found.fit.constant
    mean = feature_moments(parts)[0]
    assert found.loss == pytest.approx(loss(rest + y_p), rel=1e-12)
    if not rank:
        assert found.loss == pytest.approx(HeldOut().measure(params, spec)["eval_loss"], rel=1e-5)  # float32 there
    assert found.loss_fit == pytest.approx(loss(rest + linear), rel=1e-12)
    assert found.loss_removed == pytest.approx(loss(rest), rel=1e-12)
    assert found.loss_constant == pytest.approx(loss(rest + found.fit.map @ mean + found.fit.constant), rel=1e-12)
    at_rest = x @ found.tangent.A.T + found.tangent.constant
    assert found.loss_tangent == pytest.approx(loss(rest + at_rest), rel=1e-12)
    spread = (y_p - y_p.mean(0)).square().sum()
    assert found.linear_share == pytest.approx(float(1 - (y_p - linear).square().sum() / spread), rel=1e-9)
    served = (parts.split.per_probe.view(-1, 13) > 0).any(0)
    if served.any():
        read = p["P2"][:, served] if task == "reprojector" else torch.eye(13, dtype=torch.float64)[:, served]
        y, spread = y_p @ read, (y_p @ read - (y_p @ read).mean(0)).square().sum()
        expected = float(1 - (y - linear @ read).square().sum() / spread)
        assert found.linear_share_served == pytest.approx(expected, rel=1e-9)
    else:
        assert found.linear_share_served is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tangent_is_the_derivative_of_the_polysemantic_output_at_rest(activation):
    spec = spec_of(activation=activation)
    params = random_model(spec)
    parts = Parts(params, spec)
    p, poly = {name: value.double() for name, value in params.items()}, parts.split.polysemantic

    def y_p(f):
        return ACTIVATION[activation](p["W_in"] @ (p["P"] @ f) + p["b"])[poly] @ p["W_out"][:, poly].T

    zero = torch.zeros(13, dtype=torch.float64)
    found = linear_part(parts).tangent
    torch.testing.assert_close(found.map, torch.autograd.functional.jacobian(y_p, zero), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.constant, y_p(zero), rtol=1e-10, atol=1e-12)
    assert torch.linalg.matrix_rank(found.map) <= spec.d_embed


def test_neurons_that_are_always_on_are_their_own_linear_map():
    spec = spec_of()
    params = random_model(spec)
    params["b"] = torch.full((16,), 50.0)
    found = linear_part(Parts(params, spec))
    expected = (params["W_out"].double() @ params["W_in"].double()) @ params["P"].double()
    torch.testing.assert_close(found.tangent.map, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.fit.map, expected, rtol=0, atol=1e-8)
    assert found.linear_share == pytest.approx(1, abs=1e-12)
    assert found.loss_fit == pytest.approx(found.loss, rel=1e-9)
    assert found.loss_tangent == pytest.approx(found.loss, rel=1e-9)


def test_model_without_polysemantic_neurons_has_an_empty_linear_part():
    found = linear_part(Parts(*one_to_one(0.25, 1.5)))
    assert not found.fit.map.any() and found.fit.effective_rank == found.tangent.effective_rank == 0.0
    assert found.fit.identity_distance is None and found.fit.target_distance is None and found.linear_share is None
    assert found.loss == found.loss_fit == found.loss_removed == found.loss_constant


def test_effective_rank_counts_equal_singular_values():
    assert effective_rank(torch.tensor([2.0] * 7 + [0.0] * 5, dtype=torch.float64)) == pytest.approx(7)
    p = np.array([0.5, 0.3, 0.2])
    assert effective_rank(torch.from_numpy(10 * p)) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def projections(n, rank, count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        Q = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
        yield Q @ Q.T


def test_scaled_projection_has_no_distance_from_the_identitys_approximations():
    (Pi,) = projections(12, 5, 1)
    assert nearest_projection(0.3 * Pi, 8) == (pytest.approx(0, abs=1e-7), 5, pytest.approx(0.3))
    # A skew part is all distance: |M|^2 = |c Pi|^2 + |skew|^2
    skew = torch.zeros(12, 12, dtype=torch.float64)
    skew[0, 1], skew[1, 0] = 0.4, -0.4
    whole = (0.09 * 5 + 0.32) ** 0.5
    assert nearest_projection(0.3 * Pi + skew, 8)[0] == pytest.approx(0.32**0.5 / whole)
    # Of a larger rank than is allowed: the best has the rank allowed, and misses the other directions.
    assert nearest_projection(0.3 * Pi, 3) == (pytest.approx((2 / 5) ** 0.5), 3, pytest.approx(0.3))


def test_no_projection_of_any_rank_is_nearer_than_the_nearest():
    M = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + torch.eye(6)
    distance, rank, scale = nearest_projection(M, 4)
    _, vectors = torch.linalg.eigh((M + M.T) / 2)
    Pi = vectors[:, -rank:] @ vectors[:, -rank:].T
    assert float((M - scale * Pi).norm() / M.norm()) == pytest.approx(distance, rel=1e-12)
    for other in (1, 2, 3, 4):
        candidates = [*projections(6, other, 500), vectors[:, -other:] @ vectors[:, -other:].T]
        assert all(float((M - (M * Q).sum() / other * Q).norm() / M.norm()) >= distance - 1e-12 for Q in candidates)


@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
@pytest.mark.parametrize("task", ["decoder", "reprojector"])
def test_best_linear_map_fulfils_the_normal_equations_and_depends_on_the_embedding_alone(task, frequency):
    spec = spec_of(task=task, frequency=frequency)
    params = random_model(spec)
    parts = Parts(params, spec)
    T, P, variance = best_linear_map(parts), parts.params["P"], feature_moments(parts)[1]
    R = parts.params["P2"] if task == "reprojector" else torch.eye(13, dtype=torch.float64)
    # E (T f - R f) x^T = 0 with centred f: the errors are uncorrelated with the embedding.
    torch.testing.assert_close(((T - R) * variance) @ P.T, torch.zeros(len(R), 6).double(), rtol=0, atol=1e-14)
    through = torch.linalg.lstsq(P.T, T.T).solution.T @ P
    torch.testing.assert_close(through, T, rtol=0, atol=1e-12)
    if task == "decoder" and frequency == "uniform":
        torch.testing.assert_close(T, torch.linalg.pinv(P) @ P, rtol=0, atol=1e-12)
    noise = torch.randn(T.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert distance_up_to_scale(0.4 * T, T, variance) == (pytest.approx(0, abs=1e-7), pytest.approx(0.4))
    M = 0.4 * T + 0.1 * noise
    distance, scale = distance_up_to_scale(M, T, variance)
    errors = [float((((M - c * T).square()) * variance).sum() / (M.square() * variance).sum()) ** 0.5
              for c in (scale, scale - 0.01, scale + 0.01)]  # fmt: skip
    assert errors[0] == pytest.approx(distance) and min(errors) == errors[0]


@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
@pytest.mark.parametrize("task", TASKS)
def test_moments_are_those_of_the_sampler(task, frequency):
    spec = spec_of(task=task, frequency=frequency, n_features=5, d_embed=3)
    parts = Parts(random_model(spec), spec)
    f = FeatureSampler(spec).evaluation(0, 200_000).double()
    mean, variance = feature_moments(parts)
    off = 5 * (f.std(0) / 200_000**0.5)  # five standard errors
    assert ((f.mean(0) - mean).abs() < off).all()
    assert ((f.var(0) - variance).abs() < 5 * ((f - f.mean(0)).square().std(0) / 200_000**0.5)).all()
    tau = target(task, f, parts.params.get("P2"))
    assert ((tau.mean(0) - target_mean(parts)).abs() < 5 * tau.std(0) / 200_000**0.5).all()


@pytest.mark.parametrize("task", ["decoder", "reprojector"])
def test_model_that_is_the_best_linear_map_has_its_loss_and_no_distance(task):
    spec = spec_of(task=task, n_neurons=6, frequency="power_law")
    params = random_model(spec_of(task=task, frequency="power_law"))
    parts = Parts(params, spec_of(task=task, frequency="power_law"))
    A = torch.linalg.lstsq(parts.params["P"].T, best_linear_map(parts).T).solution.T
    params |= {"W_in": torch.eye(6), "b": torch.full((6,), 50.0), "W_out": A.float()}
    found = linear_part(Parts(params, spec))
    assert found.tangent.target_distance == pytest.approx(0, abs=1e-6)  # A is float32
    assert found.tangent.target_scale == pytest.approx(1, abs=1e-6)
    assert found.loss > found.loss_linear_model  # whose constant is right


def test_abs_has_maps_and_losses_but_no_distances():
    spec = spec_of(task="abs")
    found = linear_part(Parts(random_model(spec), spec))
    assert found.fit.effective_rank > 1 and found.loss_fit > 0
    assert found.fit.identity_distance is found.fit.target_distance is found.tangent.target_distance is None


@pytest.mark.parametrize("task", TASKS)
def test_kinks_are_where_a_finely_sampled_response_bends(task):
    spec = spec_of(task=task)
    params = random_model(spec)
    parts = Parts(params, spec)
    found = kinks(parts)
    h = {}
    for probe in range(parts.n_probes):
        feature, sign = parts.feature_and_sign(probe)
        a = sign * torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
        h[probe] = (a * parts.overlaps[:, feature] + parts.params["b"]).relu() * parts.readout[feature]
    for group, counts, visible in (
        ("monosemantic", found.monosemantic, found.monosemantic_visible),
        ("polysemantic", found.polysemantic, found.polysemantic_visible),
    ):
        for probe, values in h.items():
            slopes = values[:, getattr(parts.split, group)].diff(dim=0) * 4000
            change = (slopes[-1] - slopes[0]).abs()
            assert int(counts[probe]) == int((change > 1e-9).sum())
            assert int(visible[probe]) == int((change >= 0.05).sum())
    assert found.polysemantic.sum() > found.polysemantic_visible.sum() > 0
    with pytest.raises(ValueError, match="activation='solu': is smooth; only relu has kinks"):
        kinks(Parts(params, spec.replace(activation="solu")))
