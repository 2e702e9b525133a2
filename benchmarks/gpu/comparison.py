"""Call 2: fastmono beside its peers on one card: the same models, states and precision, in turns.

device, rates    what the machine is and can do
prepare          every contestant starts and compiles, all at once, each in a process of its own
gate             each trains a few models as the reference does, or it is not timed
published        the paper's grid, precision by precision: from its beginning, and from a state at 2,000 steps
tiny             1, 132 and 1,024 models of N 64: both regimes beside the peers
main job         `python scripts/grid.py` as a whole
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import DEVICE_SECONDS, ROOT, Flight, Job, python
from benchmarks.gpu.partners import Gone, Player, save
from benchmarks.gpu.planted import FAULTS, PLANTED
from benchmarks.measure import most_telling
from benchmarks.state import State
from benchmarks.suites import EIGHT_LEARNING_RATES, SMOKE, TINY, pair
from fastmono.presets import PUBLISHED_LEARNING_RATES, preset
from fastmono.spec import ModelSpec

LATER = 2000
"""Step of the second state of the paper's grid, where models that were dead have begun to learn."""
ROUNDS, TURN_SECONDS, UNIT_STEPS, MOST_STEPS = 3, 0.3, 16, 2048
"""Turns of each contestant from each state, about how long they are, of a multiple of so many steps (a loop of another
length would have to be compiled again by some), and of how many at most."""
PREPARE_SECONDS, REHEARSED_SECONDS, TURN_LIMIT, MAIN_JOB_SECONDS, RESERVE = 105.0, 75.0, 15.0, 45.0, 3.0
"""Limits: until all have compiled and passed the gate, since the beginning, and in a rehearsal; of a turn, of the main
job; for the page."""
GATE_STREAMS, GATE_STEPS = 4, 16
PROFILE_SECONDS = 20.0
"""How much longer than its turns the profiles of a state may take, all together."""


Entrant = tuple[str, str, dict[str, Any]]
"""A label, the name of a contestant, and the switches of our engine."""


@dataclass
class Match:
    """Contestants that take turns from the same states.

    Attributes:
        contestants: label, name, and switches of each.
        grids: by name, the models of one stream, and how many streams.
        gated: the grid that the gate is run on.
        later: steps that our own engine trains before the second state; 0 for none.
    """

    name: str
    contestants: list[Entrant]
    grids: dict[str, tuple[tuple[ModelSpec, ...], int]]
    gated: str
    later: int = 0
    players: list[Player] = field(default_factory=list)

    states: dict[str, tuple[Path, int]] = field(default_factory=dict)
    unit: int = UNIT_STEPS
    """Steps that a turn has a multiple of."""

    @property
    def kind(self) -> str:
        """published or tiny: the gate of all precisions is the same."""
        return self.name.split()[0]


def rehearsed_grid() -> tuple[ModelSpec, ...]:
    """Two models whose steps take Triton's interpreter little time."""
    return pair(SMOKE.replace(n_features=12, d_embed=4, n_neurons=16, batch_size=32), (0.03,))


def matches(rehearse: bool) -> tuple[list[Match], str]:
    """What is compared, in the order of its importance, and the device."""
    if rehearse:
        grid = rehearsed_grid()
        planted: list[Entrant] = [(fault, f"{PLANTED}{fault}", {}) for fault in FAULTS]
        regimes = [(f"ours {r}", "triton-fp32", {"regime": r}) for r in ("resident", "streamed")]
        return [
            Match("published fp32", [("ours", "triton-fp32", {}), ("bmm", "bmm", {}), *planted],
                  {"grid": (grid, 1)}, "grid", 16, unit=4),
            Match("tiny fp32", [*regimes, ("bmm", "bmm", {})], {"2 models": (grid, 1), "1 model": (grid[:1], 1)},
                  "2 models", unit=4),
        ], "cpu"  # fmt: skip
    suffix = {"bf16": "-bf16", "tf32": "-tf32", "fp32": ""}
    published = tuple(preset("published"))

    def peers(precision: str) -> list[Entrant]:
        # All of them in bf16; in the others those that were fastest on CPUs. Each compiles, and there are 16 cores.
        names = ("bmm", "compiled", "vmap", "jax") if precision == "bf16" else ("bmm", "jax")
        found: list[Entrant] = [(name, f"{name}{suffix[precision]}", {}) for name in names]
        # The published code knows one precision; its rate stands beside bf16.
        return [*found, ("published loop", "published", {})] if precision == "bf16" else found

    def whole(precision: str) -> Match:
        ours: Entrant = ("ours", f"triton-{precision}", {})
        return Match(f"published {precision}", [ours, *peers(precision)], {"grid": (published, 1)}, "grid", LATER)

    twelve, sixteen = pair(TINY, PUBLISHED_LEARNING_RATES), pair(TINY, EIGHT_LEARNING_RATES)
    tiny = {"132 models": (twelve, 11), "1024 models": (sixteen, 64), "1 model": (twelve[2:3], 1)}
    regimes = [(f"ours {regime}", "triton-bf16", {"regime": regime}) for regime in ("resident", "streamed")]
    small = Match("tiny bf16", [*regimes, *peers("bf16")], tiny, "132 models")
    return [whole("bf16"), small, whole("tf32"), whole("fp32")], "cuda"


def told(flight: Flight, match: Match, part: str, limit: float, **command: Any) -> None:
    """Give a command to all that are left, let them do it at the same time, and record what came of it."""
    for player in match.players:
        player.tell(**command)
    ends = flight.left - limit
    for player in match.players:
        with contextlib.suppress(Gone):
            flight.record(part, match=match.name, partner=player.label, **player.hear(flight.left - ends))


def write_states(match: Match, folder: Path) -> None:
    """The states that turns begin from, and that of the gate."""
    for name, (grid, streams) in match.grids.items():
        path = folder / f"{match.name} {name}.state".replace(" ", "-")
        save(State.initial(grid), path)
        match.states[name] = path, streams
    grid = match.grids[match.gated][0]
    telling = State.initial([grid[i] for i in most_telling(grid, 2)])
    save(telling, folder / f"{match.kind}.gate")


def gate_of(match: Match, folder: Path, rehearse: bool) -> dict[str, Any]:
    """What the gate of a match is run with; matches of one kind share the reference's runs."""
    steps = 4 if rehearse else GATE_STEPS
    return {"start": str(folder / f"{match.kind}.gate"), "streams": GATE_STREAMS, "steps": steps}


def merged(switches: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Switches of the whole call, and a contestant's own, which count more."""
    launch = {**switches.get("launch", {}), **own.get("launch", {})}
    return {**switches, **own, **({"launch": launch} if launch else {})}


def prepare(flight: Flight, match: Match, device: str, folder: Path, gated: bool) -> None:
    """Start all, and have each compile for every grid and go through the gate."""
    match.players = [
        Player(flight, label, name, device, merged(flight.switches, switches) if name.startswith("triton") else {})
        for label, name, switches in match.contestants
    ]
    for player in match.players:
        for path, streams in match.states.values():
            player.tell(do="load", state=str(path), streams=streams)
            player.tell(do="turn", steps=match.unit)  # as long as the turns are multiples of
        if gated:
            how = gate_of(match, folder, flight.rehearse)
            player.tell(do="gate", reference=f"{how['start']}-runs", **how)


def prepared(flight: Flight, match: Match, seconds: float = PREPARE_SECONDS) -> None:
    """Wait until all are ready, no longer than so many seconds since the call began. Whoever does not train as the
    reference does is out."""
    ends = flight.seconds - (REHEARSED_SECONDS if flight.rehearse else seconds)
    for player in match.players:
        with contextlib.suppress(Gone):
            verdict = player.hear(max(1.0, flight.left - ends))
            flight.record("prepared", match=match.name, partner=player.label, **verdict)
            if not verdict.get("passed", True):
                player.leave(f"wrong result: gate failed, {verdict['where']}")


def later_state(flight: Flight, match: Match, folder: Path) -> None:
    """A second state, trained by our engine, or by the next that can."""
    path = folder / f"{match.name} later.state".replace(" ", "-")
    for player in match.players:
        with contextlib.suppress(Gone):
            player.ask(TURN_LIMIT, do="load", state=str(match.states[match.gated][0]))
            found = player.ask(TURN_LIMIT, do="train", steps=match.later, save=str(path))
            flight.record("state", match=match.name, partner=player.label, **found)
            match.states[f"{match.gated}, step {match.later}"] = path, 1
            return


def rounds(
    flight: Flight, match: Match, seconds: float, profile: bool = False, n_rounds: int = ROUNDS,
    turn_seconds: float = TURN_SECONDS,
) -> None:  # fmt: skip
    """Turns: every contestant from every state, round after round, until all are done or the time is over, of which
    each state has its share. The first turns, which find out how many steps one has, count where there are no others.
    """
    begun = flight.left
    for i, (name, (path, streams)) in enumerate(match.states.items()):
        ends = begun - seconds * (i + 1) / len(match.states)
        steps: dict[str, int] = {}
        told(flight, match, "load", TURN_LIMIT, do="load", state=str(path), streams=streams)
        for number in range(2 if flight.rehearse else n_rounds + 1):
            for player in match.players:
                if flight.left <= max(ends, RESERVE):
                    break
                with contextlib.suppress(Gone):
                    turn = player.ask(TURN_LIMIT, do="turn", steps=steps.get(player.label, match.unit))
                    if number == 0:
                        wanted = int(turn_seconds / max(turn["seconds"], 1e-6) * match.unit)
                        # Of 32 our engine replays graphs.
                        whole = wanted // 32 * 32 if wanted >= 32 else match.unit
                        steps[player.label] = max(match.unit, min(MOST_STEPS, whole))
                    ms = 1e3 * turn["seconds"] / turn["steps"] / turn["models"]
                    flight.record("turn", match=match.name, state=name, partner=player.label, round=number,
                                  ms_a_model_step=round(ms, 6), **turn)  # fmt: skip
        for player in match.players if profile else ():  # one after another, on a device that does nothing else
            if flight.left <= max(ends - PROFILE_SECONDS, RESERVE):
                break
            with contextlib.suppress(Gone):
                found = player.ask(TURN_LIMIT, do="profile")
                flight.record("profile", match=match.name, state=name, partner=player.label, **found)


def medians(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Milliseconds a model-step by match and state, then by contestant: the median of its turns but the first, where
    it had others."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for line in records:
        if line["part"] == "turn":
            own = found.setdefault((line["match"], line["state"]), {})
            own.setdefault(line["partner"], []).append(line["ms_a_model_step"])
    return {key: {name: statistics.median(ms[1:] or ms) for name, ms in own.items()} for key, own in found.items()}


def main_job(flight: Flight, folder: Path) -> Job:
    """The main job as a user runs it."""
    # The self-check has a job of its own, in call 1.
    steps, more = ("8", ["--engine", "reference"]) if flight.rehearse else ("4096", ["--self-check", "never"])
    command = [sys.executable, str(ROOT / "scripts" / "grid.py"), "--steps", steps, "--out", str(folder / "run"), *more]
    return Job("grid.py", command, MAIN_JOB_SECONDS, {"TRITON_INTERPRET": "0"} if flight.rehearse else {})


def fly(flight: Flight) -> None:
    """The whole call."""
    folder = Path(flight.folder.name)
    chosen, device = matches(flight.rehearse)
    small = ["--small"] if flight.rehearse else []
    flight.run("device", [Job("device", python("benchmarks.gpu.device"), DEVICE_SECONDS)])
    reference = Player(flight, "reference", "reference-fp32", "cpu", {})
    for kind in dict.fromkeys(match.kind for match in chosen):
        for match in (match for match in chosen if match.kind == kind):
            write_states(match, folder)
            prepare(flight, match, device, folder, gated=True)
        how = gate_of(match, folder, flight.rehearse)
        reference.tell(do="reference", save=f"{how['start']}-runs", **how)
    for match in chosen:
        with flight.guarded(f"{match.name}, prepared"):
            prepared(flight, match)
            if match.later:
                later_state(flight, match, folder)
    reference.leave("over")
    flight.run("rates", [Job("rates", python("benchmarks.gpu.device", "--rates", *small), 20.0)])
    shares = {match.name: share for match, share in zip(chosen, (0.35, 0.35, 0.15, 0.15), strict=False)}
    spare = flight.left - MAIN_JOB_SECONDS - RESERVE
    for match in chosen:
        with flight.guarded(f"{match.name}, turns"):
            rounds(flight, match, shares[match.name] * spare)
        for player in match.players:
            player.leave("over")
    flight.run("main job", [main_job(flight, folder)], reserve=RESERVE)
    flight.record("end", load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)
