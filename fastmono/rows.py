"""Rows of models.csv and telemetry.csv, and the cells of a table that a person may open with a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmono.files import BadFile, printable, read_bytes, write_bytes
from fastmono.layout import is_whole
from fastmono.metrics import NAMES
from fastmono.spec import FIELDS, ModelSpec
from fastmono.store import final_loss

STATUSES = ("pending", "running", "done", "diverged", "failed", "stopped")
RESULTS = (
    "status", "final_loss", "eval_loss", "mono_neurons", "mono_per_feature", "mono_per_neuron", "dead_neurons",
    "mean_bias", "density", "diverged_step",
)  # fmt: skip
WHOLE_RESULTS = ("mono_neurons", "dead_neurons", "diverged_step")
COLUMNS = (*FIELDS, *RESULTS)
TELEMETRY = (
    "model", "hash", "device", "worker", "sessions", "seconds", "model_steps", "model_steps_per_second", "joules",
)  # fmt: skip
EXECUTED = "=+-@\uff1d\uff0b\uff0d\uff20"
"""What a spreadsheet takes for the beginning of a formula, the full-width forms too."""
LONGEST_CELL = 1000
LONGEST_LINE = 2**16
MOST_ROWS = 2**18


def _cell(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value)
    text = printable(value, LONGEST_CELL)
    return "'" + text if text[:1] and text[0] in EXECUTED else text


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """A table; numbers as Python writes them, so that they come back bit by bit, and None as an empty cell.

    A text that a spreadsheet would execute gets an apostrophe before it, by which that takes it for a text.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    write_bytes(path, text.getvalue().encode())


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """These columns of a table's rows. `BadFile` when one is missing or stands twice, or it is not a table at all."""
    try:
        lines = read_bytes(path).decode().splitlines()
        if len(lines) > MOST_ROWS or max(map(len, lines), default=0) > LONGEST_LINE:
            raise BadFile(path, f"has more than {MOST_ROWS:,} lines, or one of more than {LONGEST_LINE:,} characters")
        # Line by line: no row of ours stands in several.
        head, *cells = [next(csv.reader([line], strict=True)) for line in lines] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadFile(path, f"cannot be read ({error})") from None
    for column in columns:
        if head.count(column) != 1:
            raise BadFile(path, f"lacks {column!r}, or has it twice")
    if any(len(row) != len(head) for row in cells):
        raise BadFile(path, "has a row that is not complete")
    place = [(column, head.index(column)) for column in columns]
    return [{column: row[i] for column, i in place} for row in cells]


def result_row(
    spec: ModelSpec, status: str, losses: Tensor | None, measures: Tensor | None, diverged_step: int | None
) -> dict[str, Any]:
    """A model's row of models.csv from its losses [n_logged] and measures [n_checkpoints, n_measures], as far as known.

    The measures are those of the newest checkpoint; for a diverged model, of the one it is frozen at.
    """
    row: dict[str, Any] = {**spec.to_dict(), "status": status, "final_loss": math.nan, "diverged_step": diverged_step}
    if status == "done" and losses is not None:
        row["final_loss"] = final_loss(losses, spec.steps)
    known = [] if measures is None else [m for m in measures if not bool(m[0].isnan() & m[1].isnan())]
    newest = dict(zip(NAMES, known[-1].tolist(), strict=True)) if known else {}
    for name in RESULTS:
        if name not in row:
            value = newest.get(name, math.nan)
            if name in WHOLE_RESULTS:
                value = int(value) if 0 <= value <= spec.n_neurons else math.nan
            row[name] = value
    return row


def parse_row(path: Path, spec: ModelSpec, cells: Mapping[str, str]) -> dict[str, Any]:
    """Inverse of `result_row`'s results. `BadFile` for a cell that does not read."""
    row: dict[str, Any] = spec.to_dict()
    for name in RESULTS:
        cell = cells[name]
        try:
            if name == "status":
                if cell not in STATUSES:
                    raise ValueError
                row[name] = cell
            elif name == "diverged_step":
                row[name] = int(cell) if cell else None
            else:
                whole = name in WHOLE_RESULTS and cell != "nan"
                row[name] = int(cell) if whole else float(cell)
            most = spec.steps if name == "diverged_step" else spec.n_neurons
            if isinstance(row[name], int) and not is_whole(row[name], int(name == "diverged_step"), most):
                raise ValueError
        except ValueError:
            raise BadFile(path, f"has {name} {cell[:40]!r}, which is not one of its values") from None
    return row
