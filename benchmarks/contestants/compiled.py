"""Stacked `bmm` under `torch.compile`: the whole step, sampling to optimizer, is one compiled function.

On CUDA, `GRAPH_STEPS` of them are captured in a CUDA graph, so that neither Python nor a launch stands between steps.
"""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.base import Unavailable, factor_table, rate_table, synchronize
from benchmarks.contestants.stacked import Stacked, features, per_model
from fastmono.optim import BETA1, BETA2, LAMB_EPS, LAMB_LARGEST_NORM

GRAPH_STEPS = 16


def lamb(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New p, m, v of stacked tensors [A, ...], rates [A]: nothing in place, as a compiler likes it."""
    m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
    u = m / (v.sqrt() + LAMB_EPS)
    norm_p, norm_u = (tensor.flatten(1).square().sum(1).sqrt() for tensor in (p, u))
    ratio = torch.where((norm_p == 0) | (norm_u == 0), 1.0, norm_p.clamp(max=LAMB_LARGEST_NORM) / norm_u)
    return p - per_model(lr * ratio, p) * u, m, v


def gradients(
    f: Tensor, PT: Tensor, W_in: Tensor, b: Tensor, W_outT: Tensor, operand: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Losses [A] and the gradients of W_in, b, W_outT for features f [S, B, N]."""
    S, B, N = f.shape
    A = len(W_in)
    W, V = W_in.to(operand), W_outT.to(operand)
    x = torch.bmm(f.to(operand), PT.to(operand))
    x = x[:, None].expand(S, A // S, B, x.shape[-1]).reshape(A, B, -1)
    h = torch.relu(torch.bmm(x, W.mT) + b[:, None]).to(operand)
    e = (torch.bmm(h, V).view(S, A // S, B, N) - f[:, None]).view(A, B, N)
    loss = e.float().square().sum((1, 2)) / B
    e = e.to(operand)
    dz = torch.where(h > 0, torch.bmm(e, V.mT), 0.0)
    unit = 2 / B
    return loss, [unit * torch.bmm(dz.mT, x).float(), unit * dz.float().sum(1), unit * torch.bmm(h.mT, e).float()]


def sampled_step(
    p: list[Tensor], m: list[Tensor], v: list[Tensor], PT: Tensor, rates: Tensor, factors: Tensor, losses: Tensor,
    t: Tensor, batch: int, probability: float, operand: torch.dtype,
) -> None:  # fmt: skip
    """Step t in place: row t of rates and factors [n, A] holds, row t of losses is filled."""
    f = features((PT.shape[0], batch, PT.shape[1]), probability, PT.device)
    loss, found = gradients(f, PT, *p, operand)
    lr, factor = rates.index_select(0, t)[0], factors.index_select(0, t)[0]
    for i in range(3):
        new, m_new, v_new = lamb(p[i], found[i], m[i], v[i], lr)
        p[i].copy_(new * factor[:, None] if i == 1 else new)
        m[i].copy_(m_new)
        v[i].copy_(v_new)
    losses.index_copy_(0, t, loss[None])
    t.add_(1)


class Compiled(Stacked):
    """Raises `Unavailable` on a CPU without a C++ compiler."""

    warm_steps = GRAPH_STEPS

    def __init__(self, device: torch.device, precision: str = "fp32") -> None:
        super().__init__(device, precision)
        if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise Unavailable("torch.compile needs a C++ compiler for a CPU: install g++")
        self.compiled = torch.compile(sampled_step, dynamic=False, fullgraph=True)
        self.graph: Any = None

    def prepare(self) -> None:
        # More shapes than this many would silently go uncompiled.
        torch._dynamo.config.recompile_limit = 64
        self.graph = None
        self.rates, self.factors, self.losses = (torch.zeros(GRAPH_STEPS, self.A, device=self.device) for _ in range(3))
        self.t = torch.zeros(1, dtype=torch.int64, device=self.device)

    def train_step(self, f: Tensor, lr: Tensor, factor: Tensor) -> Tensor:
        loss, found = gradients(f, self.PT, *self.p.values(), self.operand)
        for name, g in zip(self.p, found, strict=True):
            new, m, v = lamb(self.p[name], g, self.m[name], self.v[name], lr)
            self.p[name].copy_(new * factor[:, None] if name == "b" else new)
            self.m[name].copy_(m)
            self.v[name].copy_(v)
        return loss

    def _call(self) -> None:
        self.compiled(
            *(list(part.values()) for part in (self.p, self.m, self.v)), self.PT, self.rates, self.factors,
            self.losses, self.t, self.B, self.probability, self.operand,
        )  # fmt: skip

    def _capture(self) -> None:
        """Capture the graph without training: the steps that warm it up are undone."""
        tensors = [t for part in (self.p, self.m, self.v) for t in part.values()]
        kept = [t.clone() for t in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.t.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(GRAPH_STEPS):
                self._call()
        for t, value in zip(tensors, kept, strict=True):
            t.copy_(value)

    def advance(self, n_steps: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own code uses what PyTorch deprecates
            return self._advance(n_steps)

    def _advance(self, n_steps: int) -> Tensor:
        assert self.state is not None
        if self.device.type == "cuda" and self.graph is None and n_steps >= GRAPH_STEPS:
            self._capture()
        rates = rate_table(self.lr, self.step, n_steps).to(self.device)
        factors = factor_table(self.state, self.step, n_steps).to(self.device)
        parts = []
        for start in range(0, n_steps, GRAPH_STEPS):
            count = min(GRAPH_STEPS, n_steps - start)
            self.rates[:count] = rates[start : start + count]
            self.factors[:count] = factors[start : start + count]
            self.t.zero_()
            if self.graph is not None and count == GRAPH_STEPS:
                self.graph.replay()
            else:
                for _ in range(count):
                    self._call()
            parts.append(self.losses[:count].clone())
        self.step += n_steps
        synchronize(self.device)
        return torch.cat(parts).T.cpu()

    def unload(self) -> None:
        super().unload()
        self.graph = None
