"""Small models: one program trains one model, for many steps in one launch.

The phases are those of the streamed kernels (project, forward, backward, moments, apply), run one after the other with
a barrier between; what passes from phase to phase goes through the program's own scratch, which stays in cache.
There is no synchronization between models.

All dimensions as in the phases' own files. BB samples a chunk of the backward pass.
"""

import triton
import triton.language as tl

from .backward import backward_tile
from .forward import forward_tile
from .project import project_tile
from .tables import BIAS_FACTOR, HALF_L1, N_FACTORS, N_FIELDS, ROW, STEPS, STREAM, K, is_active, whole_rows
from .update import N_NORMS, apply_tile, finish_model, moments_tile


@triton.jit(noinline=True)
def project_phase(
    seed, step, p_last, p_scale, p_P, p_P2, p_x, p_tau, N, B, LO,
    TASK: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [B, M] and tau [B, LO] of all samples."""
    for row0 in range(0, B, BR):
        project_tile(seed, step, row0, p_last, p_scale, p_P, p_P2, p_x, p_tau, N, B, LO, TASK, PRECISION, M, BR, BN)


@triton.jit(noinline=True)
def forward_phase(
    p_x, p_tau, p_W_in, p_b, p_W_out, p_h, p_e, p_loss, k, o, B, LO, LB,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """h^T [k, LB], e [B, LO] of all samples, and the parts of the loss, [row tiles, output tiles]."""
    tiles = tl.cdiv(o, BO)
    for row0 in range(0, B, BR):
        for tile in range(tiles):
            loss = forward_tile(
                row0, tile, tiles, p_x, p_tau, p_W_in, p_b, p_W_out, p_h, p_e, k, o, B, LO, LB,
                ACTIVATION, PRECISION, M, BR, BK, BO, False,
            )  # fmt: skip
            tl.store(p_loss + row0 // BR * tiles + tile, loss)


@triton.jit(noinline=True)
def backward_phase(
    half_l1, p_x, p_W_in, p_b, p_W_out, p_h, p_e, p_dW_in, p_db, p_dW_out, rows, k, o, B, LO, LB,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The gradients of all neurons: dW_in and db one part for each output tile."""
    for k0 in range(0, k, BK):
        for tile in range(tl.cdiv(o, BO)):
            backward_tile(
                0, B, k0, tile * BO, half_l1, p_x, p_W_in, p_b, p_W_out, p_h, p_e, p_dW_in + tile * rows * M,
                p_db + tile * rows, p_dW_out, k, LO, LB, ACTIVATION, PRECISION, M, BB, BK, BO, False,
            )  # fmt: skip


@triton.jit(noinline=True)
def moments_phase(
    k, unit, p_dW_in, p_db, p_dW_out, in_parts, rows, p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out,
    p_v_in, p_v_b, p_v_out, p_norms, o, LO, M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The moments of all neurons, and the parts of the norms."""
    for k0 in range(0, k, BA):
        moments_tile(
            k0, k, unit, p_dW_in, p_db, p_dW_out, in_parts, 1, rows, p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out,
            p_v_in, p_v_b, p_v_out, p_norms + k0 // BA * N_NORMS, o, LO, M, BA, BO,
        )  # fmt: skip


@triton.jit(noinline=True)
def apply_phase(
    k, unit, lr, c1, c2, factor, p_dW_in, p_db, p_dW_out, in_parts, rows, p_W_in, p_b, p_W_out, p_q_in, p_q_out,
    p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, p_bad, o, LO,
    OPTIMIZER: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """New parameters of all neurons, and how many are not finite, for each chunk."""
    for k0 in range(0, k, BA):
        bad = apply_tile(
            k0, k, unit, lr, c1, c2, factor, p_dW_in, p_db, p_dW_out, in_parts, 1, rows, p_W_in, p_b, p_W_out,
            p_q_in, p_q_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, o, LO,
            OPTIMIZER, PRECISION, M, BA, BO,
        )  # fmt: skip
        tl.store(p_bad + k0 // BA, bad)


NUMBERS = [
    "n_steps", "rate_stride", "in_parts", "rows", "loss_parts", "loss_stride", "chunks", "o", "N", "B", "LO", "LB",
    "first",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def resident_kernel(
    p_models, p_factors, p_diverged, p_step, p_seeds, p_last, p_scale, p_P, p_P2, p_rates, p_corrections,
    p_x, p_tau, p_h, p_e, p_loss, p_bad, p_norms, p_losses, p_dW_in, p_db, p_dW_out,
    p_W_in, p_b, p_W_out, p_q_in, p_q_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out,
    n_steps, rate_stride, unit, in_parts, rows, loss_parts, loss_stride, chunks, o, N, B, LO, LB, first,
    TASK: tl.constexpr, ACTIVATION: tl.constexpr, OPTIMIZER: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
    BP: tl.constexpr, BB: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Grid (models). Scratch for each model: x [B, M], tau and e [B, LO], h^T [k, LB], loss [loss_parts], bad [chunks],
    norms, and the gradients' parts: dW_in [in_parts, rows, M], db [in_parts, rows], dW_out [rows, LO]."""
    LO, LB = whole_rows(LO), whole_rows(LB)
    model = (first + tl.program_id(0)).to(tl.int64)
    row = tl.load(p_models + model * N_FIELDS + ROW)
    stream = tl.load(p_models + model * N_FIELDS + STREAM)
    i, out = row * M, row * LO
    p_last, p_scale, p_P, p_P2 = p_last + stream * N, p_scale + stream * N, p_P + stream * N * M, p_P2 + stream * N * M
    p_x, p_tau, p_e, p_h = p_x + model * B * M, p_tau + model * B * LO, p_e + model * B * LO, p_h + row * LB
    p_loss, p_bad, p_norms = p_loss + model * loss_stride, p_bad + model * chunks, p_norms + model * chunks * N_NORMS
    p_W_in, p_b, p_W_out, p_q_in, p_q_out = p_W_in + i, p_b + row, p_W_out + out, p_q_in + i, p_q_out + out
    p_m_in, p_m_b, p_m_out = p_m_in + i, p_m_b + row, p_m_out + out
    p_v_in, p_v_b, p_v_out = p_v_in + i, p_v_b + row, p_v_out + out
    p_dW_in, p_db, p_dW_out = p_dW_in + i, p_db + row, p_dW_out + out
    rows = rows.to(tl.int64)
    first_step = tl.load(p_step)
    for t in range(n_steps):
        step = first_step + t
        if is_active(p_models, p_diverged, model, step):
            # Numbers of a model are read in each step, most where they are used: held from step to step they spill.
            k = tl.load(p_models + model * N_FIELDS + K).to(tl.int32)
            project_phase(
                tl.load(p_seeds + stream), step, p_last, p_scale, p_P, p_P2, p_x, p_tau, N, B, LO,
                TASK, PRECISION, M, BR, BN,
            )  # fmt: skip
            tl.debug_barrier()
            forward_phase(
                p_x, p_tau, p_q_in, p_b, p_q_out, p_h, p_e, p_loss, k, o, B, LO, LB,
                ACTIVATION, PRECISION, M, BR, BK, BO,
            )  # fmt: skip
            tl.debug_barrier()
            backward_phase(
                tl.load(p_factors + model * N_FACTORS + HALF_L1), p_x, p_q_in, p_b, p_q_out, p_h, p_e,
                p_dW_in, p_db, p_dW_out, rows, k, o, B, LO, LB,
                ACTIVATION, PRECISION, M, BB, BK, BP,
            )  # fmt: skip
            tl.debug_barrier()
            if OPTIMIZER != "sgd":
                moments_phase(
                    k, unit, p_dW_in, p_db, p_dW_out, in_parts, rows, p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out,
                    p_v_in, p_v_b, p_v_out, p_norms, o, LO, M, BA, BO,
                )  # fmt: skip
                tl.debug_barrier()
            decays = 2 * step < tl.load(p_models + model * N_FIELDS + STEPS)
            factor = tl.where(decays, tl.load(p_factors + model * N_FACTORS + BIAS_FACTOR), 1.0)
            apply_phase(
                k, unit, tl.load(p_rates + model * rate_stride + t), tl.load(p_corrections + 2 * t),
                tl.load(p_corrections + 2 * t + 1), factor, p_dW_in, p_db, p_dW_out, in_parts, rows,
                p_W_in, p_b, p_W_out, p_q_in, p_q_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out,
                p_norms, p_bad, o, LO, OPTIMIZER, PRECISION, M, BA, BO,
            )  # fmt: skip
            tl.debug_barrier()
            finish_model(
                model, step, t, rate_stride, p_loss, loss_parts, p_bad, tl.cdiv(k, BA), p_losses, p_diverged, B
            )
            tl.debug_barrier()
