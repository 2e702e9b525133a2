"""What to train: `ModelSpec` is one model, `Grid` is every model of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import operator
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmono.frequencies import rarest_probability, thresholds

TASKS = ("decoder", "reprojector", "abs")
ACTIVATIONS = ("relu", "gelu", "solu")
FREQUENCIES = ("uniform", "power_law")
OPTIMIZERS = ("lamb", "adamw", "sgd")
SCHEDULES = ("published", "cosine", "constant")
BIAS_DECAY_MODES = ("global", "per_neuron", "rate")

LARGEST_DIMENSION = 2**31 - 1  # a counter word of the generator has 32 bits
LARGEST_STEPS = 2**63 - 1  # two counter words, held in an int64
LARGEST_FLOAT32 = 3.4028234663852886e38


def _fail(field: str, value: object, allowed: str) -> ValueError:
    try:
        shown = repr(value)
    except Exception:  # an integer of more digits than Python prints, or a foreign type
        shown = f"<{type(value).__name__}>"
    return ValueError(f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: {allowed}")


def _whole_number(field: str, value: object, low: int, high: int) -> int:
    allowed = f"must be a whole number from {low} to {high}"
    if isinstance(value, bool | np.bool_):
        raise _fail(field, value, allowed)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception:  # a foreign type may raise anything from __index__
        raise _fail(field, value, allowed) from None
    if not low <= number <= high:
        raise _fail(field, number, allowed)
    return number


def _real_number(field: str, value: object, allowed: str, accept: Callable[[float], bool]) -> float:
    if isinstance(value, bool | np.bool_ | str | bytes | bytearray):
        raise _fail(field, value, allowed)
    try:
        number = float(value)  # type: ignore[arg-type]
    except Exception:
        raise _fail(field, value, allowed) from None
    if not (math.isfinite(number) and abs(number) <= LARGEST_FLOAT32 and accept(number)):
        raise _fail(field, value, allowed)
    return number + 0.0  # -0.0 and 0.0 are one value and must have one content hash


def _survives_float32(number: float) -> bool:
    return struct.unpack("f", struct.pack("f", number))[0] > 0.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model and how it is trained. The defaults are the published recipe at lr 0.003 with zero bias.

    Raises `ValueError` naming the field, the value and what is allowed. Whether a spec is valid does not depend on
    the machine; whether it fits one is decided when a run is planned.
    """

    task: str = "decoder"
    """decoder (recover f from P f) | reprojector (recover P2 f) | abs (recover |f| of signed features)."""
    n_features: int = 512
    """N, features in the input distribution."""
    d_embed: int = 64
    """m, dimension the features are projected to: the model's input; at most N."""
    n_neurons: int = 1024
    """k, neurons in the hidden layer."""
    linear_path: int = 0
    """r, rank of a direct linear map from input to output beside the neurons, y = W_out h + L_out (L_in x); at most
    d_embed, above which it makes no other maps. 0: none, as published."""
    activation: str = "relu"
    """relu | gelu (exact) | solu (z exp z, as published, without a normalisation)."""
    feature_prob: float = 1 / 64
    """Mean probability, over features, that a feature is present in a sample; in (0, 1]."""
    frequency: str = "uniform"
    """uniform (every feature alike) | power_law (p_j proportional to (j+1)**-1.1, clipped at 1)."""
    optimizer: str = "lamb"
    """lamb (as published) | adamw | sgd (both with PyTorch's defaults)."""
    lr: float = 3e-3
    """Base learning rate, above 0."""
    schedule: str = "published"
    """published (lr (1 + cos(pi t / 512)) / 2, periodic) | cosine (one half wave over all steps) | constant."""
    init_bias: float = 0.0
    """Offset added to the initial bias of every neuron."""
    bias_decay: float = 0.0
    """In the first half of training each update is followed by b *= 1 - bias_decay * lr; at least 0."""
    bias_decay_mode: str = "global"
    """global (as published) | per_neuron (bias_decay counts for a neuron as far as its outputs are spread over many
    features) | rate (the relative change of W_in and W_out takes the place of lr). The rules: fastmono/optim.py."""
    l1: float = 0.0
    """Strength of the penalty on the sum of |h|; at least 0."""
    batch_size: int = 8192
    """B, samples a step."""
    steps: int = 2**17
    """Optimizer steps."""
    seed: int = 0
    """In [0, 2**32). Models with one seed and one distribution see the same batches."""

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        for field, names in CHOICES.items():
            value = getattr(self, field)
            if not (isinstance(value, str) and value in names):
                raise _fail(field, value, "must be one of " + ", ".join(names))
            put(field, str(value))
        for field, (low, high) in WHOLE_NUMBERS.items():
            put(field, _whole_number(field, getattr(self, field), low, high))
        for field, (allowed, accept) in REAL_NUMBERS.items():
            put(field, _real_number(field, getattr(self, field), allowed, accept))
        if self.d_embed > self.n_features:
            raise _fail("d_embed", self.d_embed, f"must be at most n_features, which is {self.n_features}")
        if self.linear_path > self.d_embed:
            raise _fail("linear_path", self.linear_path, f"must be at most d_embed, which is {self.d_embed}")
        if self.bias_decay_mode == "per_neuron" and self.task == "reprojector":
            raise _fail(
                "bias_decay_mode",
                self.bias_decay_mode,
                "the outputs of task='reprojector' are not features; must be global or rate",
            )
        self._check_frequencies()

    def _check_frequencies(self) -> None:
        share = self.feature_prob / 2 if self.task == "abs" else self.feature_prob
        rarest = rarest_probability(self.n_features, share, self.frequency)
        if self.frequency == "power_law" and rarest >= 1.0:
            raise _fail("feature_prob", self.feature_prob, "clips every feature of the power_law at 1; must be lower")
        if thresholds(rarest) == 0:
            raise _fail(
                "feature_prob",
                self.feature_prob,
                f"leaves the rarest feature a probability of {rarest:.3g}; must be at least 2**-32",
            )

    @property
    def d_output(self) -> int:
        """o, output width: N for decoder and abs, m for reprojector."""
        return self.d_embed if self.task == "reprojector" else self.n_features

    @property
    def n_parameters(self) -> int:
        """Trained numbers: W_in, b and W_out, L_in and L_out."""
        return self.n_neurons * (self.d_embed + 1 + self.d_output) + self.linear_path * (self.d_embed + self.d_output)

    @property
    def flops_per_step(self) -> int:
        """Useful (dense) floating-point operations of one training step: 6 B (m k + k o) - 2 B m k.

        A linear path of rank r takes as many as r neurons.
        """
        rows = self.n_neurons + self.linear_path
        hidden, output = self.d_embed * rows, rows * self.d_output
        return 6 * self.batch_size * (hidden + output) - 2 * self.batch_size * hidden

    def replace(self, **changes: Any) -> ModelSpec:
        """The same spec with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field, in order, as JSON can hold it."""
        return {name: getattr(self, name) for name in FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`; a field that is missing takes its default. `ValueError` for an unknown one."""
        if not isinstance(values, dict):
            raise ValueError(f"a model is a JSON object of fields, not {type(values).__name__}")
        unknown = [str(name) for name in values if name not in FIELDS]
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}: must be one of {', '.join(FIELDS)}")
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """What names this spec: `to_dict` without the fields that came later (`LATER_FIELDS`) at their defaults.

        So a model has the name that it had before there were such fields, and its results stay valid.
        """
        return {name: value for name, value in self.to_dict().items() if LATER_FIELDS.get(name, ...) != value}

    def content_hash(self, *context: object) -> str:
        """32 hexadecimal digits that name this spec together with `context` (engine, precision, schema)."""
        text = json.dumps([self.identity(), *map(str, context)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


CHOICES = {
    "task": TASKS,
    "activation": ACTIVATIONS,
    "frequency": FREQUENCIES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "bias_decay_mode": BIAS_DECAY_MODES,
}
WHOLE_NUMBERS = {
    "n_features": (1, LARGEST_DIMENSION),
    "d_embed": (1, LARGEST_DIMENSION),
    "n_neurons": (1, LARGEST_DIMENSION),
    "linear_path": (0, LARGEST_DIMENSION),
    "batch_size": (1, LARGEST_DIMENSION),
    "steps": (1, LARGEST_STEPS),
    "seed": (0, 2**32 - 1),
}
REAL_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "feature_prob": ("must be a number above 0 and at most 1", lambda p: 0.0 < p <= 1.0),
    "lr": ("must be a finite float32 above 0", _survives_float32),
    "init_bias": ("must be a finite float32", lambda x: True),
    "bias_decay": ("must be a finite float32, at least 0", lambda x: x >= 0.0),
    "l1": ("must be a finite float32, at least 0", lambda x: x >= 0.0),
}
FIELDS = tuple(field.name for field in dataclasses.fields(ModelSpec))
LATER_FIELDS: dict[str, object] = {"linear_path": 0, "bias_decay_mode": "global"}
"""Fields that a model had not when schema 1 was written first, and their defaults, which may not change."""


class Grid:
    """An ordered set of models: `Grid(base, lr=[...], seed=range(4))` is a product over any fields of `ModelSpec`.

    Order: the axes as they are written, the last one fastest. `a + b` is the union: the models of `a`, then those of
    `b` that `a` lacks. Equal when the same models stand in the same order. Raises `ValueError` for an unknown field,
    an empty axis, a value twice in one axis, or a combination that is not a valid `ModelSpec`.
    """

    __slots__ = ("specs",)

    def __init__(self, base: ModelSpec | None = None, /, **axes: Iterable[Any]) -> None:
        base = ModelSpec() if base is None else base
        if not isinstance(base, ModelSpec):
            raise ValueError(f"a grid starts from a ModelSpec, not {type(base).__name__}")
        values = [axis_values(field, axis) for field, axis in axes.items()]
        self.specs: tuple[ModelSpec, ...] = tuple(
            # One construction a model: fields that are only valid together (d_embed, n_features) may both be axes.
            base.replace(**dict(zip(axes, combination, strict=True)))
            for combination in itertools.product(*values)
        )
        self._refuse_duplicates()

    @classmethod
    def of(cls, specs: Iterable[ModelSpec]) -> Grid:
        """A grid of the given models, in their order. `ValueError` when one comes twice or there is none."""
        grid = cls.__new__(cls)
        grid.specs = tuple(specs)
        if not grid.specs:
            raise ValueError("a grid needs at least one model")
        for spec in grid.specs:
            if not isinstance(spec, ModelSpec):
                raise ValueError(f"a grid holds ModelSpecs, not {type(spec).__name__}")
        grid._refuse_duplicates()
        return grid

    def _refuse_duplicates(self) -> None:
        seen: dict[ModelSpec, int] = {}
        for i, spec in enumerate(self.specs):
            if spec in seen:
                raise ValueError(f"models {seen[spec]} and {i} of the grid are the same: {describe(spec)}")
            seen[spec] = i

    def __len__(self) -> int:
        return len(self.specs)

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self.specs)

    def __getitem__(self, i: int) -> ModelSpec:
        return self.specs[i]

    def __add__(self, other: Grid) -> Grid:
        if not isinstance(other, Grid):
            return NotImplemented
        return Grid.of(dict.fromkeys(self.specs + other.specs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.specs == other.specs

    def __hash__(self) -> int:
        return hash(self.specs)

    def __repr__(self) -> str:
        axes = "".join(f", {field}={list(values)}" for field, values in self.axes.items())
        return f"<Grid of {len(self)} models{axes}>"

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The fields in which the models differ, each with its values in order of appearance."""
        values = {field: tuple(dict.fromkeys(getattr(spec, field) for spec in self.specs)) for field in FIELDS}
        return {field: found for field, found in values.items() if len(found) > 1}

    def override(self, **axes: Iterable[Any]) -> Grid:
        """Every model with these fields replaced, by each combination of the values given; equal models once.

        The command line's rule: `preset("demo").override(lr=[1e-3])` has two models, one for each initial bias.
        """
        values = [axis_values(field, axis) for field, axis in axes.items()]
        combinations = [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*values)]
        return Grid.of(dict.fromkeys(spec.replace(**changes) for spec in self.specs for changes in combinations))

    def to_json(self) -> str:
        """A JSON list of models, every field written out."""
        return json.dumps([spec.to_dict() for spec in self.specs])

    @classmethod
    def from_json(cls, text: str) -> Grid:
        """Inverse of `to_json`. `ValueError` for anything that is not a list of models."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a grid is a JSON list of models: {error}") from None
        if not isinstance(values, list):
            raise ValueError(f"a grid is a JSON list of models, not {type(values).__name__}")
        return cls.of(ModelSpec.from_dict(value) for value in values)


def axis_values(field: str, axis: Iterable[Any]) -> tuple[Any, ...]:
    """The values of one axis as a tuple. `ValueError` for an unknown field, no values, or a value given twice."""
    if field not in FIELDS:
        raise ValueError(f"unknown field {field!r}: must be one of {', '.join(FIELDS)}")
    if isinstance(axis, str | bytes) or not isinstance(axis, Iterable):
        raise _fail(field, axis, "an axis is a sequence of values, such as [1, 2]")
    values = tuple(axis)
    if not values:
        raise ValueError(f"{field}: an axis needs at least one value")
    for i, value in enumerate(values):
        if any(value is earlier or value == earlier for earlier in values[:i]):
            raise _fail(field, value, "stands twice in its axis")
    return values


def describe(spec: ModelSpec, fields: Iterable[str] = ("task", "n_neurons", "lr", "init_bias", "seed")) -> str:
    """A short line that names a model by some of its fields."""
    return ", ".join(f"{field} {getattr(spec, field):g}" if isinstance(getattr(spec, field), float)
                     else f"{field} {getattr(spec, field)}" for field in fields)  # fmt: skip
