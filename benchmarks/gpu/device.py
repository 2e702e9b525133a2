"""What a machine is, and with --rates what it can do: the rates of benchmarks/machine.py.

python -m benchmarks.gpu.device [--rates] [--small]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.jobs import report
from benchmarks.machine import Machine, describe
from fastmono.engines.assembler import assembler_version


def ptxas_versions() -> dict[str, str]:
    """The assemblers that Triton brings along, and the one that TRITON_PTXAS_PATH names, by path."""
    import triton

    paths = sorted((Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*"))
    paths += [Path(other)] if (other := os.environ.get("TRITON_PTXAS_PATH")) else []
    found = {}
    for path in paths:
        found[path.name if path.parent.name == "bin" else str(path)] = assembler_version(str(path))
    return found


def driver() -> str:
    """The driver's version, the clocks and what else uses the device, as nvidia-smi says them; empty without it."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw,memory.used"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as error:  # what else is known of the machine counts more
        return type(error).__name__
    return done.stdout.strip()


def watch() -> list[str]:
    """The command that writes down clocks, power and temperature twice a second; empty without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    query = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,clocks_throttle_reasons.active"
    return ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-lms", "500"]


def main(argv: list[str] | None = None) -> int:
    """Report the machine, or its rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--small", action="store_true", help="sizes that take milliseconds; the rates mean nothing")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.rates:
        rates = Machine(device, arguments.small).measure()
        report(**{f"{name}_TFLOPs": round(rate / 1e12, 1) for name, rate in rates.items() if name != "copy"},
               copy_GBs=round(rates["copy"] / 1e9, 1), nvidia_smi=driver())  # fmt: skip
        return 0
    found = {**describe(device), "ptxas": ptxas_versions(), "nvidia_smi": driver(), "cores": os.cpu_count()}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_GiB": round(p.total_memory / 2**30, 1), "cache_MiB": round(p.L2_cache_size / 2**20, 1),
        }  # fmt: skip
    report(**found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
