"""What a run will do: which models are left, which worker trains which blocks, and what that takes.

Models are dealt to shards (shards.py) in an order that keeps those of one shape and stream together, so that a batch
is sampled once for all of them. The deal is only a schedule: no result depends on it.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmono.block import flat_size, parts, shape_class, single_thread
from fastmono.engines import engine_class, mixes_widths
from fastmono.halving import Forecast
from fastmono.layout import LOG_EVERY, SCHEMA
from fastmono.metrics import EVALUATION_SAMPLES, NAMES
from fastmono.philox import stream_key
from fastmono.shards import Shard, array_part, cut, kin
from fastmono.spec import Grid, ModelSpec
from fastmono.store import KEPT_STATES, Saved, checkpoint_steps
from fastmono.trainer import BlockJob, Options, SavedModel, jobs_by_step, keeps_checkpoint, steps_left

MEMORY_SHARE = 0.8
"""Of the memory that is free, what a run may plan to use."""
PROCESS_BYTES = 350 * 2**20
"""A worker with PyTorch loaded."""
SHORT_SECONDS = 6.0
"""A run expected to be shorter than this is trained in this process: workers take seconds to start."""
SHARD_SECONDS = 180.0
"""What a shard of a long run should take: many times what its start takes, and little beside the run, so that workers
end at about the same time and a slow one delays the end by minutes."""
SAMPLING_SHARE = 0.1
"""Of the time of a model, what drawing its batches may take because others that share them are in other shards."""
FULL_DEVICE = 128
"""Models that a GPU trains at once in about the time of one, where one program trains a model."""
GPU_FLOPS = 2e14
"""Operations a second by which GPU shards are cut, and nothing else: where a run is cut changes no result."""
OVERHEAD_SECONDS = {"cpu": 20e-6, "reference": 150e-6}
"""What a model-step takes besides its products, and a word of the feature sampler: measured on cores of 2.5 GHz."""
WORD_SECONDS = {"cpu": 1e-9, "reference": 12e-9}
DENSE_SHARE, SPARSE_SHARE = 1.25, 0.3
"""Time of a model-step's products over that of dense ones at the machine's rate: where most activations are not zero,
and where the CPU engine skips those that are, with a negative initial bias most of them throughout."""
HELD_OUT_WORD_SECONDS = 50e-9
"""A word of the held-out samples, which no engine draws for itself, and one activation that is counted."""
HELD_OUT_ACTIVATION_SECONDS = 8e-9


@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    cores: int
    memory: int | None
    """Bytes free, None where the system does not say."""
    flops: float
    """Float32 operations a second of one core, in a matrix product."""
    device_memory: int | None = None
    """Bytes free on the GPU, None where there is none."""
    architecture: int = 0
    """90 for sm_90; 0 where there is no GPU."""
    devices: int = 1
    """GPUs; 1 where there is none."""


def cores() -> int:
    """Processor cores that this process may use."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes of memory that are free, within the limit of this process's control group."""
    free = None
    with suppress(OSError, ValueError, AttributeError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = limit if free is None else min(free, limit)
    return free


def this_machine() -> Machine:
    """Measured in about 20 ms."""
    a = torch.full((384, 384), 0.5)
    best = math.inf
    with single_thread():
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - started)
    device_memory, architecture = None, 0
    if torch.cuda.is_available():
        device_memory = torch.cuda.mem_get_info()[0]
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    return Machine(
        cores(), free_memory(), 2 * 384**3 / best, device_memory, architecture, max(1, torch.cuda.device_count())
    )


@dataclass(frozen=True)
class Plan:
    """A run before it starts. Bytes, operations and seconds are estimates of what is left to do."""

    grid: Grid
    hashes: tuple[str, ...]
    saved: Mapping[str, Saved]
    options: Options
    machine: Machine
    reason: str
    """Why this engine and precision."""
    workers: int
    """How many shards are trained at a time."""
    shards: tuple[Shard, ...]
    part: tuple[int, int] | None
    """(i, n) of the i-th of n array tasks, which trains a part of the grid; None: all of it."""
    memory: int
    disk: int
    flops: int
    model_steps: int
    seconds: float
    forecast: Forecast | None = None
    """What successive halving is expected to leave of it, where that is asked for."""

    @property
    def finished(self) -> int:
        """Models that need no more steps."""
        return sum(steps_left(spec, self.saved.get(name)) == 0 for spec, name in self.items())

    def items(self) -> Iterable[tuple[ModelSpec, str]]:
        """Each model with its content hash, in the grid's order."""
        return zip(self.grid.specs, self.hashes, strict=True)


def content_hashes(grid: Grid, options: Options) -> tuple[str, ...]:
    """What each model's results are committed under."""
    return tuple(spec.content_hash(options.engine, options.precision, SCHEMA) for spec in grid)


def model_bytes(spec: ModelSpec) -> int:
    """Memory of one model in training, and of its initial values while they are made."""
    history = 4 * (spec.steps // LOG_EVERY + 1) + 8 * len(NAMES) * (spec.steps.bit_length() + 1)
    projections = 4 * spec.n_features * spec.d_embed * (2 if spec.task == "reprojector" else 1)
    return 4 * 4 * flat_size(spec) + projections + history


def block_bytes(specs: Iterable[ModelSpec], engine: str) -> int:
    """Memory that training a block takes, beyond the process itself."""
    specs = list(specs)
    streams = len({stream_key(s) for s in specs})
    # The largest of all: the widest need not be it, where models have other probabilities or paths of the CPU engine.
    workspace = max(engine_class(engine).workspace_bytes(spec, streams) for spec in specs)
    spec = max(specs, key=lambda s: s.n_neurons + s.linear_path)
    held_out = 4 * min(EVALUATION_SAMPLES * spec.n_features, 2**24) + 2**22
    rows = max(spec.n_neurons, spec.linear_path)
    drawing = 8 * max(5 * spec.n_features * spec.d_embed, 8 * rows * max(spec.d_embed, spec.d_output))
    # Stacked, and as the bytes of a file: one part after another.
    saving = max(2 * sum(model_bytes(specs[i]) for i in rows) for rows in parts(specs))
    return sum(map(model_bytes, specs)) + workspace + max(held_out, drawing, saving)


def disk_bytes(spec: ModelSpec, policy: str) -> int:
    """What one model leaves on disk."""
    steps = [0, *(1 << i for i in range(spec.steps.bit_length())), spec.steps]
    kept = len({step for step in steps if keeps_checkpoint(policy, step, spec.steps)})
    projections = 4 * spec.n_features * spec.d_embed * (2 if spec.task == "reprojector" else 1)
    return kept * (4 * spec.n_parameters + projections) + KEPT_STATES * model_bytes(spec) + model_bytes(spec) // 4


def model_seconds(spec: ModelSpec, engine: str, machine: Machine, sharing: int) -> float:
    """One step of one model on one core, when so many models share its batches."""
    kind = "cpu" if engine == "cpu" else "reference"
    words = spec.batch_size * spec.n_features * (2 if spec.task == "abs" else 1)
    skips = kind == "cpu" and spec.activation == "relu" and spec.init_bias < 0
    products = (SPARSE_SHARE if skips else DENSE_SHARE) * spec.flops_per_step / machine.flops
    return products + OVERHEAD_SECONDS[kind] + words * WORD_SECONDS[kind] / sharing


def checkpoint_seconds(spec: ModelSpec, machine: Machine, sharing: int) -> float:
    """Measuring one model at one checkpoint: in a grid of many tiny models most of the time goes there."""
    words = spec.n_features * (2 if spec.task == "abs" else 1) * HELD_OUT_WORD_SECONDS / sharing
    forward = 2 * (spec.n_neurons + spec.linear_path) * (spec.d_embed + spec.d_output) / machine.flops
    return EVALUATION_SAMPLES * (words + forward + spec.n_neurons * HELD_OUT_ACTIVATION_SECONDS)


def seconds_left(
    spec: ModelSpec, saved: Saved | None, engine: str, machine: Machine, sharing: int, until: int | None = None
) -> float:
    """What a model still takes on one core: its steps, and its measures at the checkpoints to come."""
    steps, done = steps_left(spec, saved, until), saved.step if saved else 0
    if not steps:
        return 0.0
    checkpoints = sum(done < step <= done + steps for step in checkpoint_steps(spec.steps))
    measures = checkpoints * checkpoint_seconds(spec, machine, sharing)
    return steps * model_seconds(spec, engine, machine, sharing) + measures


def least_together(spec: ModelSpec, engine: str, machine: Machine) -> int:
    """How many models that share a stream a shard should hold at least.

    On a GPU, so that it is full; elsewhere, so that drawing the batches takes a small share of the time.
    """
    if engine == "triton":
        from fastmono.engines.launch import RESIDENT_BYTES

        return FULL_DEVICE if 4 * spec.n_neurons * (spec.d_embed + spec.d_output) <= RESIDENT_BYTES else 1
    shared = model_seconds(spec, engine, machine, 10**9)
    return math.ceil((model_seconds(spec, engine, machine, 1) - shared) / (SAMPLING_SHARE * shared))


def make_plan(
    grid: Grid,
    options: Options,
    reason: str,
    saved: Mapping[str, Saved],
    workers: int | str,
    machine: Machine,
    part: tuple[int, int] | None = None,
    until: int | None = None,
    without: Collection[str] = (),
) -> Plan:
    """Deal the models that are left to shards.

    Args:
        saved: the newest good state of each model that has one, by content hash.
        workers: how many shards at a time, or "auto": a core or a GPU each, but this process alone for a run of
            seconds.
        part: (i, n) for the models of array task i of n alone.
        until: a step at which models that have more wait for a decision about them; None: all train to their last.
        without: content hashes of models that are left out.

    Raises:
        ValueError: a model does not fit this machine's memory.
    """
    hashes = content_hashes(grid, options)
    mixes = mixes_widths(options.engine)
    on_gpu = options.engine == "triton" and bool(machine.architecture)
    kinds = [kin(spec, mixes) for spec in grid]
    own = set(range(len(grid))) if part is None else array_part(grid, mixes, part)
    own = {i for i in own if hashes[i] not in without}
    sharing = Counter(kinds[i] for i in own)
    cost = [0.0] * len(grid)
    for i in own:
        spec, state = grid[i], saved.get(hashes[i])
        if on_gpu:  # no rate of one has been measured yet
            cost[i] = steps_left(spec, state, until) * spec.flops_per_step / GPU_FLOPS
        else:
            cost[i] = seconds_left(spec, state, options.engine, machine, sharing[kinds[i]], until)
    left = [i for i in own if cost[i]]
    if workers == "auto":
        short = sum(cost) < SHORT_SECONDS
        workers = 1 if short else machine.devices if options.engine == "triton" else machine.cores
    workers = max(1, min(int(workers), len(left)))
    budget = None
    if machine.memory is not None:
        budget = int(machine.memory * MEMORY_SHARE)
        workers = _fitting_workers([grid[i] for i in left], options.engine, workers, budget)
        budget = budget // workers - PROCESS_BYTES
    order = sorted(own, key=lambda i: (kinds[i], i))  # a model that has diverged stays in its block
    members = cut(
        [cost[i] for i in order],
        [kinds[i] for i in order],
        [least_together(grid[i], options.engine, machine) for i in order],
        workers,
        SHARD_SECONDS if workers > 1 else math.inf,  # one worker gains nothing by many shards
    )
    shards = []
    for which in members:
        models = [order[i] for i in which]
        jobs = _blocks([(grid[i], hashes[i], saved.get(hashes[i])) for i in models], options, budget, machine, until)
        if jobs:
            memory = max(block_bytes(job.specs, options.engine) for job in jobs)
            shards.append(Shard(jobs, memory, sum(cost[i] for i in models)))
    pending = [(grid[i], saved.get(hashes[i])) for i in left]
    return Plan(
        grid=grid,
        hashes=hashes,
        saved=saved,
        options=options,
        machine=machine,
        reason=reason,
        workers=min(workers, len(shards)),
        shards=tuple(shards),
        part=part,
        memory=sum(PROCESS_BYTES + size for size in sorted((shard.memory for shard in shards), reverse=True)[:workers]),
        disk=sum(disk_bytes(spec, options.checkpoints) for spec, _ in pending),
        flops=sum(shard.flops for shard in shards),
        model_steps=sum(shard.model_steps for shard in shards),
        seconds=math.nan if on_gpu else max([sum(cost) / workers, *(shard.seconds for shard in shards)]),
    )


def shards_to(plan: Plan, saved: Mapping[str, Saved], until: int | None, without: Collection[str]) -> Sequence[Shard]:
    """What is left of a plan, dealt anew: from newer states, to a step at most, without some models."""
    again = make_plan(plan.grid, plan.options, plan.reason, saved, plan.workers, plan.machine, None, until, without)
    return again.shards


def _fitting_workers(specs: Iterable[ModelSpec], engine: str, workers: int, budget: int) -> int:
    """As many workers as can each hold the largest model."""
    largest = max(specs, key=lambda spec: block_bytes([spec], engine), default=None)
    if largest is None:
        return workers
    needed = block_bytes([largest], engine) + PROCESS_BYTES
    if needed > budget:
        raise ValueError(
            f"n_features={largest.n_features}, n_neurons={largest.n_neurons}, batch_size={largest.batch_size}, "
            f"steps={largest.steps}: one such model takes {_gib(needed)}, and {_gib(budget)} may be used here"
        )
    return min(workers, budget // needed)


def _fits(specs: Sequence[ModelSpec], options: Options, budget: int | None, machine: Machine) -> bool:
    """Whether a block fits the host's memory, and the device's where it has one."""
    if budget is not None and block_bytes(specs, options.engine) > budget:
        return False
    if options.engine != "triton" or machine.device_memory is None:
        return True
    from fastmono.engines.switches import Switches
    from fastmono.engines.triton import TritonEngine

    switches = Switches.from_dict(options.switches)
    needed = TritonEngine.device_bytes(specs, options.precision, machine.architecture, switches)
    return needed <= MEMORY_SHARE * machine.device_memory


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"


def _blocks(
    models: list[SavedModel], options: Options, budget: int | None, machine: Machine, until: int | None
) -> tuple[BlockJob, ...]:
    """Blocks of one shape class and step that fit the budget; those with nothing left to train are dropped."""
    mixes = mixes_widths(options.engine)

    def key(model: SavedModel) -> str:
        return repr(shape_class(model[0], mixes))

    blocks = []
    for _, group in itertools.groupby(sorted(models, key=key), key):
        for job in jobs_by_step(group, until):
            size, start = len(job.specs), 0
            while start < len(job.specs):
                # Wider models, which come later, may leave room for fewer.
                while size > 1 and not _fits(job.specs[start : start + size], options, budget, machine):
                    size = -(-size // 2)
                blocks.append(job.part(slice(start, start + size)))
                start += size
    return tuple(job for job in blocks if any(job.steps_left()))
