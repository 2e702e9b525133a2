"""The state that every contestant starts from: parameters, moments and step of a stack of models, and projections.

Models stand stream by stream, equally many to each: the A = S G models of S streams are `[s * G + g]`. Models of one
stream see the same batches. All have one shape, and train the published recipe (decoder, ReLU, LAMB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmono.block import Block, Model, views
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec

TENSORS = ("W_in", "b", "W_outT")


@dataclass(frozen=True, eq=False)
class State:
    """A stack of models after `step` updates.

    Raises `ValueError` for models of several shapes, another recipe, or streams with unequally many models.
    """

    specs: tuple[ModelSpec, ...]
    step: int
    parameters: dict[str, Tensor]
    """W_in [A, k, m], b [A, k], W_outT [A, k, o], float32 on the host."""
    first_moment: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    P: Tensor
    """The projection of each stream, [S, m, N]."""

    def __post_init__(self) -> None:
        first, group = self.specs[0], self.group
        for i, spec in enumerate(self.specs):
            recipe = spec.task, spec.activation, spec.optimizer, spec.schedule, spec.frequency, spec.l1
            if recipe != ("decoder", "relu", "lamb", "published", "uniform", 0.0):
                raise ValueError(f"model {i}: the contestants train decoder, relu, lamb, published, uniform, l1 0 only")
            if spec.replace(lr=1, init_bias=0, bias_decay=0, seed=0) != first.replace(
                lr=1, init_bias=0, bias_decay=0, seed=0
            ):
                raise ValueError(f"model {i}: only lr, init_bias, bias_decay and seed may differ within a stack")
            if spec.seed != self.specs[i // group * group].seed:
                raise ValueError(f"model {i}: the models of a stream must stand together, equally many to each")

    @property
    def n_streams(self) -> int:
        """S."""
        return len(self.P)

    @property
    def group(self) -> int:
        """G, models of a stream."""
        return len(self.specs) // len(self.P)

    @classmethod
    def initial(cls, specs: Sequence[ModelSpec]) -> State:
        """The models before their first step."""
        return cls.of_block(Block.new(specs))

    @classmethod
    def of_block(cls, block: Block) -> State:
        """A copy of a block's state."""

        def stacked(part: str) -> dict[str, Tensor]:
            parts = [views(model.spec, getattr(model, part)) for model in block.models]
            return {name: torch.stack([p[name] for p in parts]).clone() for name in TENSORS}

        firsts: dict[int, Tensor] = {}
        for model in block.models:
            firsts.setdefault(model.spec.seed, model.P)
        return cls(
            block.specs, block.step, stacked("parameters"), stacked("first_moment"), stacked("second_moment"),
            torch.stack(list(firsts.values())),
        )  # fmt: skip

    def to_block(self, dtype: torch.dtype = torch.float32) -> Block:
        """The same as a block of its own, which an engine may train. The order of neurons is not kept: the CPU engine
        renews it at multiples of 64 steps, where all suites' states are."""
        projections = [P.clone().to(dtype) for P in self.P]  # one object a stream: engines share batches by it
        models = []
        for i, spec in enumerate(self.specs):
            model = Model(spec, dtype, (projections[i // self.group], None))
            for part in ("parameters", "first_moment", "second_moment"):
                for name, view in views(spec, getattr(model, part)).items():
                    view.copy_(getattr(self, part)[name][i])
            model.snapshot.copy_(model.parameters)
            models.append(model)
        return Block(models, self.step)

    def select(self, models: Sequence[int]) -> State:
        """Some of the models; those of one stream must stay equally many to each."""
        chosen = torch.tensor(models)
        streams = list(dict.fromkeys(i // self.group for i in models))
        parts = (self.parameters, self.first_moment, self.second_moment)
        taken = [{name: tensor[chosen] for name, tensor in part.items()} for part in parts]
        return State(tuple(self.specs[i] for i in models), self.step, *taken, self.P[streams])

    def on_streams(self, seeds: Sequence[int]) -> State:
        """Copies of the models of a single stream, one set for each seed: equal states that see different batches."""
        if self.n_streams != 1:
            raise ValueError(f"has {self.n_streams} streams; only one can be repeated")
        count = len(seeds)
        parts = (self.parameters, self.first_moment, self.second_moment)
        repeated = [{name: t.repeat(count, *[1] * (t.dim() - 1)) for name, t in part.items()} for part in parts]
        specs = tuple(spec.replace(seed=seed) for seed in seeds for spec in self.specs)
        return State(specs, self.step, *repeated, self.P.repeat(count, 1, 1))

    def with_steps(self, steps: int) -> State:
        """The same state in a run of so many steps, which decides until when the bias decays and where the run ends."""
        return replace(self, specs=tuple(spec.replace(steps=steps) for spec in self.specs))

    def density(self) -> float:
        """Share of activations that are not zero, over the models, on 256 samples of the first stream."""
        f = FeatureSampler(self.specs[0]).batch(self.step, 0, min(256, self.specs[0].batch_size))
        group = range(self.group)
        z = [f @ self.P[0].T @ self.parameters["W_in"][i].T + self.parameters["b"][i] for i in group]
        return float(torch.stack([(one > 0).float().mean() for one in z]).mean())
