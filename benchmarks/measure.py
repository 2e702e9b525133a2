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

    def helper(self, name: str) -> Contestant:
        """A contestant that does a job of the benchmark itself: the one being measured, or one of its own."""
        found = self.made.get(name) or self.spare.get(name)
        if found is None:
            found = self.spare[name] = make(name, self.device)
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
            trainer = self.contestants.helper("triton-bf16" if self.device.type == "cuda" else "cpu-fp32")
            # Gates start at the beginning and, where the run goes on, at a quarter of it.
            self.states[grid] = prepare_states(grid, self.suite.fractions, trainer, self.report)
        return self.states[grid]

    def _verdicts(self, case: Case, states: dict[float, State]) -> dict[str, Verdict | str]:
        """The gate of each contestant, or how it failed before, once for each shape."""
        shape = case.grid[0].replace(lr=1, init_bias=0, bias_decay=0, seed=0)
        if shape not in self.verdicts:
            known: dict[str, Verdict | str] = {}
            count = min(self.suite.gate_models, len(case.grid))
            # The highest rates move most: the last of each bias.
            half = len(case.grid) // 2
            chosen = [half - 1, len(case.grid) - 1] if count == 2 and half else list(range(len(case.grid)))[-count:]
            if count > 2 and half >= count // 2:
                chosen = [*range(half - count // 2, half), *range(len(case.grid) - count // 2, len(case.grid))]
            starts = [states[f].select(chosen) for f in sorted(states)[:2]]
            reference = (
                self.contestants.helper("reference-fp32")
                if self.device.type == "cpu"
                else make_reference(self.contestants)
            )
            gate = Gate(starts, reference, self.suite.gate_streams, self.suite.gate_steps)
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
        verdicts = self._verdicts(case, states)
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


def make_reference(contestants: Contestants) -> Contestant:
    """The reference on the host's cores, for a gate on a GPU."""
    if "reference-fp32" not in contestants.spare:
        contestants.spare["reference-fp32"] = make("reference-fp32", torch.device("cpu"))
    return contestants.spare["reference-fp32"]


def describe(error: BaseException) -> str:
    """An error in a line."""
    lines: list[Any] = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
