"""What a state or a checkpoint file says of itself, checked before any tensor of it is read.

Its header must be one that `RunDirectory` writes, and its tensors must have the shapes that its models' specs give:
so no file takes more memory than a run of the same models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmono.files import BadFile, TensorFile
from fastmono.metrics import NAMES
from fastmono.spec import LARGEST_STEPS, ModelSpec

SCHEMA = 1
LOG_EVERY = 16
HASH = re.compile("[0-9a-f]{32}")


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value from a file is a whole number, and no boolean, from low to high."""
    return type(value) is int and low <= value <= high


def check_header(file: TensorFile, kind: str) -> list[str]:
    """The content hashes of the models in a file of a kind ("state" or "checkpoint"), one for each row.

    `BadFile` where the header is not as `RunDirectory` writes it.
    """
    header = file.header
    if header.get("schema") != SCHEMA or header.get("kind") != kind:
        raise BadFile(file.path, f"is not a {kind} of schema {SCHEMA}")
    models: Any = header.get("models")
    shared = (*file.shapes.get("P", ()), 0)[0]
    columns = {"projection": (0, shared - 1), "diverged_step": (1, LARGEST_STEPS)}

    def fits(value: Any, name: str) -> bool:
        return (value is None and name == "diverged_step") or is_whole(value, *columns[name])

    good = (
        is_whole(header.get("step"), 0, LARGEST_STEPS)
        and isinstance(models, list)
        and all(isinstance(name, str) and HASH.fullmatch(name) for name in models)
        and 0 < len(set(models)) == len(models)
    )
    for name in columns:
        column: Any = header.get(name)
        good = good and isinstance(column, list) and len(column) == len(models)
        good = good and all(fits(value, name) for value in column)
    if not good:
        raise BadFile(file.path, f"has a header that is not a {kind}'s")
    return list(models)


def check_shapes(file: TensorFile, models: list[str], specs: Mapping[str, ModelSpec]) -> None:
    """`BadFile` where the tensors are not those of the file's models, as far as these are in `specs`, or its step is
    none of theirs."""
    for name, diverged in zip(models, file.header["diverged_step"], strict=True):
        spec = specs.get(name)
        if spec is None:
            continue
        if not max(diverged or 0, file.header["step"]) <= spec.steps:
            raise BadFile(file.path, f"is at a step that its models do not have ({spec.steps:,} steps)")
        expected = tensor_shapes(spec, len(models))
        if file.header["kind"] == "state":
            expected |= state_shapes(spec, len(models), file.header["step"], None not in file.header["diverged_step"])
            if "order" not in file.shapes:  # states had none at first
                del expected["order"]
        if wrong := _mismatch(file, expected):
            raise BadFile(file.path, f"does not fit its models: {wrong}")


def check_order(file: TensorFile, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state. `BadFile` where the order of a model's neurons, which becomes addresses, is not one."""
    if (order := tensors.get("order")) is not None:
        found = order.sort(-1).values
        if not torch.equal(found, torch.arange(found.shape[-1]).expand_as(found)):
            raise BadFile(file.path, "does not fit its models: order does not have each neuron once")
    return tensors


def check_history(file: TensorFile, specs: Sequence[ModelSpec]) -> list[str]:
    """The names of the measures in a grid's history. `BadFile` where it is not that of these models."""
    names = file.header.get("measures")
    if isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names):
        steps = {spec.steps for spec in specs}
        A, L = len(specs), range(sum(n_logged(one, one) for one in steps) + 1)
        C = range(sum(n_checkpoints(one, one) for one in steps) + 1)
        expected = {"losses": ("F32", A, L), "measures": ("F64", A, C, len(names))}
        expected |= {"logged_steps": ("I64", L), "checkpoint_steps": ("I64", C)}
        if (
            len(set(names)) == len(names)
            and _mismatch(file, expected) is None
            and file.shapes["losses"][1:] == file.shapes["logged_steps"]
            and file.shapes["measures"][1:2] == file.shapes["checkpoint_steps"]
        ):
            return names
    raise BadFile(file.path, "is not the history of this grid")


def n_logged(step: int, steps: int) -> int:
    """How many losses a model has logged after so many of its steps: those of 1, 17, 33, ... and its last."""
    return -(-step // LOG_EVERY) + (step == steps and (step - 1) % LOG_EVERY != 0)


def n_checkpoints(step: int, steps: int) -> int:
    """How many checkpoints it has behind it: those of 1, 2, 4, 8, ... and its last."""
    return step.bit_length() + (step == steps and step & (step - 1) != 0)


def _mismatch(file: TensorFile, expected: Mapping[str, tuple[Any, ...]]) -> str | None:
    """What is wrong with a file's tensors, each expected to have a type and a shape; None where nothing is."""
    if file.shapes.keys() != expected.keys():
        return f"{sorted(file.shapes.keys() ^ expected.keys())[0]!r} is missing, or does not belong there"
    for name, (kind, *shape) in expected.items():
        found = file.shapes[name]
        if file.types[name] != kind or len(found) != len(shape) or not all(map(_within, found, shape)):
            return f"{name} is {list(found)} {file.types[name]}"
    return None


def _within(size: int, allowed: int | range) -> bool:
    return size in allowed if isinstance(allowed, range) else size == allowed


def tensor_shapes(spec: ModelSpec, n_models: int, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """Type and shape of each tensor in a checkpoint of models of this shape; a range where a length varies."""
    A, k, m, o, N, r = n_models, spec.n_neurons, spec.d_embed, spec.d_output, spec.n_features, spec.linear_path
    found: dict[str, tuple[Any, ...]] = {"W_in": ("F32", A, k, m), "b": ("F32", A, k), "W_out": ("F32", A, o, k)}
    if r:
        found |= {"L_in": ("F32", A, r, m), "L_out": ("F32", A, o, r)}
    found = {prefix + name: shape for name, shape in found.items()}
    projections = () if prefix else ("P", "P2") if spec.task == "reprojector" else ("P",)
    return found | {name: ("F32", range(1, A + 1), m, N) for name in projections}


def state_shapes(spec: ModelSpec, n_models: int, step: int, all_diverged: bool) -> dict[str, tuple[Any, ...]]:
    """The same of what a state holds besides, after so many steps."""
    logged, checkpoints = n_logged(step, spec.steps), n_checkpoints(step, spec.steps)
    resting = checkpoints + (step not in (0, spec.steps) and step & (step - 1) != 0)  # measured between two checkpoints
    found = {
        # When all have diverged, their state is that of the last step, and nothing was logged on the way there.
        "losses": ("F32", n_models, range(logged + 1) if all_diverged else logged),
        "measures": ("F64", n_models, range(0 if all_diverged else checkpoints, resting + 1), len(NAMES)),
    }
    for prefix in ("snapshot.",) if spec.optimizer == "sgd" else ("snapshot.", "first_moment.", "second_moment."):
        found |= tensor_shapes(spec, n_models, prefix)
    return found | {"order": ("I64", n_models, spec.n_neurons)}
