"""Successive rounds: train, interpret, move the polysemantic neurons' work into the linear path, reset them, train on.

    found = fm.rounds.successive_rounds(fm.load_run("runs/demo"), models=[3], rounds=3)

What happens to a model between two rounds is in rounds_move.py. A round then trains like any model, with the recipe of
its own spec: that of the model with the round's number of steps, the rank of the path, and a seed of its own,

    first word of Philox4x32-10 for key (seed, ROUND_SEED) and counter (0, round, 0, 0)

which draws the round's batches and the fresh neurons; the projection stays the model's own. So no batch is seen twice,
models that share a seed still see the same ones, and learning rate and bias decay run as in a training from the start.
So do AdamW's corrections: monosemantic neurons, which keep their moments, take shorter steps for a while (never less
than .15 of what they would be; .93 after 2,000 steps).

Each round is a run directory, out/round-1, round-2, ..., that `load_run` reads, and whose checkpoint of step 0 is the
model after the move and the reset. A call that is stopped goes on where it was, bitwise as if nothing had happened.
What rounds.csv says is measured on the evaluation stream of the model's own seed, the same samples in all rounds; a
round's own tables, on that of the round's seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastmono.block import Model, parts, share_projections
from fastmono.engines import resolve
from fastmono.files import BadFile, DirectoryLock, read_json, remove_temporaries, write_bytes
from fastmono.interpret import Parts
from fastmono.metrics import HeldOut
from fastmono.philox import Purpose, weight_words
from fastmono.plan import content_hashes
from fastmono.rounds_move import MOVE_NUMBERS, NUMBERS, begin_round, parts_of, state_numbers
from fastmono.rows import write_csv
from fastmono.run import Run
from fastmono.runner import plan_run, train
from fastmono.spec import Grid, ModelSpec
from fastmono.store import BlockHistory, RunDirectory, block_id
from fastmono.trainer import Options, steps_left

SCHEMA = 1
MEASURED = ("loss", *NUMBERS)
COLUMNS = (
    "model", "round", "status", "steps", "rank", *MOVE_NUMBERS,
    *(f"{when}_{name}" for name in MEASURED for when in ("before", "after")),
)  # fmt: skip
"""Of a row of the table: see `successive_rounds`."""


@dataclass(frozen=True)
class _Trained:
    """A model between two rounds."""

    number: int
    """Its number in the run that all began with."""
    spec: ModelSpec
    """What it was in that run."""
    model: Model
    parts: Parts
    numbers: dict[str, float]
    """`MEASURED`."""


def round_seed(seed: int, number: int) -> int:
    """The seed of a round (from 1) of a model with this seed: batches and fresh neurons are drawn from it."""
    return int(weight_words(seed, Purpose.ROUND_SEED, number, 1))


def round_spec(spec: ModelSpec, number: int, steps: int | None, rank: int | None) -> ModelSpec:
    """What a round (from 1) trains of a model: its recipe with the round's seed, steps (None: as many as the model had)
    and rank of the linear path (None: that of the model, or if it has none d_embed, which cuts nothing off).

    `ValueError` for steps and ranks that no model can have, and for a rank of 0.
    """
    if rank is not None and rank == 0:
        raise ValueError("rank=0: must be at least 1, to have a path that something can be moved into")
    rank = rank if rank is not None else spec.linear_path or spec.d_embed
    steps = spec.steps if steps is None else steps
    return spec.replace(seed=round_seed(spec.seed, number), steps=steps, linear_path=rank)


def successive_rounds(
    run: Run,
    models: Iterable[int] | None = None,
    rounds: int = 3,
    steps: int | None = None,
    rank: int | None = None,
    out: str | Path | None = None,
    *,
    engine: str | None = None,
    workers: int | str = "auto",
    quiet: bool = False,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Take trained models through rounds, and return the table, which is also written to out/rounds.csv.

    A row is one model in one round: model (its number in the run), round (from 1), status (of its training), steps,
    rank; map_rank, left, moved_loss, reset_loss (`rounds_move.begin_round`: what the move did, before training on); and
    before and after the round, as before_* and after_*, loss (mean over the last 1,024 steps of training) and the
    `NUMBERS` of `rounds_move.state_numbers`: eval_loss, how monosemantic the model is, how many neurons of each group,
    of which polysemantic and dead ones are reset, the parts' shares of the output, the rank of the path. What is not
    known is NaN. A model that diverges or fails in a round is in no later one.

    Args:
        run: where the models are; it is not written to, but for `out`.
        models: their numbers; None: all that are trained to their end.
        rounds: how many; a directory that holds fewer of them is continued.
        steps, rank: of each round (`round_spec`).
        out: a directory for the rounds; None: "rounds" in the run's own.
        engine: None: the run's own, in its precision; or as `train` takes it.
        workers, quiet, console: as `train` takes them.

    Raises:
        ValueError: a bad argument; a model that is not trained to its end or that diverged; models that differ in
            nothing but what a round sets; a damaged file; or `out` holds other rounds.
        BlockingIOError: another process is using the directory.
        KeyboardInterrupt: Ctrl-C; the state is saved, and the same call goes on from there.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds={rounds!r}: must be a whole number, at least 1")
    folder = run.path / "rounds" if out is None else Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out!r}: is a file, and must be a directory")
    numbers = _chosen(run, models)
    specs = [run.specs[i] for i in numbers]
    first = _grid(specs, 1, steps, rank)
    engine_name, precision, _ = resolve(engine or run.engine, "auto" if engine else run.precision)
    options = Options(engine_name, precision)
    plan_run(first, folder / "nothing", engine_name, precision, workers)  # what cannot be trained ends here
    console = None if quiet else console or Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(folder)
    try:
        remove_temporaries(folder)
        _compare(folder / "rounds.json", numbers, specs, first)
        held_out = HeldOut()
        current = _load(run, list(zip(numbers, specs, strict=True)), numbers, held_out)
        rows: list[dict[str, Any]] = []
        for number in range(1, rounds + 1):
            if not current:
                break
            if console is not None:
                console.print(f"round {number} of {rounds}: {len(current)} models", markup=False, highlight=False)
            grid = _grid([one.spec for one in current], number, steps, rank)
            path = folder / f"round-{number}"
            moved = _begin(path, options, grid, current)
            trained = train(grid, path, engine_name, precision, workers, quiet=quiet, console=console)
            before, models_now = current, [(one.number, one.spec) for one in current]
            current = _load(trained, models_now, range(len(before)), held_out)
            rows += _rows(number, trained, before, moved, current)
            write_csv(folder / "rounds.csv", COLUMNS, rows)
    finally:
        lock.release()
    return rows


def _chosen(run: Run, models: Iterable[int] | None) -> list[int]:
    """The models' numbers, in the order asked for. `ValueError` for one that is not there, stands twice, is not
    trained to its end, or diverged."""
    done = [i for i, row in enumerate(run.table) if row["status"] == "done"]
    chosen = done if models is None else list(models)
    for i in chosen:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(run):
            raise ValueError(f"model {i}: the run has models 0 to {len(run) - 1}")
        if i not in done:
            raise ValueError(f"model {i} is {run.table[i]['status']}: only one that is done can go through rounds")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"models={chosen}: must be at least one, and each once; {len(done)} of the run are done")
    return chosen


def _grid(specs: Sequence[ModelSpec], number: int, steps: int | None, rank: int | None) -> Grid:
    """What a round trains."""
    found = [round_spec(spec, number, steps, rank) for spec in specs]
    if len(set(found)) < len(found):
        raise ValueError("two of the models differ in nothing but what a round sets (steps, linear_path): choose one")
    return Grid.of(found)


def _compare(path: Path, numbers: Sequence[int], specs: Sequence[ModelSpec], first: Grid) -> None:
    """Leave a note of what the rounds of a directory are of. `ValueError` when they are of something else."""
    asked = {
        "schema": SCHEMA,
        "models": list(numbers),
        "specs": [spec.identity() for spec in specs],
        "round-1": [spec.identity() for spec in first],
    }
    if not path.exists():
        write_bytes(path, json.dumps(asked, indent=1).encode())
    elif read_json(path) != asked:
        raise ValueError(
            f"{path.parent} holds rounds of other models, or with other steps or another rank: choose another directory"
        )


def _load(
    run: Run, models: Sequence[tuple[int, ModelSpec]], places: Sequence[int], held_out: HeldOut
) -> list[_Trained]:
    """Models as a run left them, those that are done: `places` are their numbers in this run, `models` their numbers
    and specs in the first. `BadFile` where one has no state on disk."""
    hashes = content_hashes(run.grid, Options(run.engine, run.precision))
    saved = run.directory.newest_states(hashes, verify=False)
    found = []
    for place, (number, spec) in zip(places, models, strict=True):
        row, state = run.table[place], saved.get(hashes[place])
        if row["status"] != "done":
            continue
        if state is None or steps_left(run.specs[place], state):
            raise BadFile(run.directory.checkpoints, f"lacks the last state of model {place}: train it again")
        model = run.directory.restore(run.specs[place], state)[0]
        parts = parts_of(model, spec, held_out)
        found.append(_Trained(number, spec, model, parts, {"loss": row["final_loss"], **state_numbers(parts)}))
    return found


def _begin(path: Path, options: Options, grid: Grid, current: Sequence[_Trained]) -> list[dict[str, float]]:
    """Write the states that a round goes on from, where there are none, and return what the moves did."""
    begun = [begin_round(one.model, one.parts, into) for one, into in zip(current, grid, strict=True)]
    models, moved = [model for model, _ in begun], [numbers for _, numbers in begun]
    share_projections(models)
    path.mkdir(exist_ok=True)
    directory, hashes = RunDirectory(path), content_hashes(grid, options)
    directory.expected = dict(zip(hashes, grid, strict=True))
    saved = directory.newest_states(hashes)
    for rows in parts(grid):  # one file holds models of one shape
        if missing := [i for i in rows if hashes[i] not in saved]:
            names = [hashes[i] for i in missing]
            for damaged in directory.checkpoints.glob(f"state-{block_id(names)}-*"):  # later ones would displace it
                damaged.unlink()
            directory.write_state([models[i] for i in missing], names, 0, BlockHistory())
    return moved


def _rows(
    number: int,
    trained: Run,
    before: Sequence[_Trained],
    moved: Sequence[Mapping[str, float]],
    after: Sequence[_Trained],
) -> list[dict[str, Any]]:
    """The table's rows of a round."""
    later = {one.number: one.numbers for one in after}
    found = []
    for one, move, spec, row in zip(before, moved, trained.specs, trained.table, strict=True):
        new = later.get(one.number, dict.fromkeys(MEASURED, math.nan))
        values = {
            "model": one.number,
            "round": number,
            "status": row["status"],
            "steps": spec.steps,
            "rank": spec.linear_path,
        }
        values |= {
            f"{when}_{name}": at[name] for name in MEASURED for when, at in (("before", one.numbers), ("after", new))
        }
        values |= move
        found.append({name: values[name] for name in COLUMNS})
    return found
