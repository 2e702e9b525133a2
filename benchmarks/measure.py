"""The measurement: states, gates, and then turns (A B C A B C ...), so that a clock that drifts hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.contestants import ENTRIES, make
from benchmarks.contestants.base import Contestant, Unavailable, synchronize
from benchmarks.gate import Gate, Verdict
from benchmarks.machine import Machine
from benchmarks.state import State
from benchmarks.suites import STATE_NAMES, Case, Suite
from fastmono.spec import ModelSpec

Report = Callable[[str], None]


@dataclass
class Row:
    """What was found of one contestant in one case."""

    name: str
    status: str = "ok"
    """ok | not available: reason | gate failed: where | failed: what."""
    verdict: Verdict | None = None
    ours: bool = False
    precision: str = "fp32"
    models: int = 0
    """Models that it trained; for one that trains them one after another no more than tell its time."""
    steps: int = 0
    """Steps of a turn."""
    ms: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds a model-step, by state, one for each round."""

    @property
    def timed(self) -> bool:
        """Whether it was right, and was timed to the end."""
        return self.status == "ok" and bool(self.ms)


@dataclass
class CaseResult:
    """A case's rows, and the machine's rates in each round."""

    case: Case
    steps: dict[str, int]
    density: dict[str, float]
    loss: float
    """Mean of the last 1024 losses of the run that made the states (all where it is shorter), over its models."""
    rows: list[Row]
    machine: list[dict[str, float]]


class Contestants:
    """The contestants that were asked for, each made once and kept for all cases."""

    def __init__(self, names: Sequence[str], device: torch.device, report: Report) -> None:
        self.device, self.made, self.missing = device, {}, {}
        for name in names:
            report(f"starting {name}")
            try:
                self.made[name] = make(name, device)
            except Unavailable as error:
                self.missing[name] = str(error)
        self.names = list(names)
        self.spare: dict[str, Contestant] = {}

    def helper(self, name: str, device: torch.device) -> Contestant:
        """A contestant that does a job of the benchmark itself: the one being measured, or one of its own."""
        found = self.made.get(name) or self.spare.get(name)
        if found is None:
            found = self.spare[name] = make(name, device)
        return found


def names_for(suite: Suite, device: torch.device, only: Sequence[str]) -> list[str]:
    """The contestants of a suite on a device, in the order of their turns. `ValueError` for an unknown name."""
    for name in only:
        if name not in ENTRIES:
            raise ValueError(f"--only {name}: must be one of {', '.join(ENTRIES)}")
    fitting = [name for name, entry in ENTRIES.items() if device.type in entry.devices]
    return [name for name in fitting if (name in only if only else name not in suite.left_out)]


def prepare_states(
    grid: tuple[ModelSpec, ...], fractions: Sequence[float], trainer: Contestant, report: Report
) -> tuple[dict[float, State], float]:
    """The states of one seed's models at these fractions of their run, and the mean loss at its end."""
    total, found = grid[0].steps, {}
    state = State.initial(grid)
    losses = torch.full((len(grid), 1), torch.nan)
    trainer.load(state)
    for fraction in sorted(fractions):
        target = round(fraction * total)
        while state.step < target:
            n = min(512, target - state.step)
            losses = torch.cat((losses, trainer.advance(n)), 1)[:, -1024:]
            state = replace(state, step=state.step + n)
            report(f"training the states: step {state.step} of {round(max(fractions) * total)}")
        if target:
            state = trainer.read()
        # The state at the end is trained on within a run twice as long, whose bias decay is over as well.
        found[fraction] = state.with_steps(2 * total) if fraction == 1 else state
    trainer.unload()
    return found, float(losses.nanmean())


def turn(contestant: Contestant, state: State, n: int, device: torch.device) -> float:
    """Seconds of n steps from a state. Loading, and a few steps that compile or allocate, are not counted."""
    contestant.load(state)
    contestant.advance(min(contestant.warm_steps, n))
    synchronize(device)
    started = time.perf_counter()
    contestant.advance(n)
    took = time.perf_counter() - started
    contestant.unload()
    return took


def steps_of_turn(suite: Suite, seconds_of_least: float) -> int:
    """Steps of a turn, a multiple of `least`, from what `least` steps take."""
    multiples = max(1, int(suite.turn_seconds / max(seconds_of_least, 1e-9)))
    return min(multiples * suite.least, max(suite.least, suite.steps))


class Measurement:
    """One suite on one device; states and gates are made once for each shape and kept."""

    def __init__(self, suite: Suite, device: torch.device, contestants: Contestants, smoke: bool, report: Report):
        self.suite, self.device, self.contestants, self.report = suite, device, contestants, report
        self.machine = Machine(device, smoke)
        self.states: dict[tuple[ModelSpec, ...], tuple[dict[float, State], float]] = {}
        self.verdicts: dict[ModelSpec, dict[str, Verdict | str]] = {}

    def _states(self, grid: tuple[ModelSpec, ...]) -> tuple[dict[float, State], float]:
        if grid not in self.states:
            trainer = self.contestants.helper("triton-bf16" if self.device.type == "cuda" else "cpu-fp32", self.device)
            self.states[grid] = prepare_states(grid, self.suite.fractions, trainer, self.report)
        return self.states[grid]

    def _verdicts(self, case: Case) -> dict[str, Verdict | str]:
        """The gate of each contestant, or how it failed before, once for each shape."""
        shape = shape_of(case.grid)
        if shape not in self.verdicts:
            # The case with most models a seed has the most telling ones.
            alike = [other.grid for other in self.suite.cases if shape_of(other.grid) == shape]
            grid = max(alike, key=len)
            states, _ = self._states(grid)
            # From the beginning and, where there are later states, from the first of those: its moments are not zero.
            starts = [states[f].select(most_telling(grid, self.suite.gate_models)) for f in sorted(states)[:2]]
            reference = self.contestants.helper("reference-fp32", torch.device("cpu"))
            gate = Gate(starts, reference, self.suite.gate_streams, self.suite.gate_steps)
            known: dict[str, Verdict | str] = {}
            for name, contestant in self.contestants.made.items():
                self.report(f"gate of {name}")
                try:
                    known[name] = gate.check(contestant)
                except Exception as error:
                    known[name] = describe(error)
            self.verdicts[shape] = known
        return self.verdicts[shape]

    def run(self, case: Case) -> CaseResult:
        """Gates, then rounds."""
        states, loss = self._states(case.grid)
        verdicts = self._verdicts(case)
        stacks = {f: s if case.streams == 1 else s.on_streams(range(case.streams)) for f, s in states.items()}
        rows = []
        for name in self.contestants.names:
            row = Row(name)
            rows.append(row)
            if name in self.contestants.missing:
                row.status = f"not available: {self.contestants.missing[name]}"
                continue
            contestant, verdict = self.contestants.made[name], verdicts[name]
            row.ours, row.precision = contestant.ours, contestant.precision
            if isinstance(verdict, str):
                row.status = f"failed: {verdict}"
                continue
            row.verdict = verdict
            if not verdict.passed:
                row.status = f"gate failed: {verdict.where}"
        machine = []
        for number in range(self.suite.rounds):
            machine.append(self.machine.measure())
            for fraction, state in stacks.items():
                for row in rows:
                    if row.status == "ok":
                        self.report(f"round {number + 1} of {self.suite.rounds}, {STATE_NAMES[fraction]}: {row.name}")
                        self._turn(row, state, STATE_NAMES[fraction])
        named = {STATE_NAMES[f]: state for f, state in states.items()}
        steps = {name: state.step for name, state in named.items()}
        density = {name: round(state.density(), 4) for name, state in named.items()}
        return CaseResult(case, steps, density, loss, rows, machine)

    def _turn(self, row: Row, state: State, name: str) -> None:
        contestant = self.contestants.made[row.name]
        if contestant.most_models is not None and len(state.specs) > contestant.most_models:
            state = state.select(range(min(contestant.most_models, state.group)))
        try:
            if not row.steps:
                first = turn(contestant, state, self.suite.least, self.device)
                row.models, row.steps = len(state.specs), steps_of_turn(self.suite, first)
            took = turn(contestant, state, row.steps, self.device)
        except Exception as error:
            row.status = f"failed: {describe(error)}"
            with suppress(Exception):
                contestant.unload()
            return
        row.ms.setdefault(name, []).append(1e3 * took / row.steps / row.models)


def shape_of(grid: tuple[ModelSpec, ...]) -> ModelSpec:
    """What the models of a grid share."""
    return grid[0].replace(lr=1, init_bias=0, bias_decay=0, seed=0)


def most_telling(grid: tuple[ModelSpec, ...], count: int) -> list[int]:
    """Indices of `count` models: the highest rates, which move most, of each initial bias in turn."""
    by_rate = sorted(range(len(grid)), key=lambda i: -grid[i].lr)
    of_bias = {bias: [i for i in by_rate if grid[i].init_bias == bias] for bias in {s.init_bias for s in grid}}
    in_turn = [i for rank in range(len(grid)) for indices in of_bias.values() for i in indices[rank : rank + 1]]
    return sorted(in_turn[:count])


def describe(error: BaseException) -> str:
    """An error in a line."""
    lines: list[Any] = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
