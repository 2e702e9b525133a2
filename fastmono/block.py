"""The state of training models: parameters, moments, projections, initial values; and what a precision means.

A model's W_in [k, m], b [k] and W_outT [k, o] (W_out transposed, so that a neuron is a row of all three) are views of
one flat float32 buffer of its own, every row starting on a 64-byte boundary, as are its moments: whatever an engine
computes from them cannot depend on which models stand beside it.

A linear path of rank r is r further rows without nonlinearity and bias: L_in [r, m] stands behind W_in, and L_outT
[r, o] behind W_outT, so that engines may take each pair for one matrix of k + r rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmono.philox import Purpose, normals, uniforms
from fastmono.spec import ModelSpec

ALIGNMENT = 16  # float32 numbers in 64 bytes


class EngineError(RuntimeError):
    """An engine cannot go on: the message says with which shape and settings, in a line."""


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of each trained tensor, as engines hold it, in the order in which they lie in memory."""
    k, r, m, o = spec.n_neurons, spec.linear_path, spec.d_embed, spec.d_output
    found = {"W_in": (k, m), "L_in": (r, m), "b": (k,), "W_outT": (k, o), "L_outT": (r, o)}
    return found if r else {name: shape for name, shape in found.items() if not name.startswith("L_")}


def padded(n: int) -> int:
    """The length of a row of n numbers in a model's buffers, a multiple of 64 bytes."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def views(spec: ModelSpec, flat: Tensor) -> dict[str, Tensor]:
    """The trained tensors as views of a model's flat buffer: rows one after another, each padded.

    Of the buffers of equal models, stacked [models, numbers], the tensors of all, [models, ...].
    """
    found, offset = {}, 0
    for name, (*rows, length) in shapes(spec).items():
        size = padded(length) * (rows[0] if rows else 1)
        tensor = flat[..., offset : offset + size]
        found[name] = tensor.view(*flat.shape[:-1], *rows, padded(length))[..., :length]
        offset += size
    return found


def flat_size(spec: ModelSpec) -> int:
    """Numbers in a model's flat buffer: its parameters and the padding of their rows, which stays 0."""
    rows = spec.n_neurons + spec.linear_path
    return rows * (padded(spec.d_embed) + padded(spec.d_output)) + padded(spec.n_neurons)


@contextmanager
def single_thread() -> Iterator[None]:
    """PyTorch with one thread: reductions and factorisations that depend on the number of threads do not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=256)
def projection(seed: int, purpose: Purpose, n_features: int, d_embed: int) -> Tensor:
    """A random projection, float32 [m, N], shared and not to be written to (recipe fact 2).

    A Gaussian N x m matrix, the U of its thin singular value decomposition, rows scaled to unit length, transposed.
    """
    gaussian = normals(seed, purpose, 0, n_features * d_embed).view(n_features, d_embed)
    with single_thread():
        U = torch.linalg.svd(gaussian, full_matrices=False).U
        return (U / torch.linalg.vector_norm(U, dim=1, keepdim=True)).T.float().contiguous()


def initial_values(spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors before the first step: U(-1, 1) / sqrt(fan_in), and `init_bias` added to b (recipe fact 4).

    A tensor has a number of its own in the generator's counter: with a linear path the others keep their values.
    """

    def draw(tensor: int, shape: tuple[int, ...], fan_in: int) -> Tensor:
        count = functools.reduce(int.__mul__, shape)
        u = uniforms(spec.seed, Purpose.INITIAL_WEIGHTS, tensor, count)
        return ((2 * u - 1) / fan_in**0.5).view(shape)

    k, r, m, o = spec.n_neurons, spec.linear_path, spec.d_embed, spec.d_output
    found = {"W_in": draw(0, (k, m), m), "b": draw(1, (k,), m) + spec.init_bias, "W_outT": draw(2, (o, k), k).T}
    if r:
        found |= {"L_in": draw(3, (r, m), m), "L_outT": draw(4, (o, r), r).T}
    return {name: value.float() for name, value in found.items()}


class Model:
    """One model in training, at its initial values; with `projections` (P, P2), all zero and to be filled in.

    Attributes:
        parameters, first_moment, second_moment: flat buffers; the moments are empty for SGD.
        tensors: the parameters by name, views.
        P, P2: the projections, [m, N]; P2 is None but for the reprojector.
        order: int32 [k], a permutation: the neurons as the CPU engine works on them. It changes at fixed steps, decides
            in which order numbers are added up, and so belongs to the state.
        diverged_step: the step (from 1) whose loss or update was not finite, or None.
        snapshot: the flat parameters at the last power-of-two step (or 0), where a diverged model is frozen.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype = torch.float32,
        projections: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        self.spec = spec
        self.parameters = torch.zeros(flat_size(spec), dtype=dtype)
        self.tensors = views(spec, self.parameters)
        self.P2: Tensor | None = None
        if projections is None:
            for name, value in initial_values(spec).items():
                self.tensors[name].copy_(value)
            self.P = projection(spec.seed, Purpose.PROJECTION, spec.n_features, spec.d_embed).to(dtype)
            if spec.task == "reprojector":
                self.P2 = projection(spec.seed, Purpose.SECOND_PROJECTION, spec.n_features, spec.d_embed).to(dtype)
        else:  # a model that was saved: whoever restores it fills in the rest
            self.P, self.P2 = projections
        moments = 0 if spec.optimizer == "sgd" else flat_size(spec)
        self.first_moment = torch.zeros(moments, dtype=dtype)
        self.second_moment = torch.zeros(moments, dtype=dtype)
        self.order = torch.arange(spec.n_neurons, dtype=torch.int32)
        self.diverged_step: int | None = None
        self.snapshot = self.parameters.clone()

    def freeze(self) -> None:
        """Put a diverged model back to its snapshot, for good."""
        self.parameters.copy_(self.snapshot)
        self.first_moment.zero_()
        self.second_moment.zero_()


class Block:
    """Models that an engine advances together, of one shape class (`shape_class`).

    All are at the same step; a model whose own steps are done stays as it is while the others go on.
    """

    def __init__(self, models: Sequence[Model], step: int = 0) -> None:
        self.models = list(models)
        self.step = step
        """Updates already made, but for a model with fewer steps of its own."""

    @classmethod
    def new(cls, specs: Iterable[ModelSpec], dtype: torch.dtype = torch.float32) -> Block:
        """Models at their initial values."""
        return cls([Model(spec, dtype) for spec in specs])

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """The models' specs, in order."""
        return tuple(model.spec for model in self.models)

    def active(self) -> list[int]:
        """Indices of the models that still train: not diverged, and with steps left."""
        return [i for i, m in enumerate(self.models) if m.diverged_step is None and self.step < m.spec.steps]


def shape_class(spec: ModelSpec, mixes_widths: bool = False) -> tuple[object, ...]:
    """Models of one block agree in this; seed, learning rate, biases, l1 and the distribution's skew may differ.

    `mixes_widths`: for an engine whose blocks hold any numbers of neurons, ranks of the linear path, and steps.
    """
    width, length = ((), ()) if mixes_widths else ((spec.n_neurons, spec.linear_path), (spec.steps,))
    return (
        spec.task, spec.n_features, spec.d_embed, *width,
        spec.activation, spec.optimizer, spec.batch_size, *length,
    )  # fmt: skip


def parts(specs: Iterable[ModelSpec]) -> list[list[int]]:
    """Indices of a block's models, those of one width and number of steps together: files stack equal shapes."""
    found: dict[object, list[int]] = {}
    for i, spec in enumerate(specs):
        found.setdefault(shape_class(spec), []).append(i)
    return list(found.values())


def share_projections(models: Iterable[Model]) -> None:
    """Let models whose projections are equal hold the same tensors: engines and files keep one copy of these.

    Those that were read from different files do not, and a seed does not tell: the file may come from another machine.
    """
    distinct: dict[object, list[Model]] = {}
    for model in models:
        found = distinct.setdefault((model.spec.seed, model.P.shape), [])
        for other in found:
            if _equal(model.P, other.P) and _equal(model.P2, other.P2):
                model.P, model.P2 = other.P, other.P2
                break
        else:
            found.append(model)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to ten mantissa bits, ties to even, still float32; infinities and NaN are kept."""
    bits = x.view(torch.int32)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


def round_to_bf16(x: Tensor) -> Tensor:
    """float32 rounded to seven mantissa bits, ties to even, still float32."""
    return x.bfloat16().float()


PRECISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda x: x,
    "tf32": round_to_tf32,
    "bf16": round_to_bf16,
}
"""What a precision does to the operands of every matrix product. Everything else is float32 always."""
