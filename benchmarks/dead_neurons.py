"""How many neurons a batch leaves dead along a run, and what leaving them out saves a GPU.

    python -m benchmarks.dead_neurons                        benchmarks/results/dead_neurons.csv, and the table printed

Trains layers on the CPU and looks at them from the beginning to the end: the share of activations, of neurons that the
next batch does not activate at all, what decay alone has left of the bias, and whether the Triton engine would look for
dead neurons at that step (`last_survey` in fastmono/engines/launch.py). `time` is what a step of the paper's shape
would then take, over one in which every neuron takes part: sums of the floors of benchmarks/kernel_limits.py.

wide   N 128, m 32, B 512, 2,048 steps, k from N to 16 N, as in the suite `width`
paper  N 128, m 32, B 8192, k = 2 N, 8,192 steps, with sixteen times the decay: as much in all as in the paper's 131,072
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from benchmarks.kernel_limits import case, seconds
from benchmarks.tables import RESULTS, write_csv
from fastmono.block import Block, Model
from fastmono.engines import engine_class
from fastmono.engines.launch import last_survey
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec

OUT = RESULTS / "dead_neurons.csv"
STATES = (0.0, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
BASE = ModelSpec(n_features=128, d_embed=32, feature_prob=1 / 32, batch_size=512, steps=2048)
RATES = (0.003, 0.03)
DECAYS = ((0.0, 0.0), (-1.0, 0.03))
"""Initial bias, and its decay."""
COLUMNS = (
    "run", "k_over_N", "init_bias", "lr", "state", "active", "dead", "bias_left", "surveyed", "time",
)  # fmt: skip


def specs() -> Iterator[tuple[str, ModelSpec]]:
    """What is trained, by the name of its kind of run."""
    for width, (bias, decay), lr in itertools.product((1, 2, 4, 16), DECAYS, RATES):
        yield "wide", BASE.replace(n_neurons=width * BASE.n_features, init_bias=bias, bias_decay=decay, lr=lr)
    for (bias, decay), lr in itertools.product(DECAYS, RATES):
        yield "paper", BASE.replace(
            n_neurons=2 * BASE.n_features, batch_size=8192, steps=8192, init_bias=bias, bias_decay=16 * decay, lr=lr
        )  # fmt: skip


def activity(model: Model, step: int) -> tuple[float, float]:
    """The share of activations of the batch of a step that are not zero, and of neurons all of whose are."""
    spec = model.spec
    f = FeatureSampler(spec).batch(step, 0, spec.batch_size)
    active = (f @ model.P.T) @ model.tensors["W_in"].T + model.tensors["b"] > 0
    return float(active.float().mean()), 1 - float(active.any(0).float().mean())


def time_of(dead: float | None) -> float:
    """Time of a step of the paper's shape with this share of dead neurons left out, over one without a survey."""
    return seconds(case(1024, None if dead is None else round((1 - dead) * 1024))) / seconds(case(1024))


def bias_left(spec: ModelSpec, step: int) -> float:
    """What decay alone leaves of the initial bias after so many steps, as a share."""
    return math.pow(1 - spec.bias_decay * spec.lr, min(step, spec.steps // 2))


def rows() -> Iterator[dict[str, object]]:
    """Train and look."""
    for run, spec in specs():
        engine, block = engine_class("cpu")("fp32"), Block.new([spec])
        for state in STATES:
            engine.advance(block, int(state * spec.steps) - block.step)
            engine.fetch(block)
            active, dead = activity(block.models[0], block.step)
            surveyed = min(block.step, spec.steps - 1) < last_survey(spec)
            found = active, dead, bias_left(spec, block.step), time_of(dead if surveyed else None)
            active, dead, left, time = (round(value, 3) for value in found)
            yield {
                "run": run, "k_over_N": spec.n_neurons // spec.n_features, "init_bias": spec.init_bias, "lr": spec.lr,
                "state": round(state, 4), "active": active, "dead": dead, "bias_left": left,
                "surveyed": int(surveyed), "time": time,
            }  # fmt: skip


def mean_time(found: list[dict[str, object]]) -> float:
    """The mean of a run over its length, by trapezoids between its states."""
    at, times = ([float(str(row[name])) for row in found] for name in ("state", "time"))
    return sum((at[i] - at[i - 1]) * (times[i] + times[i - 1]) / 2 for i in range(1, len(at)))


def main() -> int:
    """Print the table and write the file."""
    found = []
    for row in rows():
        found.append(row)
        print(*row.values(), flush=True)
    write_csv(OUT, COLUMNS, found)
    states = [f"{state:.3g}" for state in STATES]
    shown = Table("run", "k / N", "bias", "lr", *states, "mean time", title="dead neurons of a batch along a run")
    for i in range(0, len(found), len(STATES)):
        one = found[i : i + len(STATES)]
        about = (str(one[0][name]) for name in ("run", "k_over_N", "init_bias", "lr"))
        shown.add_row(*about, *(str(row["dead"]) for row in one), f"{mean_time(one):.2f}")
    Console(width=110).print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
