"""A trained run, read from its directory: the table, the curves, the models as tensors and as modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmono.files import BadFile, TensorFile
from fastmono.layout import check_history
from fastmono.plan import content_hashes
from fastmono.rows import RESULTS, parse_row, read_csv
from fastmono.spec import Grid, ModelSpec, describe
from fastmono.store import RunDirectory, checkpoint_steps, logged_steps
from fastmono.tasks import ACTIVATION
from fastmono.trainer import Options


class Run:
    """A run directory. Nothing is written; what is read is verified, and never executed.

    Attributes:
        path: the directory.
        grid, specs: what was asked for.
        engine, precision: what trained it.
        table: one dict a model: every field of its spec, its status and results (NaN where there is none yet).
        losses: float32 [n_models, n_logged], NaN where a model has no entry.
        logged_steps: int64 [n_logged], counted from 1.
        checkpoint_steps: int64 [n_checkpoints].
        metrics: measures at checkpoints by name (`fastmono.metrics.NAMES`), float64 [n_models, n_checkpoints].

    Raises:
        ValueError: the directory holds no run, or one of its files is damaged (the message names it).
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = RunDirectory(path)
        self.path = self.directory.path
        about = self.directory.read_grid()
        self.grid = about["grid"]
        self.specs: tuple[ModelSpec, ...] = self.grid.specs
        self.engine, self.precision = about["engine"], about["precision"]
        self.about: Mapping[str, Any] = {k: v for k, v in about.items() if k not in ("grid", "models")}
        self._hashes = content_hashes(self.grid, Options(self.engine, self.precision))
        self.directory.expected = dict(zip(self._hashes, self.specs, strict=True))
        self.table = self._read_table()
        self._read_history()
        self._where: dict[tuple[int, int], tuple[TensorFile, int]] | None = None

    def _read_table(self) -> list[dict[str, Any]]:
        path = self.path / "models.csv"
        rows = read_csv(path, RESULTS)  # an older one lacks fields, which grid.json has all the same
        if len(rows) != len(self.specs):
            raise BadFile(path, f"has {len(rows)} rows for {len(self.specs)} models")
        return [parse_row(path, spec, row) for spec, row in zip(self.specs, rows, strict=True)]

    def _read_history(self) -> None:
        file = TensorFile(self.path / "history.safetensors")
        names = check_history(file, self.specs)
        tensors = file.read_all()
        self.losses, self.logged_steps = tensors["losses"], tensors["logged_steps"]
        self.checkpoint_steps = tensors["checkpoint_steps"]
        for steps in (self.logged_steps, self.checkpoint_steps):
            if (steps < 1).any() or (steps.diff() < 1).any():
                raise BadFile(file.path, "has steps that do not ascend from 1")
        self.metrics: dict[str, Tensor] = dict(zip(names, tensors["measures"].unbind(2), strict=True))

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        done = sum(row["status"] in ("done", "diverged") for row in self.table)
        return f"<Run {self.path}: {len(self)} models, {done} finished>"

    def subset(self, models: Iterable[ModelSpec]) -> Run:
        """The same run with some of its models only, in the order given, to draw or to analyse.

        Raises `ValueError` for a model that the run does not have, one that comes twice, or none at all.
        """
        grid, place = Grid.of(models), {spec: i for i, spec in enumerate(self.specs)}
        if missing := [spec for spec in grid if spec not in place]:
            raise ValueError(f"{self.path} has no model with {describe(missing[0])}")
        rows = [place[spec] for spec in grid]
        part = copy.copy(self)
        part.grid, part.specs, part._where = grid, grid.specs, None
        part._hashes = tuple(self._hashes[i] for i in rows)
        part.table = [self.table[i] for i in rows]
        own = {spec.steps for spec in grid}
        logged = torch.isin(self.logged_steps, torch.cat([logged_steps(steps) for steps in own]))
        part.losses, part.logged_steps = self.losses[rows][:, logged], self.logged_steps[logged]
        kept = torch.isin(self.checkpoint_steps, torch.tensor([c for steps in own for c in checkpoint_steps(steps)]))
        part.checkpoint_steps = self.checkpoint_steps[kept]
        part.metrics = {name: values[rows][:, kept] for name, values in self.metrics.items()}
        return part

    def _index(self) -> dict[tuple[int, int], tuple[TensorFile, int]]:
        """Where each (model, step) lies; read once."""
        if self._where is None:
            number = {name: i for i, name in enumerate(self._hashes)}
            self._where = {}
            for kind in ("state", "checkpoint"):
                for file, models in self.directory.files(kind):
                    for row, name in enumerate(models):
                        if name in number:
                            self._where[number[name], file.header["step"]] = file, row
        return self._where

    def _number(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"model {i}: the run has models 0 to {len(self) - 1}")
        return i % len(self)

    def kept_steps(self, i: int) -> list[int]:
        """The steps after which model i's parameters are on disk, ascending."""
        i = self._number(i)
        last = self.specs[i].steps
        return sorted(step for model, step in self._index() if model == i and step <= last)

    def parameters(self, i: int, step: int | None = None) -> dict[str, Tensor]:
        """Model i after so many steps (None: the newest on disk), as float32 tensors.

        Returns W_in [k, m], b [k], W_out [o, k], P [m, N], P2 [m, N] for the reprojector, and L_in [r, m], L_out [o, r]
        of a linear path. A model that diverged is frozen at the last power-of-two step before, and gives that for every
        later step. Raises `IndexError` for a model and `ValueError` for a step that the run does not have.
        """
        i = self._number(i)
        steps = self.kept_steps(i)
        if not steps:
            raise ValueError(f"model {i} of {self.path} has nothing on disk yet")
        wanted = steps[-1] if step is None else step
        diverged = self.table[i]["diverged_step"]
        if diverged is not None and wanted >= diverged:
            # States after the divergence hold the frozen parameters whatever their own step is.
            frozen = 1 << (diverged - 1).bit_length() - 1 if diverged > 1 else 0
            wanted = next((s for s in reversed(steps) if s >= diverged), frozen)
        if wanted not in steps:
            raise ValueError(f"step={step}: model {i} of {self.path} has steps {', '.join(map(str, steps))}")
        file, row = self._index()[i, wanted]
        if not file.path.exists():  # a state that training has replaced since
            self._where = None
            return self.parameters(i, step)
        share = file.header["projection"][row]
        names = {"W_in": row, "b": row, "W_out": row, "P": share}
        if self.specs[i].task == "reprojector":
            names["P2"] = share
        if self.specs[i].linear_path:
            names |= {"L_in": row, "L_out": row}
        return {name: file.read(name, at) for name, at in names.items()}

    def module(self, i: int, step: int | None = None) -> ToyModel:
        """Model i as an ordinary module, from embedding [..., m] to output [..., o]; otherwise as `parameters`."""
        return ToyModel(self.parameters(i, step), self.specs[self._number(i)].activation)


class ToyModel(nn.Module):
    """A trained model: `decode(phi(encode(x)))` for embeddings x [..., m], giving [..., o]; plus `linear(x)`, which is
    L_out (L_in x), where the model has a linear path, and None where it has none.

    Args:
        params: W_in [k, m], b [k], W_out [o, k], P [m, N], and L_in [r, m], L_out [o, r] of a linear path.
        activation: relu | gelu | solu.
    """

    P: Tensor

    def __init__(self, params: Mapping[str, Tensor], activation: str) -> None:
        super().__init__()
        W_in, W_out = params["W_in"], params["W_out"]
        self.encode = nn.Linear(W_in.shape[1], W_in.shape[0])
        self.decode = nn.Linear(W_out.shape[1], W_out.shape[0], bias=False)
        self.activation = activation
        self.register_buffer("P", params["P"].clone())
        with torch.no_grad():
            self.encode.weight.copy_(W_in)
            self.encode.bias.copy_(params["b"])
            self.decode.weight.copy_(W_out)
        self.linear: nn.Sequential | None = None
        if "L_in" in params:
            first, second = (
                nn.Linear(L.shape[1], L.shape[0], bias=False) for L in (params["L_in"], params["L_out"])
            )  # fmt: skip
            with torch.no_grad():
                first.weight.copy_(params["L_in"])
                second.weight.copy_(params["L_out"])
            self.linear = nn.Sequential(first, second)

    def embed(self, f: Tensor) -> Tensor:
        """The embedding P f, [..., m], of features f [..., N]."""
        return f @ self.P.T

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., o] for embeddings x [..., m]."""
        output: Tensor = self.decode(ACTIVATION[self.activation](self.encode(x)))
        return output if self.linear is None else output + self.linear(x)


def load_run(path: str | Path) -> Run:
    """The run in a directory, finished or not. `ValueError` when there is none, or a file of it is damaged."""
    return Run(path)
