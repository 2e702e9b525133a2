"""A contestant in a process of its own, which does what it is told: it compiles, is checked, and takes its turn.

    python -m benchmarks.gpu.partners --name triton-bf16 --device cuda [--switches JSON]

So all can compile at once, one that fails takes no other with it, and turns alternate on one card: a process that waits
for its turn leaves the device idle. Commands come by lines on standard input, one JSON object each; each is answered by
one reported line.

    {"do": "load", "state": FILE, "streams": 1}      a state that `save` wrote, on so many streams
    {"do": "turn", "steps": 64}                      seconds of so many steps from that state, and the last losses
    {"do": "train", "steps": 2000, "save": FILE}     train on from there, and write the state down
    {"do": "reference", "start": FILE, "streams": 4, "steps": 16, "save": FILE}      the runs of the gate's reference
    {"do": "gate", "start": FILE, "streams": 4, "steps": 16, "reference": FILE}      the gate, against those runs
    {"do": "profile"}                                milliseconds a step of each kernel
    {"do": "unload"}
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.contestants import make
from benchmarks.contestants.base import Contestant, Unavailable, synchronize
from benchmarks.contestants.ours import Ours
from benchmarks.gate import REFERENCE_SEED, Gate
from benchmarks.gpu.jobs import Child, Flight, python, report
from benchmarks.gpu.planted import PLANTED, Planted
from benchmarks.measure import describe
from benchmarks.state import TENSORS, State
from fastmono.spec import ModelSpec

PARTS = ("parameters", "first_moment", "second_moment")


def save(state: State, path: Path, losses: Tensor | None = None) -> None:
    """Write a state, and losses that led to it."""
    tensors = {"P": state.P, "losses": torch.zeros(0) if losses is None else losses}
    for part in PARTS:
        tensors |= {f"{part} {name}": tensor for name, tensor in getattr(state, part).items()}
    about = {"step": str(state.step), "specs": json.dumps([spec.to_dict() for spec in state.specs])}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, about)


def read(path: str) -> tuple[State, Tensor]:
    """What `save` wrote."""
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    specs = tuple(ModelSpec(**spec) for spec in json.loads(about["specs"]))
    parts = {part: {name: tensors[f"{part} {name}"] for name in TENSORS} for part in PARTS}
    return State(specs, int(about["step"]), **parts, P=tensors["P"]), tensors["losses"]


def made(name: str, device: torch.device, switches: dict[str, Any]) -> Contestant:
    """A contestant by name: ours with switches, or one that is planted."""
    if name.startswith(PLANTED):
        return Planted(name.removeprefix(PLANTED))
    if switches:
        return Ours("triton", name.removeprefix("triton-"), device, switches)
    return make(name, device, in_pool=False)


class Partner:
    """What answers the commands."""

    def __init__(self, contestant: Contestant, device: torch.device) -> None:
        self.contestant, self.device = contestant, device
        self.state: State | None = None

    def load(self, state: str, streams: int = 1) -> dict[str, Any]:
        """Take over a state; its models beyond those that are enough to time it are left out."""
        found, _ = read(state)
        found = found if streams == 1 else found.on_streams(range(streams))
        most = self.contestant.most_models
        if most is not None and len(found.specs) > most:
            found = found.select(range(min(most, found.group)))
        self.state = found
        return {"models": len(found.specs), "step": found.step}

    def turn(self, steps: int) -> dict[str, Any]:
        """Seconds of so many steps. Loading and the steps that may compile or capture are not counted."""
        assert self.state is not None, "no state was loaded"
        self.contestant.load(self.state)
        self.contestant.advance(min(self.contestant.warm_steps, max(steps, 2)))
        synchronize(self.device)
        started = time.perf_counter()
        losses = self.contestant.advance(steps)
        took = time.perf_counter() - started
        logged = losses[:, ~losses[0].isnan()]
        self.unload()
        return {"seconds": took, "steps": steps, "models": len(self.state.specs), "loss": float(logged.mean())}

    def train(self, steps: int, save_to: str) -> dict[str, Any]:
        """Train on, and write the state that is reached."""
        assert self.state is not None, "no state was loaded"
        self.contestant.load(self.state)
        losses = self.contestant.advance(steps)
        self.state = self.contestant.read()
        save(self.state, Path(save_to))
        self.unload()
        return {"step": self.state.step, "loss": float(losses[:, -16:].nanmean()), "density": self.state.density()}

    def reference(self, start: str, streams: int, steps: int, save_to: str) -> dict[str, Any]:
        """Runs on the reference's streams, for the gate."""
        gate = Gate([], self.contestant, streams, steps)
        _, end, losses = gate.run(self.contestant, read(start)[0], REFERENCE_SEED)
        save(end, Path(save_to + ".partial"), losses)
        Path(save_to + ".partial").rename(save_to)
        return {"reference": self.contestant.precision}

    def gate(self, start: str, streams: int, steps: int, reference: str) -> dict[str, Any]:
        """The gate's verdict, as soon as the reference's runs are there; none where they do not come."""
        ends = time.monotonic() + REFERENCE_SECONDS
        while not Path(reference).exists():
            if time.monotonic() > ends:
                return {"where": "the reference did not run"}
            time.sleep(0.1)
        gate = Gate([read(start)[0]], self.contestant, streams, steps, [read(reference)])
        found = gate.check(self.contestant)
        self.unload()
        return found.to_dict()

    def profile(self) -> dict[str, Any]:
        """Kernels of our engine, from the state that was loaded."""
        from benchmarks.gpu.floors import profiled

        assert self.state is not None and isinstance(self.contestant, Ours)
        self.contestant.load(self.state)
        self.contestant.advance(40)
        assert self.contestant.block is not None
        found = profiled(self.contestant.engine, self.contestant.block)  # type: ignore[arg-type]
        self.unload()
        return {"kernels": {name: round(ms, 4) for name, ms in found.items()}}

    def unload(self) -> dict[str, Any]:
        """Give memory back, to the device too: others are about to need it."""
        self.contestant.unload()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what a command says."""
        what = command.pop("do")
        if "save" in command:
            command["save_to"] = command.pop("save")
        return dict(getattr(self, what)(**command))


REFERENCE_SECONDS = 60.0
"""How long a contestant waits for the reference's runs: without them it is timed all the same, and the page says so."""
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # JAX would take most of the device's memory when it starts
    "TORCHINDUCTOR_COMPILE_THREADS": "2",  # of each process; left alone, each would start one a core
    "OMP_NUM_THREADS": "2",
}


class Gone(Exception):
    """A partner that failed, crashed or took too long; the message says which."""


class Player:
    """A partner, as the call sees it.

    Args:
        label: its name in the report.
    """

    def __init__(self, flight: Flight, label: str, name: str, device: str, switches: dict[str, Any]) -> None:
        self.flight, self.label, self.gone = flight, label, ""
        command = python("benchmarks.gpu.partners", "--name", name, "--device", device)
        if switches:
            command += ["--switches", json.dumps(switches)]
        self.child: Child | None = flight.start(label, command, ENVIRONMENT if device == "cuda" else {})
        self.asked, self.answers = 1, 0  # it says once that it is there

    def tell(self, **command: Any) -> None:
        """Give a command, and do not wait."""
        if self.child is None:
            return
        assert self.child.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which the next `hear` finds
            self.child.process.stdin.write(json.dumps(command) + "\n")
            self.child.process.stdin.flush()
        self.asked += 1

    def hear(self, limit: float) -> dict[str, Any]:
        """The last answer that is due. Raises `Gone`, now and ever after, once it failed."""
        ends, last = time.monotonic() + min(limit, self.flight.left), {}
        while self.child is not None:
            for line in self.child.lines():
                self.answers += 1
                last = line
                if "error" in line:
                    self.leave(line["error"])
            if self.gone or self.answers >= self.asked:
                break
            if self.child.process.poll() is not None:
                self.leave(self.child.status)
            elif time.monotonic() > ends:
                self.leave("cut off")
            time.sleep(0.002)
        if self.gone:
            raise Gone(self.gone)
        return last

    def ask(self, limit: float, **command: Any) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.tell(**command)
        return self.hear(limit)

    def leave(self, why: str) -> None:
        """It is out, and its process is ended."""
        if self.child is not None:
            said = (self.child.said + self.child.rest).strip()[-1000:]
            self.flight.finished(self.child, why)
            self.child, self.gone = None, why
            if why != "over":
                self.flight.record("partner", partner=self.label, status=why, tail=said)


def main(argv: list[str] | None = None) -> int:
    """Answer commands until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--switches", type=json.loads, default={})
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    try:
        partner = Partner(made(arguments.name, device, arguments.switches), device)
    except Unavailable as error:
        report(error=f"not available: {error}")
        return 0
    report(ready=arguments.name)
    for line in sys.stdin:
        try:
            report(**partner.answer(json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            cause = f"; cause: {str(error.__cause__)[-600:]}" if error.__cause__ else ""
            report(error=f"failed: {describe(error)}{cause}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
