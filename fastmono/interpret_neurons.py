"""What one monosemantic neuron of a feature computes, and what two do, against the best that they could.

**One neuron.** Neuron j serves feature i (value f, probe sign s). With overlap g = s W_in,j . P e_i > 0 and the sum
over the other features n = (1/g) sum_l (W_in P)_jl f_l, its interference in units of the feature,

    r_i . W_out,j h_j = G relu(a + n - t)        a = s f,   threshold t = -b_j / g,   gain G = g r_i . W_out,j

It recovers a feature that is present (a > t - n) and mistakes interference for one (n > t while a = 0). The best
threshold and gain minimise

    L(t, G) = E (G relu(u - t) - v)^2            u = a + n

over presence, amplitude and interference, with v = a: the neuron alone makes the output for its feature. Where v is
what the rest of the model leaves to do, v = r_i . (tau - y + W_out,j h_j), it is the best *beside the others*.

**The optimum.** For a given t, G = E[v r] / E[r^2] with r = relu(u - t), and L = E v^2 - E[v r]^2 / E[r^2]. On samples
with weights w, sorted by u, the active ones are u > t; with sums over these A = wuv, B = wv, C = wu^2, D = wu, W = w,

    E[v r] = A - t B,   E[r^2] = C - 2 t D + t^2 W,   and  dL/dt = 0  at  t = (B C - A D) / (B D - A W),

one point for each set of active samples: so the best t is one of these, or a u. Both conditions in words: the neuron's
errors are zero on average while it is active (dL/dt), and uncorrelated with its activation (dL/dG).

**Assumptions.** The direction W_in,j is the model's own, so the interference is that measured, on 4,096 samples of the
evaluation stream; only the output for its own feature counts, not what it writes to others; the amplitude of a feature
that is present is uniform on (0, 1). For abs a = max(s f, 0): the two signs are present with probability p each, and
that both are at once (p^2) is neglected. relu only: other nonlinearities have no threshold.

**Two neurons.** Each has its interference, threshold (kink) and gain. Between the kinks the slope of their sum is the
first one's gain, beyond both it is the sum: a steep rise between (is it real?) and a slope near 1 beyond (how strong?)
is what the paper describes. A neuron of negative gain recovers nothing by itself: it corrects what others give, often
as the second of a pair whose first is active for some other feature, too.

The score that tells a feature that is present from one that is not is what the neurons write to its output, the sum of
G relu(a + n - t): all that the output gets to know; for one neuron alone its own term.
Scores tie where the neurons are off (ties count half), which is the threshold's doing; so `auc_linear`, before the
threshold, is given too: of a + n, what a linear probe in that neuron's direction would reach; for two of their a + n in
Fisher's combination S^-1 (mean if present - mean if absent), S the mean of the two covariances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmono.block import single_thread
from fastmono.frequencies import presence_probabilities
from fastmono.interpret_parts import INTERFERENCE_SAMPLES, Parts

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Setting:
    """A threshold t and a gain G, and the expected loss L(t, G) with them."""

    threshold: float
    gain: float
    loss: float


@dataclass(frozen=True)
class SingleNeuron:
    """The one monosemantic neuron of a probe.

    Attributes:
        probe, neuron: which.
        interference: standard deviation of n, in units of the feature.
        nothing: the loss without the neuron, E a^2.
        measured, optimal: the model's setting and the best one, the neuron alone making the output (v = a).
        measured_beside, optimal_beside: the same for what the rest of the model leaves to do.
        auc: P(score of a present feature > score of an absent one), ties half, for G relu(a + n - t).
        auc_linear: the same for a + n.
    """

    probe: int
    neuron: int
    interference: float
    nothing: float
    measured: Setting
    optimal: Setting
    measured_beside: Setting
    optimal_beside: Setting
    auc: float
    auc_linear: float


@dataclass(frozen=True)
class Pair:
    """The two monosemantic neurons of a probe, the one with the lower threshold first.

    Attributes:
        probe, neurons: which.
        thresholds: where their kinks lie, t, in amplitude.
        slopes: of their sum for the feature alone, between the kinks and beyond both (target: 1).
        cosine: of their input directions; 1 when both see the same interference.
        loss, loss_best_single: of the pair alone, and of the better of the two at its best setting.
        loss_beside, loss_best_single_beside: the same for what the rest of the model leaves to do.
        auc, auc_single: of the pair's output, and of the better of the two outputs (of -h where the gain is negative).
        auc_linear, auc_linear_single: of Fisher's combination of the two a + n, and of the better a + n.
        roc, roc_single: false and true positive rates, each float64 [2, n], of the pair and of the better one.
        at_kinks: false and true positive rate of "a + n > t" of each, float64 [2 neurons, 2].
    """

    probe: int
    neurons: tuple[int, int]
    thresholds: tuple[float, float]
    slopes: tuple[float, float]
    cosine: float
    loss: float
    loss_best_single: float
    loss_beside: float
    loss_best_single_beside: float
    auc: float
    auc_single: float
    auc_linear: float
    auc_linear_single: float
    roc: Tensor
    roc_single: Tensor
    at_kinks: Tensor


def best_setting(u: Tensor, v: Tensor, weights: Tensor) -> Setting:
    """The t and G that minimise sum w (G relu(u - t) - v)^2 / sum w, exactly (module docstring).

    A constant, which G relu(u - t) approaches as t falls and G t stays, is no setting.

    Args:
        u, v, weights: float64 [n], weights above 0.
    """
    u, order = u.sort()
    v, w = v[order], weights[order] / weights.sum()
    # Sums over the samples from each one on: the sets that a threshold just below it leaves active.
    A, B, C, D, W = ((w * x).flip(0).cumsum(0).flip(0) for x in (u * v, v, u * u, u, torch.ones_like(u)))
    inside = (B * C - A * D) / (B * D - A * W)
    below = torch.cat((u.new_tensor([-math.inf]), u[:-1]))
    inside = torch.where((inside >= below) & (inside <= u), inside, u)  # also where it is not a number
    candidates = torch.stack((torch.where(below.isfinite(), below, u), inside))
    recovered, power = A - candidates * B, C - 2 * candidates * D + candidates.square() * W
    # Beyond the last few samples both are sums of rounding errors.
    useful = power > 1e-12 * C[0]
    explained = torch.where(useful, recovered.square() / power, 0.0)
    best = int(explained.argmax())
    total = float((w * v * v).sum())
    if not explained.flatten()[best] > 0:
        return Setting(float(u[-1]), 0.0, total)  # a neuron that is never active
    t, gain = float(candidates.flatten()[best]), float((recovered / power).flatten()[best])
    return Setting(t, gain, _loss(u, v, w, t, gain))


def _loss(u: Tensor, v: Tensor, weights: Tensor, t: float, gain: float) -> float:
    return float((weights * (gain * (u - t).relu() - v).square()).sum() / weights.sum())


def auc(present: Tensor, absent: Tensor) -> float:
    """P(a score of `present` > one of `absent`) + P(they are equal) / 2: the area under the ROC curve, by ranks."""
    ordered = absent.sort().values
    lower, upper = torch.searchsorted(ordered, present), torch.searchsorted(ordered, present, right=True)
    return float((lower + upper).double().mean()) / (2 * len(ordered))


def roc(present: Tensor, absent: Tensor) -> Tensor:
    """False and true positive rates [2, n] of "score >= c" for every c that occurs, from (0, 0) to (1, 1)."""
    cuts = torch.cat((present, absent)).unique(sorted=True)  # [n - 1], ascending
    rates = [1 - torch.searchsorted(x.sort().values, cuts).double() / len(x) for x in (absent, present)]
    return torch.cat((torch.zeros(2, 1, dtype=torch.float64), torch.stack(rates).flip(1)), 1)


@dataclass(frozen=True)
class _Samples:
    """The interference samples with a probe's feature absent, then the same with it present, [2 S]."""

    feature: int
    sign: float
    a: Tensor  # amplitudes
    weights: Tensor


def _samples(parts: Parts, probe: int) -> _Samples:
    feature, sign = parts.feature_and_sign(probe)
    spec = parts.spec
    share = spec.feature_prob / 2 if spec.task == "abs" else spec.feature_prob
    p = float(presence_probabilities(spec.n_features, share, spec.frequency)[feature])
    # Multiples of the golden ratio: the amplitudes are spread evenly, and independent of the interference.
    amplitude = (torch.arange(INTERFERENCE_SAMPLES, dtype=torch.float64) + 0.5) * GOLDEN % 1
    a = torch.cat((torch.zeros_like(amplitude), amplitude))
    weights = torch.cat((torch.full_like(amplitude, 1 - p), torch.full_like(amplitude, p)))
    return _Samples(feature, sign, a, weights)


def _linear(parts: Parts, x: _Samples, row: Tensor) -> Tensor:
    """row . f [2 S] for row [N]."""
    others = parts.others @ row - parts.others[:, x.feature] * row[x.feature]
    return others.repeat(2) + x.sign * x.a * row[x.feature]


def _checked(parts: Parts, probe: int, count: int) -> list[int]:
    if parts.spec.activation != "relu":
        raise ValueError(f"activation={parts.spec.activation!r}: a threshold is a kink, and only relu has one")
    rises, neurons = parts.rises(probe), parts.split.neurons_of(probe)
    if len(neurons) != count:
        raise ValueError(f"probe={probe}: has {len(neurons)} monosemantic neurons, not {count}")
    if not rises:
        raise ValueError(f"probe={probe}: a neuron of it is on without any feature, and this one lowers it")
    return neurons


def _terms(parts: Parts, x: _Samples, neuron: int) -> tuple[Tensor, float, float]:
    """u = a + n [2 S], the threshold and the gain of a neuron."""
    g = x.sign * float(parts.overlaps[neuron, x.feature])
    u = _linear(parts, x, parts.overlaps[neuron]) / g
    return u, -float(parts.params["b"][neuron]) / g, g * float(parts.readout[x.feature, neuron])


def _left(parts: Parts, x: _Samples) -> Tensor:
    """r_i . (tau - y) [2 S]: what the whole model leaves to do for the feature."""
    wanted = x.a
    if parts.spec.task == "reprojector":
        P2 = parts.params["P2"]
        wanted = _linear(parts, x, P2[:, x.feature] @ P2)
    given = [
        parts.z_with(x.feature, x.sign * half[:, None]).relu_() @ parts.readout[x.feature] for half in x.a.chunk(2)
    ]
    left = wanted - torch.cat(given)
    return left if parts.path is None else left - _linear(parts, x, parts.path[x.feature])


@single_thread()
@torch.no_grad()
def single_neuron(parts: Parts, probe: int) -> SingleNeuron:
    """A probe's one neuron: its threshold and gain against the best ones for its interference (module docstring).

    Raises:
        ValueError: the nonlinearity is not relu, or the probe does not have exactly one monosemantic neuron.
    """
    (neuron,) = _checked(parts, probe, 1)
    x = _samples(parts, probe)
    u, t, gain = _terms(parts, x, neuron)
    own = gain * (u - t).relu()
    half = len(u) // 2

    def settings(v: Tensor) -> tuple[Setting, Setting]:
        return Setting(t, gain, _loss(u, v, x.weights, t, gain)), best_setting(u, v, x.weights)

    return SingleNeuron(
        probe,
        neuron,
        float(u[:half].std()),
        float((x.weights * x.a.square()).sum() / x.weights.sum()),
        *settings(x.a),
        *settings(_left(parts, x) + own),
        auc(own[half:], own[:half]),
        auc(u[half:], u[:half]),
    )


@single_thread()
@torch.no_grad()
def loss_against_threshold(parts: Parts, probe: int, thresholds: Tensor) -> Tensor:
    """The neuron alone (v = a): its loss [n] at each threshold [n], with the best gain for it.

    Raises as `single_neuron` does.
    """
    (neuron,) = _checked(parts, probe, 1)
    x = _samples(parts, probe)
    u, _, _ = _terms(parts, x, neuron)
    losses = []
    for t in thresholds.tolist():
        r = (u - t).relu()
        recovered, power = (x.weights * x.a * r).sum(), (x.weights * r * r).sum()
        losses.append(_loss(u, x.a, x.weights, t, float(recovered / power) if power > 0 else 0.0))
    return torch.tensor(losses, dtype=torch.float64)


@single_thread()
@torch.no_grad()
def pair(parts: Parts, probe: int) -> Pair:
    """A probe's two neurons: kinks, slopes, and how well they tell a present feature from interference.

    Raises:
        ValueError: the nonlinearity is not relu, or the probe does not have exactly two monosemantic neurons.
    """
    neurons = _checked(parts, probe, 2)
    x = _samples(parts, probe)
    ordered = sorted(neurons, key=lambda j: _terms(parts, x, j)[1])
    terms = [_terms(parts, x, j) for j in ordered]
    outputs = [gain * (u - t).relu() for u, t, gain in terms]
    both, half = outputs[0] + outputs[1], len(x.a) // 2
    left = _left(parts, x) + both
    # A neuron of negative gain tells a feature by being active, all the same.
    scores = [o * math.copysign(1, gain) for o, (_, _, gain) in zip(outputs, terms, strict=True)]
    better = max(scores, key=lambda s: auc(s[half:], s[:half]))
    u = torch.stack([u for u, _, _ in terms])  # [2, 2 S]
    within = (u[:, :half].cov() + u[:, half:].cov()) / 2
    # Where the two are parallel S is singular, and any combination of them is as good.
    combined = torch.linalg.pinv(within, hermitian=True) @ (u[:, half:].mean(1) - u[:, :half].mean(1)) @ u
    weight = x.weights / x.weights.sum()
    rows = parts.params["W_in"][ordered]
    at_kinks = [[float((u[part] > t).double().mean()) for part in (slice(half), slice(half, None))]
                for u, t, _ in terms]  # fmt: skip
    return Pair(
        probe,
        (ordered[0], ordered[1]),
        (terms[0][1], terms[1][1]),
        (terms[0][2], terms[0][2] + terms[1][2]),
        float(torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)),
        float((weight * (both - x.a).square()).sum()),
        min(best_setting(u, x.a, x.weights).loss for u, _, _ in terms),
        float((weight * (both - left).square()).sum()),
        min(best_setting(u, left, x.weights).loss for u, _, _ in terms),
        auc(both[half:], both[:half]),
        auc(better[half:], better[:half]),
        auc(combined[half:], combined[:half]),
        max(auc(u[half:], u[:half]) for u, _, _ in terms),
        roc(both[half:], both[:half]),
        roc(better[half:], better[:half]),
        torch.tensor(at_kinks, dtype=torch.float64),
    )
