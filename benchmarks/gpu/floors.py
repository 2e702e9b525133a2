"""The paper's grid in bf16: steps a second, and each kernel's time in a step beside the least that it could take.

    python -m benchmarks.gpu.floors [--small] [--switches JSON]

At the beginning of a run with zero bias, after 2,048 steps, and at the beginning at a negative bias, where most neurons
are dead. A kernel's floor is the larger of its bytes over the machine's copy bandwidth and its operations over the rate
of its products, both measured in the same call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu.cases import published_grid
from benchmarks.gpu.jobs import report
from benchmarks.machine import Machine
from fastmono.block import Block
from fastmono.engines.launch import Launch
from fastmono.engines.triton import Packed, TritonEngine
from fastmono.philox import stream_key
from fastmono.spec import ModelSpec

LATER, WARM, TIMED, REPEATS, PROFILED = 2048, 40, 96, 5, 16
"""The step of the second state; steps that compile and capture; that are timed, and how often; that are profiled."""


def traffic(
    specs: Sequence[ModelSpec], launch: Launch, size: int, used: list[int], surveyed: list[bool]
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


def beside_floors(took: dict[str, float], packed: Packed, step: int, machine: dict[str, float]) -> dict[str, Any]:
    """Milliseconds a step of each kernel, its floor, what that is made of, and the share of the one in the other."""
    surveyed = [step >= 0 and last >= step for last in packed.last_surveys]
    specs, launch = [model.spec for model in packed.models], packed.groups[0][0]
    size = 2 if packed.precision == "bf16" else 4
    least = traffic(specs, launch, size, packed.used.tolist(), surveyed)
    found: dict[str, Any] = {}
    for name, ms in sorted(took.items(), key=lambda item: -item[1]):
        found[name] = {"ms": round(ms, 4)}
        if name in least:
            moved, done = least[name]
            floors = {"bytes": 1e3 * moved / machine["copy"], "operations": 1e3 * done / machine[packed.precision]}
            bound = max(floors, key=lambda which: floors[which])
            found[name] |= {"floor_ms": round(floors[bound], 4), "bound": bound, "share": round(floors[bound] / ms, 3)}
    return found


def profiled(engine: TritonEngine, block: Block) -> dict[str, float]:
    """Milliseconds a step of each kernel, by the profiler, over a few steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        engine.advance(block, PROFILED)
        torch.cuda.synchronize()
    events = {event.key: event.device_time_total / 1e3 / PROFILED for event in found.key_averages()}
    return {name: ms for name, ms in events.items() if name.endswith("_kernel")}


def rate(engine: TritonEngine, block: Block, steps: int) -> dict[str, Any]:
    """Model-steps a second and useful operations a second of whole steps, the host's work included: the median of
    `REPEATS`, and each."""
    took = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        engine.advance(block, steps)
        took.append(time.perf_counter() - started)
    model_steps = steps * len(block.specs) / statistics.median(took)
    useful = model_steps * block.specs[0].flops_per_step
    return {"model_steps_per_s": round(model_steps, 1), "useful_TFLOPs": round(useful / 1e12, 3),
            "us_a_model_step": round(1e6 / model_steps, 2),
            "all_us": [round(1e6 * x / steps / len(block.specs), 2) for x in took]}  # fmt: skip


def states(small: bool, switches: dict[str, Any]) -> Iterator[tuple[str, TritonEngine, Block]]:
    """The three states, each with the engine that has come to it."""
    precision, warm, later = ("fp32", 1, 8) if small else ("bf16", WARM, LATER)
    for bias in (0.0, -1.0):
        specs = published_grid(bias)
        if small:
            specs = [s.replace(n_features=24, d_embed=8, n_neurons=32, batch_size=64) for s in specs[:2]]
        engine, block = TritonEngine(precision, **switches), Block.new(specs)
        engine.advance(block, warm)
        yield f"beginning, bias {bias:g}", engine, block
        if bias == 0.0:
            engine.advance(block, max(0, later - block.step))
            yield f"step {later}, bias {bias:g}", engine, block


def main(argv: list[str] | None = None) -> int:
    """Measure the three states: all rates first, then all kernels, since a profiler may slow down what follows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two small models in fp32, a few steps")
    parser.add_argument("--switches", type=json.loads, default={})
    arguments = parser.parse_args(argv)
    small, switches = arguments.small, arguments.switches
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(device, small).measure()
    report(**{f"{name}_T": round(value / 1e12, 2) for name, value in machine.items()})
    for name, engine, block in states(small, switches):
        at = block.step
        found = rate(engine, block, 1 if small else TIMED)
        of_product = found["useful_TFLOPs"] * 1e12 / machine[engine.precision]
        report(state=name, at_step=at, **found, of_the_product_rate=round(of_product, 3))
    if device.type != "cuda":
        return 0
    empty = False
    for name, engine, block in states(small, switches):
        took = profiled(engine, block)
        empty |= not took
        report(state=name, kernels=beside_floors(took, engine._pack(block), block.step, machine))
    return 1 if empty else 0  # a profiler without rights sees nothing


if __name__ == "__main__":
    sys.exit(main())
