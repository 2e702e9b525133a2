"""The CPU engine: float32 on one core, as fast as dense products at the machine's best rate, or faster.

- The batches of several steps are drawn once for all models that share them, as lists of the
  features present (cpu_sampler.py).
- Then one model after another trains through those steps in one compiled call, with its state in cache
  (cpu_kernels.py, cpu_rows.py). ReLU's zeros are skipped: they add nothing. Where a bound can tell that a block of
  neurons is all zeros for a sample, not even they are computed (cpu_hidden.py).
- gelu and solu have no zeros: their products are PyTorch's, in row tiles that stay in cache (cpu_dense.py).

The arithmetic of a model, and the address alignment of everything it touches, follow from its own spec alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmono.block import Block, EngineError, Model, flat_size, padded, shape_class, single_thread
from fastmono.engines import cpu_kernels as kernels
from fastmono.engines.cpu_dense import dense_steps, tile_rows
from fastmono.engines.cpu_hidden import BLOCK, TILE
from fastmono.engines.cpu_problem import Problem
from fastmono.engines.cpu_sampler import sample
from fastmono.engines.simd import REGISTER
from fastmono.frequencies import presence_probabilities, scales, thresholds
from fastmono.optim import adam_corrections, bias_factor, decay_strength, learning_rates
from fastmono.philox import Purpose, stream_key
from fastmono.spec import BIAS_DECAY_MODES, OPTIMIZERS, TASKS, ModelSpec

STEPS_AT_ONCE = 32
"""Steps that one model trains before the next one does: its state comes from memory once for all of them."""
ORDER_EVERY = 64
"""Steps after which a model's neurons are put in the order of their biases again (cpu_hidden.py)."""
LEAST_NARROW = 2**24
"""B k N from which Gram matrices pay: below, PyTorch's calls take as long as its products."""
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What kernels read at the addresses they are given, whatever PyTorch's defaults are."""
STREAM_NUMBERS = 2**23
"""Features, present or not, that are drawn at once at most (but at least one step's)."""


def steps_at_once(spec: ModelSpec) -> int:
    """Steps that a model trains before the next model does, and whose batches are drawn together."""
    return max(1, min(STEPS_AT_ONCE, STREAM_NUMBERS // (spec.batch_size * spec.n_features)))


def path_of(spec: ModelSpec, skips_zeros: bool = True) -> str:
    """How a model's gradients are computed, from its spec alone: whatever stands beside it, the bits are the same.

    features    only present features and active neurons; z from G = W_in P
    embedding   only active neurons; z from x, which takes fewer multiplications where many features are present
    narrow      Gram matrices (cpu_dense.py), for at most N / 2 neurons and rows of the linear path: relu only where
                its bias starts at 0 or above and so nearly all neurons are used
    dense       dense products; with `skips_zeros` False for every model
    """
    N, m, k, B = spec.n_features, spec.d_embed, spec.n_neurons + spec.linear_path, spec.batch_size
    narrow = spec.task != "reprojector" and 2 * k <= N and B * k * N >= LEAST_NARROW
    if spec.activation == "relu" and skips_zeros and not (narrow and spec.init_bias >= 0):
        return "features" if N * spec.feature_prob + N * m / B < m else "embedding"
    return "narrow" if narrow and skips_zeros else "dense"


def columns(spec: ModelSpec) -> int:
    """Length of a row with a number for each neuron and, behind these, for each row of the linear path."""
    return padded(spec.n_neurons) + padded(spec.linear_path)


def odd_lines(length: int) -> int:
    """A row length of an odd number of cache lines, so that a column does not fall into a few sets of the cache."""
    return padded(length) | REGISTER


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers below 2**-126 are 0 on this thread, where the processor can do that.

    A neuron that is no longer active has moments that halve every seven steps until they are denormal, which takes
    some 800, and multiplying those takes a processor many times as long; as zeros they move no parameter either.
    """
    before = torch.tensor([1e-39], **FLOAT32).mul(1.0).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class Batches:
    """Room for the batches of a few steps of one stream: each sample's present features. Streams take turns in it.

    Attributes:
        starts: int32 [steps, B + 1], where each sample's features begin in the next two.
        indices, values: int32 and float32, the present features and what they are worth.
    """

    def __init__(self, spec: ModelSpec) -> None:
        N, B, steps = spec.n_features, spec.batch_size, steps_at_once(spec)
        self.starts = torch.empty(steps, B + 1, dtype=torch.int32, device="cpu")
        # Room for every feature: memory that is never written to is never taken.
        self.indices = torch.empty(steps * B * N + REGISTER, dtype=torch.int32, device="cpu")
        self.values = torch.empty(steps * B * N + REGISTER, **FLOAT32)


class Stream:
    """A sequence of batches, for all models that share it.

    Raises `EngineError` where a batch has more features present than 32 bits count.
    """

    def __init__(self, model: Model, batches: Batches) -> None:
        spec = model.spec
        N, B = spec.n_features, spec.batch_size
        self.batches, self.B, self.seed = batches, B, spec.seed
        self.other = int(Purpose.NEGATIVE_FEATURES) if spec.task == "abs" else -1
        share = spec.feature_prob / 2 if spec.task == "abs" else spec.feature_prob
        p = presence_probabilities(N, share, spec.frequency)
        expected = B * float(p.sum()) * (2 if spec.task == "abs" else 1)
        if expected + 10 * expected**0.5 > 2**31:
            raise EngineError(
                f"n_features={N}, batch_size={B}, feature_prob={spec.feature_prob}: more than 2**31 features are "
                "present in a batch; use a smaller batch, or the reference engine"
            )
        self.last, self.scale = (thresholds(p) - 1).astype(np.uint32), scales(p)
        self.words = np.empty(4 * -(-N // 4), np.uint32)
        self.row = torch.zeros(padded(N), **FLOAT32)
        self.P_T = transposed(model.P)
        self.P = transposed(self.P_T)
        self.P2_T = None if model.P2 is None else transposed(model.P2)

    def sample(self, first_step: int, steps: int) -> None:
        """Draw the batches that first_step, first_step + 1, ... updates precede, in place of what was drawn before."""
        room = self.batches
        sample(
            first_step, steps, self.B, self.seed, int(Purpose.FEATURES), self.other, self.last, self.scale,
            self.row.numpy(), self.words, room.starts.data_ptr(), room.indices.data_ptr(), room.values.data_ptr(),
        )  # fmt: skip


def transposed(P: Tensor) -> Tensor:
    """[N, m] in padded rows, for a projection [m, N]."""
    rows = torch.zeros(P.shape[1], padded(P.shape[0]), **FLOAT32)
    rows[:, : P.shape[0]] = P.T
    return rows


class Workspace:
    """What one model-step needs besides the model and its batch, reused by every model of one shape and path."""

    def __init__(self, spec: ModelSpec, path: str) -> None:
        self.path = path
        N, k, B = spec.n_features, spec.n_neurons, spec.batch_size
        M, O = padded(spec.d_embed), padded(spec.d_output)  # noqa: E741
        r, K = spec.linear_path, columns(spec)
        LK, LE, steps = odd_lines(K), odd_lines(O), steps_at_once(spec)
        self.gradient = torch.zeros(flat_size(spec), **FLOAT32)
        self.rates, self.factors, self.strengths, self.losses = (torch.empty(steps, **FLOAT32) for _ in range(4))
        self.corrections = torch.empty(steps, 2, **FLOAT32)
        self.change = torch.zeros(REGISTER, **FLOAT32)
        blocks = -(-padded(k) // BLOCK)
        pairs = TILE * LK
        if path in ("features", "embedding"):
            sizes = {
                "G_T": N * LK if path == "features" else 0, "W_T": M * LK, "H": pairs, "DZ": pairs,
                "ROW": 128, "BIAS": K, "STALE": K, "SQUARES": 2 * K, "TOPS": padded(blocks),
                "BOUNDS": (2 if spec.task == "abs" else 1) * N * padded(blocks) if path == "features" else 0,
                "X": TILE * M, "E": TILE * LE,
            }  # fmt: skip
        else:
            rows = tile_rows(spec)
            sizes = {"X": B * M, "E": B * O, "Z": rows * K, "DZ": rows * K}
            if path == "narrow":
                sizes |= {"E": B * K, "G_T": N * K, "H": rows * K, "C": N * K, "S": (k + r) ** 2}
        self.buffers = {name: torch.zeros(size, **FLOAT32) for name, size in sizes.items()}
        if path in ("features", "embedding"):
            self.buffers |= {
                "ACTIVE": torch.zeros(pairs, dtype=torch.int32, device="cpu"),
                "NEXT": torch.zeros(TILE, dtype=torch.int32, device="cpu"),
                "ENDS": torch.zeros(TILE * (blocks + 1), dtype=torch.int32, device="cpu"),
                "GROUPS": torch.zeros(blocks + 1, dtype=torch.int32, device="cpu"),
                "SAMPLES": torch.zeros(TILE, dtype=torch.int32, device="cpu"),
                "MASKS": torch.zeros(TILE, dtype=torch.int64, device="cpu"),
                "NEEDED": torch.zeros(padded(blocks) + BLOCK, dtype=torch.int64, device="cpu"),
                "WORDS": torch.zeros(K + BLOCK, dtype=torch.int64, device="cpu"),
                "NEURONS": torch.zeros(K, dtype=torch.int32, device="cpu"),
                "SIGNED": torch.zeros(N, dtype=torch.int32, device="cpu"),
                "COUNTING": torch.arange(M, dtype=torch.int32, device="cpu"),
                "CHANGED": torch.zeros(K, **FLOAT32),
                "MOVING": torch.zeros(K, **FLOAT32),
                "BEHIND": torch.zeros(K, dtype=torch.int32, device="cpu"),
            }
            self.buffers["NEURONS"][padded(k) : padded(k) + r] = torch.arange(k, k + r)
            self.buffers["TOPS"].fill_(-torch.inf)
        self.fields = dict.fromkeys(Problem._fields, 0)
        self.fields |= {name: buffer.data_ptr() for name, buffer in self.buffers.items() if name in self.fields}
        self.fields |= {
            "task": TASKS.index(spec.task), "optimizer": OPTIMIZERS.index(spec.optimizer),
            "through_features": path == "features",
            "N": N, "M": M, "k": k, "r": r, "K": K, "O": O, "B": B,
            "NP": padded(N), "LB": padded(blocks), "blocks": blocks, "LK": LK, "LE": LE,
            "GRADIENT": self.gradient.data_ptr(), "CHANGE": self.change.data_ptr(),
            "at_b": (k + r) * M, "at_out": (k + r) * M + padded(k), "size": flat_size(spec),
        }  # fmt: skip

    def problem(self, model: Model, stream: Stream) -> Problem:
        """What the kernels take."""
        return Problem(**self.fields)._replace(
            decay=BIAS_DECAY_MODES.index(model.spec.bias_decay_mode),
            STARTS=stream.batches.starts.data_ptr(),
            INDICES=stream.batches.indices.data_ptr(),
            VALUES=stream.batches.values.data_ptr(),
            P_T=stream.P_T.data_ptr(),
            P=stream.P.data_ptr(),
            P2_T=0 if stream.P2_T is None else stream.P2_T.data_ptr(),
            PARAMETERS=model.parameters.data_ptr(),
            FIRST=model.first_moment.data_ptr(),
            SECOND=model.second_moment.data_ptr(),
        )


class CpuEngine:
    """Trains in float32 on one core; a machine's cores are used by one process each.

    Args:
        precision: fp32, the only one: rounding operands costs time on a CPU and saves none.
        skips_zeros: False trains every model with plain dense products, for comparison.
    """

    name = "cpu"

    def __init__(self, precision: str = "fp32", skips_zeros: bool = True) -> None:
        if precision != "fp32":
            raise ValueError(f"precision={precision!r}: the cpu engine computes in fp32; the reference engine in any")
        self.precision, self.skips_zeros = precision, skips_zeros
        self._block: Block | None = None
        self._batches: Batches | None = None
        self._streams: dict[object, Stream] = {}
        self._workspaces: dict[object, Workspace] = {}

    def advance(self, block: Block, n_steps: int) -> Tensor:
        """Train every model for n steps, in place. Returns losses, float32 [A, n]: NaN where a model did not train."""
        if block is not self._block:  # the buffers of the block before this one are of no more use
            self._block, self._batches, self._streams, self._workspaces = block, None, {}, {}
        losses = torch.full((len(block.models), n_steps), torch.nan, **FLOAT32)
        done = 0
        with single_thread(), flushed_denormals(), torch.no_grad():
            while done < n_steps:
                active = block.active()
                left = [block.specs[i].steps - block.step for i in active]
                n = min(n_steps - done, steps_at_once(block.specs[0]), ORDER_EVERY - block.step % ORDER_EVERY, *left)
                for stream, members in self._by_stream(block, active):
                    stream.sample(block.step, n)
                    for i in members:
                        work = self._workspace(block.models[i])
                        losses[i, done : done + n] = train(block.models[i], stream, work, block.step, n)
                block.step += n
                done += n
        return losses

    def _by_stream(self, block: Block, active: Sequence[int]) -> list[tuple[Stream, list[int]]]:
        """The models that train, by the stream that they see."""
        found: dict[object, list[int]] = {}
        for i in active:
            model = block.models[i]
            found.setdefault((stream_key(model.spec), id(model.P)), []).append(i)
        if self._batches is None:
            self._batches = Batches(block.specs[0])
        for key, members in found.items():
            if key not in self._streams:
                self._streams[key] = Stream(block.models[members[0]], self._batches)
        return [(self._streams[key], members) for key, members in found.items()]

    def _workspace(self, model: Model) -> Workspace:
        path = path_of(model.spec, self.skips_zeros)
        key = shape_class(model.spec), path
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(model.spec, path)
        return self._workspaces[key]

    def fetch(self, block: Block) -> None:
        """Nothing to do: the block's models are where they are trained."""

    @staticmethod
    def workspace_bytes(spec: ModelSpec, n_streams: int) -> int:
        """Memory beyond the models' own state, for a block of one shape whose models see `n_streams` streams."""
        N, k, B = spec.n_features, spec.n_neurons + spec.linear_path, spec.batch_size
        m, o, steps = padded(spec.d_embed), padded(spec.d_output), steps_at_once(spec)
        # All of a batch's features where that is little, else far more than chance will give.
        present = 1.0 if steps * B * N <= STREAM_NUMBERS else min(1.0, 2 * spec.feature_prob + 32 / N)
        batches = 4 * steps * (B + 1) + int(8 * steps * B * N * present)
        stream = 4 * (N * m * (2 if spec.task == "reprojector" else 1) + m * padded(N) + 4 * N)
        path, K = path_of(spec), columns(spec)
        blocks = padded(-(-K // BLOCK))
        lists = 3 * odd_lines(K) + blocks + 2 + m + odd_lines(o) + 1
        tile = TILE * lists + 2 * (K + BLOCK) + 2 * (blocks + BLOCK) + blocks
        through = (N * odd_lines(K) + N * blocks * (2 if spec.task == "abs" else 1)) if path == "features" else 0
        sparse = through + m * odd_lines(K) + 8 * K + N + m + 2 * blocks + 5 * TILE + tile
        rows, width = tile_rows(spec), K if path == "narrow" else o
        dense = B * (m + width) + 6 * rows * K + (2 * N * K + 2 * k * k if path == "narrow" else 0)
        return batches + n_streams * stream + 4 * (flat_size(spec) + (dense if path in ("narrow", "dense") else sparse))


def train(model: Model, stream: Stream, work: Workspace, first: int, n: int) -> Tensor:
    """Train one model for n steps from its step `first`, and return its losses, float32 [n]."""
    spec = model.spec
    work.rates[:n] = torch.tensor(learning_rates(spec, first, n))
    work.factors[:n] = torch.tensor([bias_factor(spec, step) for step in range(first, first + n)])
    work.strengths[:n] = torch.tensor([decay_strength(spec, step) for step in range(first, first + n)])
    if spec.optimizer == "adamw":
        work.corrections[:n] = torch.tensor([adam_corrections(step) for step in range(first, first + n)])
    work.losses.fill_(torch.nan)
    problem = work.problem(model, stream)
    unit, half_l1 = np.float32(2 / spec.batch_size), np.float32(spec.l1 / 2)
    if work.path in ("features", "embedding"):
        if first % ORDER_EVERY == 0:
            model.order = model.tensors["b"].argsort(stable=True).int()
        work.buffers["NEURONS"][: padded(spec.n_neurons)] = model.order[-1]  # padding: of a bias that is never reached
        work.buffers["NEURONS"][: spec.n_neurons] = model.order
        each = (work.rates, work.corrections, work.factors, work.strengths, work.losses)
        well = kernels.train(problem, n, unit, half_l1, *(tensor.data_ptr() for tensor in each))
    else:
        well = dense_steps(model, work, problem, n)
    if well < n:
        model.diverged_step = first + well + 1
    return work.losses[:n]
