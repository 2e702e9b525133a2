"""The run directory: what is in it, and how it is written.

    grid.json            schema version, every spec, engine, precision, versions, device, command line
    models.csv           one row a model: spec, status, results
    telemetry.csv        what is not a result: worker, seconds, rate, energy
    history.safetensors  losses, and every measure at every checkpoint
    halving.json         which models have stopped, where that was asked for (halving.py)
    events.jsonl         one JSON line an event
    status.json          how the run is doing: its process, and a beat every few seconds
    lock                 held by whoever trains in the directory; lock-I-of-N by an array task
    reports/             what the tasks of a Ray cluster say, while they run
    checkpoints/         step-<step>-<block>.safetensors    parameters after 0, 1, 2, 4, 8, ... steps and the last
                         state-<block>-<step>.safetensors   everything that continues a block, the two newest
    figures/

The state files are the truth, committed per model under a content hash of its spec, engine, precision and schema; the
tables and the history are derived from them at any time. A block is only a schedule: any block can be put together
from the states of other blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmono.block import PRECISIONS, Model, views
from fastmono.engines import ENGINES
from fastmono.files import (
    LARGEST_TEXT,
    BadFile,
    TensorFile,
    printable,
    read_json,
    write_bytes,
    write_tensors,
)
from fastmono.layout import LOG_EVERY, SCHEMA, check_header, check_order, check_shapes, n_checkpoints
from fastmono.metrics import NAMES
from fastmono.spec import Grid, ModelSpec

FINAL_STEPS = 1024
MOMENTS = ("first_moment", "second_moment")
KEPT_STATES = 2
LISTINGS = 5
"""How often to look again when a state has gone while a directory was read: a newer one has taken its place."""


def logged_steps(steps: int) -> Tensor:
    """The steps (from 1) whose loss a model of so many steps logs: 1, 17, 33, ... and its last, int64."""
    logged = torch.arange(1, steps + 1, LOG_EVERY, dtype=torch.int64)
    return logged if logged[-1] == steps else torch.cat((logged, torch.tensor([steps])))


def checkpoint_steps(steps: int) -> list[int]:
    """1, 2, 4, 8, ... and the last."""
    powers = [1 << i for i in range(steps.bit_length())]
    return powers if powers[-1] == steps else [*powers, steps]


def final_loss(losses: Tensor, steps: int) -> float:
    """Mean of the losses [n_logged] logged in the last 1,024 steps; of a shorter run, in all of its second half."""
    first = steps - FINAL_STEPS if steps >= FINAL_STEPS else steps / 2
    return float(losses[logged_steps(steps) > first].double().mean())


def contract_tensors(spec: ModelSpec, flat: Tensor) -> dict[str, Tensor]:
    """W_in [k, m], b [k], W_out [o, k], with a linear path L_in [r, m], L_out [o, r], from an engine's flat buffer."""
    return {_contract_name(name): _turned(name, tensor) for name, tensor in views(spec, flat).items()}


def _contract_name(name: str) -> str:
    return name.removesuffix("T")


def _turned(name: str, tensor: Tensor) -> Tensor:
    """From an engine's W_outT and L_outT to W_out and L_out, and back."""
    return tensor.T if name.endswith("T") else tensor


def load_flat(spec: ModelSpec, flat: Tensor, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Inverse of `contract_tensors`, into `flat`; shapes are checked (`ValueError`)."""
    for name, view in views(spec, flat).items():
        value = _turned(name, tensors[prefix + _contract_name(name)])
        if value.shape != view.shape or value.dtype != view.dtype:
            raise ValueError(f"{prefix}{name} is {list(value.shape)} {value.dtype}, not {list(view.shape)} float32")
        view.copy_(value)


def _pack(models: Sequence[Model], with_state: bool) -> dict[str, Tensor]:
    """All models' tensors, stacked; the projections once for each that is different."""

    def stack(part: str) -> dict[str, Tensor]:
        each = [contract_tensors(model.spec, getattr(model, part)) for model in models]
        prefix = "" if part == "parameters" else part + "."
        return {prefix + name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}

    packed = stack("parameters")
    distinct = {id(model.P): model for model in models}.values()
    packed["P"] = torch.stack([model.P for model in distinct])
    if models[0].P2 is not None:
        packed["P2"] = torch.stack([model.P2 for model in distinct if model.P2 is not None])
    if with_state:
        for part in ("snapshot", *(MOMENTS if len(models[0].first_moment) else ())):
            packed |= stack(part)
        packed["order"] = torch.stack([model.order.long() for model in models])
    return packed


def block_id(hashes: Iterable[str]) -> str:
    """Twelve hexadecimal digits that name a set of models."""
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()[:12]


@dataclass
class BlockHistory:
    """What models of one shape have logged.

    Losses: one [A] tensor a logged step. Measures: one [A, n_measures] a checkpoint.
    """

    losses: list[Tensor] = dataclasses.field(default_factory=list)
    measures: list[Tensor] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """Where a model's newest good state lies: a row of a state file that was verified."""

    path: str
    row: int
    step: int
    diverged_step: int | None


class RunDirectory:
    """A run's files. Writing is for the process that holds the directory's lock, and its workers."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.figures = self.path / "figures"
        self.reports = self.path / "reports"
        self.expected: dict[str, ModelSpec] = {}
        """Models by content hash: a file that holds one of them must fit it. Filled in by who knows them."""
        for folder in (self.checkpoints, self.figures, self.reports):  # what lies elsewhere is neither read nor deleted
            if folder.is_symlink():
                raise BadFile(folder, "is a symbolic link, which is not followed: put the folder itself there")
        self._newest_read: tuple[str, list[int], dict[str, Tensor]] = ("", [], {})
        self._projections: dict[int, tuple[Tensor, Tensor | None]] = {}

    # grid.json

    def read_grid(self) -> dict[str, Any]:
        """grid.json with "grid" as a `Grid`. `BadFile` when it is missing, damaged, or of a newer schema."""
        path = self.path / "grid.json"
        values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("models"), list):
            raise BadFile(path, "is not a fastmono grid")
        if values.get("schema") != SCHEMA:
            found = values.get("schema")
            found = found if isinstance(found, int | str) else type(found).__name__
            raise BadFile(path, f"has schema {found!r}; this fastmono reads {SCHEMA}")
        for field, known in (("engine", ENGINES), ("precision", PRECISIONS)):
            if values.get(field) not in [*known]:
                raise BadFile(path, f"lacks {field!r}, or has one that this fastmono does not know")
        try:
            values["grid"] = Grid.of(ModelSpec.from_dict(spec) for spec in values["models"])
        except (ValueError, TypeError) as error:
            raise BadFile(path, f"holds a model that is not valid: {error}") from None
        return values

    def write_grid(self, grid: Grid, engine: str, precision: str, about: Mapping[str, Any]) -> None:
        """Write grid.json; `about` is recorded and not read back (versions, device, command line)."""
        head = {"schema": SCHEMA, "engine": engine, "precision": precision, **about}
        models = ",\n  ".join(json.dumps(spec.to_dict()) for spec in grid)
        text = json.dumps(head, indent=1)[:-2] + f',\n "models": [\n  {models}\n ]\n}}\n'
        if len(text) > LARGEST_TEXT:
            raise ValueError(
                f"{len(grid):,} models: grid.json would have {len(text):,} bytes, and {LARGEST_TEXT:,} are read again; "
                "split the grid over several directories"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path / "grid.json", text.encode())

    def clear(self) -> None:
        """Delete a run's files, and nothing else that lies in the directory."""
        for name in ("grid.json", "models.csv", "telemetry.csv", "history.safetensors", "halving.json"):
            (self.path / name).unlink(missing_ok=True)
        for pattern in ("events*.jsonl", "status*.json", "lock-*"):
            for file in self.path.glob(pattern):
                file.unlink()
        for folder in (self.checkpoints, self.figures, self.reports):
            for pattern in ("step-*.safetensors*", "state-*.safetensors*", "*.png", "*.jsonl"):
                for file in folder.glob(pattern):
                    file.unlink()
            with suppress(OSError):
                folder.rmdir()

    # checkpoints and states

    def write_checkpoint(self, models: Sequence[Model], hashes: Sequence[str], step: int) -> None:
        """Parameters and projections of a block after so many steps."""
        self.checkpoints.mkdir(exist_ok=True)
        header = self._header("checkpoint", models, hashes, step)
        path = self.checkpoints / f"step-{step:012d}-{block_id(hashes)}.safetensors"
        write_tensors(path, _pack(models, with_state=False), header)

    def write_state(self, models: Sequence[Model], hashes: Sequence[str], step: int, history: BlockHistory) -> None:
        """Everything that continues a block; of its earlier states the newest is kept, the others are deleted."""
        self.checkpoints.mkdir(exist_ok=True)
        name = block_id(hashes)
        tensors = _pack(models, with_state=True)
        tensors["losses"] = torch.stack(history.losses, 1) if history.losses else torch.empty(len(models), 0)
        empty = torch.empty(len(models), 0, len(NAMES), dtype=torch.float64)
        tensors["measures"] = torch.stack(history.measures, 1) if history.measures else empty
        header = self._header("state", models, hashes, step)
        write_tensors(self.checkpoints / f"state-{name}-{step:012d}.safetensors", tensors, header)
        for old in sorted(self.checkpoints.glob(f"state-{name}-*.safetensors"))[:-KEPT_STATES]:
            old.unlink(missing_ok=True)  # a worker that was given up for dead may train the same models

    @staticmethod
    def _header(kind: str, models: Sequence[Model], hashes: Sequence[str], step: int) -> dict[str, Any]:
        distinct = list(dict.fromkeys(id(model.P) for model in models))
        return {
            "schema": SCHEMA,
            "kind": kind,
            "step": step,
            "models": list(hashes),
            "projection": [distinct.index(id(model.P)) for model in models],
            "diverged_step": [model.diverged_step for model in models],
        }

    def files(self, kind: str) -> list[tuple[TensorFile, list[str]]]:
        """The readable files of a kind ("state" or "checkpoint") with their models, newest step first.

        A file that cannot be read is named in a warning and passed over; one that a worker replaces meanwhile is not.
        """
        for _ in range(LISTINGS):
            found, vanished = [], False
            for path in self.checkpoints.glob(("state" if kind == "state" else "step") + "-*.safetensors"):
                try:
                    file = TensorFile(path)
                    models = check_header(file, kind)
                    check_shapes(file, models, self.expected)
                    found.append((file, models))
                except BadFile as error:
                    if path.exists():
                        warnings.warn(f"{error}; it is not used", stacklevel=2)
                    vanished = vanished or not path.exists()
            if not vanished:
                break
        return sorted(found, key=lambda item: (-item[0].header["step"], item[0].path.name))

    def newest_states(self, hashes: Iterable[str], verify: bool = True) -> dict[str, Saved]:
        """The newest good state of each model that has one.

        With `verify` all of a file is read, and one that is damaged is set aside, and an older one used; without, only
        headers are, and nothing is changed.
        """
        wanted, found = set(hashes), {}
        for file, models in self.files("state"):
            if not wanted.intersection(models):
                continue
            try:
                if verify:
                    check_order(file, file.read_all())
            except BadFile as error:
                aside = file.path.with_name(file.path.name + ".damaged")
                file.path.rename(aside)
                warnings.warn(
                    f"{error}; renamed to {printable(aside.name)}, an older state is used if there is one", stacklevel=2
                )
                continue
            for row, name in enumerate(models):
                if name in wanted:
                    wanted.remove(name)
                    header = file.header
                    found[name] = Saved(file.path.name, row, header["step"], header["diverged_step"][row])
        return found

    def prune(self, hashes: Sequence[str]) -> None:
        """Delete the states that are not among any model's two newest."""
        ranks = dict.fromkeys(hashes, 0)
        for file, models in self.files("state"):
            needed = False
            for name in models:
                if name in ranks and ranks[name] < KEPT_STATES:
                    ranks[name] += 1
                    needed = True
            if not needed:
                file.path.unlink(missing_ok=True)

    def restore(self, spec: ModelSpec, saved: Saved) -> tuple[Model, Tensor, Tensor]:
        """A model as it was saved, its losses [n_logged], its measures at checkpoints [n_checkpoints, n_measures]."""
        path, row = self.checkpoints / Path(saved.path).name, saved.row
        if self._newest_read[0] != saved.path:
            file = TensorFile(path)
            models = check_header(file, "state")
            if row >= len(models):
                raise BadFile(path, f"has no row {row}")
            check_shapes(file, models, self.expected | {models[row]: spec})
            self._newest_read = saved.path, file.header["projection"], check_order(file, file.read_all())
            self._projections.clear()
        _, projection, stacked = self._newest_read
        share = projection[row]
        if share not in self._projections:  # one object for all models that share it
            P2 = stacked["P2"][share].clone() if "P2" in stacked else None
            self._projections[share] = (stacked["P"][share].clone(), P2)
        tensors = {name: tensor[row] for name, tensor in stacked.items() if name not in ("P", "P2")}
        model = Model(spec, projections=self._projections[share])
        try:
            load_flat(spec, model.parameters, tensors)
            load_flat(spec, model.snapshot, tensors, "snapshot.")
            for part in MOMENTS if len(model.first_moment) else ():
                load_flat(spec, getattr(model, part), tensors, part + ".")
        except (KeyError, ValueError) as error:
            raise BadFile(path, f"does not fit its model: {error}") from None
        if "order" in tensors:  # states had none at first
            model.order = tensors["order"].int()
        model.diverged_step = saved.diverged_step
        measures = tensors["measures"][: n_checkpoints(saved.step, spec.steps)]
        return model, tensors["losses"].clone(), measures.clone()


def free_space(path: Path) -> int:
    """Bytes free where a path is, or would be made."""
    for folder in (path, *path.absolute().parents):
        if folder.exists():
            return shutil.disk_usage(folder).free
    return 0
