"""The device's memory that a block takes: what `Packed` allocates, and what Triton asks for at launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from fastmono.engines.launch import (
    ROWS_A_SURVEY,
    Launch,
    last_survey,
    rows_of,
    scratch_parts,
    tiles_of,
    whole_rows,
)
from fastmono.engines.triton_launch import SIDE_BY_SIDE, STEPS_A_CALL
from fastmono.philox import stream_key
from fastmono.spec import ModelSpec

N_FIELDS, N_FACTORS, N_NORMS = 6, 3, 6
"""Columns of the tables of models, of their factors, and of the norms (kernels/tables.py, kernels/update.py)."""
DESCRIPTOR_BYTES = 128
"""What a descriptor of tiles takes of the device's memory: Triton asks for it at each launch, for every program."""


def descriptors_of(launch: Launch, activation: str) -> dict[str, int]:
    """Descriptors that one program of each kernel makes: its windows in `kernels/` that are BULK."""
    if not launch.bulk:
        return {}
    if launch.fused:
        return {"narrow": 2}  # x, tau
    return {
        "forward": 8 if launch.linear else 5,  # x, e; W_in, W_out and h, of a linear path too
        "backward": 4 if activation == "relu" else 5,  # x, e, h, W_out; W_in where z is computed again
    }


def descriptor_bytes(specs: Sequence[ModelSpec], launches: Sequence[Launch]) -> int:
    """Memory of the descriptors of all launches of one step, those of each launch in a place of its own."""
    groups: dict[Launch, list[ModelSpec]] = defaultdict(list)
    for spec, launch in zip(specs, launches, strict=True):
        groups[launch].append(spec)
    found = 0
    for launch, models in groups.items():
        B, o, count = models[0].batch_size, models[0].d_output, len(models)
        parts, beside = -(-B // launch.rows) * -(-o // launch.BP), min(count, SIDE_BY_SIDE)
        programs = {
            "forward": -(-B // launch.BR) * -(-o // launch.BO) * -(-count // beside) * beside,
            "backward": max(tiles_of(spec, launch.BL) for spec in models) * parts * count,
            "narrow": parts * count,
        }
        found += sum(programs[name] * each for name, each in descriptors_of(launch, models[0].activation).items())
    return DESCRIPTOR_BYTES * found


def block_bytes(specs: Sequence[ModelSpec], launches: Sequence[Launch], size: int, compiled: bool) -> int:
    """Bytes of the device that a block takes.

    Args:
        launches: each model's settings.
        size: bytes of an operand.
        compiled: whether kernels are compiled: the interpreter makes no descriptors in the device's memory.
    """
    spec = specs[0]
    N, o, B = spec.n_features, spec.d_output, spec.batch_size
    M, LO = launches[0].M, whole_rows(o)
    rows, A = sum(map(rows_of, specs)), len(specs)
    row_parts, parts, loss_parts = scratch_parts(launches, B, o)
    chunks = max(tiles_of(s, launch.BA) for s, launch in zip(specs, launches, strict=True))
    state = rows * ((12 + size) * (M + LO) + 16)
    survey = rows * (4 + -(-B // ROWS_A_SURVEY)) + 4 * A
    gradients = 4 * rows * (row_parts * LO + parts * (M + 1))
    streams = len({stream_key(s) for s in specs})
    batches = max(A, streams) if any(launch.regime == "resident" for launch in launches) else streams
    second = 2 if spec.task == "reprojector" else 1
    stored = 0 if all(launch.fused for launch in launches) else A * B * LO + rows * whole_rows(B)
    activations = size * (stored + batches * B * M) + 4 * batches * B * LO
    sampling = streams * (N * (second * size * M + 12) + 8)
    tables = A * (8 * N_FIELDS + 4 * N_FACTORS + 16 + 8 * STEPS_A_CALL) + 8 * STEPS_A_CALL + 16
    partial = 4 * A * (loss_parts + chunks * (3 + N_NORMS))
    # Each launch leaves the memory of its descriptors to the next, which may need more; each graph has its own.
    # The interpreter has none.
    pools = 2 + any(last_survey(s) >= 0 for s in specs) if compiled else 0
    descriptors = pools * descriptor_bytes(specs, launches)
    return state + survey + gradients + activations + sampling + tables + partial + descriptors
