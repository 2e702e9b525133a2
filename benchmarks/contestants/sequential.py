"""What the two contestants that train one model after another share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants.base import Contestant, stream_seed, synchronize
from benchmarks.contestants.stacked import set_precision
from benchmarks.state import State
from fastmono.spec import ModelSpec


def module(k: int, m: int, o: int, device: torch.device) -> nn.Sequential:
    """The toy model in PyTorch's modules."""
    layers = nn.Linear(m, k), nn.ReLU(), nn.Linear(k, o, bias=False)
    return nn.Sequential(*layers).to(device)


class Sequential(Contestant):
    """One model after another, each with its own module, its optimizer, and batches drawn for it alone.

    The models of a stream see the same batches, since each begins again from the stream's seed.
    """

    most_models = 12  # twice as many take twice as long

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state: State | None = None
        self.models: list[tuple[ModelSpec, nn.Sequential, Tensor, Any]] = []

    @abstractmethod
    def optimizer(self, spec: ModelSpec, parameters: list[nn.Parameter], moments: list[tuple[Tensor, Tensor]]) -> Any:
        """What updates a model; it starts from these moments at `self.step`."""

    @abstractmethod
    def train(
        self, spec: ModelSpec, model: nn.Sequential, P: Tensor, optimizer: Any, n: int, batches: Tensor | None
    ) -> Tensor:
        """Train one model n steps from `self.step`. Returns losses [n], NaN where none was logged, on any device."""

    @abstractmethod
    def moments(self, optimizer: Any) -> list[tuple[Tensor, Tensor]]:
        """The moments of the model's parameters, in their order."""

    def load(self, state: State) -> None:
        set_precision(self.precision)
        self.state, self.step, self.models = state, state.step, []
        projections = [P.to(self.device) for P in state.P]
        names = ("W_in", "b", "W_outT")
        for i, spec in enumerate(state.specs):
            model = module(spec.n_neurons, spec.d_embed, spec.d_output, self.device)

            def tensors(part: dict[str, Tensor], i: int = i) -> list[Tensor]:
                found = [part[name][i].to(self.device) for name in names]
                return [*found[:2], found[2].T.contiguous()]

            parameters = list(model.parameters())
            for parameter, value in zip(parameters, tensors(state.parameters), strict=True):
                parameter.data.copy_(value)
            moments = [
                (m.clone(), v.clone())
                for m, v in zip(tensors(state.first_moment), tensors(state.second_moment), strict=True)
            ]
            optimizer = self.optimizer(spec, parameters, moments)
            self.models.append((spec, model, projections[i // state.group], optimizer))

    def advance(self, n_steps: int) -> Tensor:
        set_precision(self.precision)
        losses = []
        for spec, model, P, optimizer in self.models:
            torch.manual_seed(stream_seed(spec.seed, self.step))
            losses.append(self.train(spec, model, P, optimizer, n_steps, None))
        self.step += n_steps
        synchronize(self.device)
        return torch.stack(losses).cpu()

    def advance_on(self, batches: Tensor) -> Tensor:
        assert self.state is not None
        losses = []
        for i, (spec, model, P, optimizer) in enumerate(self.models):
            own = batches[:, i // self.state.group].to(self.device)
            losses.append(self.train(spec, model, P, optimizer, len(batches), own))
        self.step += len(batches)
        return torch.stack(losses).cpu()

    def read(self) -> State:
        assert self.state is not None

        def stacked(tensors: list[list[Tensor]]) -> dict[str, Tensor]:
            W_in, b, W_out = (torch.stack(column).detach().cpu() for column in zip(*tensors, strict=True))
            return {"W_in": W_in, "b": b, "W_outT": W_out.mT.contiguous()}

        moments = [self.moments(optimizer) for *_, optimizer in self.models]
        return replace(
            self.state,
            step=self.step,
            parameters=stacked([list(model.parameters()) for _, model, *_ in self.models]),
            first_moment=stacked([[m for m, _ in one] for one in moments]),
            second_moment=stacked([[v for _, v in one] for one in moments]),
        )

    def unload(self) -> None:
        self.models = []
