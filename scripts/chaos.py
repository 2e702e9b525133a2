"""Train a grid of a hundred small models while thirty faults happen to it, and compare every bit with a calm run.

    python scripts/chaos.py [--seed 0] [--faults 30] [--models 100] [--steps 600000] [--out DIR] [--keep]

The faults are drawn from a seeded schedule: workers and drivers killed, stopped by a signal, frozen for a while; states
corrupted, cut short, emptied or deleted; tables damaged; files touched with times far away; a second driver; other
numbers of workers; array parts in between; a full disk (a limit on the size of files). A driver that ends is started
again, with the same command. Exit code 0: every model is complete, and bitwise what it is in an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

import fastmono as fm

GRID = Path(__file__).resolve().parent / "grid.py"
FLAGS = [
    "--n-features", "16", "--d-embed", "6", "--batch-size", "16", "--feature-prob", "1/8", "--n-neurons", "8", "24",
    "--init-bias", "0", "--bias-decay", "0", "--no-plots", "--save-every", "0.5",
]  # fmt: skip
PATIENCE = 1800.0
"""Seconds after which a driver that does not end is taken for stuck."""
START_SECONDS = 30.0
"""How long to wait for a driver to begin to train before a fault happens to it."""


def children(pid: int) -> list[int]:
    """The worker processes of a driver."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def different(found: fm.Run, expected: fm.Run) -> int:
    """How many files or models differ: the tables, every loss and measure, and the parameters at the end."""
    names = ("models.csv", "history.safetensors")
    files = sum((found.path / name).read_bytes() != (expected.path / name).read_bytes() for name in names)
    ends = [(found.parameters(i), expected.parameters(i)) for i in range(len(expected))]
    return files + sum(not all(torch.equal(a[name], b[name]) for name in b) for a, b in ends)


class Chaos:
    """One run, and what is done to it."""

    def __init__(self, out: Path, models: int, steps: int, draw: random.Random) -> None:
        seeds = [str(i) for i in range(max(1, models // 10))]
        rates = ["0.001", "0.003", "0.01", "0.03", "0.1"]
        self.flags = [*FLAGS, "--steps", str(steps), "--lr", *rates, "--seed", *seeds]
        self.out, self.draw = out, draw
        self.log = out.with_suffix(".log").open("a")
        self.driver: subprocess.Popen[bytes] | None = None
        self.partial = False
        self.done: Counter[str] = Counter()
        self.complete_before: int | None = None

    def start(self, *flags: str, small_files: int | None = None) -> None:
        """Start the driver, unless it runs."""
        if self.running():
            return
        ended_well = self.driver is not None and self.driver.returncode == 0 and not self.partial
        if ended_well and self.complete_before is None:
            self.complete_before = sum(self.done.values())

        def limit() -> None:
            if small_files is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (small_files, small_files))

        workers = [] if "--workers" in flags else ["--workers", "2"]
        command = [sys.executable, str(GRID), *self.flags, "--out", str(self.out), *workers, *flags]
        self.partial = "--part" in flags
        self.driver = subprocess.Popen(command, stdout=self.log, stderr=self.log, preexec_fn=limit)

    def finish(self) -> int:
        """Wait for the driver, and return its exit code."""
        assert self.driver is not None
        return self.driver.wait(PATIENCE)

    def running(self) -> bool:
        """Whether the driver runs."""
        return self.driver is not None and self.driver.poll() is None

    def states(self) -> list[Path]:
        """The state files there are."""
        return sorted(self.out.glob("checkpoints/state-*.safetensors"))

    # the faults

    def kill_driver(self) -> None:
        """SIGKILL."""
        if self.driver is not None:
            self.driver.kill()
            self.driver.wait()

    def stop_driver(self) -> None:
        """SIGINT or SIGTERM: it saves and ends."""
        if self.driver is not None and self.running():
            self.driver.send_signal(self.draw.choice([signal.SIGINT, signal.SIGTERM]))
            self.finish()

    def kill_worker(self) -> None:
        """SIGKILL to one of its workers."""
        workers = children(self.driver.pid) if self.driver is not None else []
        if workers:
            with suppress(ProcessLookupError):
                os.kill(self.draw.choice(workers), signal.SIGKILL)

    def freeze_worker(self) -> None:
        """A worker that stands still for a second: a straggler."""
        workers = children(self.driver.pid) if self.driver is not None else []
        if workers:
            worker = self.draw.choice(workers)
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGSTOP)
                time.sleep(1.0)
                os.kill(worker, signal.SIGCONT)

    def damage_state(self) -> None:
        """A state that is corrupted, cut short, emptied or gone, with the driver killed or running."""
        if self.draw.random() < 0.5:
            self.kill_driver()
        if not (states := self.states()):
            return
        path = self.draw.choice(states)
        with suppress(FileNotFoundError):  # a worker has replaced it
            data = bytearray(path.read_bytes())
            how = self.draw.choice(["corrupted", "cut short", "empty", "gone"])
            if how == "corrupted" and data:
                data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
            elif how == "cut short":
                data = data[: self.draw.randrange(len(data) + 1)]
            elif how == "empty":
                data.clear()
            path.unlink() if how == "gone" else path.write_bytes(data)

    def damage_table(self) -> None:
        """A derived file that is cut short; a driver at work only writes it again."""
        path = self.out / self.draw.choice(["models.csv", "history.safetensors", "telemetry.csv", "status.json"])
        if path.exists():
            path.write_bytes(path.read_bytes()[:20])

    def shift_clock(self) -> None:
        """Files from long ago, or from the future."""
        for path in self.states():
            with suppress(FileNotFoundError):
                os.utime(path, (self.draw.choice([0, 2**32]),) * 2)

    def second_driver(self) -> None:
        """Another driver in the same directory: one of the two is refused."""
        command = [sys.executable, str(GRID), *self.flags, "--out", str(self.out), "--workers", "1"]
        other = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        time.sleep(self.draw.uniform(2.0, 5.0))
        other.terminate()
        other.wait()

    def other_workers(self) -> None:
        """The same run with one worker, or three."""
        self.stop_driver()
        self.start("--workers", self.draw.choice(["1", "3"]))

    def array_part(self) -> None:
        """A part of the run as an array task."""
        self.stop_driver()
        self.start("--part", f"{self.draw.randrange(4)}/4", "--workers", "1")

    def full_disk(self) -> None:
        """No file can grow beyond some kilobytes."""
        self.stop_driver()
        self.start(small_files=self.draw.choice([2_000, 20_000]))

    def happen(self) -> None:
        """One fault, mostly after a while of training, and sometimes before that begins."""
        self.start()
        before, deadline = self.states(), time.monotonic() + START_SECONDS
        early = self.draw.random() < 0.2
        while not early and self.states() == before and self.running() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(self.draw.uniform(0.5, 5.0))
        fault = self.draw.choice(
            [
                self.kill_driver, self.stop_driver, self.kill_worker, self.kill_worker, self.freeze_worker,
                self.damage_state, self.damage_state, self.damage_table, self.shift_clock, self.second_driver,
                self.other_workers, self.array_part, self.full_disk,
            ]
        )  # fmt: skip
        self.done[fault.__name__.replace("_", " ")] += 1
        print(f"{sum(self.done.values()):3d}  {fault.__name__.replace('_', ' ')}", flush=True)
        fault()


def main(argv: list[str] | None = None) -> int:
    """Run the faults, then the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the schedule of faults")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--models", type=int, default=100, help="a multiple of ten")
    parser.add_argument("--steps", type=int, default=600_000, help="of each model")
    parser.add_argument("--out", type=Path, help="where the two runs lie (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="do not delete the temporary folder")
    arguments = parser.parse_args(argv)
    out = arguments.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    out.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(out / "chaos", arguments.models, arguments.steps, random.Random(arguments.seed))
    calm = Chaos(out / "calm", arguments.models, arguments.steps, random.Random(0))
    started = time.monotonic()
    try:
        for _ in range(arguments.faults):
            chaos.happen()
        chaos.stop_driver()
        chaos.start()
        code = chaos.finish()
        print(f"the last start ended with exit code {code}, {time.monotonic() - started:.0f} s after the first")
        calm.start()
        calm.finish()
        found, expected = fm.load_run(out / "chaos"), fm.load_run(out / "calm")
        done = sum(row["status"] in ("done", "diverged") for row in found.table)
        same = different(found, expected) == 0
        print(", ".join(f"{count} x {name}" for name, count in chaos.done.items()))
        if chaos.complete_before is not None:
            print(f"all models were complete after {chaos.complete_before} faults: with more --steps more would count")
        print(f"{done} of {len(found)} models are complete; bitwise the calm run: {'yes' if same else 'NO'}")
        good = code == 0 and done == len(found) and same
    finally:
        for run in (chaos, calm):
            run.kill_driver()
            run.log.close()
    if arguments.out is None and not arguments.keep and good:
        shutil.rmtree(out)
    elif not good:
        print(f"see {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
