"""What the PyTorch contestants that train all models at once share: batches, LAMB with one value a model, tables.

S streams, G models to each, A = S G; parameters are stacked, [A, ...].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, factor_table, rate_table, stream_seed, synchronize
from benchmarks.state import TENSORS, State
from fastmono.optim import BETA1, BETA2, LAMB_EPS, LAMB_LARGEST_NORM

OPERAND = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def features(shape: Sequence[int], probability: float, device: torch.device) -> Tensor:
    """Sparse features from PyTorch's generator, float32: one draw decides presence and value."""
    u = torch.rand(shape, device=device)
    return torch.where(u < probability, u * (1 / probability), 0.0)


def per_model(values: Tensor, like: Tensor) -> Tensor:
    """Values [A], to be multiplied with a tensor [A, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def stacked_lamb_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor) -> None:
    """One LAMB update of a stacked tensor [A, ...] and its moments, in place; each model has its own norms and rate."""
    m.mul_(BETA1).add_(g, alpha=1 - BETA1)
    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    u = m / v.sqrt().add_(LAMB_EPS)
    norm_p, norm_u = (torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in (p, u))
    ratio = torch.where((norm_p == 0) | (norm_u == 0), 1.0, norm_p.clamp(max=LAMB_LARGEST_NORM) / norm_u)
    p.sub_(u.mul_(per_model(lr * ratio, p)))


def set_precision(precision: str) -> None:
    """Whether float32 products of PyTorch may use tf32; a no-op on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


class Stacked(Contestant):
    """Models as stacked tensors on a device. Losses of every step stay there until the call ends."""

    def __init__(self, device: torch.device, precision: str = "fp32") -> None:
        self.device, self.precision = device, precision
        self.operand = OPERAND[precision]
        self.state: State | None = None

    def load(self, state: State) -> None:
        set_precision(self.precision)
        self.state, self.step = state, state.step
        self.S, self.G, self.A = state.n_streams, state.group, len(state.specs)
        self.spec = spec = state.specs[0]
        self.B, self.N, self.probability = spec.batch_size, spec.n_features, spec.feature_prob
        parts = state.parameters, state.first_moment, state.second_moment
        self.p, self.m, self.v = ({name: t.to(self.device, copy=True) for name, t in part.items()} for part in parts)
        self.PT = state.P.mT.contiguous().to(self.device)  # [S, N, m]
        self.lr = torch.tensor([spec.lr for spec in state.specs], dtype=torch.float64)
        torch.manual_seed(stream_seed(spec.seed, state.step))
        self.prepare()

    def prepare(self) -> None:
        """Allocate what depends on the shape."""

    def sample(self) -> Tensor:
        """The next batch of every stream, [S, B, N]."""
        return features((self.S, self.B, self.N), self.probability, self.device)

    @abstractmethod
    def train_step(self, f: Tensor, lr: Tensor, factor: Tensor) -> Tensor:
        """One step on features f [S, B, N] with rates and bias factors [A]. Returns losses [A]."""

    def advance(self, n_steps: int) -> Tensor:
        return self._train(n_steps, None)

    def advance_on(self, batches: Tensor) -> Tensor:
        return self._train(len(batches), batches.to(self.device))

    def _train(self, n: int, batches: Tensor | None) -> Tensor:
        assert self.state is not None
        set_precision(self.precision)
        rates = rate_table(self.lr, self.step, n).to(self.device)
        factors = factor_table(self.state, self.step, n).to(self.device)
        losses = torch.empty(n, self.A, device=self.device)
        for t in range(n):
            losses[t] = self.train_step(self.sample() if batches is None else batches[t], rates[t], factors[t])
        self.step += n
        synchronize(self.device)
        return losses.T.cpu()

    def read(self) -> State:
        assert self.state is not None
        p, m, v = ({name: part[name].detach().cpu().clone() for name in TENSORS} for part in (self.p, self.m, self.v))
        return replace(self.state, step=self.step, parameters=p, first_moment=m, second_moment=v)

    def unload(self) -> None:
        self.p, self.m, self.v = {}, {}, {}
