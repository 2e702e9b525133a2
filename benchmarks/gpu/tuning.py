"""Call 3: other launch settings in turns with today's, and what the profiler says of the kernels.

ncu          forward and backward, two launches each: stalls, matrix units, cache
alternatives each in a process of its own, all compiling at once; then turns, and each kernel's time
racecheck    one step of streamed kernels, whose warp groups share memory, then of the resident kernel
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.comparison import (
    RESERVE,
    TURN_LIMIT,
    Entrant,
    Match,
    prepare,
    prepared,
    rehearsed_grid,
    rounds,
    write_states,
)
from benchmarks.gpu.jobs import DEVICE_SECONDS, Flight, Job, python
from benchmarks.gpu.partners import Gone, read
from benchmarks.gpu.planted import FAULTS, PLANTED
from benchmarks.suites import EIGHT_LEARNING_RATES, TINY, pair
from fastmono.presets import preset

NCU_SECONDS, RACE_SECONDS = 40.0, 40.0
READY_SECONDS, LEAST_SPARE, AGREE_SECONDS = 60.0, 45.0, 10.0
"""Until all have compiled, since the beginning; for turns and profiles at least, whatever the tools after them would
take; for the comparison with today's settings, of each match."""
TUNING_ROUNDS, TUNING_TURN_SECONDS = 2, 0.15
"""Of fifteen entrants that differ by tenths."""
SECTIONS = ("SpeedOfLight", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats",
            "Occupancy", "LaunchStats")  # fmt: skip
STEPS, CLOSE = 8, 0.1
"""Steps after which an alternative's parameters are compared with those of today's settings, and how far they may be
apart, in units of the way gone. Sums in another order differ by rounding; LAMB makes of a gradient that rounds to
another side of 0 a whole step."""


@dataclass(frozen=True)
class Alternative:
    """Other settings, by the names of `Launch`, and what they are expected to change, with the reason."""

    launch: dict[str, int] = field(default_factory=dict)
    expected: str = ""
    switches: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """As the engine takes them."""
        return {**self.switches, **({"launch": self.launch} if self.launch else {})}


PUBLISHED = {
    "forward 256 x 64 x 128, not carried": Alternative(
        {"forward_carried": False, "BR": 256, "BK": 64, "BO": 128, "forward_stages": 3},
        "17.5 us of cache for 23.3, 16.1 us of products for 13.5: faster where the cache is the limit",
    ),
    "forward 128 x 64 x 128, two programs": Alternative(
        {"forward_carried": False, "BO": 128, "forward_warps": 4, "forward_stages": 3},
        "a program multiplies while the other computes phi; 16.1 us of products, 28 of cache",
    ),
    "forward 64 x 64 x 256, two programs": Alternative(
        {"BR": 64, "forward_warps": 4, "forward_stages": 2}, "the same, carried; weights are read twice as often"
    ),
    "forward, two stages": Alternative({"forward_stages": 2}, "a chunk less in flight: slower where the cache is far"),
    "backward 64 x 64 x 128, two programs": Alternative(
        {"BB": 64, "BL": 64, "BP": 128, "backward_warps": 4, "backward_stages": 2},
        "a program multiplies while the other forms dz; 38 us of cache for 23",
    ),
    "backward 64 x 128 x 128": Alternative(
        {"BB": 64, "BP": 128, "backward_stages": 3}, "fewer turns, twice as many programs; 32 us of cache for 23"
    ),
    "backward, three stages": Alternative({"backward_stages": 3}, "a chunk less in flight"),
    "projection not transposed": Alternative(
        {"project_across": False}, "its products wait for one another: under 1 us a model-step more"
    ),
    "moments, 64 registers": Alternative(
        {"moments_registers": 64}, "twice as many programs a multiprocessor, and spills: 5.7 us of memory at the least"
    ),
    "update by 32 rows": Alternative({"BA": 32}, "half as many programs, twice the numbers in flight each"),
    "rows 8192": Alternative({"rows": 8192}, "half the partial gradients, half the programs of backward"),
    "rows 2048": Alternative({"rows": 2048}, "twice the partial gradients; a fuller last wave"),
    "copy engine off": Alternative(expected="slower: addresses take registers, and spill", switches={"bulk": False}),
    "graphs off": Alternative(expected="nine launches a step from the host: 40 us more", switches={"graphs": False}),
}
"""Of the paper's grid, in bf16. Microseconds are those of benchmarks/kernel_limits.py, of one model-step."""
SMALL = {
    "4 warps": Alternative({"num_warps": 4}, "two programs a multiprocessor where registers allow"),
    "streamed": Alternative(expected="by count about as fast at 1,024 models", switches={"regime": "streamed"}),
}
"""Of 1,024 tiny models, in bf16."""


def matches(rehearse: bool) -> tuple[list[Match], str]:
    """Today's settings beside the alternatives, and the device."""

    def beside(name: str, alternatives: dict[str, Alternative]) -> list[Entrant]:
        return [("today", name, {})] + [(label, name, other.arguments()) for label, other in alternatives.items()]

    if rehearse:
        some = {name: PUBLISHED[name] for name in ("update by 32 rows", "copy engine off")}
        planted: list[Entrant] = [(fault, f"{PLANTED}{fault}", {}) for fault in FAULTS]
        grid = {"grid": (rehearsed_grid(), 1)}
        return [Match("published", [*beside("triton-fp32", some), *planted], grid, "grid", unit=4)], "cpu"
    grids = {"grid": (tuple(spec for spec in preset("published") if spec.init_bias == 0.0), 1)}
    tiny = {"1024 models": (pair(TINY, EIGHT_LEARNING_RATES), 64)}
    return [
        Match("published", beside("triton-bf16", PUBLISHED), grids, "grid"),
        Match("tiny", beside("triton-bf16", SMALL), tiny, "1024 models"),
    ], "cuda"


def agree(flight: Flight, match: Match, folder: Path) -> None:
    """Whoever does not go where today's settings go, in a few steps on the same batches, is out."""
    start, truth, ends = read(str(match.states[match.gated][0]))[0], None, flight.left - AGREE_SECONDS
    for player in match.players:
        if flight.left <= ends and not flight.rehearse:
            return  # they are timed all the same, and the page shows who was compared
        with contextlib.suppress(Gone):
            path = folder / "agreement.state"
            player.ask(TURN_LIMIT, do="load", state=str(match.states[match.gated][0]))
            player.ask(TURN_LIMIT, do="train", steps=STEPS, save=str(path))
            reached = read(str(path))[0]
            truth = reached if truth is None else truth
            off = max(
                float(
                    (reached.parameters[name] - truth.parameters[name]).norm() / (truth.parameters[name] - old).norm()
                )
                for name, old in start.parameters.items()
            )
            flight.record("agreement", match=match.name, partner=player.label, off_by=round(off, 5))
            if not off <= CLOSE:
                player.leave(f"wrong result: off by {off:.3g} of the way that today's settings go")


def profiler(out: Path) -> list[Job]:
    """Nsight Compute on forward, backward and update, two launches each, after the first steps; a table a launch."""
    ncu = [
        "ncu", "--clock-control", "none", "--cache-control", "none",  # as a step finds the cache
        "--kernel-name", "regex:forward_kernel|backward_kernel|moments_kernel|apply_kernel",
        "--launch-skip", "16", "--launch-count", "8", "--csv", "--page", "details",
        "--log-file", str(out / "call3_ncu.csv"),
    ]  # fmt: skip
    for section in SECTIONS:
        ncu += ["--section", section]
    return [
        Job("ncu", [*ncu, *python("benchmarks.gpu.few", "published", "--steps", "8", "--models", "6")], NCU_SECONDS)
    ]


def race() -> list[Job]:
    """compute-sanitizer's racecheck on the streamed kernels of the paper's grid, and on a resident model."""
    tool = ["compute-sanitizer", "--tool", "racecheck", "--racecheck-report", "all"]
    few = {"streamed": ["published", "--steps", "1"], "resident": ["tiny", "--steps", "2"]}
    return [
        Job(f"racecheck, {regime}",
            [*tool, *python("benchmarks.gpu.few", *own, "--switches", json.dumps({"regime": regime}))], RACE_SECONDS)
        for regime, own in few.items()
    ]  # fmt: skip


def fly(flight: Flight) -> None:
    """The whole call."""
    folder, small = Path(flight.folder.name), ["--small"] if flight.rehearse else []
    chosen, device = matches(flight.rehearse)
    flight.run("device", [Job("device", python("benchmarks.gpu.device"), DEVICE_SECONDS)])
    for match in chosen:
        write_states(match, folder)
        prepare(flight, match, device, folder, gated=False)
    for match in chosen:
        with flight.guarded(f"{match.name}, prepared"):
            prepared(flight, match, READY_SECONDS)
            agree(flight, match, folder)
    flight.run("rates", [Job("rates", python("benchmarks.gpu.device", "--rates", *small), 20.0)])
    spare = flight.left - RESERVE
    if not flight.rehearse:
        spare = max(spare - NCU_SECONDS - RACE_SECONDS, min(spare, LEAST_SPARE))
    for match, share in zip(chosen, (0.8, 0.2) if len(chosen) == 2 else (1.0,), strict=True):
        with flight.guarded(f"{match.name}, turns"):
            rounds(flight, match, share * spare, not flight.rehearse, TUNING_ROUNDS, TUNING_TURN_SECONDS)
        for player in match.players:
            player.leave("over")
    if flight.rehearse:
        flight.run("few", [Job("few", python("benchmarks.gpu.few", "tiny", "--steps", "1"), 60.0)])
    else:
        flight.run("ncu", profiler(flight.out), reserve=RESERVE)
        flight.run("racecheck", race(), reserve=RESERVE)
