"""Print the results of a run as Markdown tables: mean [lowest, highest] over seeds.

    python scripts/results.py runs/demo
    python scripts/results.py runs/paper-small --preset lr-zero-bias-small --only lr=.003,.03
    python scripts/results.py runs/paper-small --preset width-small --columns mono_per_feature kept_by_map

`fastmono/results.py` lists the columns. Where learning rates vary a second table says what goes with them. Exit code 0:
printed; 2: bad arguments, or no such run; 1: anything else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

import fastmono as fm
from fastmono import results
from fastmono.command_line import Parser, UsageError, plain_console, real, run_main
from fastmono.presets import PRESET_NAMES, preset
from fastmono.spec import FIELDS, ModelSpec


def make_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="results.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--preset", metavar="NAME", help=f"only the models of a preset: {PRESET_NAMES}")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FIELD=VALUE[,VALUE...]", help="only models with these values"
    )
    parser.add_argument(
        "--columns", nargs="+", default=results.DEFAULT, metavar="NAME", help=f"({' '.join(results.DEFAULT)})"
    )
    return parser


def chosen(spec: ModelSpec, conditions: list[str]) -> bool:
    """Whether a model has one of the values of each condition. `UsageError` for what is no condition."""
    for condition in conditions:
        field, _, texts = condition.partition("=")
        if field not in FIELDS or not texts:
            raise UsageError(f"--only {condition}: must be FIELD=VALUE[,VALUE...], a field being {', '.join(FIELDS)}")
        value = getattr(spec, field)
        try:
            allowed = [text if isinstance(value, str) else real(text) for text in texts.split(",")]
        except ValueError as error:
            raise UsageError(f"--only {condition}: {error} is not a number") from None
        if value not in allowed:
            return False
    return True


def run_command(argv: list[str], errors: Console) -> int:
    """Parse, choose the models, print."""
    arguments = make_parser().parse_args(argv)
    run = fm.load_run(Path(arguments.run))
    everyone = preset(arguments.preset) if arguments.preset else run.specs
    models = [spec for spec in everyone if chosen(spec, arguments.only)]
    if not models:
        raise UsageError("no model of the run has these values: --only asks for too much")
    part, console = run.subset(models), plain_console()
    console.print(results.models_table(part, arguments.columns))
    if len({spec.lr for spec in models}) > 1:
        console.print("Along the learning rates, once a seed, of the models that have settled:\n")
        console.print(results.rates_table(part))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    return run_main(run_command, argv, "stopped")


if __name__ == "__main__":
    sys.exit(main())
