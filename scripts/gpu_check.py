"""The first minutes on a CUDA machine: does it run, is it right, how fast is it.

    python scripts/gpu_check.py --out DIR [--minutes 8] [--only SECTION ...]

Sections, the most telling first: device, tests, rates, published, ladder, kernels, resources. After each, everything so
far is written to DIR/gpu_check.json, so the check may be cut off at any time. Exit code 0: every section ran and the
tests passed; 1: something failed; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastmono as fm
from fastmono.block import Block
from fastmono.engines import engine_class, has_gpu
from fastmono.engines.reference import ReferenceEngine
from fastmono.spec import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
TINY = ModelSpec(n_features=64, d_embed=16, n_neurons=128, feature_prob=1 / 16, batch_size=256, steps=2**30, lr=0.01)
SHAPES = {"tiny": TINY, "demo": fm.preset("demo")[4].replace(steps=2**30), "published": ModelSpec(steps=2**30)}


def timed(call: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a call on the device, by events, after two calls that are not counted."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def device(seconds: float) -> dict[str, Any]:
    """What this machine is."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__, "triton": triton.__version__, "fastmono": fm.__version__,
    }  # fmt: skip


def tests(seconds: float) -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "tests/test_gpu.py", "--tb=short"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return {"passed": False, "tail": f"not done after {seconds:.0f} s: {error.stdout or b''!r}"[-3000:]}
    return {"passed": done.returncode == 0, "tail": done.stdout[-3000:]}


def rates(seconds: float) -> dict[str, Any]:
    """The machine's own limits: products of 8192^3 in TFLOP/s, and a copy of 1 GiB in GB/s (read plus written)."""
    found = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name}_TFLOPs"] = round(2 * 8192**3 / timed(partial(torch.mm, a, b)) / 1e12, 1)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    found["copy_GBs"] = round(2 * 4 * 2**28 / timed(lambda: target.copy_(source)) / 1e9, 1)
    return found


def rate_of(specs: list[ModelSpec], precision: str, seconds: float = 2.0) -> dict[str, float]:
    """Model-steps and useful operations a second of whole training steps, host work included."""
    engine, block = engine_class("triton")(precision), Block.new(specs)
    started = time.perf_counter()
    engine.advance(block, 40)  # compiles, captures the graph
    cold, n = time.perf_counter() - started, 32
    while True:
        started = time.perf_counter()
        engine.advance(block, n)
        took = time.perf_counter() - started
        if took > seconds / 4 or n >= 2**16:
            break
        n *= 4
    steps = n * len(specs) / took
    return {"model_steps_per_s": round(steps, 1), "useful_TFLOPs": round(steps * specs[0].flops_per_step / 1e12, 3),
            "first_40_steps_s": round(cold, 2)}  # fmt: skip


def published(seconds: float) -> dict[str, Any]:
    """The paper's grid: its rate in each precision, and the losses of its first steps beside the reference's."""
    grid = [spec.replace(steps=2**30) for spec in fm.preset("published")]
    found: dict[str, Any] = {p: rate_of(grid, p) for p in ("bf16", "tf32", "fp32")}
    spec, steps = grid[2], 4
    reference = ReferenceEngine().advance(Block.new([spec]), steps)
    for precision in ("fp32", "bf16"):
        losses = engine_class("triton")(precision).advance(Block.new([spec]), steps)
        found[f"{precision}_loss_error"] = float(((losses - reference) / reference).abs().max())
    return found


def ladder(seconds: float) -> dict[str, Any]:
    """Rates of both regimes over grids of growing size, bf16."""
    found = {}
    for shape, counts in (("tiny", (1, 16, 128, 1024, 4096)), ("demo", (1, 12, 132, 1024)), ("published", (1, 4, 24))):
        for count in counts:
            specs = [SHAPES[shape].replace(lr=0.001 * (1 + i % 13), seed=i // 256) for i in range(count)]
            found[f"{shape} x {count}"] = rate_of(specs, "bf16", 1.0)
    return found


def kernels(seconds: float) -> dict[str, Any]:
    """Time of each kernel over a few steps of the paper's grid, by PyTorch's profiler, milliseconds a step."""
    from torch.profiler import ProfilerActivity, profile

    engine, block = engine_class("triton")("bf16"), Block.new([s.replace(steps=2**30) for s in fm.preset("published")])
    engine.advance(block, 4)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        engine.advance(block, 8)
        torch.cuda.synchronize()
    times = {e.key: round(e.device_time_total / 8e3, 4) for e in found.key_averages() if "kernel" in e.key}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def resources(seconds: float) -> dict[str, Any]:
    """Registers and spills of the kernels, compiled for this architecture."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.kernel_resources import Variant, variants
    from benchmarks.kernel_resources import resources as of

    major, minor = torch.cuda.get_device_capability()
    rows = [of(Variant(v.kernel, v.shape, v.precision), 10 * major + minor) for v in variants(precisions=("bf16",))]
    return {f"{r['kernel']} {r['shape']}": {k: r[k] for k in ("registers", "stack", "shared")} for r in rows}


SECTIONS = (device, tests, rates, published, ladder, kernels, resources)


def main(argv: list[str] | None = None) -> int:
    """Run the sections, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=[section.__name__ for section in SECTIONS])
    arguments = parser.parse_args(argv)
    if not has_gpu():
        print("error: there is no CUDA GPU with Triton here", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * arguments.minutes, False
    report: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        name = section.__name__
        if arguments.only and name not in arguments.only:
            continue
        left = end - time.monotonic()
        if left < 10:
            report[name] = {"skipped": "out of time"}
            continue
        started = time.monotonic()
        try:
            report[name] = section(0.6 * left)
        except Exception:
            report[name] = {"failed": traceback.format_exc()[-3000:]}
        failed = failed or "failed" in report[name] or report[name].get("passed") is False
        report[name]["seconds"] = round(time.monotonic() - started, 1)
        (arguments.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
        print(f"\n{name}")
        for key, value in report[name].items():
            print(f"  {key:28s} {value}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
