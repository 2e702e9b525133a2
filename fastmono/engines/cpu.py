"""The CPU engine: the reference's arithmetic in float32, arranged for one core.

What is different from `reference.py`, and why:
- a batch is sampled, projected and turned into a target once for all models that share it;
- the bias, the residual's subtraction and the factor 2/B ride on the matrix products (`addmm`'s beta and alpha);
- rows pass in tiles whose activations stay in cache, and every buffer is allocated once;
- the optimizer works on a model's flat buffers, in place: one pass serves its three tensors.

The arithmetic of a model, and the address alignment of everything it touches, follow from its own spec alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmono.block import Block, Model, flat_size, shape_class, single_thread, views
from fastmono.optim import (
    ADAMW_EPS,
    ADAMW_WEIGHT_DECAY,
    BETA1,
    BETA2,
    LAMB_EPS,
    LAMB_LARGEST_NORM,
    adam_corrections,
    bias_factor,
    finite_or_inf,
    learning_rates,
)
from fastmono.philox import FeatureSampler, stream_key
from fastmono.spec import ModelSpec
from fastmono.tasks import ACTIVATION, DERIVATIVE, target

TILE_NUMBERS = 2**17
"""Activations a row tile holds at most: h and dh then take 1 MiB together."""


def tile_rows(spec: ModelSpec) -> int:
    """Rows worked on at a time: a function of the model's shape alone, since it orders the sums."""
    rows = max(32, TILE_NUMBERS // max(spec.n_neurons, spec.d_output))
    return min(spec.batch_size, rows)


class Stream:
    """One sequence of batches: features, embeddings and targets of the current step, for all models that share it."""

    def __init__(self, model: Model) -> None:
        spec = model.spec
        self.task, self.P, self.P2 = spec.task, model.P, model.P2
        self.sampler = FeatureSampler(spec)
        self.f = torch.empty(spec.batch_size, spec.n_features)
        self.x = torch.empty(spec.batch_size, spec.d_embed)
        self.tau = self.f

    def sample(self, step: int) -> None:
        """Draw the batch that `step` updates precede."""
        self.sampler.batch(step, 0, len(self.f), self.f)
        torch.mm(self.f, self.P.T, out=self.x)
        self.tau = target(self.task, self.f, self.P2)


class Workspace:
    """The buffers of one model-step, reused by every model of one shape."""

    def __init__(self, spec: ModelSpec) -> None:
        rows, k, o = tile_rows(spec), spec.n_neurons, spec.d_output
        self.z = torch.empty(rows, k)
        self.dh = torch.empty(rows, k)
        self.e = torch.empty(rows, o)
        self.ones = torch.ones(rows)
        self.db = torch.empty(k)
        self.gradient = torch.zeros(flat_size(spec))
        self.update = torch.zeros(flat_size(spec))
        self.gradients = views(spec, self.gradient)
        self.updates = views(spec, self.update)


def gradient_pass(model: Model, stream: Stream, work: Workspace) -> Tensor:
    """Fill `work.gradient` from the whole batch and return the logged loss, a scalar tensor."""
    spec = model.spec
    W_in, b, W_outT = (model.tensors[name] for name in ("W_in", "b", "W_outT"))
    dW_in, db, dW_outT = (work.gradients[name] for name in ("W_in", "b", "W_outT"))
    unit, loss = 2 / spec.batch_size, torch.zeros(())
    rows = len(work.z)
    for start in range(0, spec.batch_size, rows):
        x, tau = stream.x[start : start + rows], stream.tau[start : start + rows]
        z, dh, e, ones = (buffer[: len(x)] for buffer in (work.z, work.dh, work.e, work.ones))
        earlier = 0.0 if start == 0 else 1.0  # whether to add to the tiles before this one

        torch.addmm(b, x, W_in.T, out=z)
        h = torch.relu_(z) if spec.activation == "relu" else ACTIVATION[spec.activation](z)
        torch.addmm(tau, h, W_outT, beta=-1, out=e)  # y - tau
        loss += torch.dot(e.view(-1), e.view(-1))

        torch.addmm(dW_outT, h.T, e, beta=earlier, alpha=unit, out=dW_outT)
        torch.mm(e, W_outT.T, out=dh)
        if spec.l1:
            dh.add_(h.sign(), alpha=spec.l1 / 2)
        if spec.activation == "relu":
            dz = torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        else:
            dz = dh.mul_(DERIVATIVE[spec.activation](z))
        torch.addmm(dW_in, dz.T, x, beta=earlier, alpha=unit, out=dW_in)
        torch.addmv(db, dz.T, ones, beta=earlier, alpha=unit, out=db)
    return loss / spec.batch_size


def update(model: Model, work: Workspace, lr: float, step: int) -> None:
    """One optimizer step and bias decay from `work.gradient`, in place; `step` updates were made before."""
    spec, p, g, u = model.spec, model.parameters, work.gradient, work.update
    m, v = model.first_moment, model.second_moment
    if spec.optimizer == "sgd":
        p.sub_(g, alpha=lr)
    else:
        m.mul_(BETA1).add_(g, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        torch.sqrt(v, out=u)
    if spec.optimizer == "lamb":
        torch.div(m, u.add_(LAMB_EPS), out=u)
        for name, tensor in model.tensors.items():
            direction = work.updates[name].view(-1)
            norm_p = torch.linalg.vector_norm(tensor.view(-1)).item()
            norm_u = torch.linalg.vector_norm(direction).item()
            # A NaN norm must reach the parameters: min() would drop it.
            clamped = LAMB_LARGEST_NORM if norm_p > LAMB_LARGEST_NORM else norm_p
            ratio = clamped / norm_u if norm_p and norm_u else 1.0
            tensor.view(-1).sub_(direction, alpha=finite_or_inf(lr * ratio))
    elif spec.optimizer == "adamw":
        first, second = adam_corrections(step)
        p.mul_(1 - lr * ADAMW_WEIGHT_DECAY)
        p.addcdiv_(m, u.div_(second).add_(ADAMW_EPS), value=finite_or_inf(-lr / first))
    if (factor := bias_factor(spec, step)) != 1.0:
        model.tensors["b"].mul_(factor)


class CpuEngine:
    """Trains in float32 on one core; a machine's cores are used by one process each.

    Args:
        precision: fp32, the only one: rounding operands costs time on a CPU and saves none.
    """

    name = "cpu"

    def __init__(self, precision: str = "fp32") -> None:
        if precision != "fp32":
            raise ValueError(f"precision={precision!r}: the cpu engine computes in fp32; the reference engine in any")
        self.precision = precision
        self._block: Block | None = None
        self._streams: dict[object, Stream] = {}
        self._workspaces: dict[object, Workspace] = {}

    def advance(self, block: Block, n_steps: int) -> Tensor:
        """Train every model for n steps, in place. Returns losses, float32 [A, n]: NaN where a model did not train."""
        if block is not self._block:  # the buffers of the block before this one are of no more use
            self._block, self._streams, self._workspaces = block, {}, {}
        losses = torch.full((len(block.models), n_steps), torch.nan)
        rates = [learning_rates(spec, block.step, n_steps) for spec in block.specs]
        with single_thread(), torch.no_grad():
            for t in range(n_steps):
                sampled: set[object] = set()
                for i in block.active():
                    model = block.models[i]
                    stream, work = self._buffers(model)
                    if id(stream) not in sampled:
                        sampled.add(id(stream))
                        stream.sample(block.step)
                    loss = gradient_pass(model, stream, work)
                    update(model, work, rates[i][t], block.step)
                    losses[i, t] = loss
                    low, high = torch.aminmax(model.parameters)  # both are NaN when any entry is
                    if not (math.isfinite(loss) and math.isfinite(low) and math.isfinite(high)):
                        model.diverged_step = block.step + 1
                block.step += 1
        return losses

    def _buffers(self, model: Model) -> tuple[Stream, Workspace]:
        stream, shape = (stream_key(model.spec), id(model.P)), shape_class(model.spec)
        if stream not in self._streams:
            self._streams[stream] = Stream(model)
        if shape not in self._workspaces:
            self._workspaces[shape] = Workspace(model.spec)
        return self._streams[stream], self._workspaces[shape]

    def fetch(self, block: Block) -> None:
        """Nothing to do: the block's models are where they are trained."""

    @staticmethod
    def workspace_bytes(spec: ModelSpec, n_streams: int) -> int:
        """Memory beyond the models' own state, for a block of one shape whose models see `n_streams` streams."""
        sampled = 4 * spec.batch_size * (2 * spec.n_features + spec.d_embed + spec.d_output)
        return n_streams * sampled + 4 * (tile_rows(spec) * (3 * spec.n_neurons + spec.d_output) + 2 * flat_size(spec))
