"""How the time of a run grows with what goes wrong, simulated: thousands of shards on hundreds of devices.

    python -m benchmarks.simulation        benchmarks/results/simulation.csv, docs/figures/scale.png

The executor of `fastmono.simulate`, with 5,000 shards of 180 s. Reported is the failure rate of a large training run
(`fastmono.simulate.Faults`); the others, the heavy tail and the stragglers are assumed, as the labels say.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np

from fastmono.plot_style import DASHES, OKABE_ITO, new_figure, styled
from fastmono.simulate import NO_FAULTS, Faults, Outcome, ideal_seconds, simulate

ROOT = Path(__file__).resolve().parent.parent
TABLE, FIGURE = ROOT / "benchmarks" / "results" / "simulation.csv", ROOT / "docs" / "figures" / "scale.png"
SHARDS, SECONDS, RUNS = 5000, 180.0, 10
DEVICES = (8, 16, 32, 64, 128, 256, 512)
RATES = tuple(10.0**x for x in np.arange(-2, 1.01, 0.5))
UNEVEN = replace(NO_FAULTS, spread=0.5, stragglers=0.02)
PARTS = {"the last, in shards of 45 s": 4}
"""Into how many a shard is cut, where that is not 1."""
SCENARIOS = {
    "equal shards, no faults": NO_FAULTS,
    "heavy tail, 2 % stragglers": UNEVEN,
    "and 2e-5 failures/h (reported)": replace(UNEVEN, failures_per_hour=2e-5, state_lost=0.01),
    "and 1 failure/h (assumed)": replace(UNEVEN, failures_per_hour=1.0, state_lost=0.01),
    "the last, in shards of 45 s": replace(UNEVEN, failures_per_hour=1.0, state_lost=0.01),
}
SAVING = {"states every 20 s": 20.0, "states every 60 s": 60.0, "none within a shard": np.inf}
COLUMNS = (
    "scenario", "devices", "failures_per_hour", "save_every", "ideal_s", "mean_s", "nine_of_ten_s", "over_ideal",
    "lost_share", "failures",
)  # fmt: skip


def measure(scenario: str, devices: int, faults: Faults, runs: int) -> dict[str, object]:
    """A row of the table: so many runs, each with its own seed."""
    parts = PARTS.get(scenario, 1)
    shards, speeds = [SECONDS / parts] * (SHARDS * parts), [1.0] * devices
    found: list[Outcome] = [simulate(shards, speeds, faults, seed) for seed in range(runs)]
    seconds, ideal = [outcome.seconds for outcome in found], ideal_seconds(shards, speeds)
    lost = sum(outcome.lost for outcome in found) / sum(outcome.busy for outcome in found)
    values = (
        scenario, devices, faults.failures_per_hour, faults.save_every, ideal, mean(seconds),
        float(np.quantile(seconds, 0.9)), mean(seconds) / ideal, lost, mean(outcome.failures for outcome in found),
    )  # fmt: skip
    return dict(zip(COLUMNS, (f"{v:.6g}" if isinstance(v, float) else v for v in values), strict=True))


def rows(devices: Sequence[int], rates: Sequence[float], runs: int) -> Iterator[dict[str, object]]:
    """The table: each scenario over the number of devices, and the work lost over the failure rate at 256 of them."""
    for scenario, faults in SCENARIOS.items():
        for number in devices:
            yield measure(scenario, number, faults, runs)
    for saving, every in SAVING.items():
        for rate in rates:
            yield measure(saving, 256, replace(UNEVEN, failures_per_hour=rate, save_every=every), runs)


@styled
def draw(path: Path, table: Sequence[Mapping[str, object]]) -> None:
    """Write the figure as PNG."""
    figure, axes = new_figure(9.5, 4.4, 1, 2)
    left, right = axes[0]

    def line(ax: object, name: str, x: str, y: str, color: str, dash: object) -> None:
        points = [(float(str(row[x])), float(str(row[y]))) for row in table if row["scenario"] == name]
        ax.plot(*zip(*points, strict=True), color=color, linestyle=dash, marker="o", markersize=3, label=name)  # type: ignore[attr-defined]

    for name, color, dash in zip(SCENARIOS, OKABE_ITO, DASHES, strict=False):
        line(left, name, "devices", "over_ideal", color, dash)
    for name, color, dash in zip(SAVING, OKABE_ITO, DASHES, strict=False):
        line(right, name, "failures_per_hour", "lost_share", color, dash)
    left.set_xscale("log", base=2)
    left.set_xticks(DEVICES, [str(number) for number in DEVICES])
    left.set_xlabel(f"devices, for {SHARDS:,} shards of {SECONDS:.0f} s")
    left.set_ylabel("time of the run over the ideal")
    left.set_ylim(bottom=0.95)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("failures of a device in an hour, 256 devices")
    right.set_ylabel("share of the work that is done again")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.suptitle(f"Simulated runs, means of {RUNS}: python -m benchmarks.simulation")
    figure.savefig(path)


def main() -> int:
    """Simulate, write the table, draw the figure."""
    table = list(rows(DEVICES, RATES, RUNS))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    draw(FIGURE, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
