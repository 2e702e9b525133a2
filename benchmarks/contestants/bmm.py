"""Stacked `bmm`, eager: gradients written out and large buffers allocated once, which spares it autograd's graph and
the allocator's page faults."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contestants.stacked import Stacked, per_model, stacked_lamb_


class Bmm(Stacked):
    """All models in batched products; operands of a lower precision are cast, sums and state are float32."""

    def prepare(self) -> None:
        k, o, operand = self.spec.n_neurons, self.spec.d_output, self.operand

        def empty(*shape: int, dtype: torch.dtype = operand) -> Tensor:
            return torch.empty(shape, device=self.device, dtype=dtype)

        self.u = empty(self.S, self.B, self.N, dtype=torch.float32)
        self.f, self.present = torch.empty_like(self.u), empty(self.S, self.B, self.N, dtype=torch.bool)
        self.z, self.dh = empty(self.A, self.B, k), empty(self.A, self.B, k)
        self.e = empty(self.A, self.B, o)
        self.square = torch.empty_like(self.e)
        self.P_operand = self.PT.to(operand)

    def sample(self) -> Tensor:
        torch.rand(self.u.shape, out=self.u)
        torch.lt(self.u, self.probability, out=self.present)
        return torch.mul(self.u, self.present, out=self.f).mul_(1 / self.probability)

    def train_step(self, f: Tensor, lr: Tensor, factor: Tensor) -> Tensor:
        S, G, A, B, N, operand = self.S, self.G, self.A, self.B, self.N, self.operand
        W_in, b, W_outT = (self.p[name] for name in ("W_in", "b", "W_outT"))
        W, V, f_operand = W_in.to(operand), W_outT.to(operand), f.to(operand)
        x = torch.bmm(f_operand, self.P_operand)  # [S, B, N] @ [S, N, m] -> [S, B, m]
        x = x[:, None].expand(S, G, *x.shape[1:]).reshape(A, B, -1)
        z = torch.baddbmm(b.to(operand)[:, None], x, W.mT, out=self.z)  # [A, B, m] @ [A, m, k] -> [A, B, k]
        h = z.relu_()
        e = torch.bmm(h, V, out=self.e)  # [A, B, k] @ [A, k, o] -> [A, B, o]
        e.view(S, G, B, N).sub_(f_operand[:, None])
        loss = torch.mul(e, e, out=self.square).view(A, -1).sum(1, dtype=torch.float32) / B
        dh = torch.bmm(e, V.mT, out=self.dh)
        dz = torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        gradients = {
            "W_in": torch.bmm(dz.mT, x),  # [A, k, B] @ [A, B, m] -> [A, k, m]
            "b": dz.sum(1, dtype=torch.float32),
            "W_outT": torch.bmm(h.mT, e),  # [A, k, B] @ [A, B, o] -> [A, k, o]
        }
        for name, p in self.p.items():
            g = gradients[name].float().mul_(2 / B)
            stacked_lamb_(p, g, self.m[name], self.v[name], lr)
        b.mul_(per_model(factor, b))
        return loss

    def unload(self) -> None:
        super().unload()
        self.u = self.f = self.present = self.z = self.dh = self.e = self.square = self.P_operand = torch.empty(0)
