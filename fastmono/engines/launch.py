"""Launch settings of the Triton engine: a pure function of architecture, shape and precision, never of timing.

resident   one program trains one model          when its working set is small
streamed   kernels over all models of a block    otherwise
"""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_EMBEDDING = 1024
OLDEST_ARCHITECTURE = 80
LARGEST_GRID = 65_535
"""CUDA's limit to the second and third dimension of a grid."""
RESIDENT_BYTES = 2**18
"""Largest W_in and W_out together of a resident model."""
ROWS_A_PART = 4096
"""Samples whose gradient one backward program sums: a function of the shape alone, since it orders the sum."""


def note_on(architecture: int) -> str:
    """What to say about settings for an architecture that they were not made for; empty where they were."""
    if architecture in (0, 80, 86, 89) or architecture // 10 in (9, 10):
        return ""
    return f"sm_{architecture} gets the launch settings of sm_80"


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, within low and high."""
    return min(high, max(low, 1 << (n - 1).bit_length()))


@dataclass(frozen=True)
class Launch:
    """Tiles (powers of two, at least 16, what a product needs), warps and pipeline stages, by the kernels' names."""

    regime: str
    M: int
    """Embedding dimension, whole."""
    BN: int
    """Features a chunk of the projection."""
    BR: int
    """Samples a tile of the projection and the forward pass."""
    BK: int
    """Neurons a chunk of the forward pass, a tile of the backward pass."""
    BO: int
    """Outputs a tile of the forward pass."""
    BP: int
    """Outputs a tile of the backward pass."""
    BB: int
    """Samples a chunk of the backward pass."""
    BA: int
    """Neurons a chunk of the update."""
    rows: int
    """Samples of one backward program."""
    num_warps: int
    num_stages: int


def choose_launch(
    architecture: int, N: int, m: int, k: int, o: int, B: int, precision: str, activation: str = "relu"
) -> Launch:
    """Settings for a model of this shape on a CUDA architecture (90 for sm_90; 0 for the interpreter).

    The numbers are those at which no bf16 or tf32 kernel spills (benchmarks/results/kernel_resources.csv).
    Raises `ValueError` where a shape cannot run.
    """
    if 0 < architecture < OLDEST_ARCHITECTURE:
        raise ValueError(f"sm_{architecture}: the triton engine needs sm_{OLDEST_ARCHITECTURE} or newer")
    half = precision in ("bf16", "fp16")
    # 227 KiB of shared memory; all others, those not known here among them, get what fits the 99 KiB of sm_86.
    roomy = architecture // 10 in (9, 10)
    largest = LARGEST_EMBEDDING if roomy or half or architecture == 0 else LARGEST_EMBEDDING // 2
    if m > largest:
        raise ValueError(f"d_embed={m}: the triton engine holds an embedding whole, in {precision} up to {largest}")
    M = power_of_two(m, 16, LARGEST_EMBEDDING)
    resident = 4 * k * (M + o) <= RESIDENT_BYTES
    if resident or precision == "fp32" or M > 128:
        # float32 products run on the ordinary units, with operands and sums in registers. The phases of a resident
        # model share one program's registers, and above 32 x 32 they spill; in a function that is not inlined, sm_100
        # has no tensor memory either, which larger tiles would ask for.
        row_tile, neurons, outputs, outputs_back = (32, 32, 32, 32) if M <= 128 else (16, 16, 16, 16)
    elif half:
        # On sm_80 a tile of the gradient, 64 x 128 float32, leaves too few registers for its operands.
        row_tile, neurons, outputs, outputs_back = (128, 64 if roomy else 32, 128, 128)
        if architecture // 10 == 9 and (activation != "relu" or M > 64):
            outputs_back = 64  # their derivatives, or rows of dW_in, take the registers that 128 would need
    else:
        row_tile, neurons, outputs, outputs_back = (64, 32, 64, 64)
    BB = power_of_two(B, 16, min(row_tile, 64))
    rows = B if resident else min(-(-B // BB) * BB, ROWS_A_PART)
    BP = power_of_two(o, 16, outputs_back)
    if -(-B // rows) * -(-o // BP) > LARGEST_GRID:
        raise ValueError(f"d_output={o}, batch_size={B}: more than {LARGEST_GRID} parts of a gradient")
    return Launch(
        regime="resident" if resident else "streamed",
        M=M,
        BN=power_of_two(N, 16, 32 if M <= 128 else 16),
        BR=power_of_two(B, 16, row_tile),
        BK=power_of_two(k, 16, neurons),
        BO=power_of_two(o, 16, outputs),
        BP=BP,
        BB=BB,
        BA=16,
        rows=rows,
        num_warps=4 if precision == "tf32" and not roomy and not resident else 8,
        num_stages=3 if architecture // 10 == 9 else 2,
    )
