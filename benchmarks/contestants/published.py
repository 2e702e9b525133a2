"""The published recipe in the manner of its published loop: modules, autograd, torch-optimizer's LAMB, model by model.

Written anew. Kept from the original's manner of working: presence and value are two draws; the hidden layer is
evaluated a second time for its activation penalty (strength 0 here, as in the main runs); LAMB asks the host whether a
norm is zero, three times a step; the bias decays by way of the state dict; the loss comes to the host every 16 steps.
Left out: TorchScript, which PyTorch no longer develops.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants.base import LOG_EVERY, Unavailable
from benchmarks.contestants.sequential import Sequential
from fastmono.spec import ModelSpec


class Published(Sequential):
    """Raises `Unavailable` without torch-optimizer."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its own imports are deprecated
                from torch_optimizer import Lamb
        except ImportError:
            raise Unavailable("torch-optimizer is not installed: pip install torch-optimizer") from None
        self.Lamb = Lamb

    def optimizer(self, spec: ModelSpec, parameters: list[nn.Parameter], moments: list[tuple[Tensor, Tensor]]) -> Any:
        lamb = self.Lamb(parameters, lr=spec.lr)
        for parameter, (m, v) in zip(parameters, moments, strict=True):
            lamb.state[parameter] = {"step": self.step, "exp_avg": m, "exp_avg_sq": v}
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(lamb, T_max=512)
        # The scheduler goes from one rate to the next; this is where it would be after `step` of them.
        schedule.last_epoch = self.step
        lamb.param_groups[0]["lr"] = spec.lr * (1 + math.cos(math.pi * (self.step % 1024) / 512)) / 2
        return lamb, schedule

    def train(
        self, spec: ModelSpec, model: nn.Sequential, P: Tensor, optimizer: Any, n: int, batches: Tensor | None
    ) -> Tensor:
        lamb, schedule = optimizer
        probability = torch.full((spec.batch_size, spec.n_features), spec.feature_prob, device=self.device)
        losses = torch.full((n,), math.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-optimizer uses overloads that PyTorch deprecates
            for t in range(n):
                lamb.zero_grad(set_to_none=True)
                if batches is None:
                    f = torch.rand(spec.batch_size, spec.n_features, device=self.device) * torch.bernoulli(probability)
                else:
                    f = batches[t]
                x = f @ P.T
                loss = (model(x) - f).square().sum() / spec.batch_size
                hidden = model[:2](x)
                (loss + spec.l1 * hidden.abs().sum() / spec.batch_size).backward()
                lamb.step()
                schedule.step()
                if self.step + t < spec.steps / 2:
                    values = model.state_dict()
                    values["0.bias"] *= 1 - spec.bias_decay * spec.lr
                    model.load_state_dict(values)
                if (self.step + t) % LOG_EVERY == 0:
                    losses[t] = loss.item()
        return losses

    def moments(self, optimizer: Any) -> list[tuple[Tensor, Tensor]]:
        lamb, _ = optimizer
        parameters = lamb.param_groups[0]["params"]
        return [(lamb.state[p]["exp_avg"], lamb.state[p]["exp_avg_sq"]) for p in parameters]
