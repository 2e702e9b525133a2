"""The CPU engine: float32 on one core, a few times faster than its dense arithmetic at the machine's product rate.

- The batches of several steps are drawn once for all models that share them, as lists of the
  features present (cpu_sampler.py).
- Then one model after another trains through those steps in one compiled call, with its state in cache
  (cpu_kernels.py, cpu_rows.py). ReLU's zeros are skipped: they add nothing.
- gelu and solu have no zeros: their products are PyTorch's, in row tiles that stay in cache (cpu_dense.py).

The arithmetic of a model, and the address alignment of everything it touches, follow from its own spec alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmono.block import Block, Model, flat_size, padded, shape_class, single_thread
from fastmono.engines import cpu_kernels as kernels
from fastmono.engines.cpu_dense import dense_steps, tile_rows
from fastmono.engines.cpu_sampler import sample
from fastmono.engines.simd import REGISTER
from fastmono.frequencies import presence_probabilities, scales, thresholds
from fastmono.optim import adam_corrections, bias_factor, learning_rates
from fastmono.philox import Purpose, stream_key
from fastmono.spec import OPTIMIZERS, TASKS, ModelSpec

STEPS_AT_ONCE = 32
LEAST_NARROW = 2**24
"""B k N from which Gram matrices pay: below, PyTorch's calls take as long as its products."""
STREAM_NUMBERS = 2**23
"""Features, present or not, that are drawn at once at most (but at least one step's)."""


def steps_at_once(spec: ModelSpec) -> int:
    """Steps that a model trains before the next model does, and whose batches are drawn together."""
    return max(1, min(STEPS_AT_ONCE, STREAM_NUMBERS // (spec.batch_size * spec.n_features)))


def path_of(spec: ModelSpec, skips_zeros: bool = True) -> str:
    """How a model's gradients are computed, from its spec alone: whatever stands beside it, the bits are the same.

    features    only present features and active neurons, z from G = W_in P
    embedding   only active neurons, z from x: where too many features are present for the other, by multiplications
    narrow      dense products, by Gram matrices (cpu_dense.py): 1.6 to 3.7 times fewer milliseconds than
    dense       dense products
    """
    N, m, k, B = spec.n_features, spec.d_embed, spec.n_neurons, spec.batch_size
    narrow = spec.task != "reprojector" and 2 * k <= N and B * k * N >= LEAST_NARROW
    if spec.activation == "relu" and skips_zeros and not (narrow and spec.init_bias >= 0):
        return "features" if N * spec.feature_prob + N * m / B < m else "embedding"
    return "narrow" if narrow and skips_zeros else "dense"


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
    """What one model-step needs besides the model and its batch, reused by every model of one shape and path."""

    def __init__(self, spec: ModelSpec, path: str) -> None:
        self.path = path
        N, k, B = spec.n_features, spec.n_neurons, spec.batch_size
        M, K, O = padded(spec.d_embed), padded(k), padded(spec.d_output)  # noqa: E741
        steps = steps_at_once(spec)
        self.gradient = torch.zeros(flat_size(spec))
        self.rates, self.factors, self.losses = (torch.empty(steps) for _ in range(3))
        self.corrections = torch.empty(steps, 2)
        blocks = -(-K // kernels.BLOCK)
        pairs = kernels.TILE * K + REGISTER
        if path in ("features", "embedding"):
            sizes = {
                "G_T": N * K if path == "features" else 0, "W_T": M * K, "Z": kernels.TILE * odd_lines(k),
                "DZ": kernels.TILE * odd_lines(k), "X": kernels.TILE * M, "E": kernels.TILE * odd_lines(O), "H": pairs,
            }  # fmt: skip
        else:
            rows = tile_rows(spec)
            sizes = {"X": B * M, "E": B * O, "Z": rows * K, "DZ": rows * K}
            if path == "narrow":
                sizes |= {"E": B * K, "G_T": N * K, "H": rows * K, "C": N * K, "S": k * k}
        self.buffers = {name: torch.zeros(size) for name, size in sizes.items()}
        self.buffers |= {
            "ACTIVE": torch.zeros(pairs, dtype=torch.int32),
            "ENDS": torch.zeros(kernels.TILE * (blocks + 1), dtype=torch.int32),
            "WORDS": torch.zeros(K, dtype=torch.int64), "COUNTING": torch.arange(M, dtype=torch.int32),
        }  # fmt: skip
        self.fields = dict.fromkeys(kernels.Problem._fields, 0)
        self.fields |= {name: buffer.data_ptr() for name, buffer in self.buffers.items() if name in self.fields}
        self.fields |= {
            "task": TASKS.index(spec.task), "optimizer": OPTIMIZERS.index(spec.optimizer),
            "through_features": path == "features",
            "N": N, "M": M, "k": k, "K": K, "O": O, "B": B, "blocks": blocks, "LK": odd_lines(k), "LE": odd_lines(O),
            "GRADIENT": self.gradient.data_ptr(), "at_b": k * M, "at_out": k * M + K, "size": flat_size(spec),
        }  # fmt: skip

    def problem(self, model: Model, stream: Stream) -> kernels.Problem:
        """What the kernels take."""
        return kernels.Problem(**self.fields)._replace(
            STARTS=stream.starts.data_ptr(),
            INDICES=stream.indices.data_ptr(),
            VALUES=stream.values.data_ptr(),
            P_T=stream.P_T.data_ptr(),
            P2_T=0 if stream.P2_T is None else stream.P2_T.data_ptr(),
            PARAMETERS=model.parameters.data_ptr(),
            FIRST=model.first_moment.data_ptr(),
            SECOND=model.second_moment.data_ptr(),
        )


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
        path = path_of(model.spec, self.skips_zeros)
        stream, shape = (stream_key(model.spec), id(model.P)), (shape_class(model.spec), path)
        if stream not in self._streams:
            self._streams[stream] = Stream(model)
        if shape not in self._workspaces:
            self._workspaces[shape] = Workspace(model.spec, path)
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
        path = path_of(spec)
        sparse = N * padded(k) + m * padded(k) + kernels.TILE * (2 * odd_lines(k) + 2 * padded(k) + m + odd_lines(o))
        rows, width = tile_rows(spec), padded(k) if path == "narrow" else o
        dense = B * (m + width) + 6 * rows * padded(k) + (2 * N * padded(k) + 2 * k * k if path == "narrow" else 0)
        return n_streams * stream + 4 * (flat_size(spec) + (dense if path in ("narrow", "dense") else sparse))


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
    if work.path in ("features", "embedding"):
        well = kernels.train(problem, n, unit, half_l1, rates, corrections, factors, work.losses.data_ptr())
    else:
        well = dense_steps(model, work, problem, n)
    if well < n:
        model.diverged_step = first + well + 1
    return work.losses[:n]
