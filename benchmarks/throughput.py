"""fastmono beside its peers, in one run: `python -m benchmarks.throughput --suite demo`.

Every contestant trains the same recipe; a gate before timing checks that it does (gate.py). Then they take turns, from
the same states (suites.py), and the machine's own product rate is measured beside them. Results: a table, and in
benchmarks/results/<device>/<suite>/ (or --out) result.json and figure.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import figures, report
from benchmarks.contestants import ENTRIES
from benchmarks.machine import ROOT, describe, device_name, slug
from benchmarks.measure import CaseResult, Contestants, Measurement, names_for
from benchmarks.suites import SUITES, suite

RESULTS = ROOT / "benchmarks" / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--suite", nargs="+", choices=(*SUITES, "all"), required=True)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--out", type=Path, help="folder (of several suites: one folder in it each)")
    found.add_argument("--smoke", action="store_true", help="seconds: everything runs, the times mean nothing")
    found.add_argument("--only", nargs="+", default=[], metavar="CONTESTANT", help=", ".join(ENTRIES))
    found.add_argument("--rounds", type=int, help="turns of each contestant from each state")
    return found


def write(out: Path, name: str, results: list[CaseResult], arguments: argparse.Namespace, command: str) -> None:
    """result.json and figure.png of the cases so far: a run that is cut off leaves what it has."""
    chosen = suite(name, arguments.device == "cuda", arguments.smoke)
    chosen = replace(chosen, rounds=arguments.rounds or chosen.rounds)
    about = describe(torch.device(arguments.device))
    result = report.as_json(chosen, results, about, command, arguments.smoke)
    report.write_json(out / "result.json", result)
    figures.draw(out / "figure.png", result)


def main(argv: list[str] | None = None) -> int:
    """Measure the suites. 0: done; 1: a contestant failed its gate, or failed otherwise; 2: bad arguments."""
    arguments = parser().parse_args(argv)
    given = sys.argv[1:] if argv is None else list(argv)
    if "--out" in given:  # where results are written is not what was done
        at = given.index("--out")
        given = given[:at] + given[at + 2 :]
    command = "python -m benchmarks.throughput " + " ".join(given)
    device, console = torch.device(arguments.device), Console()
    if not console.is_terminal:
        console = Console(width=180)  # a log has room for the table, whatever the terminal
    if arguments.smoke:
        torch.set_num_threads(1)  # of so little work, several threads only make more
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: there is no CUDA GPU here", file=sys.stderr)
        return 2
    names = list(SUITES) if "all" in arguments.suite else list(dict.fromkeys(arguments.suite))
    made: Contestants | None = None
    failed = False
    try:
        with console.status("") as status:
            started = time.perf_counter()

            def tell(text: str) -> None:
                status.update(text)
                if not (console.is_terminal or arguments.smoke):  # a log of a long run says where it is
                    print(f"{time.perf_counter() - started:7.0f} s  {text}", file=sys.stderr, flush=True)

            for name in names:
                chosen = suite(name, device.type == "cuda", arguments.smoke)
                chosen = replace(chosen, rounds=arguments.rounds or chosen.rounds)
                wanted = names_for(chosen, device, arguments.only)
                if made is None or made.names != wanted:
                    made = Contestants(wanted, device, tell)
                out = arguments.out or RESULTS / slug(device_name(device))
                out = out / name if arguments.out is None or len(names) > 1 else out
                measurement, results = Measurement(chosen, device, made, arguments.smoke, tell), []
                for case in chosen.cases:
                    results.append(measurement.run(case))
                    report.table(console, f"{name} on {device_name(device)}", results[-1])
                    write(out, name, results, arguments, command)
                    failed |= any("failed" in row.status for row in results[-1].rows)
                console.print(f"{out / 'result.json'}, {out / 'figure.png'}", soft_wrap=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
