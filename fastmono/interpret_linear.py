"""The polysemantic neurons, linearised: which linear map they stand for, and what that map is worth.

Their output y_p = W_out,p phi(W_in,p x + b_p) sees the features through x = P f alone. Two linear maps M [o, N] of the
features, both M = A P and so of rank at most m:

    tangent   at rest: A = W_out,p diag(phi'(b_p)) W_in,p. With relu, the neurons that are on without any feature; the
              map that acts at low amplitudes, of a rank that they choose.
    fit       least squares over the model's own distribution: y_p ~ A x + c, on 16,384 samples of the evaluation stream
              beyond those on which losses are measured. Of a model whose neurons are all polysemantic it is nearly the
              best map T below whatever they do, since its output is nearly the conditional mean of the target; it says
              more the more of the work monosemantic neurons do.

**Against the identity** (decoder). A best approximation to the identity of rank r is an orthogonal projection of rank
r (Eckart and Young: all singular values are equal, so each choice of r directions is as good). Up to a scale c the one
nearest to M has the r leading eigenvectors of the symmetric part of M, with eigenvalues l_1 >= l_2 >= ...:

    min over c, projection of |M - c Pi|^2 = |M|^2 - (l_1 + ... + l_r)^2 / r         c = (l_1 + ... + l_r) / r

`identity_distance` is the smallest of these over r <= m, relative to |M| (Frobenius): 0 for a scaled projection, near
1 for a map that has nothing of one.

**Against the best map** (decoder, reprojector). Through this embedding the best linear map for the task, to the
features or for the reprojector to P2 f, is T = R S P^T (P S P^T)^-1 P with R = 1 or P2 and S the variances of the
features; for equal frequencies and the decoder, the projection on the row space of P, of rank m. `target_distance` is
the smallest |(M - c T) S^1/2| / |M S^1/2| over c: outputs' root mean square difference over that of M's.

For abs the target |f| is even in f, the best linear map of an even function of symmetric features is 0, and neither
distance exists (None); the maps, their singular values and the losses do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmono.block import single_thread
from fastmono.frequencies import presence_probabilities
from fastmono.interpret_parts import Parts
from fastmono.metrics import EVALUATION_SAMPLES
from fastmono.philox import FeatureSampler
from fastmono.tasks import DERIVATIVE, target

FIT_SAMPLES, TILE = 2**14, 2**10  # of the fit, in all and at a time
VISIBLE = 0.05
"""The least change of slope, in the output for its own feature, that counts as a kink to be seen (target slope: 1)."""


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the features, against the identity and the best map of the embedding (module docstring).

    Attributes:
        A: float64 [o, m], on embeddings; constant [o], what is added: y_p ~ A x + constant.
        map: M = A P, float64 [o, N].
        singular_values: of M, float64 [min(o, N)], descending.
        effective_rank: exp of the entropy of the singular values over their sum (Roy and Vetterli, 2007); 0 for M = 0.
        identity_distance, identity_rank, identity_scale: of the nearest projection; None but for a decoder, and for 0.
        target_distance, target_scale: of the embedding's best map; None for abs, and for M = 0.
    """

    A: Tensor
    constant: Tensor
    map: Tensor
    singular_values: Tensor
    effective_rank: float
    identity_distance: float | None
    identity_rank: int | None
    identity_scale: float | None
    target_distance: float | None
    target_scale: float | None


@dataclass(frozen=True)
class LinearPart:
    """The polysemantic neurons' linear maps, and losses with the neurons as they are and with other things in their
    place: squared error summed over outputs, mean over the evaluation stream.

    Attributes:
        tangent, fit: the two maps.
        linear_share: share of the variance of y_p that `fit` explains, on samples that it was not fitted on.
        linear_share_served: the same, in the outputs for features with a monosemantic neuron; None without any.
        loss: the model as it is.
        loss_fit, loss_tangent: the map and its constant in the place of the polysemantic neurons.
        loss_constant: their mean output in their place.
        loss_removed: nothing in their place.
        loss_linear_model: a model that is T x and the best constant, and nothing else.
    """

    tangent: LinearMap
    fit: LinearMap
    linear_share: float | None
    linear_share_served: float | None
    loss: float
    loss_fit: float
    loss_tangent: float
    loss_constant: float
    loss_removed: float
    loss_linear_model: float


def effective_rank(singular_values: Tensor) -> float:
    """exp(-sum p log p) of p = s / sum s, for singular values s [n]: n for n equal ones, 0 where all are 0."""
    total = singular_values.sum()
    if not total > 0:
        return 0.0
    p = singular_values / total
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


def feature_moments(parts: Parts) -> tuple[Tensor, Tensor]:
    """Mean and variance of every feature, float64 [N] each, by the definition of the sampler (recipe fact 3)."""
    spec = parts.spec
    share = spec.feature_prob / 2 if spec.task == "abs" else spec.feature_prob
    p = torch.from_numpy(presence_probabilities(spec.n_features, share, spec.frequency))
    mean, variance = p / 2, p / 3 - p * p / 4
    return (torch.zeros_like(p), 2 * variance) if spec.task == "abs" else (mean, variance)


def target_mean(parts: Parts) -> Tensor:
    """E tau, float64 [o]."""
    spec = parts.spec
    if spec.task == "abs":  # one of the two signs is present, or both, and then E|U - V| = 1/3
        p = torch.from_numpy(presence_probabilities(spec.n_features, spec.feature_prob / 2, spec.frequency))
        return p * (1 - p) + p * p / 3
    mean, _ = feature_moments(parts)
    return parts.params["P2"] @ mean if spec.task == "reprojector" else mean


def best_linear_map(parts: Parts) -> Tensor:
    """T [o, N], the best linear map for the task through the embedding (module docstring); 0 for abs."""
    P, (_, variance) = parts.params["P"], feature_moments(parts)
    if parts.spec.task == "abs":
        return torch.zeros(parts.spec.d_output, parts.spec.n_features, dtype=torch.float64)
    through = torch.linalg.solve((P * variance) @ P.T, P)  # [m, N]
    spread = variance[:, None] * P.T  # S P^T [N, m]
    return (parts.params["P2"] @ spread if parts.spec.task == "reprojector" else spread) @ through


def nearest_projection(M: Tensor, largest_rank: int) -> tuple[float, int, float]:
    """Relative distance of M [N, N] to the nearest scaled orthogonal projection, its rank, its scale.

    Raises `ValueError` for a map that is 0 or not square.
    """
    norm = M.square().sum()
    if M.shape[0] != M.shape[1] or not norm > 0:
        raise ValueError(f"a map of shape {list(M.shape)} and norm {float(norm.sqrt()):g}: must be square and not 0")
    eigenvalues = torch.linalg.eigvalsh((M + M.T) / 2).flip(0)[:largest_rank]
    ranks = torch.arange(1, len(eigenvalues) + 1, dtype=M.dtype)
    sums = eigenvalues.cumsum(0).clamp(min=0)  # a negative scale would not be an approximation to the identity
    rank = int((sums.square() / ranks).argmax()) + 1
    scale = float(sums[rank - 1]) / rank
    return math.sqrt(max(0.0, 1 - float(sums[rank - 1].square() / rank / norm))), rank, scale


def distance_up_to_scale(M: Tensor, T: Tensor, variance: Tensor) -> tuple[float, float]:
    """min over c of |(M - c T) S^1/2| / |M S^1/2| for M, T [o, N] and S = diag(variance [N]), and that c."""
    inner = float((M * T * variance).sum())
    norms = float((M.square() * variance).sum()), float((T.square() * variance).sum())
    return math.sqrt(max(0.0, 1 - inner * inner / (norms[0] * norms[1]))), inner / norms[1]


def _linear_map(parts: Parts, A: Tensor, constant: Tensor) -> LinearMap:
    M = A @ parts.params["P"]
    values = torch.linalg.svdvals(M)
    identity: tuple[float | None, int | None, float | None] = (None, None, None)
    apart: tuple[float | None, float | None] = (None, None)
    if parts.spec.task != "abs" and float(values[0]) > 0:
        apart = distance_up_to_scale(M, best_linear_map(parts), feature_moments(parts)[1])
        if parts.spec.task == "decoder":
            identity = nearest_projection(M, parts.spec.d_embed)
    return LinearMap(A, constant, M, values, effective_rank(values), *identity, *apart)


def _tangent(parts: Parts) -> tuple[Tensor, Tensor]:
    """A [o, m] and the constant y_p(0) [o] of the tangent at rest."""
    poly, b = parts.split.polysemantic, parts.params["b"]
    W_out = parts.params["W_out"][:, poly]
    slope = DERIVATIVE[parts.spec.activation](b[poly])
    return (W_out * slope) @ parts.params["W_in"][poly], W_out @ parts.phi(b[poly])


def least_squares(parts: Parts, constant: bool = True) -> tuple[Tensor, Tensor]:
    """The least-squares A [o, m] and constant [o] of y_p on x, on fresh samples; without `constant` that is 0."""
    sampler, P, poly = FeatureSampler(parts.spec), parts.params["P"], parts.split.polysemantic
    W_in, b, W_out = parts.params["W_in"][poly], parts.params["b"][poly], parts.params["W_out"][:, poly]
    m, width = parts.spec.d_embed, parts.spec.d_embed + constant
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(width, parts.spec.d_output, dtype=torch.float64)
    for first in range(EVALUATION_SAMPLES, EVALUATION_SAMPLES + FIT_SAMPLES, TILE):
        x = sampler.evaluation(first, TILE).double() @ P.T
        y = parts.phi(x @ W_in.T + b) @ W_out.T
        if constant:
            x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
        gram += x.T @ x
        cross += x.T @ y
    solution = torch.linalg.lstsq(gram, cross, driver="gelsd").solution  # rare features leave it without full rank
    return solution[:m].T, solution[m:].sum(0)  # no row: 0


class _Share:
    """Share of the variance of samples [n, o] that a prediction of them explains, tile by tile."""

    def __init__(self, width: int) -> None:
        self.rows, self.left, self.square = 0, 0.0, 0.0
        self.total = torch.zeros(width, dtype=torch.float64)

    def add(self, y: Tensor, predicted: Tensor) -> None:
        self.rows += len(y)
        self.left += float((y - predicted).square().sum())
        self.square += float(y.square().sum())
        self.total += y.sum(0)

    def value(self) -> float | None:
        variance = self.square - float(self.total.square().sum()) / self.rows
        return 1 - self.left / variance if variance > 1e-12 * self.square else None


@single_thread()
@torch.no_grad()
def linear_part(parts: Parts) -> LinearPart:
    """Linearise the polysemantic neurons, compare their maps with the identity's (section 5), and measure losses."""
    spec, p, poly = parts.spec, parts.params, parts.split.polysemantic
    tangent, fit = (_linear_map(parts, *found) for found in (_tangent(parts), least_squares(parts)))
    T, mean = best_linear_map(parts), feature_moments(parts)[0]
    best_constant = target_mean(parts) - T @ mean
    average = fit.map @ mean + fit.constant
    served = (parts.split.per_probe.view(-1, spec.n_features) > 0).any(0)
    read = p["P2"][:, served] if spec.task == "reprojector" else None
    share, share_served = _Share(spec.d_output), _Share(int(served.sum()))
    squares = [0.0] * 6
    for tile in parts.held_out.tiles(spec):
        f = tile.double()
        x = f @ p["P"].T
        tau = target(spec.task, f, p.get("P2"))
        h = parts.phi(x @ p["W_in"].T + p["b"])
        y_p, linear = h[:, poly] @ p["W_out"][:, poly].T, x @ fit.A.T + fit.constant
        rest = h[:, ~poly] @ p["W_out"][:, ~poly].T
        if "L_in" in p:
            rest += x @ p["L_in"].T @ p["L_out"].T
        instead = (y_p, linear, x @ tangent.A.T + tangent.constant, average, torch.zeros_like(average))
        for place, y in enumerate((*(rest + y for y in instead), f @ T.T + best_constant)):
            squares[place] += float((y - tau).square().sum()) / EVALUATION_SAMPLES
        share.add(y_p, linear)
        if read is None:
            share_served.add(y_p[:, served], linear[:, served])
        else:
            share_served.add(y_p @ read, linear @ read)
    return LinearPart(tangent, fit, share.value(), share_served.value(), *squares)


@dataclass(frozen=True)
class Kinks:
    """Where the output bends while one feature's amplitude goes from 0 to 1 and no other is present.

    Attributes:
        monosemantic, polysemantic: int64 [n_probes]; neurons whose threshold the amplitude crosses.
        monosemantic_visible, polysemantic_visible: of these, with a change of slope, |r_i . W_out,j (W_in P)_ji|, of
            at least 0.05 in the output for that feature.
    """

    monosemantic: Tensor
    polysemantic: Tensor
    monosemantic_visible: Tensor
    polysemantic_visible: Tensor


def kinks(parts: Parts, visible: float = VISIBLE) -> Kinks:
    """Count the kinks of each probe (section 5). `ValueError` unless the nonlinearity is relu: others are smooth."""
    if parts.spec.activation != "relu":
        raise ValueError(f"activation={parts.spec.activation!r}: is smooth; only relu has kinks")
    slopes = parts.overlaps if parts.spec.task != "abs" else torch.cat((parts.overlaps, -parts.overlaps), 1)
    b = parts.params["b"][:, None]
    bends = (b > 0) != (slopes + b > 0)  # [k, n_probes]
    change = (parts.readout.T * parts.overlaps).abs()  # [k, N]
    seen = bends & (change.repeat(1, slopes.shape[1] // change.shape[1]) >= visible)
    groups = parts.split.monosemantic, parts.split.polysemantic
    return Kinks(*(table[group].sum(0) for table in (bends, seen) for group in groups))
