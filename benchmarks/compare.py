"""Two commits against each other: `python -m benchmarks.compare REV_A REV_B [--suite demo]`.

Each is checked out in a git worktree of its own, and runs our best engine for the device (cpu in a process a core, or
triton in bf16) from the same state, in turns (A B B A A B ...): a clock that drifts, or a neighbour that comes and
goes, hits both. Printed: the median over pairs of the time of B over that of A, below 1 where B is faster, with its
95 % interval, and the verdict that this allows. What is measured is the library of each commit, by the benchmark
of the working tree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import ROOT, device_name
from benchmarks.suites import SUITES


def resolved(revision: str) -> str:
    """The full name of a commit. Raises `ValueError` for what is none."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        raise ValueError(f"{revision!r} is not a commit of this repository")
    return found.stdout.strip()


class Side:
    """One commit: its worktree, and a process that waits in it for "go" (see `serve`)."""

    def __init__(self, revision: str, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None
        add = ["git", "worktree", "add", "--detach", "--quiet", str(folder), revision]
        subprocess.run(add, cwd=ROOT, check=True)

    def start(self, suite: str, device: str, smoke: bool) -> None:
        """Start the process, and wait until it has its state. Raises `ValueError` when it fails."""
        folder = self.folder.resolve()
        # The library as `fastmono`, its kernels where the installed package has them, and this benchmark beside it.
        (folder / "fastmono" / "kernels").symlink_to(folder / "kernels")
        path = folder / "path"
        path.mkdir()
        (path / "fastmono").symlink_to(folder / "fastmono")
        (path / "benchmarks").symlink_to(ROOT / "benchmarks")
        command = [sys.executable, "-m", "benchmarks.compare", "--serve", suite, device, *(["smoke"] if smoke else [])]
        self.process = subprocess.Popen(
            command, cwd=path, env={**os.environ, "PYTHONPATH": str(path)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        library = Path(self._answer()["ready"])
        if folder not in library.resolve().parents:
            raise ValueError(f"{library} is not the library of the worktree {folder}")

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise ValueError(f"the process of {self.folder.name} ended; its error stands above")

    def turn(self) -> float:
        """Milliseconds a model-step of one turn."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer()["ms"])

    def close(self) -> None:
        """End the process and remove the worktree."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
        remove = ["git", "worktree", "remove", "--force", str(self.folder)]
        subprocess.run(remove, cwd=ROOT, check=False, capture_output=True)


def serve(suite_name: str, device_type: str, smoke: bool) -> None:
    """In a worktree: train the state at the half of the suite's run, then time one turn for each "go"."""
    import fastmono
    from benchmarks.contestants import make
    from benchmarks.measure import prepare_states, steps_of_turn, turn
    from benchmarks.suites import suite

    device = torch.device(device_type)
    chosen = suite(suite_name, device_type == "cuda", smoke)
    case = chosen.cases[0]
    contestant = make("triton-bf16" if device_type == "cuda" else "cpu-fp32", device)
    fraction = 0.5 if 0.5 in chosen.fractions else 0.0
    states, _ = prepare_states(case.grid, (fraction,), contestant, lambda text: None)
    state = states[fraction].on_streams(range(case.streams))
    steps = steps_of_turn(chosen, turn(contestant, state, chosen.least, device))
    print(json.dumps({"ready": str(fastmono.__file__)}), flush=True)
    for _ in sys.stdin:
        seconds = turn(contestant, state, steps, device)
        print(json.dumps({"ms": 1e3 * seconds / steps / case.n_models}), flush=True)


def pairs(a: Side, b: Side, count: int) -> list[tuple[float, float]]:
    """Turns of both, one pair after another; which goes first alternates."""
    found = []
    for i in range(count):
        if i % 2:
            later = b.turn()
            found.append((a.turn(), later))
        else:
            found.append((a.turn(), b.turn()))
    return found


def rank_of_interval(count: int) -> int | None:
    """k such that the k-th lowest and k-th highest of `count` values enclose their median in 95 % of cases, or None.

    However they are distributed: k values or fewer on one side are as likely as k heads or fewer of `count` coins.
    """
    below, k = 0.0, 0
    while (below := below + math.comb(count, k) / 2**count) <= 0.025:
        k += 1
    return k or None


def summary(found: list[tuple[float, float]]) -> dict[str, Any]:
    """Median of the paired ratios B / A with its 95 % interval, and what it says: nothing where it encloses 1."""
    ratios, k = sorted(b / a for a, b in found), rank_of_interval(len(found))
    if k is None:
        low, high, said = ratios[0], ratios[-1], "too few pairs to tell"
    else:
        low, high = ratios[k - 1], ratios[-k]
        said = "no difference beyond the spread" if low <= 1 <= high else "B is faster" if high < 1 else "B is slower"
    return {
        "ms_a": median(a for a, _ in found), "ms_b": median(b for _, b in found),
        "b_over_a": median(ratios), "interval": [low, high], "pairs": len(found), "verdict": said,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Compare, print, and write JSON where asked. 0: done; 2: bad arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs=2, metavar="REV")
    parser.add_argument("--suite", choices=SUITES, default="demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: the times mean nothing")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args(argv)
    sides: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        try:
            names = [resolved(revision) for revision in arguments.revisions]
            for label, name in zip("ab", names, strict=True):
                sides.append(Side(name, Path(folder) / label))
                sides[-1].start(arguments.suite, arguments.device, arguments.smoke)
            started = time.time()
            result = summary(pairs(*sides, arguments.pairs))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            for side in sides:
                side.close()
    result |= {"a": names[0], "b": names[1], "suite": arguments.suite, "seconds": round(time.time() - started, 1),
               "device": device_name(torch.device(arguments.device)), "torch": torch.__version__}  # fmt: skip
    low, high = result["interval"]
    print(f"A {names[0][:12]}  {result['ms_a']:.4g} ms a model-step\nB {names[1][:12]}  {result['ms_b']:.4g}")
    print(f"B over A: {result['b_over_a']:.3f}, {low:.3f} to {high:.3f} (95 %) of {arguments.pairs} pairs")
    print(f"{result['verdict']}  ({arguments.suite}, {result['device']}, torch {torch.__version__})")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], "smoke" in sys.argv[4:])
    else:
        sys.exit(main())
