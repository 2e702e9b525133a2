"""The first minutes on a CUDA machine: does it run, is it right, how fast is it.

    python scripts/gpu_check.py --out DIR [--minutes 7.5] [--only SECTION ...]

Sections, the most telling first: device, tests, resources, rates, kernels, ladder, published. Each runs in a process of
its own, since an error on the device ends the process that meets it, and for its share of the time. DIR/gpu_check.json
holds everything so far, so the check may be cut off at any time. Exit code 0: every section ran to its end and the
tests passed; 1: something did not; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastmono as fm
from fastmono.block import Block
from fastmono.engines import engine_class, has_gpu
from fastmono.engines.launch import Launch, choose_launch
from fastmono.engines.reference import ReferenceEngine
from fastmono.files import read_json, write_bytes
from fastmono.philox import stream_key
from fastmono.spec import ModelSpec

Save = Callable[[dict[str, Any]], None]
"""What a section calls with all that it knows so far."""
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


def device(out: Path, save: Save) -> None:
    """What this machine is."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    save({
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__, "triton": triton.__version__, "fastmono": fm.__version__,
    })  # fmt: skip


def tests(out: Path, save: Save) -> None:
    """The tests that need a GPU; what they print is in DIR/tests.txt."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu and not slow", "tests/test_gpu.py", "--tb=short"]
    save({"passed": False, "tail": "not done, see tests.txt"})
    with (out / "tests.txt").open("w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    save({"passed": done.returncode == 0, "tail": (out / "tests.txt").read_text()[-3000:]})


def resources(out: Path, save: Save) -> None:
    """Registers and spills of the kernels, compiled for this architecture."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.kernel_resources import resources as of
    from benchmarks.kernel_resources import variants

    found: dict[str, Any] = {}
    for variant in variants(precisions=("bf16",), others=False):
        row = of(variant, architecture())
        found[f"{variant.kernel} {variant.shape}"] = {name: row[name] for name in ("registers", "stack", "shared")}
        save(found)


def rates(out: Path, save: Save) -> None:
    """The machine's own limits: products of 8192^3 in TFLOP/s, and a copy of 1 GiB in GB/s (read plus written)."""
    found = {}
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    found["copy_GBs"] = round(2 * 4 * 2**28 / timed(lambda: target.copy_(source)) / 1e9, 1)
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name}_TFLOPs"] = round(2 * 8192**3 / timed(partial(torch.mm, a, b)) / 1e12, 1)
        save(found)


def traffic(
    specs: list[ModelSpec], launch: Launch, size: int, used: list[int], surveyed: list[bool]
) -> dict[str, tuple[float, float]]:
    """Bytes and operations of each streamed kernel in one step, at the least: every array once, nothing twice.

    Args:
        size: bytes of an operand.
        used: neurons of each model that take part.
        surveyed: whether those were found by a survey.
    """
    spec, A, streams = specs[0], len(specs), len({stream_key(s) for s in specs})
    B, N, o, M = spec.batch_size, spec.n_features, spec.d_output, launch.M
    row_parts, column_parts = -(-B // launch.rows), -(-o // launch.BP)
    every, k = sum(s.n_neurons for s in specs), sum(used)
    looked_at = sum(s.n_neurons for s, survey in zip(specs, surveyed, strict=True) if survey)
    gathered = sum(number for number, survey in zip(used, surveyed, strict=True) if survey)
    weights, numbers = k * (M + o), every * (M + o + 1)
    partial_gradients = row_parts * (k * o + column_parts * k * (M + 1))
    projections = 2 if spec.task == "reprojector" else 1
    read_again = sum(number > 0 for number in used)  # of no neuron there is no gradient
    e_and_h, tau, shared = A * B * o + B * k, 4 * B * o, streams * size * B * M
    return {
        "project_kernel": (streams * (size * (B + N) * M * projections + tau), streams * 2 * B * N * M * projections),
        "survey_kernel": (shared * any(surveyed) + 4 * looked_at * (M + 1), 2 * B * looked_at * M),
        "gather_kernel": ((4 + size) * gathered * (M + o) + 8 * gathered, 0),
        "forward_kernel": (shared + streams * tau + size * (e_and_h + weights), 2 * B * weights),
        "backward_kernel": (
            shared + size * (read_again * B * o + B * k + weights) + 4 * partial_gradients,
            4 * B * weights - 2 * B * k * M,
        ),
        "moments_kernel": (4 * (partial_gradients + 5 * numbers), 0),  # p, m and v read, m and v written
        "apply_kernel": (16 * numbers + size * every * (M + o), 0),  # p, m and v read, p written twice
    }


def kernels(out: Path, save: Save) -> None:
    """Each kernel's milliseconds in a step of the paper's grid, bf16, against its floor: the larger of bytes over the
    machine's copy bandwidth and operations over its bf16 rate."""
    from torch.profiler import ProfilerActivity, profile

    from fastmono.engines.triton import TritonEngine

    known = out / "rates.json"
    machine = read_json(known) if known.exists() else {}
    if "bf16_TFLOPs" not in machine:
        rates(out, machine.update)
    specs = [s.replace(steps=2**30) for s in fm.preset("published")]
    engine, block = TritonEngine("bf16"), Block.new(specs)
    engine.advance(block, 4)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        engine.advance(block, 8)
        torch.cuda.synchronize()
    took = {e.key: e.device_time_total / 8e3 for e in profiled.key_averages() if "kernel" in e.key}
    s = specs[0]
    launch = choose_launch(architecture(), s.n_features, s.d_embed, s.n_neurons, s.d_output, s.batch_size, "bf16")
    packed = engine._pack(block)
    surveyed = [step >= block.step for step in packed.last_surveys]
    least = traffic([model.spec for model in packed.models], launch, 2, packed.used.tolist(), surveyed)
    found: dict[str, Any] = {}
    for name, ms in sorted(took.items(), key=lambda item: -item[1]):
        found[name] = {"ms": round(ms, 4)}
        if name in least:
            moved, done = least[name]
            floors = {"bytes": moved / machine["copy_GBs"] / 1e6, "operations": done / machine["bf16_TFLOPs"] / 1e9}
            bound = max(floors, key=lambda which: floors[which])
            found[name] |= {"floor_ms": round(floors[bound], 4), "bound": bound, "share": round(floors[bound] / ms, 3)}
    save(found)


def rate_of(specs: list[ModelSpec], precision: str, seconds: float) -> dict[str, float]:
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


def ladder(out: Path, save: Save) -> None:
    """Rates of both regimes over grids of growing size, bf16."""
    found: dict[str, Any] = {}
    for shape, counts in (("tiny", (1, 16, 128, 1024, 4096)), ("demo", (1, 12, 132, 1024)), ("published", (1, 4, 24))):
        for count in counts:
            specs = [SHAPES[shape].replace(lr=0.001 * (1 + i % 13), seed=i // 256) for i in range(count)]
            found[f"{shape} x {count}"] = rate_of(specs, "bf16", 1.0)
            save(found)


def published(out: Path, save: Save) -> None:
    """Losses of a model's first steps beside the reference's, and the rate of the paper's grid in each precision."""
    grid = [spec.replace(steps=2**30) for spec in fm.preset("published")]
    spec, steps = grid[2], 4
    found: dict[str, Any] = {}
    reference = ReferenceEngine().advance(Block.new([spec]), steps)
    for precision in ("fp32", "tf32", "bf16"):
        losses = engine_class("triton")(precision).advance(Block.new([spec]), steps)
        found[f"{precision}_loss_error"] = float(((losses - reference) / reference).abs().max())
        save(found)
    for precision in ("bf16", "tf32", "fp32"):
        found[precision] = rate_of(grid, precision, 2.0)
        save(found)


SECTIONS = {  # each with its share of the time; what one leaves goes to those after it
    device: 2, tests: 26, resources: 4, rates: 3, kernels: 4, ladder: 9, published: 6,
}  # fmt: skip
NAMES = [section.__name__ for section in SECTIONS]


def architecture() -> int:
    """90 for sm_90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def run_section(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """One section in a process of its own, which is ended when its time is over; what it saved until then stays."""
    path, started = out / f"{name}.json", time.monotonic()
    path.unlink(missing_ok=True)
    with (out / f"{name}.err").open("w+") as errors:
        command = [sys.executable, __file__, "--out", str(out), "--section", name]
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        cut = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            cut = True
        finally:  # its children too, the tests among them
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        if cut:
            found["cut_off"] = f"after {seconds:.0f} s"
        elif process.returncode:
            errors.seek(0)
            found["failed"] = errors.read()[-3000:] or f"exit code {process.returncode}"
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the sections, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--section", choices=NAMES, help=argparse.SUPPRESS)  # this process runs it
    arguments = parser.parse_args(argv)
    out: Path = arguments.out.resolve()
    if arguments.section:
        section = next(section for section in SECTIONS if section.__name__ == arguments.section)
        section(out, lambda found: write_bytes(out / f"{arguments.section}.json", json.dumps(found).encode()))
        return 0
    if not has_gpu():
        print("error: there is no CUDA GPU with Triton here", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    report: dict[str, dict[str, Any]] = {}
    waiting = {section.__name__: share for section, share in SECTIONS.items() if section.__name__ in arguments.only}
    while waiting:
        left, (name, share) = max(0.0, end - time.monotonic()), next(iter(waiting.items()))
        report[name] = run_section(name, out, left * share / sum(waiting.values()))
        del waiting[name]
        write_bytes(out / "gpu_check.json", json.dumps(report, indent=1).encode())
        print(f"\n{name}")
        for key, value in report[name].items():
            print(f"  {key:28s} {value}", flush=True)
    bad = [name for name, found in report.items() if {"failed", "cut_off"} & set(found) or found.get("passed") is False]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
