"""The tables of docs/performance.md, from results that were kept: `python -m benchmarks.markdown RESULT.json ...`.

One table a file on standard output: a row a contestant; of a suite with several cases, a column for each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastmono.files import BadFile, printable, read_json


def cells(contestant: dict[str, Any], ratio: float | None, flops: float) -> list[str]:
    """Milliseconds a model-step, useful GFLOP/s, their share of the product rate, and the ratio to ours."""
    if "ms_per_model_step" not in contestant:
        return [contestant["status"].split(":")[0], "", "", ""]
    ms = contestant["ms_per_model_step"]["overall"]["median"]
    share = contestant["useful_over_product_rate"]["median"]
    return [f"{ms:.3g}", f"{flops / ms / 1e6:.0f}", f"{share:.2f}", "" if ratio is None else f"{ratio:.2f}"]


def one_case(case: dict[str, Any]) -> list[list[str]]:
    """Rows of a suite with one case."""
    rows = [["", "ms a model-step", "useful GFLOP/s", "of the product rate", "times as long as ours"]]
    flops = case["shape"]["flops_per_model_step"]
    for name, contestant in case["contestants"].items():
        ratio = None if name == case["best_of_ours"] else case["ratios"].get(name)
        rows.append([contestant["title"], *cells(contestant, ratio, flops)])
    return rows


def several_cases(cases: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of a suite with several: milliseconds a model-step and, behind them, how many times as long as ours."""
    rows = [["ms a model-step (times as long as ours)", *(case["name"] for case in cases)]]
    for name, contestant in cases[0]["contestants"].items():
        row = [contestant["title"]]
        for case in cases:
            ms, _, _, ratio = cells(
                case["contestants"][name], case["ratios"].get(name), case["shape"]["flops_per_model_step"]
            )
            row.append(ms if name == case["best_of_ours"] or not ratio else f"{ms} ({ratio})")
        rows.append(row)
    shares = [f"{case['useful_over_product_rate']:.2f}" for case in cases]
    return [*rows, ["ours, share of the product rate", *shares]]


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table."""
    cases = result["cases"]
    head, *rows = one_case(cases[0]) if len(cases) == 1 else several_cases(cases)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    for path in parser.parse_args(argv).results:
        try:
            result = read_json(path)
            machine = result["cases"][0]["machine"]
            about = f"`{result['command']}` on {result['device']}, commit {result['commit']}, {result['date']};"
            rate, text = machine["fp32"]["median"] / 1e9, table(result)
        except BadFile as error:
            parser.error(str(error))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            parser.error(f"{path} is not the result of a benchmark ({printable(repr(error), 200)})")
        print(f"\n{printable(about)}\nproducts {rate:.0f} GFLOP/s\n")
        print("\n".join(map(printable, text.splitlines())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
