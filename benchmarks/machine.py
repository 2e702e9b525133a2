"""What the machine itself can do: its rate of matrix products and its copy bandwidth, beside the contestants."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.contestants.base import synchronize
from benchmarks.contestants.pool import cores
from benchmarks.contestants.stacked import OPERAND, set_precision
from fastmono.engines.assembler import compiler_versions

ROOT = Path(__file__).resolve().parent.parent
CPU_SIZE, GPU_SIZE = 2048, 8192
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


class Machine:
    """Products of size^3 (2048 on a CPU, all cores; 8192 on a GPU) in each precision that the device has, and copies.

    Args:
        device: cpu or cuda.
        smoke: sizes that take milliseconds; the rates then mean nothing.
    """

    def __init__(self, device: torch.device, smoke: bool = False) -> None:
        self.device = device
        self.size = 256 if smoke else CPU_SIZE if device.type == "cpu" else GPU_SIZE
        self.bytes = 2**20 if smoke else COPY_BYTES[device.type]
        self.precisions = ("fp32",) if device.type == "cpu" else ("fp32", "tf32", "bf16")
        self.repeats = 2 if smoke else 8

    def measure(self) -> dict[str, float]:
        """Products in FLOP/s by precision, and `copy` in bytes/s, read plus written: medians of eight."""
        found = {}
        for precision in self.precisions:
            set_precision(precision)
            a, b = (torch.randn(self.size, self.size, device=self.device).to(OPERAND[precision]) for _ in range(2))
            c = torch.empty_like(a)
            found[precision] = 2 * self.size**3 / self._seconds(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
        source = torch.ones(self.bytes // 4, device=self.device)
        target = torch.empty_like(source)
        found["copy"] = 2 * self.bytes / self._seconds(lambda: target.copy_(source))
        return found

    def _seconds(self, call: Any) -> float:
        times = []
        for _ in range(2 + self.repeats):
            synchronize(self.device)
            started = time.perf_counter()
            call()
            synchronize(self.device)
            times.append(time.perf_counter() - started)
        return median(times[2:])


def device_name(device: torch.device) -> str:
    """What the device calls itself; a CPU with the number of cores that may be used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)):
        name = found[1]
    count = cores()
    return f"{count} {'core' if count == 1 else 'cores'} {name}"


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the versions of what runs on it, and the commit."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("jax", "jaxlib", "triton", "torch-optimizer", "fastmono"):
        try:
            from importlib.metadata import version

            versions[package] = version(package)
        except ImportError:  # PackageNotFoundError is one
            continue
    if "triton" in versions:
        versions |= compiler_versions()
    about: dict[str, Any] = {
        "name": device_name(device),
        "type": device.type,
        "cores": cores(),
        "os": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_GiB": round(properties.total_memory / 2**30, 1),
        }
    elif hasattr(os, "getloadavg"):
        about["load_before"] = round(os.getloadavg()[0], 2)
    return {"device": about, "versions": versions, "commit": commit()}


def commit() -> str | None:
    """The checkout's commit, with "+" after it where tracked files differ; None outside of one."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed else "")
