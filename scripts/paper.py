"""Reproduce the paper: train every sweep, draw its figures, and measure its claims.

    python scripts/paper.py                      the small scale, for two CPU cores; writes runs/paper-small/report.md
    python scripts/paper.py --scale full         the paper's sizes, for a GPU
    python scripts/paper.py --only width task    some sweeps; what the directory holds already stays in the report
    python scripts/paper.py --dry-run            models, operations and expected time of each sweep
    python scripts/paper.py --quick              every code path on models of no size; for continuous integration

The same command again trains what is missing, draws, and writes the report. Exit code 0: all models trained (one that
diverged is a result, and so is a claim that fails); 2: bad arguments; 1: anything else.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

if __name__ == "__main__":  # what is imported below takes seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped before it began"))

from fastmono.command_line import Parser, UsageError, operations, plain_console, run_main, warnings_shown, workers_from
from fastmono.paper import Stage, chosen_sweeps, reproduce, stages
from fastmono.presets import SWEEPS
from fastmono.progress import duration


def make_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="paper.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", metavar="NAME", help="small (default) or full")
    parser.add_argument("--quick", action="store_true", help="instead of a scale: try the code in minutes")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"sweeps: {', '.join(SWEEPS)}")
    parser.add_argument("--out", metavar="DIR", help="run directory (default: runs/paper-<scale>)")
    parser.add_argument("--workers", default="auto", metavar="N", help="processes; auto: one for each core")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return parser


def print_plan(console: Console, found: list[Stage], out: str) -> None:
    """A line for each sweep, and the sum."""
    width = max(len(stage.sweep.name) for stage in found)
    for stage in found:
        console.print(
            f"  {stage.sweep.name:{width}s}  {len(stage.grid):4d} models, {stage.left:4d} to train  "
            f"{operations(stage.flops):>14s}  {duration(stage.seconds)}"
        )
    left, flops = sum(stage.left for stage in found), sum(stage.flops for stage in found)
    seconds = sum(stage.seconds for stage in found)
    console.print(
        f"  {'in all':{width}s}  {left:17d} to train  {operations(flops):>14s}  {duration(seconds)}, and figures"
    )
    console.print(f"  directory  {out}")


def run_command(argv: list[str], errors: Console) -> int:
    """Parse, train, draw, report."""
    arguments = make_parser().parse_args(argv)
    if arguments.quick and arguments.scale:
        raise UsageError("--quick is a scale of its own: give either --quick or --scale")
    scale = "quick" if arguments.quick else arguments.scale or "small"
    if not arguments.quick and scale not in ("small", "full"):
        raise UsageError(f"scale={scale!r}: must be small or full")
    sweeps, workers = chosen_sweeps(arguments.only), workers_from(arguments.workers)
    out = str(Path("runs") / f"paper-{scale}") if arguments.out is None else arguments.out
    console = plain_console()
    with warnings_shown(console) as failures:
        print_plan(console, stages(sweeps, scale, out, workers), out)
        if arguments.dry_run:
            return 0
        report = reproduce(sweeps, scale, out, workers, console)
    console.print(f"report: {report}")
    for text in failures:
        errors.print(f"error: {text}")
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    return run_main(run_command, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
