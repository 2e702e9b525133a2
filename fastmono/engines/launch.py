"""Launch settings of the Triton engine: a pure function of architecture, shape and precision, never of timing.

resident   one program trains one model          when its working set is small
streamed   kernels over all models of a block    otherwise
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastmono.spec import ModelSpec

LARGEST_EMBEDDING = 1024
OLDEST_ARCHITECTURE = 80
LARGEST_GRID = 65_535
"""CUDA's limit to the second and third dimension of a grid."""
ROW_NUMBERS = 32
"""Rows of W_out^T, tau, e and h^T are padded to a multiple of so many numbers."""
RESIDENT_BYTES = 2**18
"""Largest W_in and W_out together of a resident model."""
RESIDENT_SCRATCH = 2**21
"""Largest batch of one, with all that is stored of it: one multiprocessor works on it, and its share of cache ends."""
ROWS_A_PART, FEWEST_ROWS = 4096, 512
"""Samples whose gradient one backward program sums: at most, and at least where few tiles ask for many parts."""
MOST_PROGRAMS, ROWS_A_NARROW_PART = 128, 16_384
"""Programs of a narrow layer, about as many as a GPU has multiprocessors, since those that update it add up the parts;
but no more samples in one."""
ROWS_A_SURVEY = 1024
"""Samples in which one program looks for active neurons, a multiple of BV. No result depends on it."""
MOMENTS_REGISTERS = 128
"""It takes 48 to 108: two or more programs of 256 threads a multiprocessor (docs/LOG.md, 2026-11-27)."""
LEAST_BIAS = 0.3
"""How far below 0 a bias has to be for many neurons to be dead in a batch."""
PROGRAMS_A_MODEL = 32
"""Backward programs that a model's shape asks for: a few models then fill a GPU of 132 multiprocessors."""


def note_on(architecture: int) -> str:
    """What to say about settings for an architecture that they were not made for; empty where they were."""
    if architecture in (0, 80, 86, 89) or architecture // 10 in (9, 10):
        return ""
    return f"sm_{architecture} gets the launch settings of sm_80"


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, within low and high."""
    return min(high, max(low, 1 << (n - 1).bit_length()))


def rows_of(spec: ModelSpec) -> int:
    """Rows that a model has in the packed tensors: its neurons, and behind them its linear path."""
    return spec.n_neurons + spec.linear_path


def tiles_of(spec: ModelSpec, size: int) -> int:
    """Tiles of so many rows, each of neurons or of the linear path."""
    return -(-spec.n_neurons // size) + -(-spec.linear_path // size)


def last_survey(spec: ModelSpec) -> int:
    """The step up to which each one looks for the neurons that its batch activates, and leaves out the rest
    (kernels/survey.py); -1 where none does.

    That takes a twentieth of a step. It pays while the bias is well below 0: until decay alone would have brought it to
    `LEAST_BIAS`, or throughout. Of other layers next to no neuron is dead in a whole batch (docs/LOG.md, 2026-11-25).
    Where decay is not global it is slower, and this the earliest that it could be: rho is at most lr with LAMB.
    """
    if spec.activation != "relu" or spec.linear_path or spec.init_bias >= -LEAST_BIAS:
        return -1
    factor = 1.0 - spec.bias_decay * spec.lr
    if factor >= 1.0:
        return spec.steps
    steps = math.ceil(math.log(LEAST_BIAS / -spec.init_bias) / math.log(factor)) if factor > 0.0 else 1
    return steps if 2 * steps < spec.steps else spec.steps  # there is no decay in the second half


@dataclass(frozen=True)
class Launch:
    """Tiles (powers of two, at least 16, what a product needs), warps and pipeline stages, by the kernels' names."""

    regime: str
    M: int
    """Embedding dimension, whole."""
    BN: int
    """Features a chunk of the projection."""
    BS: int
    """Samples a tile of the projection."""
    BR: int
    """Samples a tile of the forward pass; of the projection too where one program trains a model."""
    BK: int
    """Neurons a chunk of the forward pass."""
    BO: int
    """Outputs a tile of the forward pass."""
    BB: int
    """Samples a chunk of the backward pass."""
    BL: int
    """Neurons a tile of the backward pass."""
    BP: int
    """Outputs a tile of the backward pass."""
    BA: int
    """Neurons a chunk of the update, and of those that are gathered."""
    BU: int
    """Outputs a piece of either."""
    BV: int
    """Samples a chunk and neurons a tile of the survey."""
    rows: int
    """Samples of one backward program: a function of the model's shape alone, since it orders the sum."""
    bulk: bool
    """Whether the forward, backward and narrow kernels move tiles by the copy engine."""
    fused: bool
    """Whether forward and backward pass are one kernel, narrow, in chunks of BB samples and tiles of BP outputs."""
    num_warps: int
    num_stages: int
    """Of all kernels but those for which a number of their own follows."""
    forward_carried: bool = False
    """Whether the forward pass computes z one chunk ahead (kernels/forward.py)."""
    backward_carried: bool = False
    """Whether the backward pass multiplies dz with x one chunk later (kernels/backward.py)."""
    project_across: bool = False
    """Whether the projection is formed transposed (kernels/project.py)."""
    project_warps: int | None = None
    survey_warps: int | None = None
    forward_warps: int | None = None
    forward_stages: int | None = None
    backward_warps: int | None = None
    backward_stages: int | None = None
    narrow_warps: int | None = None
    narrow_stages: int | None = None
    moments_registers: int | None = None
    """At most so many for each thread of `moments`. Left alone, the assembler aims at 64, and spills one or two."""
    linear: bool = False
    """Whether models have a linear path."""
    decay: str = "global"
    """Their mode of bias decay."""

    def options(self, kernel: str) -> dict[str, int | bool]:
        """What the kernel of that name (project, survey, gather, forward, ...) is compiled with."""
        warps, stages = (getattr(self, f"{kernel}_{what}", None) for what in ("warps", "stages"))
        found = {
            "num_warps": self.num_warps if warps is None else warps,
            "num_stages": self.num_stages if stages is None else stages,
            "enable_fp_fusion": False,
        }
        registers = getattr(self, f"{kernel}_registers", None)
        return found if registers is None else {**found, "maxnreg": registers}


def streamed_tiles(architecture: int, M: int, precision: str, activation: str, linear: bool) -> tuple[int, ...]:
    """BR, BK, BO and BB, BL, BP of a large model: those at which no bf16 or tf32 kernel spills, and the cache is read
    least (docs/LOG.md, 2026-11-25 and 2026-11-27; benchmarks/results/kernel_resources.csv)."""
    generation, relu = architecture // 10, activation == "relu"
    if M > 128:
        return 16, 16, 16, 16, 16, 16
    if precision == "fp32":  # on the ordinary units, with operands and sums in registers
        return 32, 32, 32, 32, 32, 32
    if precision == "tf32":
        if generation in (9, 10):
            return 128, 32, 128, 32, 64, 128
        return 64, 32, 64, 32, 32, 64
    if generation == 9:
        # 128 sums in each thread, and those of dW_in: at 64 of them for M = 128, z and its operands leave less.
        if M > 64:
            return 128, 32 if linear else 64, 256, 32, 128 if relu else 64, 128
        if M < 64:  # 32 x 128 x 256 spills 4 to 60 bytes with Triton 3.6
            return 128, 64, 256, 64 if relu else 32, 128, 128
        return 128, 64, 256, 32, 128, 256
    if generation == 10:
        return 128, 64, 256, 64, 128 if M <= 64 else 64, 128
    return 128, 32, 128, 32, 64, 128


def narrow_tiles(architecture: int, k: int) -> tuple[int, int, int]:
    """BB, BL, BP of a layer of at most 64 neurons, at which no kernel of the table of resources spills."""
    generation = architecture // 10
    if k <= 16:
        return 128 if generation in (9, 10) else 64, 16, 128
    if k <= 32:
        return 128 if generation == 9 else 64, 32, 64
    return 128 if generation == 9 else 64, 64, 64 if generation in (9, 10) else 32


def survey_tile(architecture: int, M: int, precision: str) -> int:
    """BV: x, W_in and the sums of so many samples and neurons."""
    generation = architecture // 10
    if M > 128:
        return 16
    if precision == "fp32":
        return 32
    if generation == 9:  # one warp group, which spills 600 bytes at 128
        return 64
    return 64 if precision == "tf32" and (M > 64 or generation != 10) else 128


def hopper_settings(M: int, BR: int, BL: int, precision: str, activation: str) -> dict[str, Any]:
    """Fields for single kernels of large models on sm_90: forms in which no product waits for another, and one warp
    group where more would race in Triton 3.6 and 3.7, whose wait for a product holds back one group alone
    (docs/LOG.md, 2026-11-27).

    Products of 64 rows and more are meant: smaller ones are made by each warp for itself.
    """
    if M > 128 or precision == "fp32":
        return {}
    found: dict[str, Any] = {"project_across": True, "project_warps": 4, "survey_warps": 4}
    if precision == "tf32":  # is not serialised as it is, and spills where carried
        return found
    if BR >= 64:
        found |= {"forward_carried": True, "forward_warps": 8 if BR > 64 else 4, "forward_stages": 3 if BR > 64 else 2}
    if BL >= 64:
        whole = BL > 64 or M <= 64 or activation == "relu"
        found |= {"backward_carried": True, "backward_warps": 8 if whole else 4}
        found |= {"backward_stages": 4 if activation == "relu" and M >= 64 else 3}
    return found


def choose_launch(
    architecture: int, N: int, m: int, k: int, o: int, B: int, precision: str, activation: str = "relu",
    linear: bool = False, decay: str = "global", regime: str = "auto",
) -> Launch:  # fmt: skip
    """Settings for a model of this shape on a CUDA architecture (90 for sm_90; 0 for the interpreter).

    regime: resident or streamed; auto chooses by the size of the model and its batch.

    Raises `ValueError` where a shape cannot run.
    """
    if 0 < architecture < OLDEST_ARCHITECTURE:
        raise ValueError(f"sm_{architecture}: the triton engine needs sm_{OLDEST_ARCHITECTURE} or newer")
    # 227 KiB of shared memory; all others, those not known here among them, get what fits the 99 KiB of sm_86.
    roomy = architecture // 10 in (9, 10)
    half = precision in ("bf16", "fp16")
    largest = LARGEST_EMBEDDING if roomy or half or architecture == 0 else LARGEST_EMBEDDING // 2
    if m > largest:
        raise ValueError(f"d_embed={m}: the triton engine holds an embedding whole, in {precision} up to {largest}")
    M = power_of_two(m, 16, LARGEST_EMBEDDING)
    small = 4 * k * (M + o) <= RESIDENT_BYTES and 4 * B * (M + 2 * o + k) <= RESIDENT_SCRATCH
    resident = regime == "resident" or (regime == "auto" and small)
    if resident:
        # The phases share one program's registers, and above 32 x 32 they spill, in tf32 on sm_100 above 32 x 16; in a
        # function that is not inlined, that has no tensor memory either, which larger tiles would ask for. Others than
        # relu hold z besides, and in tf32 a linear path takes what was left.
        relu, tf32 = activation == "relu", precision == "tf32"
        rows_back = 32 if relu and not (linear and tf32) else 16
        neurons = 16 if tf32 and architecture // 10 == 10 else 32
        tiles: tuple[int, ...] = (32, neurons, 32, rows_back, 32, 32) if M <= 128 else (16,) * 6
    else:
        tiles = streamed_tiles(architecture, M, precision, activation, linear)
    # In bf16 alone: others would spill at tiles of any use, as would gelu and solu with more than 32 neurons.
    fused = not resident and half and not linear and M <= 64 and k <= (64 if activation == "relu" else 32)
    if fused:
        tiles = *tiles[:3], *narrow_tiles(architecture, k)
    BR, BK, BO, BB, BL, BP = (
        power_of_two(size, 16, tile) for size, tile in zip((B, k, o, B, k, o), tiles, strict=True)
    )
    if resident:
        rows = B
    else:
        tiles_a_part = -(-k // BL) * -(-o // BP)
        parts = max(-(-B // ROWS_A_PART), min(-(-PROGRAMS_A_MODEL // tiles_a_part), B // FEWEST_ROWS))
        if fused:
            parts = max(min(parts, MOST_PROGRAMS // -(-o // BP)), -(-B // ROWS_A_NARROW_PART))
        unit = max(BB, 32)
        rows = -(-B // (parts * unit)) * unit
    grids = -(-B // ROWS_A_SURVEY), 0 if fused else -(-B // rows) * -(-o // BP)
    if max(grids) > LARGEST_GRID:
        raise ValueError(f"d_output={o}, batch_size={B}: more than {LARGEST_GRID} parts of a gradient")
    own: dict[str, Any] = {} if resident else {"moments_registers": MOMENTS_REGISTERS}
    if architecture // 10 == 9 and not resident:
        own |= hopper_settings(M, BR, BL, precision, activation)
    return Launch(
        regime="resident" if resident else "streamed",
        M=M,
        BN=power_of_two(N, 16, 32 if M <= 128 else 16),
        BS=BR if resident else min(BR, 64),
        BR=BR,
        BK=BK,
        BO=BO,
        BB=BB,
        BL=BL,
        BP=BP,
        BA=16,
        # Where BP is 16, the backward pass does not fill a padded row; sums of w^2 and w^4 take what more would spill.
        BU=min(BP, 64 if decay == "per_neuron" else 128),
        BV=survey_tile(architecture, M, precision),
        rows=rows,
        bulk=not resident and (roomy or architecture == 0),
        fused=fused,
        num_warps=4 if precision == "tf32" and not roomy and not resident else 8,
        num_stages=3 if architecture // 10 == 9 and M <= 512 else 2,
        linear=linear,
        decay=decay,
        **own,
    )


def whole_rows(numbers: int) -> int:
    """The length of a row in memory that holds so many numbers."""
    return -(-numbers // ROW_NUMBERS) * ROW_NUMBERS


def loss_parts(launch: Launch, B: int, o: int) -> int:
    """Programs that each write a part of a model's loss."""
    if launch.fused:
        return -(-B // launch.rows) * -(-o // launch.BP)
    return -(-B // launch.BR) * -(-o // launch.BO)


def scratch_parts(launches: Sequence[Launch], B: int, o: int) -> tuple[int, int, int]:
    """The most parts of dW_out, of dW_in and db, and of the loss, of models with these settings."""
    return (
        max(-(-B // launch.rows) for launch in launches),
        max(-(-B // launch.rows) * -(-o // launch.BP) for launch in launches),
        max(loss_parts(launch, B, o) for launch in launches),
    )
