"""The CPU engine: float32 on one core, a few times faster than its dense arithmetic at the machine's product rate.

- The batches of several steps are drawn once for all models that share them, as lists of the
  features present (cpu_sampler.py).
- Then one model after another trains through those steps in one compiled call, with its state in cache
  (cpu_kernels.py, cpu_rows.py). ReLU's zeros are skipped: they add nothing.
- gelu and solu have no zeros. Their products are PyTorch's, in row tiles that stay in cache.

The arithmetic of a model, and the address alignment of everything it touches, follow from its own spec alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmono.block import Block, Model, flat_size, padded, shape_class, single_thread
from fastmono.engines import cpu_kernels as kernels
from fastmono.engines.cpu_sampler import sample
from fastmono.engines.simd import REGISTER
from fastmono.frequencies import presence_probabilities, scales, thresholds
from fastmono.optim import adam_corrections, bias_factor, learning_rates
from fastmono.philox import Purpose, stream_key
from fastmono.spec import OPTIMIZERS, TASKS, ModelSpec
from fastmono.tasks import ACTIVATION, DERIVATIVE

STEPS_AT_ONCE = 32
STREAM_NUMBERS = 2**23
"""Features, present or not, that are drawn at once at most (but at least one step's)."""
TILE_NUMBERS = 2**17
"""Activations a row tile of the dense path holds at most: h and dh then take 1 MiB together."""


def steps_at_once(spec: ModelSpec) -> int:
    """Steps that a model trains before the next model does, and whose batches are drawn together."""
    return max(1, min(STEPS_AT_ONCE, STREAM_NUMBERS // (spec.batch_size * spec.n_features)))


def through_features(spec: ModelSpec) -> bool:
    """Whether z is cheaper from G = W_in P and the features present than from x: by multiplications."""
    N, m, B = spec.n_features, spec.d_embed, spec.batch_size
    return N * spec.feature_prob + N * m / B < m


def odd_lines(length: int) -> int:
    """A row length of an odd number of cache lines, so that a column does not fall into a few sets of the cache."""
    return padded(length) | REGISTER


class Stream:
    """The batches of a few steps, for all models that share them: each sample's present features.

    Attributes:
        starts: int32 [steps, B + 1], where each sample's features begin in `indices` (int32) and `values` (float32).
    """

    def __init__(self, model: Model) -> None:
        spec = model.spec
        N, B, steps = spec.n_features, spec.batch_size, steps_at_once(spec)
        self.B, self.seed = B, spec.seed
        self.other = int(Purpose.NEGATIVE_FEATURES) if spec.task == "abs" else -1
        share = spec.feature_prob / 2 if spec.task == "abs" else spec.feature_prob
        p = presence_probabilities(N, share, spec.frequency)
        self.last, self.scale = (thresholds(p) - 1).astype(np.uint32), scales(p)
        self.words = np.empty(4 * -(-N // 4), np.uint32)
        self.row = torch.zeros(padded(N))
        self.starts = torch.empty(steps, B + 1, dtype=torch.int32)
        # Room for every feature: memory that is never written to is never taken.
        self.indices = torch.empty(steps * B * N + REGISTER, dtype=torch.int32)
        self.values = torch.empty(steps * B * N + REGISTER)
        self.P_T = transposed(model.P)
        self.P2_T = None if model.P2 is None else transposed(model.P2)

    def sample(self, first_step: int, steps: int) -> None:
        """Draw the batches that first_step, first_step + 1, ... updates precede."""
        sample(
            first_step, steps, self.B, self.seed, int(Purpose.FEATURES), self.other, self.last, self.scale,
            self.row.numpy(), self.words, self.starts.data_ptr(), self.indices.data_ptr(), self.values.data_ptr(),
        )  # fmt: skip


def transposed(P: Tensor) -> Tensor:
    """[N, m] in padded rows, for a projection [m, N]."""
    rows = torch.zeros(P.shape[1], padded(P.shape[0]))
    rows[:, : P.shape[0]] = P.T
    return rows


class Workspace:
    """What one model-step needs besides the model and its batch, reused by every model of one shape."""

    def __init__(self, spec: ModelSpec, skips_zeros: bool = True) -> None:
        self.sparse = skips_zeros and spec.activation == "relu"
        N, k, B = spec.n_features, spec.n_neurons, spec.batch_size
        M, K, O = padded(spec.d_embed), padded(k), padded(spec.d_output)  # noqa: E741
        steps = steps_at_once(spec)
        self.gradient = torch.zeros(flat_size(spec))
        self.rates, self.factors, self.losses = (torch.empty(steps) for _ in range(3))
        self.corrections = torch.empty(steps, 2)
        blocks = -(-K // kernels.BLOCK)
        pairs = kernels.TILE * K + REGISTER
        through = self.sparse and through_features(spec)
        if self.sparse:
            sizes = {
                "G_T": N * K if through else 0, "W_T": M * K, "Z": kernels.TILE * odd_lines(k),
                "DZ": kernels.TILE * odd_lines(k), "X": kernels.TILE * M, "E": kernels.TILE * odd_lines(O), "H": pairs,
            }  # fmt: skip
        else:
            sizes = {"X": B * M, "E": B * O}
            rows = tile_rows(spec)
            self.z, self.dh = torch.empty(rows, k), torch.empty(rows, k)
            self.ones, self.db = torch.ones(rows), torch.empty(k)
        self.buffers = {name: torch.zeros(size) for name, size in sizes.items()}
        self.buffers |= {
            "ACTIVE": torch.zeros(pairs, dtype=torch.int32),
            "ENDS": torch.zeros(kernels.TILE * (blocks + 1), dtype=torch.int32),
            "WORDS": torch.zeros(K, dtype=torch.int64), "COUNTING": torch.arange(M, dtype=torch.int32),
        }  # fmt: skip
        self.fields: dict[str, int] = {name: buffer.data_ptr() for name, buffer in self.buffers.items()}
        self.fields |= dict.fromkeys({"G_T", "W_T", "Z", "DZ", "H"} - sizes.keys(), 0)
        self.fields |= {
            "task": TASKS.index(spec.task), "optimizer": OPTIMIZERS.index(spec.optimizer), "through_features": through,
            "N": N, "M": M, "k": k, "K": K, "O": O, "B": B, "blocks": blocks, "LK": odd_lines(k), "LE": odd_lines(O),
            "GRADIENT": self.gradient.data_ptr(), "at_b": k * M, "at_out": k * M + K, "size": flat_size(spec),
        }  # fmt: skip

    def problem(self, model: Model, stream: Stream) -> kernels.Problem:
        """What the kernels take."""
        return kernels.Problem(
            **self.fields,
            STARTS=stream.starts.data_ptr(),
            INDICES=stream.indices.data_ptr(),
            VALUES=stream.values.data_ptr(),
            P_T=stream.P_T.data_ptr(),
            P2_T=0 if stream.P2_T is None else stream.P2_T.data_ptr(),
            PARAMETERS=model.parameters.data_ptr(),
            FIRST=model.first_moment.data_ptr(),
            SECOND=model.second_moment.data_ptr(),
        )


def tile_rows(spec: ModelSpec) -> int:
    """Rows that the dense path works on at a time: a function of the model's shape alone, since it orders the sums."""
    return min(spec.batch_size, max(32, TILE_NUMBERS // max(spec.n_neurons, spec.d_output)))


def dense_gradients(model: Model, work: Workspace) -> Tensor:
    """Fill `work.gradient` from x and -tau, in units of 2/B, and return the logged loss, a scalar tensor."""
    spec = model.spec
    k, B, M, O = spec.n_neurons, spec.batch_size, padded(spec.d_embed), padded(spec.d_output)  # noqa: E741
    at_b, at_out = k * M, k * M + padded(k)
    W_in, W_outT = model.parameters[:at_b].view(k, M), model.parameters[at_out:].view(k, O)
    dW_in, dW_outT = work.gradient[:at_b].view(k, M), work.gradient[at_out:].view(k, O)
    b, db = model.tensors["b"], work.gradient[at_b : at_b + k]
    whole_x, whole_e = work.buffers["X"].view(B, M), work.buffers["E"].view(B, O)
    loss, rows = torch.zeros(()), tile_rows(spec)
    for start in range(0, B, rows):
        x, e = whole_x[start : start + rows], whole_e[start : start + rows]
        z, dh, ones = (buffer[: len(x)] for buffer in (work.z, work.dh, work.ones))
        earlier = 0.0 if start == 0 else 1.0  # whether to add to the tiles before this one
        torch.addmm(b, x, W_in.T, out=z)
        h = ACTIVATION[spec.activation](z)
        torch.addmm(e, h, W_outT, out=e)
        loss += torch.dot(e.view(-1), e.view(-1))
        torch.addmm(dW_outT, h.T, e, beta=earlier, out=dW_outT)
        torch.mm(e, W_outT.T, out=dh)
        if spec.l1:
            dh.add_(h.sign(), alpha=spec.l1 / 2)
        dz = dh.mul_(DERIVATIVE[spec.activation](z))
        torch.addmm(dW_in, dz.T, x, beta=earlier, out=dW_in)
        torch.addmv(db, dz.T, ones, beta=earlier, out=db)
    return loss / B


class CpuEngine:
    """Trains in float32 on one core; a machine's cores are used by one process each.

    Args:
        precision: fp32, the only one: rounding operands costs time on a CPU and saves none.
        skips_zeros: False trains relu with dense products as well, for comparison.
    """

    name = "cpu"

    def __init__(self, precision: str = "fp32", skips_zeros: bool = True) -> None:
        if precision != "fp32":
            raise ValueError(f"precision={precision!r}: the cpu engine computes in fp32; the reference engine in any")
        self.precision, self.skips_zeros = precision, skips_zeros
        self._block: Block | None = None
        self._streams: dict[object, Stream] = {}
        self._workspaces: dict[object, Workspace] = {}

    def advance(self, block: Block, n_steps: int) -> Tensor:
        """Train every model for n steps, in place. Returns losses, float32 [A, n]: NaN where a model did not train."""
        if block is not self._block:  # the buffers of the block before this one are of no more use
            self._block, self._streams, self._workspaces = block, {}, {}
        losses = torch.full((len(block.models), n_steps), torch.nan)
        done = 0
        with single_thread(), torch.no_grad():
            while done < n_steps:
                active = block.active()
                left = [block.specs[i].steps - block.step for i in active]
                n = min(n_steps - done, steps_at_once(block.specs[0]), *left)
                drawn: set[object] = set()
                for i in active:
                    stream, work = self._buffers(block.models[i])
                    if id(stream) not in drawn:
                        drawn.add(id(stream))
                        stream.sample(block.step, n)
                    losses[i, done : done + n] = train(block.models[i], stream, work, block.step, n)
                block.step += n
                done += n
        return losses

    def _buffers(self, model: Model) -> tuple[Stream, Workspace]:
        stream, shape = (stream_key(model.spec), id(model.P)), shape_class(model.spec)
        if stream not in self._streams:
            self._streams[stream] = Stream(model)
        if shape not in self._workspaces:
            self._workspaces[shape] = Workspace(model.spec, self.skips_zeros)
        return self._streams[stream], self._workspaces[shape]

    def fetch(self, block: Block) -> None:
        """Nothing to do: the block's models are where they are trained."""

    @staticmethod
    def workspace_bytes(spec: ModelSpec, n_streams: int) -> int:
        """Memory beyond the models' own state, for a block of one shape whose models see `n_streams` streams."""
        N, k, B = spec.n_features, spec.n_neurons, spec.batch_size
        m, o, steps = padded(spec.d_embed), padded(spec.d_output), steps_at_once(spec)
        present = min(1.0, 2 * spec.feature_prob + 32 / N)  # of a batch; far more than chance will give
        stream = 4 * steps * B + int(8 * steps * B * N * present) + 4 * N * (m + o + 4)
        relu = N * padded(k) + m * padded(k) + kernels.TILE * (2 * odd_lines(k) + 2 * padded(k) + m + odd_lines(o))
        dense = B * (m + o) + 4 * tile_rows(spec) * k
        return n_streams * stream + 4 * (flat_size(spec) + (relu if spec.activation == "relu" else dense))


def train(model: Model, stream: Stream, work: Workspace, first: int, n: int) -> Tensor:
    """Train one model for n steps from its step `first`, and return its losses, float32 [n]."""
    spec = model.spec
    work.rates[:n] = torch.tensor(learning_rates(spec, first, n))
    work.factors[:n] = torch.tensor([bias_factor(spec, step) for step in range(first, first + n)])
    if spec.optimizer == "adamw":
        work.corrections[:n] = torch.tensor([adam_corrections(step) for step in range(first, first + n)])
    work.losses.fill_(torch.nan)
    problem = work.problem(model, stream)
    rates, corrections, factors = (t.data_ptr() for t in (work.rates, work.corrections, work.factors))
    unit, half_l1 = np.float32(2 / spec.batch_size), np.float32(spec.l1 / 2)
    if work.sparse:
        well = kernels.train(
            problem, n, unit, half_l1, rates, corrections, factors, work.losses.data_ptr()
        )  # fmt: skip
    else:
        well = dense_steps(model, work, problem, n, unit)
    if well < n:
        model.diverged_step = first + well + 1
    return work.losses[:n]


def dense_steps(model: Model, work: Workspace, problem: kernels.Problem, n: int, unit: Any) -> int:
    """`kernels.train` for nonlinearities without zeros: the same arguments and result."""
    x, e = work.buffers["X"].data_ptr(), work.buffers["E"].data_ptr()
    for step in range(n):
        kernels.embed(problem, step, x, e)
        loss = work.losses[step] = dense_gradients(model, work)
        lr, factor = work.rates[step].item(), work.factors[step].item()
        finite = kernels.update(
            problem, unit, np.float32(lr), work.corrections.data_ptr(), step, np.float32(factor)
        )  # fmt: skip
        if not (finite and math.isfinite(loss)):
            return step
    return n
