"""Train a grid of toy models, measure how monosemantic each came out, and draw the figures.

    python scripts/grid.py                                             the preset `demo` (with a GPU: `published`)
    python scripts/grid.py --lr 1e-3 3e-3 --init-bias 0 -1 --seed 0 1  the product, every other field as in the preset
    python scripts/grid.py --dry-run                                   what would be done
    python scripts/grid.py --ray ADDRESS                               on a cluster, the same bits (docs/scale.md)
    python scripts/grid.py --status DIR                                how a run is doing, from any machine

The same command again continues a run that was stopped. Exit code 0: all models trained (one that diverged is a
result); 2: bad arguments; 1: anything else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # what is imported below takes seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped before it began"))

import fastmono as fm
from fastmono.command_line import (
    Parser,
    gib,
    operations,
    plain_console,
    reader,
    real,
    run_main,
    warnings_shown,
    workers_from,
)
from fastmono.engines import has_gpu
from fastmono.plan import Plan
from fastmono.planner import describe, describe_here, estimate, parse_cluster, rates
from fastmono.presets import PRESET_NAMES
from fastmono.progress import duration
from fastmono.spec import CHOICES, FIELDS, REAL_NUMBERS, WHOLE_NUMBERS
from fastmono.status import status_lines

LARGEST_TABLE = 60
RESULTS = ("status", "final_loss", "eval_loss", "mono_per_feature", "mono_per_neuron", "dead_neurons", "mean_bias")
SHORT = {"mono_per_feature": "mono/N", "mono_per_neuron": "mono/k", "dead_neurons": "dead"}
LEFT_OUT_FIRST = ("mono/k", "dead", "mean_bias", "eval_loss")
"""Columns that a terminal too narrow for all of them does without, in this order."""


def part(text: str) -> tuple[int, int]:
    """A part of a run, as 0/8."""
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: must be I/N, as 0/8") from None
    return i, n


def make_parser() -> Parser:
    """Every field of ModelSpec as a flag of one or more values, and the flags of a run."""
    parser = Parser(
        prog="grid.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_argument_group("models: each flag takes one or more values, and the grid is their product")
    for field in FIELDS:
        kind: Callable[[str], Any] = str
        if field in WHOLE_NUMBERS:
            allowed = "a whole number from {} to {}".format(*WHOLE_NUMBERS[field])
            kind = reader(int, allowed)
        elif field in REAL_NUMBERS:
            allowed = REAL_NUMBERS[field][0].removeprefix("must be ")
            kind = reader(real, allowed)
        else:
            allowed = "one of " + ", ".join(CHOICES[field])
        flag = "--" + field.replace("_", "-")
        models.add_argument(flag, type=kind, nargs="+", metavar="VALUE", default=None, help=allowed)
    models.add_argument("--preset", metavar="NAME", help=PRESET_NAMES)
    run = parser.add_argument_group("the run")
    run.add_argument("--out", metavar="DIR", help="run directory (default: runs/ and the preset's name)")
    run.add_argument("--engine", default="auto", metavar="NAME", help="auto, cpu, reference or triton")
    run.add_argument("--precision", default="auto", metavar="NAME", help="auto, fp32, tf32 or bf16")
    run.add_argument("--workers", default="auto", metavar="N", help="processes; auto: one for each core")
    run.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS", help="train in a Ray cluster; without ADDRESS in one here"
    )
    run.add_argument("--part", type=part, metavar="I/N", help="train part I of N, from 0: one array task's share")
    share = reader(real, "a number between 0 and 1")
    run.add_argument(
        "--keep", type=share, metavar="SHARE", help="train on only the best share of comparable models, and"
    )
    run.add_argument("--every", type=reader(int, "a whole number of steps"), metavar="N", help="so do every N steps,")
    run.add_argument("--by", default="loss", metavar="WHAT", help="by loss, or by mono: monosemantic neurons")
    run.add_argument("--status", metavar="DIR", help="print how the run in DIR is doing, and stop")
    run.add_argument("--checkpoints", default="all", metavar="WHICH", help="which to keep: all, last or none")
    seconds = reader(real, "a number of seconds, at least 0")
    run.add_argument("--save-every", type=seconds, default=60.0, metavar="SECONDS", help="between full states (60)")
    run.add_argument("--no-resume", action="store_true", help="discard what the directory holds of an earlier run")
    run.add_argument(
        "--self-check", default="once", metavar="WHEN",
        help="of the triton engine, against float64: once on each device, always or never",
    )  # fmt: skip
    run.add_argument("--no-plots", action="store_true", help="draw no figures")
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    devices = ", ".join(rates())
    run.add_argument(
        "--plan", metavar="DEVICES", help=f"print what it would take on h100:64, cpu:32, ... ({devices}), and stop"
    )
    return parser


def chosen_grid(arguments: argparse.Namespace) -> tuple[fm.Grid, str]:
    """The grid that the flags ask for, and its name."""
    name = arguments.preset or ("published" if has_gpu() else "demo")
    overrides = {field: getattr(arguments, field) for field in FIELDS if getattr(arguments, field) is not None}
    grid = fm.preset(name)
    if not overrides:
        return grid, name
    grid = grid.override(**overrides)
    models = json.dumps([spec.identity() for spec in grid])
    return grid, f"{name}-{hashlib.sha256(models.encode()).hexdigest()[:8]}"


def count(number: int, what: str) -> str:
    """So many of something."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def print_plan(console: Console, plan: Plan, out: str) -> None:
    """What will be done, in a few lines."""
    options = plan.options
    for field, values in plan.grid.axes.items():
        shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values[:12])
        console.print(f"  {field:15s} {shown}{', ...' if len(values) > 12 else ''}")
    left = plan.forecast or plan
    blocks = sum(len(shard.jobs) for shard in plan.shards)
    shards, workers = count(len(plan.shards), "shard"), count(plan.workers, "worker")
    rows = {
        "models": f"{len(plan.grid)}, of which {plan.finished} are finished",
        "engine": f"{options.engine}, {options.precision} ({plan.reason})",
        "schedule": f"{count(blocks, 'block')} in {shards} on {workers}",
        "work": f"{left.model_steps:,} model-steps, {operations(left.flops)}",
        "expected time": duration(plan.seconds * left.flops / max(plan.flops, 1)),
        "memory": gib(plan.memory),
        "disk": f"{gib(plan.disk)} (checkpoints kept: {options.checkpoints})",
        "directory": out,
    }
    if plan.forecast is not None:
        rungs = [f"{n:,} at step {step:,}" for step, n in plan.forecast.stops]
        more = f", ... ({len(rungs)} rungs)" if len(rungs) > 8 else ""
        spared = f"{operations(plan.flops - left.flops)} less than all to their end"
        rows["stopping"] = f"{', '.join(rungs[:8]) or 'no model any more'}{more}; {spared}"
    print_rows(console, [*rows.items(), *describe_here(plan, out)])


def print_rows(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Titles and texts."""
    for title, text in rows:
        console.print(f"  {title:15s} {text}")


def cell(value: Any) -> str:
    """A table cell: four significant digits, and a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(console: Console, run: fm.Run) -> None:
    """One row a model, with the fields in which they differ; the most monosemantic ones of a large grid."""
    fields = list(run.grid.axes) or ["lr"]
    order = list(range(len(run)))
    if len(run) > LARGEST_TABLE:
        order = sorted(order, key=lambda i: -(run.table[i]["mono_per_feature"] or 0))[:LARGEST_TABLE]
        console.print(f"The {LARGEST_TABLE} most monosemantic of {len(run)} models (all are in models.csv):")
    heads = ["model", *fields, *(SHORT.get(name, name) for name in RESULTS)]
    rows = [[str(i), *(cell(run.table[i][name]) for name in (*fields, *RESULTS))] for i in order]
    diverged = {i: run.table[i]["diverged_step"] for i in order if run.table[i]["diverged_step"]}
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    if console.is_terminal:
        shown = dict(zip(heads, widths, strict=True))
        for head in LEFT_OUT_FIRST:
            if sum(shown.values()) + 2 * (len(shown) - 1) > console.width:
                del shown[head]
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for head, width in shown.items():  # never narrower than its text: a line that wraps can still be read
            table.add_column(head, justify="right", no_wrap=True, min_width=width)
        for i, row in zip(order, rows, strict=True):
            cells = [text for head, text in zip(heads, row, strict=True) if head in shown]
            table.add_row(*cells, style="red" if run.table[i]["status"] in ("diverged", "failed") else None)
        console.print(table, crop=False)
        if left_out := [name for name in RESULTS if SHORT.get(name, name) not in shown]:
            console.print(f"(not shown, but in models.csv: {', '.join(left_out)})")
    else:
        for row in [heads, *rows]:
            console.print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    for i, step in diverged.items():
        console.print(f"model {i} diverged at step {step}; it is kept as it was at the last power of two before")


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    return run_main(run_command, argv)


def run_command(argv: list[str], errors: Console) -> int:
    """Parse, train, draw, report."""
    arguments = make_parser().parse_args(argv)
    console = plain_console()
    if arguments.status is not None:
        for line in status_lines(arguments.status):
            console.print(line)
        return 0
    grid, name = chosen_grid(arguments)
    out = str(Path("runs") / name) if arguments.out is None else arguments.out
    settings: dict[str, Any] = {
        "out": out,
        "engine": arguments.engine,
        "precision": arguments.precision,
        "workers": workers_from(arguments.workers),
        "resume": not arguments.no_resume,
        "checkpoints": arguments.checkpoints,
        "save_every": arguments.save_every,
        "ray": arguments.ray,
        "part": arguments.part,
        "keep": arguments.keep,
        "every": arguments.every,
        "by": arguments.by,
    }
    with warnings_shown(console) as failures:
        if arguments.plan is not None:
            told = (arguments.precision, arguments.checkpoints, not arguments.no_resume)
            print_rows(console, describe(estimate(grid, out, parse_cluster(arguments.plan), *told)))
            return 0
        print_plan(console, fm.plan_run(grid, **settings), out)
        if arguments.dry_run:
            return 0
        run = fm.train(grid, **settings, self_check=arguments.self_check, console=console)
    others = sum(row["status"] in ("pending", "running") for row in run.table)
    if arguments.part and others:
        console.print(f"this part is done; {count(others, 'model')} of other parts are not, yet")
    else:
        print_table(console, run)
        if not arguments.no_plots:
            drawn = fm.plots.save_all(run, run.directory.figures)
            console.print(f"{len(drawn)} figures in {run.directory.figures}")
    console.print(f"load it with: import fastmono as fm; run = fm.load_run({json.dumps(out, ensure_ascii=False)})")
    for text in failures:
        errors.print(f"error: {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
