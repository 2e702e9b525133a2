"""One model between two rounds: what its polysemantic neurons do moves into the linear path, and they begin anew.

    y  =  y_mono + y_poly + L x        L = L_out L_in, x = P f, y_poly = W_out,poly phi(W_in,poly x + b_poly)

**The move.** The path has no constant, so the map that stands for the neurons is the least-squares map through the
origin, and the path of rank r that then comes nearest to what path and neurons gave together is wanted:

    A = argmin E |y_poly - A x|^2        B = argmin over rank r of E |(L + A) x - B x|^2

A is fitted on 16,384 samples of the model's own distribution (`interpret_linear.least_squares`). Nothing is lost by
doing the one before the other: the residual y_poly - A x is orthogonal to every linear map of x. Of the neurons' mean
output, A gives what x gives by its own mean; the rest of a constant has no place in the path, and is lost with what is
not linear. Both are in `left`; what they were worth, the loss after the move shows.

**The truncation.** E |M x|^2 = |M C^1/2|^2 (Frobenius) for the second moments C = E x x^T = P (S + mu mu^T) P^T, mu and
S being the means and variances of the features, which the sampler's definition gives exactly. C^1/2 has full rank, so
(Eckart and Young) B C^1/2 is the truncated singular value decomposition of T C^1/2 with T = L + A. With U_r its r
leading left singular vectors that is U_r U_r^T T C^1/2, and so

    B = U_r U_r^T T

U belongs to T C T^T = (T R)(T R)^T for any R with R R^T = C: R = P [S^1/2, mu] needs no root of a matrix. B is written
as L_out L_in with factors of equal norm, U' s^1/2 and s^1/2 V'^T of B = U' s V'^T.

**The reset.** Polysemantic and dead neurons get fresh initial values (recipe fact 4), those that a model of the round's
spec would begin with, and moments of 0. Dead ones, too: they give nothing, and no gradient would wake them.
Monosemantic neurons keep their weights and their moments, bit by bit. The path has new factors, to which the old
moments do not belong: they become 0. Directions of the path that B does not use begin as L_in does, with L_out at 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmono.block import Model, initial_values, single_thread, views
from fastmono.interpret import Parts
from fastmono.interpret_linear import effective_rank, feature_moments, least_squares
from fastmono.metrics import HeldOut, counts
from fastmono.spec import ModelSpec
from fastmono.store import MOMENTS, contract_tensors

UNUSED = 2.0**-24
"""A singular value of B, relative to the largest, below which float32 has no digit of it."""
NUMBERS = (
    "eval_loss", "mono_per_feature", "mono_per_neuron", "neurons_mono", "neurons_poly", "neurons_dead", "mean_bias",
    "share_mono", "share_poly", "share_path", "path_rank",
)  # fmt: skip
MOVE_NUMBERS = ("map_rank", "left", "moved_loss", "reset_loss")


def parts_of(model: Model, spec: ModelSpec, held_out: HeldOut) -> Parts:
    """A model in training in the terms of `fastmono.interpret`, on the distribution and evaluation stream of `spec`.

    `ValueError` where a parameter is not finite.
    """
    params = contract_tensors(model.spec, model.parameters) | {"P": model.P}
    return Parts(params if model.P2 is None else params | {"P2": model.P2}, spec, held_out=held_out)


def _outputs(parts: Parts) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x [rows, m], and y_mono, y_poly, L x [rows, o], float64, over the evaluation stream."""
    p, split = parts.params, parts.split
    for f in parts.held_out.tiles(parts.spec):
        x = f.double() @ p["P"].T
        h = parts.phi(x @ p["W_in"].T + p["b"])
        mono, poly = (h[:, group] @ p["W_out"][:, group].T for group in (split.monosemantic, split.polysemantic))
        yield x, mono, poly, x @ p["L_in"].T @ p["L_out"].T if "L_in" in p else torch.zeros_like(mono)


@single_thread()
@torch.no_grad()
def state_numbers(parts: Parts) -> dict[str, float]:
    """`NUMBERS` of a model as it is.

    eval_loss, mono_per_feature, mono_per_neuron, mean_bias: as in a run's table. neurons_mono, _poly, _dead: the groups
    of `interpret.split`. share_mono, _poly, _path: E y_g . y / E |y|^2 over the evaluation stream, each part's share of
    the output's power, which add up to 1 (one that works against the others is negative; NaN where y is 0). path_rank:
    the effective rank of L P.
    """
    spec, params, split = parts.spec, parts.weights, parts.split
    powers = torch.zeros(3, dtype=torch.float64)
    for _, *given in _outputs(parts):
        whole = torch.stack(given).sum(0)
        powers += torch.stack([(part * whole).sum() for part in given])
    groups = {"mono": split.monosemantic, "poly": split.polysemantic, "dead": split.dead}
    path = parts.params["L_out"] @ (parts.params["L_in"] @ parts.params["P"]) if "L_in" in params else None
    found = counts(params, spec) | parts.held_out.measure(params, spec)
    found |= {f"neurons_{name}": float(group.sum()) for name, group in groups.items()}
    found |= dict(zip(("share_mono", "share_poly", "share_path"), (powers / powers.sum()).tolist(), strict=True))
    found["path_rank"] = 0.0 if path is None else effective_rank(torch.linalg.svdvals(path))
    return {name: found[name] for name in NUMBERS}


@dataclass(frozen=True)
class Move:
    """The linear path that takes over from the polysemantic neurons (module docstring).

    Attributes:
        A: float64 [o, m], what stands for the neurons.
        L_in, L_out: float64 [r, m] and [o, r], the path: L_out L_in = B.
        left: E |(y_poly + L x) - B x|^2 / E |y_poly|^2 over the evaluation stream: the share of the neurons' power that
            the path does not take over, not being linear, a constant, or beyond the rank; NaN where they give nothing.
    """

    A: Tensor
    L_in: Tensor
    L_out: Tensor
    left: float


def truncated(T: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [r, m] and [o, r] of the map of a rank r nearest to T [o, m] under second moments root root^T.

    Both have the norm sqrt(s) in a direction of singular value s; what is below `UNUSED` is 0. For root [m, n]; all in
    float64.
    """
    if rank < min(T.shape):
        leading = torch.linalg.svd(T @ root, full_matrices=False).U[:, :rank]
        T = leading @ (leading.T @ T)
    U, s, Vh = torch.linalg.svd(T, full_matrices=False)
    scale = torch.where(s > UNUSED * s[0], s, 0.0).sqrt()[:rank]
    return scale[:, None] * Vh[:rank], U[:, :rank] * scale


@single_thread()
@torch.no_grad()
def move(parts: Parts, rank: int) -> Move:
    """Linearise the polysemantic neurons and add their map to the linear path, cut to a rank from 1 to m."""
    p = parts.params
    mean, variance = feature_moments(parts)
    root = torch.cat((p["P"] * variance.sqrt(), (p["P"] @ mean)[:, None]), 1)
    A, _ = least_squares(parts, constant=False)
    before = p["L_out"] @ p["L_in"] if "L_in" in p else torch.zeros_like(A)
    L_in, L_out = truncated(before + A, root, rank)
    change, left, power = L_out @ L_in - before, 0.0, 0.0
    for x, _, poly, _ in _outputs(parts):
        left += float((poly - x @ change.T).square().sum())
        power += float(poly.square().sum())
    return Move(A, L_in, L_out, left / power if power else float("nan"))


@single_thread()
@torch.no_grad()
def begin_round(model: Model, parts: Parts, into: ModelSpec) -> tuple[Model, dict[str, float]]:
    """A trained model as the next round begins with it, and `MOVE_NUMBERS`. The model itself stays as it is.

    map_rank: the effective rank of A P. left: of `Move`. moved_loss, reset_loss: eval_loss with the path in the place
    of polysemantic and dead neurons, and then with the fresh neurons beside it.

    Args:
        parts: the model, of `parts_of`.
        into: the round's spec: of the same shape, with the rank that the path is to have (1 or more), and the seed that
            fresh values are drawn from.
    """
    moved, kept = move(parts, into.linear_path), parts.split.monosemantic
    start, fresh = Model(into, projections=(model.P, model.P2)), initial_values(into)
    for part in ("parameters", *(MOMENTS if len(model.first_moment) else ())):
        new, old = views(into, getattr(start, part)), views(model.spec, getattr(model, part))
        for name in ("W_in", "b", "W_outT"):
            new[name][kept] = old[name][kept]
    L_in = moved.L_in.float()
    unused = (L_in == 0).all(1)
    start.tensors["L_in"].copy_(torch.where(unused[:, None], fresh["L_in"], L_in))
    start.tensors["L_outT"].copy_(moved.L_out.T)

    def loss() -> float:
        params = {**parts.weights, **contract_tensors(into, start.parameters)}
        return parts.held_out.measure(params, parts.spec)["eval_loss"]

    without = loss()
    for name in ("W_in", "b", "W_outT"):
        start.tensors[name][~kept] = fresh[name][~kept]
    start.snapshot.copy_(start.parameters)
    map_rank = effective_rank(torch.linalg.svdvals(moved.A @ parts.params["P"]))
    return start, dict(zip(MOVE_NUMBERS, (map_rank, moved.left, without, loss()), strict=True))
