"""The figure of a suite, from its result: `python -m benchmarks.figures RESULT.json ...` draws `figure.png` beside it.

Bars of the time a model-step, or lines over the number of models (suite scale) or neurons (suite width).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fastmono.files import BadFile, printable, read_json
from fastmono.plot_style import DASHES, OKABE_ITO, new_figure, styled, wrapped

LINES = {"scale": ("models", "model-steps/s"), "width": ("neurons k", "ms a model-step")}
"""Suites that are drawn as lines: their axes."""


@styled
def draw(path: Path, result: dict[str, Any]) -> None:
    """Write the figure of a result (report.py) as PNG."""
    cases = result["cases"]
    as_lines = result["suite"] in LINES
    columns = 1 if as_lines else len(cases)
    rows = max(len(case["contestants"]) for case in cases)
    size = (8.5, 5.0) if as_lines else (4.5 + 3 * columns, 1.6 + 0.27 * rows)
    figure, axes = new_figure(*size, 1, columns, sharey=not as_lines)
    if as_lines:
        lines(axes[0, 0], result["suite"], cases)
        # Outside of the axes, yet below the title.
        axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
    else:
        for ax, case in zip(axes[0], cases, strict=True):
            bars(ax, case)
    shape = cases[0]["shape"]
    text = f"{result['suite']}: N {shape['N']}, m {shape['m']}, B {shape['B']}"
    text += "" if result["suite"] == "width" else f", k {shape['k']}"
    text += f"\n{result['device']['name']}, torch {result['versions']['torch']}, commit {(result['commit'] or '?')[:9]}"
    text += f"; {result['command']}{' (smoke)' if result['smoke'] else ''}"
    lines_of_text = "\n".join(map(printable, text.split("\n")))
    figure.suptitle(wrapped(lines_of_text, figure.get_figwidth() - 0.3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def timed(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The contestants of a case that have times."""
    return {name: row for name, row in case["contestants"].items() if "ms_per_model_step" in row}


def at_product_rate(case: dict[str, Any], precision: str = "fp32") -> float:
    """Milliseconds that a model-step would take by dense arithmetic at the machine's product rate."""
    return 1e3 * case["shape"]["flops_per_model_step"] / case["machine"][precision]["median"]


def bars(ax: Axes, case: dict[str, Any]) -> None:
    """Milliseconds a model-step, median over rounds with lowest and highest; the machine's product rate as a line."""
    rows = list(case["contestants"].values())
    for place, row in enumerate(rows):
        if "ms_per_model_step" not in row:
            status, where = row["status"].split(":")[0], ax.get_yaxis_transform()
            ax.text(0.02, place, status, transform=where, va="center", fontsize=7, color="0.4")
            continue
        low, middle, high = (row["ms_per_model_step"]["overall"][name] for name in ("min", "median", "max"))
        error = [[middle - low], [high - middle]]
        ax.barh(place, middle, xerr=error, color=OKABE_ITO[0 if row["ours"] else 4], height=0.7, capsize=2)
        ax.annotate(f"{middle:.3g}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_yticks(range(len(rows)), [row["title"] for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.15)
    ax.set_xlim(left=0)
    for precision, dash in zip([name for name in case["machine"] if name != "copy"], DASHES, strict=False):
        rate = at_product_rate(case, precision)
        ax.axvline(rate, color="0.3", linestyle=dash, linewidth=0.8, label=f"at the {precision} product rate")
    ax.set_xlabel("ms a model-step")
    ax.set_title(case["name"])
    ax.legend(fontsize=7, loc="lower right")


def lines(ax: Axes, suite: str, cases: list[dict[str, Any]]) -> None:
    """Over models: model-steps/s. Over neurons: milliseconds a model-step, and for ours each state besides."""
    rate = suite == "scale"

    def place(case: dict[str, Any]) -> int:
        return case["models"] if rate else case["shape"]["k"]

    names = list(dict.fromkeys(name for case in cases for name in timed(case)))
    for number, name in enumerate(names):
        found = [(place(case), timed(case)[name]) for case in cases if name in timed(case)]
        x, row = [x for x, _ in found], found[0][1]
        middles = [each["ms_per_model_step"]["overall"]["median"] for _, each in found]
        y = [1e3 / ms for ms in middles] if rate else middles
        color, dash = OKABE_ITO[number % len(OKABE_ITO)], DASHES[number // len(OKABE_ITO) % len(DASHES)]
        width = 2.2 if row["ours"] else 1.2
        ax.plot(x, y, marker="o", markersize=3, color=color, linestyle=dash, linewidth=width, label=row["title"])
        if not rate and row["ours"]:
            states = [state for state in row["ms_per_model_step"] if state != "overall"]
            for state, look in zip(states, DASHES[1:], strict=False):
                times = [each["ms_per_model_step"][state]["median"] for _, each in found]
                ax.plot(x, times, color=color, linestyle=look, linewidth=0.7, label=f"  from the {state}")
    if not rate:
        dense = [at_product_rate(case) for case in cases]
        ax.plot([place(case) for case in cases], dense, color="0.5", linewidth=0.8, label="dense, at the product rate")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel(LINES[suite][0])
    ax.set_ylabel(LINES[suite][1])


def main(argv: list[str] | None = None) -> int:
    """Draw the figures of results that were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    for path in parser.parse_args(argv).results:
        try:
            draw(path.parent / "figure.png", read_json(path))
        except BadFile as error:
            parser.error(str(error))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            parser.error(f"{path} is not the result of a benchmark ({printable(repr(error), 200)})")
        print(path.parent / "figure.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
