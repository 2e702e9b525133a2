"""Gradients by dense products, PyTorch's, for nonlinearities without zeros: row tiles that stay in cache.

A narrow layer does without its outputs. With G = W_out^T W_out, S = sum of h h^T over samples and C = tau^T h,

    dh = h G - tau W_out          dW_out^T = S W_out^T - C^T          |e|^2 = h (dh - tau W_out) + |tau|^2

in units of 2/B: products of k x k instead of k x N, and tau W_out and C come from the present features alone. Where
k <= N / 2 the terms that cancel are at most a few times what is left, as its output cannot come close to all targets.

A linear path of rank r is r further rows of W_in and W_out^T: z, h and dh below have k + r columns, of which the last r
have neither bias, nonlinearity nor penalty.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastmono.block import Model, padded
from fastmono.engines import cpu_kernels as kernels
from fastmono.engines.cpu_problem import Problem
from fastmono.engines.cpu_update import update
from fastmono.spec import ModelSpec
from fastmono.tasks import ACTIVATION, DERIVATIVE

if TYPE_CHECKING:
    from fastmono.engines.cpu import Workspace

TILE_NUMBERS = 2**17
"""Activations a row tile holds at most: h and dh then take 1 MiB together."""


def tile_rows(spec: ModelSpec) -> int:
    """Rows worked on at a time: a function of the model's shape alone, since it orders the sums."""
    return min(spec.batch_size, max(32, TILE_NUMBERS // max(spec.n_neurons + spec.linear_path, spec.d_output)))


class Views:
    """Parameters, gradients and buffers of a model as matrices, in padded rows."""

    def __init__(self, model: Model, work: Workspace) -> None:
        spec = model.spec
        M, self.O, self.k = padded(spec.d_embed), padded(spec.d_output), spec.n_neurons
        rows, at_b, at_out = spec.n_neurons + spec.linear_path, work.fields["at_b"], work.fields["at_out"]
        self.W_in, self.b = model.parameters[:at_b].view(rows, M), model.tensors["b"]
        if spec.linear_path:
            self.b = torch.nn.functional.pad(self.b, (0, spec.linear_path))
        self.W_outT = model.parameters[at_out:].view(rows, self.O)
        self.dW_in, self.db = work.gradient[:at_b].view(rows, M), work.gradient[at_b : at_b + self.k]
        self.dW_outT = work.gradient[at_out:].view(rows, self.O)
        self.x = work.buffers["X"].view(-1, M)
        self.z, self.dh = (work.buffers[name].view(-1, work.fields["K"])[:, :rows] for name in ("Z", "DZ"))

    def activations(self, spec: ModelSpec, z: Tensor) -> Tensor:
        """h, the shape of z [rows, k + r]."""
        h = ACTIVATION[spec.activation](z[:, : self.k])
        return torch.cat((h, z[:, self.k :]), 1) if spec.linear_path else h

    def add_inner(self, spec: ModelSpec, h: Tensor, z: Tensor, dh: Tensor, x: Tensor, earlier: float) -> None:
        """dW_in [k + r, M] and db [k] of a tile from its dh [rows, k + r], which becomes dz; h, z as dh, x [rows, M].

        `earlier` 1 adds to what is there; 0 does not even read it, as a diverged model may have left NaN.
        """
        dz = dh[:, : self.k]
        if spec.l1:
            dz.add_(h[:, : self.k].sign(), alpha=spec.l1 / 2)
        dz.mul_(DERIVATIVE[spec.activation](z[:, : self.k]))
        torch.addmm(self.dW_in, dh.T, x, beta=earlier, out=self.dW_in)
        torch.addmv(self.db, dz.T, torch.ones(len(x), dtype=torch.float32, device="cpu"), beta=earlier, out=self.db)


def dense_gradients(model: Model, work: Workspace, problem: Problem, step: int) -> float:
    """Fill `work.gradient` from a step's batch, in units of 2/B, and return the logged loss."""
    spec, v = model.spec, Views(model, work)
    outputs = work.buffers["E"].view(-1, v.O)
    kernels.embed(problem, step, problem.X, problem.E)
    loss, rows = 0.0, tile_rows(spec)
    for start in range(0, spec.batch_size, rows):
        x, e = v.x[start : start + rows], outputs[start : start + rows]
        z, dh = v.z[: len(x)], v.dh[: len(x)]
        earlier = 0.0 if start == 0 else 1.0
        torch.addmm(v.b, x, v.W_in.T, out=z)
        h = v.activations(spec, z)
        torch.addmm(e, h, v.W_outT, out=e)
        loss += float(torch.dot(e.view(-1), e.view(-1)))
        torch.addmm(v.dW_outT, h.T, e, beta=earlier, out=v.dW_outT)
        torch.mm(e, v.W_outT.T, out=dh)
        v.add_inner(spec, h, z, dh, x, earlier)
    return loss / spec.batch_size


def narrow_gradients(model: Model, work: Workspace, problem: Problem, step: int) -> float:
    """The same by Gram matrices, for decoder and abs."""
    spec, v = model.spec, Views(model, work)
    N, k, K = spec.n_features, spec.n_neurons + spec.linear_path, work.fields["K"]
    W_out, targets = work.buffers["G_T"].view(N, K), work.buffers["E"].view(-1, K)
    C, S, padded_h = work.buffers["C"].view(N, K), work.buffers["S"].view(k, k), work.buffers["H"].view(-1, K)
    W_out[:, :k] = v.W_outT[:, :N].T
    G = v.W_outT @ v.W_outT.T
    loss, rows = kernels.embed_narrow(problem, step, problem.X, problem.E), tile_rows(spec)
    C.zero_()
    for start in range(0, spec.batch_size, rows):
        x, t = v.x[start : start + rows], targets[start : start + rows, :k]
        z, dh, h = v.z[: len(x)], v.dh[: len(x)], padded_h[: len(x), :k]
        earlier = 0.0 if start == 0 else 1.0
        torch.addmm(v.b, x, v.W_in.T, out=z)
        h.copy_(v.activations(spec, z))
        torch.addmm(t, h, G, beta=-1, out=dh)
        loss += float((h * (dh - t)).sum())
        torch.addmm(S, h.T, h, beta=earlier, out=S)
        kernels.add_target_products(problem, step, start, len(x), problem.H, work.buffers["C"].data_ptr())
        v.add_inner(spec, h, z, dh, x, earlier)
    torch.mm(S, v.W_outT, out=v.dW_outT)
    v.dW_outT[:, :N] -= C[:, :k].T
    return loss / spec.batch_size


def dense_steps(model: Model, work: Workspace, problem: Problem, n: int) -> int:
    """What `kernels.train` does, with dense products: the first n rates and factors of `work`, losses into it."""
    gradients = narrow_gradients if work.path == "narrow" else dense_gradients
    unit = np.float32(2 / model.spec.batch_size)
    for step in range(n):
        loss = gradients(model, work, problem, step)
        work.losses[step] = loss
        lr, factor = np.float32(work.rates[step].item()), np.float32(work.factors[step].item())
        strength = np.float32(work.strengths[step].item())
        finite = update(problem, unit, lr, work.corrections.data_ptr(), step, factor, strength)
        if not (finite and math.isfinite(work.losses[step])):
            return step
    return n
