"""Take one model of a run apart: its numbers as a table, and the figures of the paper's section 5.

    python scripts/interpret.py runs/demo --model 5
    python scripts/interpret.py runs/demo --model 5 --step 1024 --out figures/early

Exit code 0: drawn; 2: bad arguments, no such run, model or step; 1: anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

import fastmono as fm
from fastmono.command_line import Parser, UsageError, run_main
from fastmono.metrics import THRESHOLD
from fastmono.spec import describe

Numbers = Mapping[str, float | None]
Row = tuple[str, ...]


def cell(value: float | None) -> str:
    """Three significant digits, and a dash for what does not apply."""
    return "-" if value is None else f"{value:.3g}"


def tables(n: Numbers) -> list[tuple[Row, list[Row]]]:
    """The summary's numbers as tables: the head of each, and its rows."""

    def row(title: str, *names: str) -> Row:
        return (title, *(cell(n[name]) for name in names))

    def single(title: str, name: str) -> Row:
        return row(title, *(f"single_{kind}{name}" for kind in ("", "optimal_", "beside_", "optimal_beside_")))

    def maps(title: str, name: str) -> Row:
        return row(title, f"tangent_{name}", f"fit_{name}")

    recovering, correcting = (cell(n[f"singles_{kind}"]) for kind in ("recovering", "correcting"))
    return [
        (("neurons", "monosemantic", "polysemantic", "dead"),
         [row("", "neurons_mono", "neurons_poly", "neurons_dead")]),
        (("probes by monosemantic neurons", "0", "1", "2", "more"),
         [row("", "probes_0", "probes_1", "probes_2", "probes_more")]),
        ((f"one neuron (medians of {recovering}; {correcting} more correct)", "alone", "best", "beside others", "best"),
         [single("threshold", "threshold"), single("gain", "gain"), single("loss", "loss"),
          row("loss without it", "single_nothing"), row("interference, standard deviation", "single_interference"),
          row("AUC; before the threshold", "single_auc", "single_auc_linear")]),
        ((f"two neurons (medians of {cell(n['probes_2'])})", "lower", "upper"),
         [row("kink", "pair_kink_low", "pair_kink_high"),
          row("slope beyond it", "pair_slope_between", "pair_slope_beyond"),
          row("cosine of their inputs", "pair_cosine")]),
        (("", "pair", "best single"),
         [row("loss alone", "pair_loss", "pair_loss_best_single"),
          row("loss beside others", "pair_loss_beside", "pair_loss_best_single_beside"),
          row("AUC", "pair_auc", "pair_auc_single"),
          row("AUC before thresholds", "pair_auc_linear", "pair_auc_linear_single")]),
        (("polysemantic neurons as a linear map", "tangent", "fit"),
         [maps("effective rank", "effective_rank"), maps("distance from c x projection", "identity_distance"),
          maps("  its rank", "identity_rank"), maps("  its scale c", "identity_scale"),
          maps("distance from c x best map", "target_distance"), maps("  its scale c", "target_scale"),
          row("share of variance that fit explains", "linear_share"),
          row("  in outputs of served features", "linear_share_served")]),
        (("loss with, for the polysemantic neurons", "themselves", "fit", "tangent", "mean", "nothing"),
         [row("", "loss", "loss_fit", "loss_tangent", "loss_constant", "loss_removed"),
          row("best linear model", "loss_linear_model")]),
        (("per probe", "monosemantic", "polysemantic", "linear path"),
         [row("kinks", "kinks_mono", "kinks_poly"),
          row("kinks to be seen", "kinks_mono_visible", "kinks_poly_visible"),
          row("slope at low amplitude", "low_mono", "low_poly", "low_path")]),
    ]  # fmt: skip


def print_tables(numbers: Numbers) -> None:
    """Every table, with columns of one width throughout."""
    found = tables(numbers)
    first = max(len(row[0]) for head, rows in found for row in (head, *rows))
    for head, rows in found:
        print()
        for title, *cells in (head, *rows):
            print(f"{title:{first}s}" + "".join(f"  {text:>13s}" for text in cells))


def run_command(argv: list[str], errors: Console) -> int:
    """Parse, measure, print, draw."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--model", type=int, required=True, metavar="I", help="number of the model in the run, from 0")
    parser.add_argument("--step", type=int, metavar="S", help="after so many steps (default: the newest on disk)")
    parser.add_argument("--out", metavar="DIR", help="for figures (default: RUN/figures/interpret_model_I[_step_S])")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help=f"of monosemanticity ({THRESHOLD})")
    arguments = parser.parse_args(argv)
    run = fm.load_run(arguments.run)
    if arguments.model not in range(len(run)):
        raise UsageError(f"model {arguments.model}: the run has models 0 to {len(run) - 1}")
    params = run.parameters(arguments.model, arguments.step)
    spec = run.specs[arguments.model]
    found = fm.interpret.findings(params, spec, arguments.threshold)
    step = f"_step_{arguments.step}" if arguments.step is not None else ""
    out = Path(arguments.out or run.directory.figures / f"interpret_model_{arguments.model}{step}")
    print(f"model {arguments.model} of {run.path}: {describe(spec)}")
    print_tables(found.numbers())
    print()
    for note in found.notes:
        print(f"note: {note}")
    drawn = fm.interpret_plots.save_all(found, out)
    print(f"{len(drawn)} figures in {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    return run_main(run_command, argv, "stopped")


if __name__ == "__main__":
    sys.exit(main())
