"""One neuron and two, against closed forms without interference, SciPy's optimizers, and SciPy's rank statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up_model import TASKS, one_to_one, random_model, spec_of
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu

from fastmono.interpret import Parts, auc, best_setting, pair, roc, single_neuron
from fastmono.philox import FeatureSampler
from fastmono.tasks import target

T, G, PROB = 0.25, 1.5, 0.1


def loss(u, v, w, t, gain):
    return float((w * (gain * np.maximum(u - t, 0) - v) ** 2).sum() / w.sum())


def test_one_neuron_without_interference_is_its_closed_form():
    params, spec = one_to_one(T, G, PROB)
    found = single_neuron(Parts(params, spec), 4)
    assert (found.probe, found.neuron, found.interference) == (4, 4, 0.0)
    assert (found.measured.threshold, found.measured.gain) == pytest.approx((T, G), abs=1e-12)
    # Amplitudes are 4,096 multiples of the golden ratio: discrepancy below (1 + log(4096) / log(phi)) / 4096 = 0.005
    off = 0.005
    expected = PROB * quad(lambda a: (G * max(a - T, 0) - a) ** 2, 0, 1, points=[T])[0]
    assert found.measured.loss == pytest.approx(expected, abs=PROB * off)
    assert found.nothing == pytest.approx(PROB / 3, abs=PROB * off)
    # Nothing to balance: the threshold that passes every amplitude, and a gain of 1.
    assert (found.optimal.threshold, found.optimal.gain, found.optimal.loss) == pytest.approx((0, 1, 0), abs=1e-6)
    assert found.optimal_beside == found.optimal and found.measured_beside == found.measured
    assert found.auc == pytest.approx((1 - T) + T / 2, abs=off)  # amplitudes below t tie with absence
    assert found.auc_linear == 1.0


@pytest.mark.parametrize("kind", ["plain", "far below", "few", "falls", "always on"])
def test_best_setting_is_what_scipy_finds_from_many_starts(kind):
    rng = np.random.default_rng(5)
    n = 4 if kind == "few" else 400
    v = np.linspace(0, 1, n) if kind == "few" else np.where(rng.random(n) < 0.3, rng.random(n), 0.0)
    u, w = v + 0.3 * rng.standard_normal(n), 0.5 + rng.random(n)
    if kind == "far below":
        u = u - 7
    if kind == "falls":
        v = -(u - 0.3).clip(0)
    if kind == "always on":
        v = 2 * u + 20
    found = best_setting(*(torch.from_numpy(x) for x in (u, v, w)))
    assert found.loss == pytest.approx(loss(u, v, w, found.threshold, found.gain), rel=1e-10, abs=1e-12)
    starts = [(t, g) for t in np.quantile(u, np.linspace(0, 0.95, 12)) for g in (0.3, 1.0, 2.0)]
    runs = [minimize(lambda s: loss(u, v, w, *s), s, method="Nelder-Mead",
                     options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}) for s in starts]  # fmt: skip
    best = min(runs, key=lambda r: r.fun)
    assert found.loss <= best.fun + 1e-9 * (1 + best.fun)
    if kind in ("plain", "far below"):
        assert (found.threshold, found.gain) == pytest.approx(tuple(best.x), abs=1e-3)
        r, active = np.maximum(u - found.threshold, 0), u > found.threshold
        error = found.gain * r - v
        # Both conditions of the module's docstring
        assert (w * error * r).sum() == pytest.approx(0, abs=1e-8)
        assert (w * error)[active].sum() == pytest.approx(0, abs=1e-8)
    if kind == "falls":
        assert (found.threshold, found.gain) == pytest.approx((0.3, -1))
    nothing = best_setting(torch.from_numpy(u), torch.zeros(n, dtype=torch.float64), torch.from_numpy(w))
    assert (nothing.gain, nothing.loss) == (0, 0)


def everything(params, spec, probe):
    """Amplitudes, weights, features [2 S, N] and pre-activations [2 S, k] of a probe, anew in NumPy."""
    feature, sign = probe % spec.n_features, 1 if probe < spec.n_features else -1
    p = {name: value.double().numpy() for name, value in params.items()}
    absent = FeatureSampler(spec).evaluation(0, 4096).double().numpy()
    absent[:, feature] = 0.0
    present, a = absent.copy(), (np.arange(4096) + 0.5) * (np.sqrt(5) - 1) / 2 % 1
    present[:, feature] = sign * a
    f = np.concatenate((absent, present))
    share = spec.feature_prob / (2 if spec.task == "abs" else 1)
    weights = np.repeat([1 - share, share], 4096)
    return p, np.concatenate((0 * a, a)), weights, f, f @ p["P"].T @ p["W_in"].T + p["b"]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("task", TASKS)
def test_measured_neuron_equals_numpy_on_every_sample(task, rank):
    spec = spec_of(task=task)
    params = random_model(spec, rank)
    found = single_neuron(Parts(params, spec), 1)
    p, a, w, f, z = everything(params, spec, 1)
    read = p["P2"][:, 1] if task == "reprojector" else np.eye(13)[1]
    own = np.maximum(z[:, 1], 0) * (read @ p["W_out"][:, 1])
    y = np.maximum(z, 0) @ p["W_out"].T @ read
    if rank:
        y = y + f @ p["P"].T @ p["L_in"].T @ p["L_out"].T @ read
    tau = target(task, torch.from_numpy(f), torch.from_numpy(p["P2"]) if task == "reprojector" else None).numpy() @ read
    assert found.measured.loss == pytest.approx((w * (own - a) ** 2).sum() / w.sum(), rel=1e-10)
    assert found.measured_beside.loss == pytest.approx((w * (y - tau) ** 2).sum() / w.sum(), rel=1e-10)
    assert found.optimal.loss <= found.measured.loss and found.optimal_beside.loss <= found.measured_beside.loss
    g = p["W_in"][1] @ p["P"][:, 1]
    assert found.measured.threshold == pytest.approx(-p["b"][1] / g, rel=1e-12)
    u = a + (z[:, 1] - p["b"][1]) / g - a
    assert found.interference == pytest.approx(u[:4096].std(ddof=1), rel=1e-10)
    statistic = mannwhitneyu(own[4096:], own[:4096]).statistic
    assert found.auc == pytest.approx(statistic / 4096**2, abs=1e-12)
    assert found.auc_linear > found.auc > 0.5


def test_negative_values_of_abs_have_their_own_neuron():
    params, spec = one_to_one(T, G, PROB)
    params["W_in"] = -params["W_in"]
    found = single_neuron(Parts(params, spec.replace(task="abs")), 6 + 2)
    assert found.neuron == 2 and (found.measured.threshold, found.measured.gain) == pytest.approx((T, G), abs=1e-12)
    assert (found.optimal.threshold, found.optimal.gain) == pytest.approx((0, 1), abs=1e-6)


def two_neurons(gains, thresholds):
    """Six features with one neuron each, and a second one for feature 0 (the last)."""
    params, spec = one_to_one(thresholds[0], gains[0], PROB)
    extra = torch.zeros(1, 6)
    extra[0, 0] = 1.0
    params["W_in"] = torch.cat((params["W_in"], extra))
    params["b"] = torch.cat((params["b"], torch.tensor([-thresholds[1]])))
    params["W_out"] = torch.cat((params["W_out"], gains[1] * extra.T), 1)
    return params, spec.replace(n_neurons=7)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pair_without_interference_is_its_closed_form_in_order_of_thresholds(order):
    gains, thresholds = [(4.0, -3.0)[i] for i in order], [(0.25, 0.5)[i] for i in order]
    found = pair(Parts(*two_neurons(gains, thresholds)), 0)
    assert found.neurons == ((0, 6) if order == (0, 1) else (6, 0))
    assert found.thresholds == pytest.approx((0.25, 0.5), abs=1e-12)
    assert found.slopes == pytest.approx((4.0, 1.0), abs=1e-12) and found.cosine == pytest.approx(1.0)
    expected = PROB * quad(lambda a: (4 * max(a - 0.25, 0) - 3 * max(a - 0.5, 0) - a) ** 2, 0, 1, points=[0.25, 0.5])[0]
    assert found.loss == pytest.approx(expected, abs=PROB * 0.005)
    assert found.loss_best_single == pytest.approx(0, abs=1e-6)
    # The sum rises wherever the first neuron is on: it ties with absence below 0.25 only, as that neuron does.
    assert found.auc == pytest.approx(1 - 0.25 / 2, abs=0.005) and found.auc_linear == 1.0
    assert found.auc_single == found.auc
    assert found.at_kinks.tolist() == [[0.0, pytest.approx(0.75, abs=0.005)], [0.0, pytest.approx(0.5, abs=0.005)]]


def test_pair_under_interference_equals_scipy_ranks_of_its_output():
    spec = spec_of()
    params = random_model(spec)
    found = pair(Parts(params, spec), 2)
    p, a, w, f, z = everything(params, spec, 2)
    terms = np.maximum(z[:, 2:4], 0) * p["W_out"][2, 2:4]
    ranks = [mannwhitneyu(s[4096:], s[:4096]).statistic / 4096**2 for s in (terms.sum(1), *terms.T)]
    assert found.auc == pytest.approx(ranks[0], abs=1e-12)
    assert found.auc_single == pytest.approx(max(ranks[1:]), abs=1e-12)
    assert found.loss == pytest.approx((w * (terms.sum(1) - a) ** 2).sum() / w.sum(), rel=1e-10)
    left = f[:, 2] - np.maximum(z, 0) @ p["W_out"][2]
    assert found.loss_beside == pytest.approx((w * left**2).sum() / w.sum(), rel=1e-10)
    g = p["W_in"][2:4] @ p["P"][:, 2]
    u = (z[:, 2:4] - p["b"][2:4]) / g
    ours = [best_setting(*(torch.from_numpy(x) for x in (one, left + terms.sum(1), w))).loss for one in u.T]
    assert found.loss_best_single_beside == pytest.approx(min(ours), rel=1e-9)
    within = np.cov(u[:4096].T) + np.cov(u[4096:].T)
    score = u @ np.linalg.solve(within, u[4096:].mean(0) - u[:4096].mean(0))
    ranks = [mannwhitneyu(s[4096:], s[:4096]).statistic / 4096**2 for s in (score, *u.T)]
    assert found.auc_linear == pytest.approx(ranks[0], abs=1e-6)  # float64, but for the order of near ties
    assert found.auc_linear_single == pytest.approx(max(ranks[1:]), abs=1e-6)
    for curve, area in ((found.roc, found.auc), (found.roc_single, found.auc_single)):
        assert (curve.diff(dim=1) >= 0).all() and curve[:, 0].tolist() == [0, 0] and curve[:, -1].tolist() == [1, 1]
        assert float(torch.trapezoid(curve[1], curve[0])) == pytest.approx(area, abs=1e-12)


def test_auc_is_scipys_mann_whitney_with_ties_and_the_area_under_roc():
    rng = np.random.default_rng(1)
    present, absent = rng.integers(2, 9, 300) / 4, rng.integers(0, 7, 500) / 4
    found = auc(torch.from_numpy(present), torch.from_numpy(absent))
    assert found == pytest.approx(mannwhitneyu(present, absent).statistic / 150_000, abs=1e-14)
    curve = roc(torch.from_numpy(present), torch.from_numpy(absent))
    assert float(torch.trapezoid(curve[1], curve[0])) == pytest.approx(found, abs=1e-14)


def test_notions_that_do_not_apply_are_refused_in_one_line():
    params, spec = one_to_one(T, G)
    parts = Parts(params, spec)
    with pytest.raises(ValueError, match="probe=0: has 1 monosemantic neurons, not 2"):
        pair(parts, 0)
    with pytest.raises(ValueError, match="activation='gelu': a threshold is a kink, and only relu has one"):
        single_neuron(Parts(params, spec.replace(activation="gelu")), 0)
    # On by themselves, and off for every feature but one, which lowers them least: monosemantic by the ratio.
    W_in = torch.full((6, 6), -2.0)
    W_in[:, 0] = -0.5
    inhibited = Parts({**params, "W_in": W_in, "b": torch.ones(6)}, spec)
    assert inhibited.split.per_probe[0] == 6 and not inhibited.rises(0)
    with pytest.raises(ValueError, match="has 6 monosemantic"):
        single_neuron(inhibited, 0)
    W_in[1:] = 0.0
    with pytest.raises(ValueError, match="on without any feature, and this one lowers it"):
        single_neuron(Parts({**params, "W_in": W_in, "b": torch.tensor([1.0, 0, 0, 0, 0, 0])}, spec), 0)
