"""What comes out: ratios computed within each round, medians with their spread, the table, `result.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import ENTRIES
from benchmarks.measure import CaseResult, Row
from benchmarks.suites import Suite


def overall(row: Row) -> list[float]:
    """Milliseconds a model-step of each round: the mean over states, which is total time over total steps."""
    return [fmean(times) for times in zip(*row.ms.values(), strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def best_of_ours(rows: Sequence[Row], precision: str | None = None) -> Row | None:
    """Our engine with the lowest median time, of one precision or of any; None where none was timed."""
    ours = [row for row in rows if row.timed and row.ours and precision in (None, row.precision)]
    return min(ours, key=lambda row: median(overall(row)), default=None)


def ratios(rows: Sequence[Row], mine: Row | None) -> dict[str, float]:
    """How many times as long as ours each contestant takes: side by side in each round, then the median."""
    if mine is None:
        return {}
    ours = overall(mine)
    return {
        row.name: median(theirs / own for theirs, own in zip(overall(row), ours, strict=True))
        for row in rows
        if row.timed and row is not mine
    }


def rate_shares(result: CaseResult, row: Row) -> list[float]:
    """Useful FLOP/s over the machine's product rate in the row's precision, in each round."""
    flops = result.case.grid[0].flops_per_step
    return [
        flops / (1e-3 * ms) / machine[row.precision if row.precision in machine else "fp32"]
        for ms, machine in zip(overall(row), result.machine, strict=True)
    ]


def row_as_json(result: CaseResult, row: Row) -> dict[str, Any]:
    """Everything known of a contestant."""
    found: dict[str, Any] = {
        "title": ENTRIES[row.name].title, "status": row.status, "ours": row.ours, "precision": row.precision,
        "gate": row.verdict.to_dict() if row.verdict else None,
    }  # fmt: skip
    if row.timed:
        times, flops = overall(row), result.case.grid[0].flops_per_step
        found |= {
            "models_trained": row.models,
            "steps_a_turn": row.steps,
            "ms_per_model_step": {
                "overall": spread(times), **{state: spread(values) for state, values in row.ms.items()}
            },
            "model_steps_per_s": 1e3 / median(times),
            "useful_flops_per_s": flops / (1e-3 * median(times)),
            "useful_over_product_rate": spread(rate_shares(result, row)),
            "rounds": row.ms,
        }  # fmt: skip
    return found


def case_as_json(result: CaseResult) -> dict[str, Any]:
    """A case: shape, grid, states, machine, contestants, ratios."""
    case, spec, mine = result.case, result.case.grid[0], best_of_ours(result.rows)
    same = {
        precision: ratios([r for r in result.rows if r.precision == precision], best_of_ours(result.rows, precision))
        for precision in sorted({row.precision for row in result.rows if row.timed})
    }
    return {
        "name": case.name,
        "shape": {
            "N": spec.n_features, "m": spec.d_embed, "k": spec.n_neurons, "o": spec.d_output, "B": spec.batch_size,
            "feature_prob": spec.feature_prob, "steps": spec.steps, "flops_per_model_step": spec.flops_per_step,
        },
        "models": case.n_models,
        "grid": {
            "models_a_seed": [
                {"lr": s.lr, "init_bias": s.init_bias, "bias_decay": s.bias_decay} for s in case.grid
            ],
            "seeds": list(range(case.streams)),
        },
        "states": {
            name: {"step": step, "density": result.density[name]} for name, step in result.steps.items()
        },
        "loss_at_the_end": result.loss,
        "machine": {
            name: spread([machine[name] for machine in result.machine]) for name in result.machine[0]
        },
        "contestants": {row.name: row_as_json(result, row) for row in result.rows},
        "best_of_ours": mine.name if mine else None,
        "ratios": ratios(result.rows, mine),
        "ratios_in_one_precision": same,
        "useful_over_product_rate": median(rate_shares(result, mine)) if mine else None,
    }  # fmt: skip


def as_json(
    suite: Suite, results: Sequence[CaseResult], about: dict[str, Any], command: str, smoke: bool
) -> dict[str, Any]:
    """The whole of `result.json`; `ratios` and `useful_over_product_rate` stand at the top too, by case."""
    cases = [case_as_json(result) for result in results]
    return {
        "suite": suite.name, "smoke": smoke, "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **about, "rounds": suite.rounds,
        "units": {"machine": "FLOP/s of products, by precision; copy: bytes/s, read and written"},
        "ratios": {
            case["name"]: {**case["ratios"], "useful_over_product_rate": case["useful_over_product_rate"]}
            for case in cases
        },
        "useful_over_product_rate": {case["name"]: case["useful_over_product_rate"] for case in cases},
        "cases": cases,
    }  # fmt: skip


def write_json(path: Path, result: dict[str, Any]) -> None:
    """With four significant digits: more are noise. What was not measured, NaN, is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1, allow_nan=False) + "\n")


def rounded(value: Any) -> Any:
    """Floats to four significant digits, all through a JSON value, but for the settings of models."""
    if isinstance(value, dict):
        return {key: part if key in ("shape", "grid") else rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def table(console: Console, title: str, result: CaseResult) -> None:
    """Print a case."""
    mine = best_of_ours(result.rows)
    against = ratios(result.rows, mine)
    rates = ", ".join(
        f"{name} {median(m[name] for m in result.machine) / 1e9:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name in result.machine[0]
    )
    shown = Table(title=f"{title}, {result.case.name}   (the machine: {rates})", title_justify="left")
    shown.add_column("contestant", no_wrap=True, min_width=30)
    shown.add_column("gate", no_wrap=True, max_width=32)
    for column in (*result.steps, "ms/model-step", "low to high", "steps/s", "GFLOP/s", "of product", "/ ours"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        if not row.timed:
            shown.add_row(ENTRIES[row.name].title, row.status)
            continue
        times, worst = overall(row), row.verdict.worst if row.verdict else 0.0
        ms = median(times)
        name = ENTRIES[row.name].title
        shown.add_row(
            f"[bold]{name}[/bold]" if row is mine else name, f"{worst:.2f} of its bound",
            *(f"{median(values):.3g}" for values in row.ms.values()), f"{ms:.3g}",
            f"{min(times):.3g} to {max(times):.3g}", f"{1e3 / ms:,.0f}",
            f"{result.case.grid[0].flops_per_step / ms / 1e6:,.1f}", f"{median(rate_shares(result, row)):.2f}",
            f"{against[row.name]:.2f}" if row.name in against else "",
        )  # fmt: skip
    console.print(shown)
