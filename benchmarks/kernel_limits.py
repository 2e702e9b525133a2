"""What each streamed kernel can reach at the most on an H100, from its own loops; no GPU is needed or measured.

    python -m benchmarks.kernel_limits                       benchmarks/results/kernel_limits.csv, and tables printed

For one model-step of the paper's shape in bf16, with the tiles that the engine chooses for sm_90, of a model all of
whose neurons take part, and of one that is surveyed and of whose neurons a batch activates a quarter; then of the
narrow half of the paper's width sweep, where B k = 2^23:

    useful      operations that the mathematics asks for       done       those of the kernel's loops: z is computed
    memory      bytes that must pass once                                 again for every tile of outputs
    cache       bytes that the tiles read and write, most of them from the second-level cache

Floors: done over the rate of an 8192^3 product, memory over the copy bandwidth, both as measured elsewhere on an H100
(design figures, not this project's); cache over a nominal 5.5 TB/s; the sampler's integer operations, 25 a word, and
the survey's comparison of every z, over 64 lanes of 132 multiprocessors at 1.755 GHz. The largest of a kernel's floors
is what limits it.
`share` is the useful operations of the whole step at the product rate over the sum of the floors, kernel after kernel.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.tables import RESULTS, write_csv
from fastmono.engines.launch import ROWS_A_SURVEY, Launch, choose_launch
from fastmono.spec import ModelSpec

OUT = RESULTS / "kernel_limits.csv"
PRODUCT, COPY, CACHE, INTEGER = 798e12, 3.0e12, 5.5e12, 64 * 132 * 1.755e9
"""Operations a second in bf16, bytes a second from memory and from cache, integer operations a second."""
A_WORD = 25
"""Integer operations of a feature: a quarter of Philox's ten rounds, conversion and comparison."""
SHARING = 12
"""Models that share a stream: the projection is done once for all of them."""
CASES = (1024, None), (1024, 256), (256, None), (128, None), (64, None), (32, None), (16, None)
"""Neurons, and how many of them a survey finds active: None where there is none, and all take part."""
COLUMNS = (
    "k", "active", "kernel", "useful_GFLOP", "done_GFLOP", "memory_MB", "cache_MB", "product_us", "memory_us",
    "cache_us", "integer_us", "limited_by",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One kernel's part of a model-step: operations and bytes."""

    kernel: str
    useful: float
    done: float
    memory: float
    cache: float
    integer: float = 0.0

    def floors(self) -> dict[str, float]:
        """Seconds that each limit alone would take."""
        return {
            "product": self.done / PRODUCT,
            "memory": self.memory / COPY,
            "cache": self.cache / CACHE,
            "integer": self.integer / INTEGER,
        }


def works(spec: ModelSpec, launch: Launch, size: int = 2, active: int | None = None) -> list[Work]:
    """The streamed kernels' work for one model-step; operands of `size` bytes.

    Args:
        active: so many neurons are found by a survey to take part; without one all do.
    """
    B, N, o, M = spec.batch_size, spec.n_features, spec.d_output, launch.M
    rows, outputs, back = -(-B // launch.BR), -(-o // launch.BO), -(-o // launch.BP)
    every = spec.n_neurons
    k = every if active is None else active
    row_parts, neurons = -(-B // launch.rows), -(-k // launch.BL)
    weights, numbers = k * (M + o), every * (M + o + 1)
    x, e, h, tau = size * B * M, size * B * o, size * B * k, 4 * B * o
    partial_gradients = 4 * row_parts * (k * o + back * k * (M + 1))
    again = 0 if spec.activation == "relu" else back * 2 * B * k * M  # z, where its derivative does not follow from h
    parts, W_in, copied = -(-B // ROWS_A_SURVEY), 4 * every * (M + 1), (4 + size) * weights
    survey = [
        Work(
            "survey", 0.0, 2 * B * every * M, x / SHARING + W_in + parts * every,
            -(-every // launch.BV) * x + parts * (W_in + every), B * every,
        ),
        Work("gather", 0.0, 0.0, copied + parts * every, copied + parts * every * -(-every // launch.BA) / 2),
    ]  # fmt: skip
    two = [
        Work(
            "forward", 2 * B * every * (M + o), 2 * B * k * (outputs * M + o),
            (x + tau) / SHARING + size * weights + h + e,
            outputs * x + tau + size * rows * (outputs * k * M + k * o) + h + e,
        ),
        Work(
            "backward", 4 * B * every * (M + o) - 2 * B * every * M, 4 * B * k * o + back * 2 * B * k * M + again,
            (x / SHARING + e if k else 0) + size * weights + h + partial_gradients,
            neurons * (back * x + e) + back * h + row_parts * size * k * o + partial_gradients,
        ),
    ]  # fmt: skip
    narrow = Work(
        "narrow", 6 * B * every * (M + o) - 2 * B * every * M, 2 * B * k * (2 * back * M + 3 * o),
        (x + tau) / SHARING + size * weights + partial_gradients,
        back * x + tau + row_parts * size * (back * k * M + k * o) + partial_gradients,
    )  # fmt: skip
    return [
        Work(
            "project", 0.0, 2 * B * N * M / SHARING, (x + tau) / SHARING,
            (x + tau + size * -(-B // launch.BS) * N * M) / SHARING, A_WORD * B * N / SHARING,
        ),
        *([] if active is None else survey),
        *([narrow] if launch.fused else two),
        Work("moments", 0.0, 0.0, partial_gradients + 20 * numbers, partial_gradients + 20 * numbers),
        Work("apply", 0.0, 0.0, *(2 * [16 * numbers + size * every * (M + o)])),
    ]  # fmt: skip


def rows_of(found: list[Work]) -> list[dict[str, object]]:
    """Each kernel's row of the file."""
    rows: list[dict[str, object]] = []
    for work in found:
        floors = work.floors()
        rows.append(
            {
                "kernel": work.kernel,
                "useful_GFLOP": round(work.useful / 1e9, 2),
                "done_GFLOP": round(work.done / 1e9, 2),
                "memory_MB": round(work.memory / 1e6, 1),
                "cache_MB": round(work.cache / 1e6, 1),
                **{f"{name}_us": round(1e6 * seconds, 1) for name, seconds in floors.items()},
                "limited_by": max(floors, key=lambda name: floors[name]),
            }
        )
    return rows


LIMITS = ("product", "memory", "cache", "integer")


def seconds(found: list[Work], limits: tuple[str, ...] = LIMITS) -> float:
    """Of a model-step: the sum of the kernels' largest floors among `limits`."""
    return sum(max(work.floors()[name] for name in limits) for work in found)


def share(found: list[Work], limits: tuple[str, ...] = LIMITS) -> float:
    """Useful operations at the product rate over that time."""
    return sum(work.useful for work in found) / PRODUCT / seconds(found, limits)


def case(k: int, active: int | None = None) -> list[Work]:
    """The work of a layer of k neurons on sm_90, of the paper's width sweep; `active` as in `works`."""
    spec = ModelSpec(n_neurons=k, batch_size=2**23 // k)
    launch = choose_launch(90, spec.n_features, spec.d_embed, k, spec.d_output, spec.batch_size, "bf16")
    return works(spec, launch, active=active)


def main() -> int:
    """Print the tables and write the file."""
    rows, console = [], Console(width=130)
    widths = Table("k", "B", "us a model-step", "of the product rate", title="the narrow half of the width sweep")
    for k, active in CASES:
        found = case(k, active)
        own = [{"k": k, "active": (active or k) / k, **row} for row in rows_of(found)]
        rows += own
        if k < 1024:
            widths.add_row(str(k), f"{2**23 // k:,}", f"{1e6 * seconds(found):.0f}", f"{share(found):.2f}")
            continue
        shown = Table(*COLUMNS, title="one model-step, N 512, m 64, B 8192, bf16, sm_90")
        for row in own:
            shown.add_row(*(str(row[name]) for name in COLUMNS))
        console.print(shown)
        console.print(
            f"the whole step can reach {share(found, ('product',)):.2f} of the product rate by its products, "
            f"{share(found, ('product', 'memory')):.2f} with memory, {share(found):.2f} with the cache and the rest"
        )
    console.print(widths)
    write_csv(OUT, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
