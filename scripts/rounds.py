"""Take trained models through successive rounds: move what their polysemantic neurons do into a linear path, reset
these neurons, train on; and print what each round did.

    python scripts/rounds.py runs/demo
    python scripts/rounds.py runs/demo --model 5 11 --rounds 4 --steps 4096 --rank 16

Writes a run directory for each round, rounds.csv and rounds.png into RUN/rounds. The same command goes on where it was
stopped; more rounds continue those that are there. Exit code 0: done; 2: bad arguments, no such run or model; 1:
anything else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import fastmono as fm
from fastmono.command_line import Parser, plain_console, run_main, warnings_shown, workers_from

TABLE = {
    "model": "model", "round": "round", "before_neurons_poly": "poly reset", "left": "left", "moved_loss": "loss moved",
    "before_eval_loss": "loss before", "after_eval_loss": "after", "before_mono_per_feature": "mono/N before",
    "after_mono_per_feature": "after", "after_share_path": "path", "after_share_mono": "mono",
    "after_share_poly": "poly",
}  # fmt: skip


def make_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="rounds.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--model", type=int, nargs="+", metavar="I", help="numbers of models, from 0 (default: all)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how many (3)")
    parser.add_argument("--steps", type=int, metavar="S", help="of a round (default: as many as the model had)")
    parser.add_argument("--rank", type=int, metavar="R", help="of the linear path (default: the model's, else m)")
    parser.add_argument("--out", metavar="DIR", help="for the rounds (default: RUN/rounds)")
    parser.add_argument("--engine", metavar="NAME", help="auto, cpu, reference, triton (default: the run's own)")
    parser.add_argument("--workers", default="auto", metavar="N", help="processes; auto: one for each core")
    return parser


def cell(value: Any) -> str:
    """Three significant digits; a dash for what is not known."""
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3g}"
    return str(value)


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    """A line for each model and round."""
    cells = [[*TABLE.values()], *([cell(row[name]) for name in TABLE] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        console.print("  ".join(f"{text:>{width}s}" for text, width in zip(line, widths, strict=True)))


def run_command(argv: list[str], errors: Console) -> int:
    """Parse, take the models through the rounds, print, draw."""
    arguments = make_parser().parse_args(argv)
    run = fm.load_run(arguments.run)
    out = Path(arguments.out) if arguments.out is not None else run.path / "rounds"
    console = plain_console()
    with warnings_shown(console) as failures:
        rows = fm.rounds.successive_rounds(
            run, arguments.model, arguments.rounds, arguments.steps, arguments.rank, out,
            engine=arguments.engine, workers=workers_from(arguments.workers), console=console,
        )  # fmt: skip
    print_table(console, rows)
    console.print(f"table: {out / 'rounds.csv'}; figure: {fm.rounds_plots.save(run, rows, out)}")
    for text in failures:
        errors.print(f"error: {text}")
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    return run_main(run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
