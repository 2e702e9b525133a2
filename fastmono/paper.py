"""The paper, sweep by sweep: what is to be trained, training it, the figures of each sweep.

All sweeps of a scale share one run directory, which grows with each of them: a model that two sweeps have in common is
trained once, and figures and report of a sweep are there as soon as its models are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fastmono.claims import claims_of
from fastmono.claims_inside import section_5
from fastmono.paper_figures import Drawing, claim_figures, inside_figures, sweep_figures
from fastmono.presets import SWEEPS, Sweep
from fastmono.report import write_report
from fastmono.run import load_run
from fastmono.runner import plan_run, train
from fastmono.spec import Grid, ModelSpec
from fastmono.store import RunDirectory
from fastmono.trainer import steps_left

if TYPE_CHECKING:
    from fastmono.run import Run


@dataclass(frozen=True)
class Stage:
    """A sweep before it is trained; estimates are of what neither the directory nor an earlier stage has."""

    sweep: Sweep
    grid: Grid
    """The models of the sweep."""
    left: int
    flops: int
    seconds: float
    """NaN where no rate is known."""


def chosen_sweeps(names: Sequence[str] | None) -> list[Sweep]:
    """The sweeps named, in the order of the paper; all of them for None. `ValueError` for an unknown name."""
    for name in names or ():
        if name not in SWEEPS:
            raise ValueError(f"only={name!r}: must be one of {', '.join(SWEEPS)}")
    return [sweep for sweep in SWEEPS.values() if names is None or sweep.name in names]


def held_models(scale: str, out: str | Path) -> tuple[ModelSpec, ...]:
    """The models that a directory has begun; none where there is no run yet.

    Raises `ValueError` when it holds models that are in no sweep of this scale: another run must not grow by accident.
    """
    directory = RunDirectory(out)
    if not (directory.path / "grid.json").exists():
        return ()
    held: Grid = directory.read_grid()["grid"]
    known = {spec for sweep in SWEEPS.values() for spec in sweep.grid(scale)}
    if foreign := sum(spec not in known for spec in held):
        raise ValueError(
            f"{directory.path} holds {foreign} models that are in no sweep of scale {scale}: choose another directory"
        )
    return held.specs


def _grown(held: Iterable[ModelSpec], more: Iterable[ModelSpec]) -> Grid:
    return Grid.of(dict.fromkeys((*held, *more)))


def stages(sweeps: Sequence[Sweep], scale: str, out: str | Path, workers: int | str = "auto") -> list[Stage]:
    """What `train_sweeps` would do; writes nothing. Raises as it does."""
    grids = [sweep.grid(scale) for sweep in sweeps]
    union = _grown(held_models(scale, out), (spec for grid in grids for spec in grid))
    everything = plan_run(union, out, workers=workers)
    to_do = {spec for spec, name in everything.items() if steps_left(spec, everything.saved.get(name))}
    found = []
    for sweep, grid in zip(sweeps, grids, strict=True):
        new = [spec for spec in grid if spec in to_do]
        to_do.difference_update(new)
        # In a directory that is not there: what a stage takes by itself.
        plan = plan_run(Grid.of(new), Path(out) / "nothing", workers=workers) if new else None
        found.append(Stage(sweep, grid, len(new), plan.flops if plan else 0, plan.seconds if plan else 0.0))
    return found


def train_sweeps(
    sweeps: Sequence[Sweep], scale: str, out: str | Path, workers: int | str = "auto", console: Console | None = None
) -> Iterator[tuple[Sweep, Run]]:
    """Train what is missing, sweep by sweep, and give the whole run after each.

    What an earlier call left unfinished in the directory is finished first. Raises as `fastmono.train` and
    `held_models` do; Ctrl-C saves the state and raises `KeyboardInterrupt`.
    """
    for sweep in sweeps:
        grid = _grown(held_models(scale, out), sweep.grid(scale))
        plan = plan_run(grid, out, workers=workers)
        if plan.finished < len(grid) or not (Path(out) / "models.csv").exists():
            run = train(grid, out, workers=workers, checkpoints="last", console=console)
        else:
            run = load_run(out)
        yield sweep, run


def reproduce(
    sweeps: Sequence[Sweep], scale: str, out: str | Path, workers: int | str = "auto", console: Console | None = None
) -> Path:
    """Train sweeps, draw their figures, and write the report, anew after each of them; returns its path.

    Sweeps that an earlier call drew stay in the report. Raises as `train_sweeps` does.
    """
    folder = Path(out)
    figures = folder / "figures"
    report = folder / "report.md"
    for sweep, run in train_sweeps(sweeps, scale, out, workers, console):
        for drawing in sweep_figures(sweep, scale, run):
            drawing.save(figures)
        claims, drawn, inside = claims_of(run, scale), _drawn(scale, run, figures), None
        if sweep == sweeps[-1]:  # what is found inside takes longer, and rests on several sweeps
            if console is not None:
                console.print("looking inside the models (section 5)")
            inside = section_5(run, scale, folder / "insides.json")
            claims += inside.claims
            drawn |= {"claims": list(claim_figures(scale, run)), "inside": list(inside_figures(run, inside))}
            for drawing in (*drawn["claims"], *drawn["inside"]):
                drawing.save(figures)
        report = write_report(folder, scale, run, claims, drawn, inside)
    return report


def _drawn(scale: str, run: Run, figures: Path) -> dict[str, list[Drawing]]:
    """The figures of sweeps that are there, by sweep."""
    found = {}
    for sweep in SWEEPS.values():
        if set(sweep.grid(scale)) <= set(run.specs):
            drawings = sweep_figures(sweep, scale, run)
            found[sweep.name] = [drawing for drawing in drawings if drawing.path(figures).exists()]
    return found
