"""How much of the GPU's products ReLU's zeros would save, if tiles without an active neuron were skipped.

    python -m benchmarks.empty_tiles                         benchmarks/results/empty_tiles.csv, and the table printed

Trains layers of k = N to 16 N neurons on the CPU, with zero and with negative initial bias, and looks at them at the
beginning, a quarter, a half and the end. A tile is samples x neurons as the streamed kernels take them on sm_90: one of
the forward pass that is empty saves its part of y (z must be computed to know it), one of the backward pass all of its
products. Neurons stand in their natural order, or sorted by how often each was active in another batch.

`saved` is the share of all products of a step; its mean over the states is what skipping would gain at the most,
without what finding empty tiles and permuting neurons costs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.suites import STATE_NAMES
from benchmarks.tables import RESULTS, write_csv
from fastmono.block import Block, Model
from fastmono.engines import engine_class
from fastmono.engines.launch import Launch, choose_launch
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec

OUT = RESULTS / "empty_tiles.csv"
N, STEPS = 128, 2048
WIDTHS = (1, 4, 16)
BIASES = ((0.0, 0.0), (-1.0, 0.03))
RATES = (0.007, 0.03)
COLUMNS = (
    "k_over_N", "init_bias", "lr", "state", "active", "dead_neurons", "forward_empty", "forward_empty_sorted",
    "backward_empty", "backward_empty_sorted", "saved", "saved_sorted",
)  # fmt: skip


def activity(model: Model, step: int, batches: int = 4) -> Tensor:
    """Which neurons are active in the batches from `step` on, bool [batches B, k]."""
    spec = model.spec
    sampler = FeatureSampler(spec)
    f = torch.cat([sampler.batch(step + i, 0, spec.batch_size) for i in range(batches)])
    return (f @ model.P.T) @ model.tensors["W_in"].T + model.tensors["b"] > 0


def empty_share(active: Tensor, rows: int, neurons: int) -> float:
    """The share of tiles [rows, neurons] of `active` in which nothing is, remainders counted as tiles."""
    padded = torch.nn.functional.pad(active, (0, -active.shape[1] % neurons, 0, -active.shape[0] % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // neurons, neurons)
    return 1 - float(tiles.any(3).any(1).float().mean())


def saved(launch: Launch, o: int, forward: float, backward: float) -> float:
    """The share of a step's products that is skipped, where these shares of the tiles are empty."""
    z, y = -(-o // launch.BO) * launch.M, o  # of a sample and a neuron, in multiply-adds
    back = 2 * o + -(-o // launch.BP) * launch.M
    return (forward * y + backward * back) / (z + y + back)


def look(model: Model, step: int, state: float) -> dict[str, object]:
    """One row of the file. Tiles are those of the paper's layers: the small ones here would not be streamed."""
    spec = model.spec
    launch = choose_launch(90, 512, 64, 1024, 512, 8192, "bf16")
    active, earlier = activity(model, step), activity(model, step + 2**40)
    order = earlier.float().mean(0).argsort(descending=True, stable=True)
    found = {}
    for name, chosen in (("", active), ("_sorted", active[:, order])):
        forward = empty_share(chosen, launch.BR, launch.BK)
        backward = empty_share(chosen, launch.BB, launch.BL)
        found |= {f"forward_empty{name}": forward, f"backward_empty{name}": backward}
        found[f"saved{name}"] = saved(launch, 512, forward, backward)
    shares = {"active": float(active.float().mean()), "dead_neurons": 1 - float(active.any(0).float().mean()), **found}
    about = {"k_over_N": spec.n_neurons // N, "init_bias": spec.init_bias, "lr": spec.lr, "state": STATE_NAMES[state]}
    return {**about, **{key: round(value, 4) for key, value in shares.items()}}


def rows(widths: tuple[int, ...], steps: int) -> Iterator[dict[str, object]]:
    """Train and look."""
    base = ModelSpec(n_features=N, d_embed=32, feature_prob=1 / 32, batch_size=512, steps=steps)
    for width, (init_bias, decay), lr in itertools.product(widths, BIASES, RATES):
        spec = base.replace(n_neurons=width * N, init_bias=init_bias, bias_decay=decay, lr=lr)
        engine, block = engine_class("cpu")("fp32"), Block.new([spec])
        for state in STATE_NAMES:
            engine.advance(block, int(state * steps) - block.step)
            engine.fetch(block)
            yield look(block.models[0], block.step, state)


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args(argv)
    found = []
    for row in rows(WIDTHS, arguments.steps):
        found.append(row)
        print(*row.values(), flush=True)
    write_csv(OUT, COLUMNS, found)
    shown = Table("k / N", "initial bias", "active", "saved", "saved, sorted", title="means over rates and states")
    for width, (bias, _) in itertools.product(WIDTHS, BIASES):
        chosen = [row for row in found if row["k_over_N"] == width and row["init_bias"] == bias]
        sums = (sum(float(str(row[name])) for row in chosen) for name in ("active", "saved", "saved_sorted"))
        shown.add_row(str(width), str(bias), *(f"{total / len(chosen):.3f}" for total in sums))
    Console(width=100).print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
