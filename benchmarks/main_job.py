"""Time and memory of the main job, from outside: `python -m benchmarks.main_job [--repeats 3] [FLAGS OF grid.py ...]`.

Whole-process seconds of `python scripts/grid.py` in an empty folder, seconds from the command to the first step, peak
memory of all its processes together (proportional set size, sampled; Linux), and what `import fastmono` adds to
`import torch`. Medians, as JSON in benchmarks/results/main_job.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import fastmono

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "main_job.json"


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
    found = [pid]
    for parent in found:
        found.extend(child for child, its in parents.items() if its == parent)
    return found


def memory(pid: int) -> int:
    """Bytes that a process and its descendants hold, shared pages counted once."""
    total = 0
    for one in tree(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])  # type: ignore[index]
    return total


def job(flags: list[str]) -> dict[str, float]:
    """One run of the main job."""
    with tempfile.TemporaryDirectory() as folder:
        began, started = time.time(), time.perf_counter()
        command = [sys.executable, str(ROOT / "scripts" / "grid.py"), *flags, "--out", "run"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.25)
        seconds = time.perf_counter() - started
        events = [json.loads(line) for line in (Path(folder) / "run" / "events.jsonl").read_text().splitlines()]
    assert process.returncode == 0
    first = next(datetime.fromisoformat(event["time"]).timestamp() for event in events if event["kind"] == "first step")
    return {"seconds": seconds, "first_step_at_most": first - began, "peak_MiB": peak / 2**20}


def importing() -> float:
    """Seconds that `import fastmono` takes after `import torch`."""
    code = "import torch, time; t = time.perf_counter(); import fastmono; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments, flags = parser.parse_known_args(argv)
    runs = [job(flags) for _ in range(arguments.repeats)]
    report: dict[str, Any] = {
        "command": "python scripts/grid.py " + " ".join(flags),
        "device": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "versions": {"fastmono": fastmono.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "median": {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]},
        "runs": [{name: round(value, 2) for name, value in run.items()} for run in runs],
        "import_after_torch_seconds": round(statistics.median(importing() for _ in range(3)), 3),
    }
    print(json.dumps(report, indent=1))
    if not flags:
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
