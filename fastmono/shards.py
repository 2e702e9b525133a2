"""Shards: what one worker trains at a time. How models are dealt to them, and how one is described in JSON.

A shard is only a schedule. Results are committed per model, so that a run may be cut anew at every start, a shard may
be trained twice, halved, or taken up by another machine, and no bit of a result depends on it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmono.block import shape_class
from fastmono.philox import stream_key
from fastmono.spec import Grid, ModelSpec
from fastmono.store import RunDirectory, Saved, block_id
from fastmono.trainer import BlockJob, Options, jobs_by_step


@dataclass(frozen=True)
class Shard:
    """Blocks that one worker trains one after another, and what that is expected to take."""

    jobs: tuple[BlockJob, ...]
    memory: int
    """Bytes of the largest block, beyond the process itself."""
    seconds: float
    """On one core, or one device."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """The content hashes of its models."""
        return tuple(name for job in self.jobs for name in job.hashes)

    @property
    def name(self) -> str:
        """Twelve hexadecimal digits: the same models, the same name."""
        return block_id(self.hashes)

    @property
    def flops(self) -> int:
        """Operations left."""
        return sum(
            steps * spec.flops_per_step
            for job in self.jobs
            for spec, steps in zip(job.specs, job.steps_left(), strict=True)
        )

    @property
    def model_steps(self) -> int:
        """Updates left."""
        return sum(steps for job in self.jobs for steps in job.steps_left())

    def only(self, hashes: Sequence[str], saved: Mapping[str, Saved]) -> Shard | None:
        """Those of its models that are named and have steps left, from where they are now; None when none has."""
        wanted, jobs = set(hashes), []
        for job in self.jobs:
            models = zip(job.specs, job.hashes, strict=True)
            jobs += jobs_by_step(((spec, name, saved.get(name)) for spec, name in models if name in wanted), job.until)
        made = dataclasses.replace(self, jobs=tuple(job for job in jobs if any(job.steps_left())))
        return dataclasses.replace(made, seconds=self.seconds * made.flops / max(self.flops, 1)) if made.jobs else None


def encode_shard(directory: RunDirectory, shard: Shard, options: Options) -> str:
    """A worker's task as one line of JSON."""
    blocks = [
        {
            "specs": [spec.to_dict() for spec in job.specs],
            "hashes": job.hashes,
            "saved": [None if saved is None else dataclasses.asdict(saved) for saved in job.saved],
            "until": job.until,
        }
        for job in shard.jobs
    ]
    return json.dumps({"out": str(directory.path.absolute()), "options": dataclasses.asdict(options), "blocks": blocks})


def decode_shard(line: str) -> tuple[RunDirectory, list[BlockJob], Options]:
    """What `encode_shard` wrote, as `train_blocks` takes it."""
    task = json.loads(line)
    blocks = [
        BlockJob(
            tuple(ModelSpec.from_dict(spec) for spec in block["specs"]),
            tuple(block["hashes"]),
            tuple(None if saved is None else Saved(**saved) for saved in block["saved"]),
            block["until"],
        )
        for block in task["blocks"]
    ]
    return RunDirectory(task["out"]), blocks, Options(**task["options"])


def kin(spec: ModelSpec, mixes_widths: bool) -> tuple[str, ...]:
    """What models that gain by standing together have in common: their block's shape, and the stream of batches.

    Sorted by it, those of one width are neighbours also where blocks mix widths.
    """
    shape = repr(shape_class(spec, mixes_widths))
    width = f"{spec.n_neurons:12d} {spec.linear_path:12d} {spec.steps:20d}"
    return shape, width, repr(stream_key(spec))


def deal(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Consecutive indices in so many parts of about equal cost, some of which may be empty.

    By the middle of each one's cost, so that small differences do not move a model to another part.
    """
    members: list[list[int]] = [[] for _ in range(parts)]
    before, total = 0.0, sum(costs) or 1.0
    for i, cost in enumerate(costs):
        members[min(parts - 1, int(parts * (before + cost / 2) / total))].append(i)
        before += cost
    return members


def cut(
    costs: Sequence[float], kinds: Sequence[object], least: Sequence[int], workers: int, seconds: float
) -> list[list[int]]:
    """Consecutive models in shards of about so many seconds, but in no fewer shards than workers.

    Args:
        costs: expected seconds of each model, in an order that keeps those of a kind together.
        kinds: models of one kind gain by standing together, and
        least: so many of them at least are kept together, however long they take.

    Returns the indices of each shard's models.
    """
    if sum(costs) <= workers * seconds:
        return [part for part in deal(costs, workers) if part]
    pieces: list[list[int]] = []
    for _, group in itertools.groupby(range(len(costs)), kinds.__getitem__):
        members = list(group)
        own = [costs[i] for i in members]
        parts = max(1, min(len(members) // max(least[i] for i in members), round(sum(own) / seconds)))
        pieces += [[members[i] for i in part] for part in deal(own, parts) if part]
    shards: list[list[int]] = []
    lasts = 0.0
    for piece in pieces:
        takes = sum(costs[i] for i in piece)
        if shards and lasts + takes / 2 <= seconds:
            shards[-1] += piece
            lasts += takes
        else:
            shards.append(list(piece))
            lasts = takes
    # What should stay together would leave workers idle.
    return shards if len(shards) >= workers else [part for part in deal(costs, workers) if part]


def array_part(grid: Grid, mixes_widths: bool, part: tuple[int, int]) -> set[int]:
    """The indices of the models that array task i of n trains, `part` being (i, n).

    It follows from the set of models alone, not from the machine nor from what is done already: tasks that start at
    different times, on different nodes, must agree.
    """
    order = sorted(range(len(grid)), key=lambda i: (kin(grid[i], mixes_widths), repr(grid[i])))
    costs = [float(grid[i].steps * grid[i].flops_per_step) for i in order]
    return {order[i] for i in deal(costs, part[1])[part[0]]}


def part_name(part: tuple[int, int]) -> str:
    """An array task's part in the names of its files."""
    return f"{part[0]}-of-{part[1]}"


def describe(shard: Shard) -> dict[str, Any]:
    """A shard for the log: its name, and what it is expected to take."""
    return {"shard": shard.name, "models": len(shard.hashes), "flops": shard.flops, "seconds": round(shard.seconds, 1)}
