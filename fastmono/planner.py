"""What a run would take on devices that are not here, and its energy: from the figures of rates.json, each with its
origin, and the simulation of simulate.py.

On cores the time is that of plan.py with the measured rate of a core. No rate of training on a GPU has been measured
by this project: there the time is a bound, all operations at the rate of a matrix product, and where a target stands
for a device also the time with that, both called what they are. What a run directory's own telemetry.csv has counted
comes before all of them.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmono.block import shape_class
from fastmono.engines import mixes_widths
from fastmono.files import BadFile
from fastmono.philox import stream_key
from fastmono.plan import (
    MEMORY_SHARE,
    PROCESS_BYTES,
    SHARD_SECONDS,
    Machine,
    Plan,
    block_bytes,
    content_hashes,
    disk_bytes,
    seconds_left,
)
from fastmono.progress import duration
from fastmono.rows import TELEMETRY, read_csv
from fastmono.simulate import NO_FAULTS, Faults, expected, simulate
from fastmono.spec import Grid, ModelSpec
from fastmono.store import RunDirectory
from fastmono.tables import counted
from fastmono.trainer import Options, steps_left

MOST_DEVICES = 4096

Rows = list[tuple[str, str]]


@functools.cache
def rates() -> dict[str, Any]:
    """Devices by name, each with its figures, and the basis and origin of each."""
    return json.loads((Path(__file__).parent / "rates.json").read_text(encoding="utf-8"))


def parse_cluster(text: str) -> dict[str, int]:
    """Devices by name and how many there are: "h100:64", "cpu:32", "h100:8,a100:4".

    Raises `ValueError` for an unknown device, a number that is none, or cores beside GPUs, which no run uses at once.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().lower().partition(":")
        if name not in rates() or name in found or not number.isascii() or not number.isdigit() or len(number) > 4:
            known = ", ".join(rates())
            raise ValueError(f"plan={text[:60]!r}: must be NAME:NUMBER, or several with commas; names: {known}")
        found[name] = int(number)
    if not 1 <= min(found.values()) <= sum(found.values()) <= MOST_DEVICES:
        raise ValueError(f"plan={text[:60]!r}: must have from 1 to {MOST_DEVICES:,} devices")
    if len({rates()[name]["engine"] for name in found}) > 1:
        raise ValueError(f"plan={text[:60]!r}: a run is trained by one engine, on cores or on GPUs")
    return found


@dataclass(frozen=True)
class Estimate:
    """What the models that are left take on a described cluster."""

    cluster: dict[str, int]
    precision: str
    models: int
    """Those that are left."""
    model_steps: int
    flops: int
    disk: int
    """Bytes that they will leave in the run directory."""
    shards: tuple[float, ...]
    """Seconds of each on a device of the first kind; on a GPU a lower bound."""
    speeds: tuple[float, ...]
    """Of each device, in those of the first kind."""
    memory: int
    """Bytes that a device needs at most."""
    target: float | None
    """Share of the bound's rate that is to be reached, where one is given; 1 where the shards' seconds are no bound."""

    @property
    def measured(self) -> bool:
        """Whether the rate comes from measurements of this project, and is not a bound."""
        return "cpu" in self.cluster


def estimate(
    grid: Grid,
    out: str | Path,
    cluster: dict[str, int],
    precision: str = "auto",
    checkpoints: str = "all",
    resume: bool = True,
) -> Estimate:
    """What is left of a grid, were it trained on these devices into `out`, which need not exist.

    Args:
        cluster: devices by name, as `parse_cluster` gives them.
        precision: auto | fp32 | tf32 | bf16; auto is fp32 on cores, bf16 on GPUs.
        checkpoints: which stay on disk: all | last | none.
        resume: False plans all of the grid, whatever the directory holds.

    Raises `ValueError` for a precision that the devices have no figure for, or a model that does not fit their memory.
    """
    devices = [rates()[name] for name in cluster]
    engine = devices[0]["engine"]
    precision = ("fp32" if engine == "cpu" else "bf16") if precision == "auto" else precision
    for name, device in zip(cluster, devices, strict=True):
        if precision not in device["product"]:
            raise ValueError(f"precision={precision!r}: {name} has figures for {', '.join(device['product'])}")
    mixes = mixes_widths(engine)
    directory, hashes = RunDirectory(out), content_hashes(grid, Options(engine, precision))
    directory.expected = dict(zip(hashes, grid, strict=True))
    saved = directory.newest_states(hashes, verify=False) if resume else {}
    left = [(spec, saved.get(name)) for spec, name in zip(grid, hashes, strict=True)]
    left = [model for model in left if steps_left(*model)]
    left.sort(key=lambda model: (repr(shape_class(model[0], mixes)), model[0].n_neurons, repr(stream_key(model[0]))))
    products = [device["product"][precision]["value"] for device in devices]
    if engine == "cpu":
        core = Machine(1, None, products[0])
        sharing = Counter((shape_class(spec), stream_key(spec)) for spec, _ in left)
        costs = [seconds_left(s, state, "cpu", core, sharing[shape_class(s), stream_key(s)]) for s, state in left]
    else:
        costs = [steps_left(spec, state) * spec.flops_per_step / products[0] for spec, state in left]
    number = max(1, min(len(left), max(sum(cluster.values()), math.ceil(sum(costs) / SHARD_SECONDS))))
    members: list[list[int]] = [[] for _ in range(number)]
    before, total = 0.0, sum(costs) or 1.0
    for i, cost in enumerate(costs):  # by the middle of each one's cost, but a model each where there are so many parts
        members[i if number == len(left) else min(number - 1, int(number * (before + cost / 2) / total))].append(i)
        before += cost
    members = [which for which in members if which]
    budget = min(MEMORY_SHARE * device["memory"]["value"] for device in devices)
    architecture = min(device["architecture"] for device in devices)
    memory = max(
        (_memory([left[i][0] for i in which], engine, precision, architecture, budget) for which in members), default=0
    )
    speeds = [product / products[0] for product, n in zip(products, cluster.values(), strict=True) for _ in range(n)]
    targets = [device.get("target", {"value": 0.0})["value"] for device in devices if precision == "bf16"]
    target = 1.0 if engine == "cpu" else min(targets, default=0.0) or None
    return Estimate(
        cluster=cluster,
        precision=precision,
        models=len(left),
        model_steps=sum(steps_left(*model) for model in left),
        flops=sum(steps_left(*model) * model[0].flops_per_step for model in left),
        disk=sum(disk_bytes(spec, checkpoints) for spec, _ in left),
        shards=tuple(sum(costs[i] for i in which) for which in members),
        speeds=tuple(speeds),
        memory=memory,
        target=target,
    )


def _memory(specs: Sequence[ModelSpec], engine: str, precision: str, architecture: int, budget: float) -> int:
    """Bytes of a shard's largest block on a device, halved until it fits."""
    mixes, most = mixes_widths(engine), 0
    groups: dict[object, list[ModelSpec]] = {}
    for spec in specs:
        groups.setdefault(shape_class(spec, mixes), []).append(spec)
    for group in groups.values():
        while (needed := _block_memory(group, engine, precision, architecture)) > budget:
            if len(group) == 1:
                raise ValueError(
                    f"n_neurons={group[0].n_neurons}, batch_size={group[0].batch_size}: one such model takes "
                    f"{needed / 2**30:,.1f} GiB, and {budget / 2**30:,.1f} may be used of a device"
                )
            group = group[: -(-len(group) // 2)]
        most = max(most, needed)
    return most


def _block_memory(specs: Sequence[ModelSpec], engine: str, precision: str, architecture: int) -> int:
    if engine == "cpu":
        return PROCESS_BYTES + block_bytes(specs, engine)
    from fastmono.engines.triton import TritonEngine

    return TritonEngine.device_bytes(specs, precision, architecture)


def describe(made: Estimate, faults: Faults | None = None) -> Rows:
    """Titles and texts for a terminal, each figure called what it is, and the origins of all that went in."""
    faults = faults or Faults()
    names = ", ".join(f"{number} x {rates()[name]['title']}" for name, number in made.cluster.items())
    rows = [("devices", f"{names}, {made.precision}: described, and not looked for")]
    rows.append(("models", f"{made.models:,} with steps left"))
    rows.append(("work", f"{made.model_steps:,} model-steps, {made.flops / 1e15:,.4g} PFLOP"))
    rows.append(("memory", f"at most {made.memory / 2**30:,.2f} GiB of a device"))
    rows.append(("disk", f"{made.disk / 2**30:,.2f} GiB"))
    share = made.target or 1.0
    shards = [seconds / share for seconds in made.shards]
    each = duration(sum(shards) / max(len(shards), 1))
    rows.append(("shards", f"{len(shards):,}, of {each} on average" + ("" if made.measured else ", by the next lines")))
    undisturbed = simulate(made.shards, made.speeds, NO_FAULTS, 0).seconds
    if made.measured:
        rows.append(("without faults", duration(undisturbed)))
    else:
        best = f"{duration(undisturbed)}: not measured; all operations at the rate of a matrix product"
        rows.append(("time at best", best))
        if made.target:
            text = f"{duration(undisturbed / share)}: not measured; at {share:.2f} of that rate, the target"
            rows.append(("time at target", text))
    basis = "" if made.measured else " (at the target)" if made.target else " (at best)"
    mean, late = expected(shards, made.speeds, faults)
    what = (
        f"{faults.failures_per_hour:g} failures a device-hour, {faults.restart_seconds:g} s to restart, "
        f"{faults.stragglers:.0%} of devices {faults.slowdown:g} times as slow"
    )
    rows.append(("with faults", f"{duration(mean)}{basis}, nine of ten within {duration(late)}; simulated with {what}"))
    watts = sum(rates()[name]["watts"]["value"] * n for name, n in made.cluster.items()) / len(made.speeds)
    joules = watts * sum(shards) * len(made.speeds) / sum(made.speeds)
    rows.append(("energy", f"{energy(joules)}{basis}: nominal power of the devices over the time that they work"))
    return rows + origins(made.cluster, made.precision)


def energy(joules: float) -> str:
    """Joules as kWh, or kJ below a tenth of one."""
    return f"{joules / 3.6e6:,.2f} kWh" if joules >= 3.6e5 else f"{joules / 1e3:,.1f} kJ"


def origins(names: Iterable[str], precision: str) -> Rows:
    """Where the figures of devices come from."""
    rows = []
    for name in names:
        device = rates()[name]
        figures = {"FLOP/s": device["product"][precision], "bytes": device["memory"], "W": device["watts"]}
        if "target" in device and precision == "bf16":
            figures["of that rate"] = device["target"]
        for unit, figure in figures.items():
            rows.append((name, f"{figure['value']:g} {unit}, {figure['basis']}: {figure['origin']}"))
    return rows


@dataclass(frozen=True)
class Counted:
    """What a run directory's telemetry has counted so far."""

    flops: float
    seconds: float
    """Of one device."""
    joules: float | None


def telemetry(plan: Plan, out: str | Path) -> Counted | None:
    """What the models of a plan have taken so far in its directory; None where nothing is known."""
    flops = seconds = joules = 0.0
    known = True
    with suppress(BadFile):  # it holds no result
        of = {name: spec.flops_per_step for spec, name in plan.items()}
        for row in read_csv(Path(out) / "telemetry.csv", TELEMETRY):
            with suppress(ValueError, KeyError):
                own = counted(row)
                if own["model_steps"]:
                    flops += of[row["hash"]] * own["model_steps"]
                    seconds += own["seconds"]
                    known = known and own["joules"] is not None
                    joules += own["joules"] or 0.0
    return Counted(flops, seconds, joules if known else None) if flops and seconds else None


def describe_here(plan: Plan, out: str | Path) -> Rows:
    """Time where plan.py knows none, and energy, on the devices at hand."""
    rows, so_far, workers = [], telemetry(plan, out), max(plan.workers, 1)
    if so_far and math.isnan(plan.seconds):
        rate = so_far.flops / so_far.seconds
        text = f"{duration(plan.flops / rate / workers)}: at {rate:.3g} FLOP/s, measured in this run"
        rows.append(("from its start", text))
    if so_far and so_far.joules:
        each = so_far.joules / so_far.flops
        rows.append(("energy", f"{energy(plan.flops * each)}: at {each:.3g} J/FLOP, measured in this run"))
    elif plan.options.engine != "triton":
        watts = rates()["cpu"]["watts"]
        joules = watts["value"] * plan.seconds * workers
        rows.append(("energy", f"{energy(joules)}: nominal, {watts['value']:g} W a core ({watts['origin']})"))
    else:
        rows.append(("energy", "not known before the first of it is measured"))
    return rows
