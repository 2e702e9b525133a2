"""models.csv, history.safetensors and telemetry.csv: views of the state files, made anew after a save."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fastmono.files import BadFile, TensorFile, write_tensors
from fastmono.layout import SCHEMA, is_whole, n_checkpoints
from fastmono.metrics import NAMES
from fastmono.rows import COLUMNS, TELEMETRY, read_csv, result_row, write_csv
from fastmono.spec import LARGEST_STEPS, Grid
from fastmono.store import LISTINGS, RunDirectory, checkpoint_steps, logged_steps


def write_tables(
    directory: RunDirectory, grid: Grid, hashes: Sequence[str], statuses: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Write models.csv and history.safetensors from the newest states, and return the rows of the table.

    Args:
        statuses: the status of each model by content hash; one whose state says that it diverged is that in any case.
    """
    for _ in range(LISTINGS):
        saved = directory.newest_states(hashes, verify=False)
        known, vanished = _logged(directory, {state.path for state in saved.values()})
        if not vanished:
            break
    logged = {steps: logged_steps(steps) for steps in {spec.steps for spec in grid}}
    checkpoints = {steps: torch.tensor(checkpoint_steps(steps)) for steps in logged}
    all_logged = torch.cat(list(logged.values())).unique()
    all_checkpoints = torch.cat(list(checkpoints.values())).unique()
    losses = torch.full((len(grid), len(all_logged)), math.nan)
    measures = torch.full((len(grid), len(all_checkpoints), len(NAMES)), math.nan, dtype=torch.float64)
    rows = []
    for i, (spec, name) in enumerate(zip(grid, hashes, strict=True)):
        state = saved.get(name)
        own_losses = own_measures = diverged = None
        if state is not None and state.path in known:
            own_losses, own_measures = (tensor[state.row] for tensor in known[state.path])
            diverged = state.diverged_step
            # A state holds what was logged so far: the beginning of the model's own steps.
            columns = torch.searchsorted(all_logged, logged[spec.steps][: len(own_losses)])
            losses[i, columns] = own_losses
            at_checkpoints = own_measures[: n_checkpoints(state.step, spec.steps)]  # one that rests has a row more
            columns = torch.searchsorted(all_checkpoints, checkpoints[spec.steps][: len(at_checkpoints)])
            measures[i, columns] = at_checkpoints
        status = "diverged" if diverged is not None else statuses[name]
        rows.append(result_row(spec, status, own_losses, own_measures, diverged))
    history = {
        "losses": losses,
        "measures": measures,
        "logged_steps": all_logged,
        "checkpoint_steps": all_checkpoints,
    }
    header = {"schema": SCHEMA, "kind": "history", "measures": list(NAMES)}
    write_tensors(directory.path / "history.safetensors", history, header)
    write_csv(directory.path / "models.csv", COLUMNS, rows)
    return rows


def _logged(directory: RunDirectory, paths: set[str]) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
    """Losses [A, n_logged] and measures [A, n_checkpoints, n_measures] of state files, and whether one has gone."""
    found, vanished = {}, False
    for path in paths:
        try:
            file = TensorFile(directory.checkpoints / path)
            found[path] = file.read("losses"), file.read("measures")
        except BadFile as error:
            if (directory.checkpoints / path).exists():
                warnings.warn(f"{error}; the tables leave it out", stacklevel=2)
            vanished = vanished or not (directory.checkpoints / path).exists()
    return found, vanished


def counted(old: Mapping[str, str]) -> dict[str, Any]:
    """What a row of telemetry.csv adds to. `ValueError` where one of its numbers is none."""
    counts = {name: int(old[name]) for name in ("sessions", "model_steps")}
    amounts = {"seconds": float(old["seconds"]), "joules": float(old["joules"]) if old["joules"] else None}
    good = all(is_whole(count, 0, LARGEST_STEPS) for count in counts.values())
    if not (good and all(amount is None or 0 <= amount < math.inf for amount in amounts.values())):
        raise ValueError(f"no counts: {counts}, {amounts}")
    return {**counts, **amounts, "device": old["device"], "worker": old["worker"]}


class Telemetry:
    """What training took, summed over the sessions of a run; not a result, and not reproducible."""

    def __init__(self, directory: RunDirectory, flops: Mapping[str, int]) -> None:
        """`flops`: each model's operations a step, by its content hash, in the grid's order."""
        self.flops = flops
        self.path = directory.path / "telemetry.csv"
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        earlier: dict[str, dict[str, str]] = {}
        if self.path.exists():
            with suppress(BadFile):  # it holds no result: one that is damaged is begun anew
                earlier = {row["hash"]: row for row in read_csv(self.path, TELEMETRY)}
        rows = {}
        for i, name in enumerate(self.flops):
            row: dict[str, Any] = dict.fromkeys(TELEMETRY)
            row |= {"sessions": 0, "seconds": 0.0, "model_steps": 0}
            with suppress(KeyError, ValueError):
                row |= counted(earlier[name])
            rows[name] = row | {"model": i, "hash": name}
        return rows

    def started(self, models: Sequence[str], worker: int, device: str) -> None:
        """Models were taken up by a worker."""
        for name in models:
            row = self.rows[name]
            row |= {"device": device, "worker": worker, "sessions": row["sessions"] + 1}

    def add(self, models: Sequence[str], model_steps: int, seconds: float, joules: float | None = None) -> None:
        """These models of a block trained for so long, all of them as many steps, and took so much energy if that is
        known: each its share of the operations."""
        total = sum(self.flops[name] for name in models)
        for name in models:
            share = self.flops[name] / total
            self.rows[name]["seconds"] += seconds * share
            self.rows[name]["model_steps"] += model_steps // len(models)
            if joules is not None:
                self.rows[name]["joules"] = (self.rows[name]["joules"] or 0.0) + joules * share

    def write(self, own: Collection[str] | None = None) -> None:
        """Write telemetry.csv. `own`: the models that this process trains; others may have written of the rest."""
        if own is not None:
            self.rows = {name: self.rows[name] if name in own else row for name, row in self._read().items()}
        for row in self.rows.values():
            row["model_steps_per_second"] = row["model_steps"] / row["seconds"] if row["seconds"] else None
        write_csv(self.path, TELEMETRY, self.rows.values())
