"""The published recipe one model at a time, cleaned up: one draw a batch, one forward pass, no wait for the host."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants.base import LOG_EVERY, rate_table
from benchmarks.contestants.sequential import Sequential
from benchmarks.contestants.stacked import features
from fastmono.optim import lamb_
from fastmono.spec import ModelSpec


class Cleaned(Sequential):
    """Modules and autograd; LAMB without a question to the host."""

    def optimizer(self, spec: ModelSpec, parameters: list[nn.Parameter], moments: list[tuple[Tensor, Tensor]]) -> Any:
        return list(zip(parameters, moments, strict=True))

    def train(
        self, spec: ModelSpec, model: nn.Sequential, P: Tensor, optimizer: Any, n: int, batches: Tensor | None
    ) -> Tensor:
        rates = rate_table(torch.tensor([spec.lr], dtype=torch.float64), self.step, n)[:, 0].tolist()
        factor, bias = 1 - spec.bias_decay * spec.lr, model[0].bias
        losses = torch.full((n,), math.nan, device=self.device)
        for t in range(n):
            shape = (spec.batch_size, spec.n_features)
            f = features(shape, spec.feature_prob, self.device) if batches is None else batches[t]
            loss = (model(f @ P.T) - f).square().sum() / spec.batch_size
            loss.backward()
            with torch.no_grad():
                for parameter, (m, v) in optimizer:
                    lamb_(parameter, parameter.grad, m, v, rates[t])
                    parameter.grad = None
                if 2 * (self.step + t) < spec.steps:
                    bias.mul_(factor)
                if (self.step + t) % LOG_EVERY == 0:
                    losses[t] = loss.detach()
        return losses

    def moments(self, optimizer: Any) -> list[tuple[Tensor, Tensor]]:
        return [moments for _, moments in optimizer]
