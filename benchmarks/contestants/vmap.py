"""`torch.func`: `stack_module_state`, and `grad_and_value` of a functional call under `vmap`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from benchmarks.contestants.sequential import module
from benchmarks.contestants.stacked import Stacked, per_model, stacked_lamb_

NAMES = {"W_in": "0.weight", "b": "0.bias", "W_outT": "2.weight"}


class Vmap(Stacked):
    """One module called functionally on the stacked parameters of all; LAMB on the stacked tensors."""

    def prepare(self) -> None:
        spec = self.spec
        shape = spec.n_neurons, spec.d_embed, spec.d_output
        base = module(*shape, torch.device("meta"))
        stacked, _ = stack_module_state([module(*shape, self.device) for _ in range(self.A)])
        for name, tensor in self.p.items():
            value = tensor.mT if name == "W_outT" else tensor
            stacked[NAMES[name]].data.copy_(value)
        for part in (self.m, self.v):
            part["W_outT"] = part["W_outT"].mT.contiguous()
        self.stacked = {name: tensor.detach() for name, tensor in stacked.items()}

        def loss(parameters: dict[str, Tensor], x: Tensor, f: Tensor) -> Tensor:
            if self.operand != torch.float32:
                parameters = {name: p.to(self.operand) for name, p in parameters.items()}
                x = x.to(self.operand)
            y: Tensor = functional_call(base, parameters, (x,))
            return (y.float() - f).square().sum() / self.B

        of_group = vmap(grad_and_value(loss), in_dims=(0, None, None))
        self.gradients = vmap(of_group, in_dims=(0, 0, 0))

    def train_step(self, f: Tensor, lr: Tensor, factor: Tensor) -> Tensor:
        x = torch.bmm(f.to(self.operand), self.PT.to(self.operand))
        grouped = {name: p.view(self.S, self.G, *p.shape[1:]) for name, p in self.stacked.items()}
        gradients, losses = self.gradients(grouped, x, f)
        for ours, name in NAMES.items():
            stacked_lamb_(self.stacked[name], gradients[name].flatten(0, 1), self.m[ours], self.v[ours], lr)
        bias = self.stacked["0.bias"]
        bias.mul_(per_model(factor, bias))
        return losses.flatten()

    def read(self):  # type: ignore[no-untyped-def]
        kept = self.p, self.m, self.v
        self.p = {
            ours: self.stacked[name].mT.contiguous() if ours == "W_outT" else self.stacked[name]
            for ours, name in NAMES.items()
        }
        self.m, self.v = (
            {name: t.mT.contiguous() if name == "W_outT" else t for name, t in part.items()}
            for part in (self.m, self.v)
        )
        state = super().read()
        self.p, self.m, self.v = kept
        return state

    def unload(self) -> None:
        super().unload()
        self.stacked = {}
