"""The figure of a suite: bars of the time a model-step, or lines over the number of models or neurons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes

from benchmarks.contestants import ENTRIES
from benchmarks.measure import CaseResult
from benchmarks.report import overall
from benchmarks.suites import Suite
from fastmono.plot_style import DASHES, OKABE_ITO, new_figure, styled, wrapped


@styled
def draw(path: Path, suite: Suite, results: Sequence[CaseResult], caption: str) -> None:
    """Write the figure as PNG; `caption` says device, versions and command."""
    columns = len(results) if suite.kind == "bars" else 1
    rows = max(len(result.rows) for result in results)
    size = (4.5 + 3 * columns, 1.6 + 0.27 * rows) if suite.kind == "bars" else (8.5, 5.0)
    figure, axes = new_figure(*size, 1, columns, sharey=suite.kind == "bars")
    if suite.kind == "bars":
        for ax, result in zip(axes[0], results, strict=True):
            bars(ax, result)
    else:
        lines(axes[0, 0], suite, results)
        # Outside of the axes, yet below the title.
        axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
    spec = results[0].case.grid[0]
    shape = f"N {spec.n_features}, m {spec.d_embed}, B {spec.batch_size}"
    shape += "" if suite.name == "width" else f", k {spec.n_neurons}"
    figure.suptitle(wrapped(f"{suite.name}: {shape}\n{caption}", figure.get_figwidth() - 0.3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def bars(ax: Axes, result: CaseResult) -> None:
    """Milliseconds a model-step, median over rounds with lowest and highest; the machine's product rate as a line."""
    for place, row in enumerate(result.rows):
        if not row.timed:
            ax.text(
                0.02,
                place,
                row.status.split(":")[0],
                transform=ax.get_yaxis_transform(),
                va="center",
                fontsize=7,
                color="0.4",
            )
            continue
        times = overall(row)
        middle = median(times)
        error = [[middle - min(times)], [max(times) - middle]]
        ax.barh(place, middle, xerr=error, color=OKABE_ITO[0 if row.ours else 4], height=0.7, capsize=2)
        ax.annotate(f"{middle:.3g}", (max(times), place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set_yticks(range(len(result.rows)), [ENTRIES[row.name].title for row in result.rows])
    ax.set_ylim(len(result.rows) - 0.4, -0.6)
    ax.margins(x=0.15)
    ax.set_xlim(left=0)
    flops = result.case.grid[0].flops_per_step
    for precision, dash in zip([name for name in result.machine[0] if name != "copy"], DASHES, strict=False):
        at_rate = 1e3 * flops / median(m[precision] for m in result.machine)
        ax.axvline(at_rate, color="0.3", linestyle=dash, linewidth=0.8, label=f"at the {precision} product rate")
    ax.set_xlabel("ms a model-step")
    ax.set_title(result.case.name)
    ax.legend(fontsize=7, loc="lower right")


def lines(ax: Axes, suite: Suite, results: Sequence[CaseResult]) -> None:
    """Over models: model-steps/s. Over neurons: milliseconds a model-step, and for ours each state besides."""
    names = list(dict.fromkeys(row.name for result in results for row in result.rows if row.timed))
    for number, name in enumerate(names):
        found = [(result.case.x, row) for result in results for row in result.rows if row.name == name and row.timed]
        x, middles = [x for x, _ in found], [median(overall(row)) for _, row in found]
        y = [1e3 / ms for ms in middles] if suite.kind == "rate" else middles
        color, dash = OKABE_ITO[number % len(OKABE_ITO)], DASHES[number // len(OKABE_ITO) % len(DASHES)]
        width = 2.2 if found[0][1].ours else 1.2
        ax.plot(x, y, marker="o", markersize=3, color=color, linestyle=dash, linewidth=width, label=ENTRIES[name].title)
        if suite.kind == "time" and found[0][1].ours:
            for state, look in zip(found[0][1].ms, DASHES[1:], strict=False):
                times = [median(row.ms[state]) for _, row in found]
                ax.plot(x, times, color=color, linestyle=look, linewidth=0.7, label=f"  from the {state}")
    if suite.kind == "time":
        rate = [1e3 * r.case.grid[0].flops_per_step / median(m["fp32"] for m in r.machine) for r in results]
        ax.plot([r.case.x for r in results], rate, color="0.5", linewidth=0.8, label="dense, at the fp32 product rate")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlabel(suite.x_label)
    ax.set_ylabel("model-steps/s" if suite.kind == "rate" else "ms a model-step")
