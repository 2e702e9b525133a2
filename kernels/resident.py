"""Small models: one program trains one model, for many steps in one launch.

The phases are those of the streamed kernels (project, survey, gather, forward, backward, moments, apply), run one after
the other with a barrier between; what passes from phase to phase goes through the program's own scratch, which stays in
cache. There is no synchronization between models. The phases after the forward pass are called once more for a linear
path, whose `rank` rows begin `after` rows behind the first.

All dimensions as in the phases' own files. BB samples a chunk of the backward pass.
"""

import triton
import triton.language as tl

from .backward import backward_tile
from .forward import forward_tile
from .project import project_tile
from .survey import gather_tile, survey_tile
from .tables import (
    HALF_L1,
    N_FACTORS,
    N_FIELDS,
    RANK,
    STREAM,
    chunks_before,
    decay_of,
    is_active,
    is_surveyed,
    part_start,
    row_start,
    takes_all,
    whole_rows,
)
from .update import N_NORMS, apply_tile, finish_model, moments_tile, trust_ratios


@triton.jit(noinline=True)
def project_phase(
    p_models, model, p_seeds, step, p_last, p_scale, p_P, p_P2, p_x, p_tau, N, B, LO,
    TASK: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x [B, M] and tau [B, LO] of all samples."""
    stream = tl.load(p_models + model * N_FIELDS + STREAM)
    seed, f, P = tl.load(p_seeds + stream), stream * N, stream * N * M
    p_x, p_tau = p_x + model * B * M, p_tau + model * B * LO
    for row0 in range(0, B, BR):
        project_tile(
            seed, step, row0, p_last + f, p_scale + f, p_P + P, p_P2 + P, p_x, p_tau, N, B, LO,
            TASK, PRECISION, False, M, BR, BN,
        )  # fmt: skip


@triton.jit(noinline=True)
def survey_phase(
    p_models, model, step, p_x, p_W_in, p_b, p_flags, B, LO,
    PRECISION: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The flags of all neurons."""
    row, i, _, k = part_start(p_models, model, 0, M, LO)
    every = takes_all(p_models, model, step)
    for k0 in range(0, k, BK):
        survey_tile(
            every, 0, B, k0, p_x + model * B * M, p_W_in + i, p_b + row, p_flags + row, k, PRECISION, M, BR, BK
        )  # fmt: skip


@triton.jit(noinline=True)
def gather_phase(
    p_models, model, p_used, p_flags, p_place, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, LO,
    PRECISION: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The operands of all active neurons, and how many they are."""
    row, i, out, k = part_start(p_models, model, 0, M, LO)
    used = 0
    for k0 in range(0, k, BG):
        used += gather_tile(
            k0, used, p_flags + row, 1, 0, p_place + row, p_W_in + i, p_b + row, p_W_out + out,
            p_q_in + i, p_q_b + row, p_q_out + out, k, LO, PRECISION, M, BG, BO,
        )  # fmt: skip
    tl.store(p_used + model, used)


@triton.jit(noinline=True)
def forward_phase(
    p_models, model, p_used, p_x, p_tau, p_W_in, p_b, p_W_out, p_h, p_e, p_loss, loss_stride, o, B, LO, LB,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """h^T [k + rank, LB], e [B, LO] of all samples, and the parts of the loss, [row tiles, output tiles]."""
    row, i, out, _ = part_start(p_models, model, 0, M, LO)
    k, rank = tl.load(p_used + model), tl.load(p_models + model * N_FIELDS + RANK).to(tl.int32)
    p_x, p_tau, p_e = p_x + model * B * M, p_tau + model * B * LO, p_e + model * B * LO
    tiles = tl.cdiv(o, BO)
    for row0 in range(0, B, BR):
        for tile in range(tiles):
            loss = forward_tile(
                row0, tile, tiles, p_x, p_tau, p_W_in + i, p_b + row, p_W_out + out, p_h + row * LB, p_e, k, rank,
                o, B, LO, LB, ACTIVATION, LINEAR, PRECISION, False, M, BR, BK, BO, False,
            )  # fmt: skip
            tl.store(p_loss + model * loss_stride + row0 // BR * tiles + tile, loss)


@triton.jit(noinline=True)
def backward_phase(
    p_models, model, part: tl.constexpr, p_used, p_factors, p_x, p_W_in, p_b, p_W_out, p_h, p_e,
    p_dW_in, p_db, p_dW_out, rows, o, B, LO, LB,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The gradients of all neurons, or of a linear path: dW_in and db one part for each output tile."""
    row, i, out, k = part_start(p_models, model, part, M, LO)
    if part == 0:
        k = tl.load(p_used + model)
    half_l1 = tl.load(p_factors + model * N_FACTORS + HALF_L1)
    p_x, p_e = p_x + model * B * M, p_e + model * B * LO
    for k0 in range(0, k, BK):
        for tile in range(tl.cdiv(o, BO)):
            backward_tile(
                0, B, k0, tile * BO, half_l1, part == 1, p_x, p_W_in + i, p_b + row, p_W_out + out, p_h + row * LB, p_e,
                p_dW_in + row_start(tile, rows) * M + i, p_db + row_start(tile, rows) + row, p_dW_out + out, k, LO, LB,
                ACTIVATION, LINEAR, PRECISION, False, M, BB, BK, BO, False,
            )  # fmt: skip


@triton.jit(noinline=True)
def moments_phase(
    p_models, model, part: tl.constexpr, unit, p_place, p_dW_in, p_db, p_dW_out, in_parts, rows,
    p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, chunks, o, LO,
    M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The moments of all neurons, or of a linear path, and the parts of the norms."""
    row, i, out, k = part_start(p_models, model, part, M, LO)
    p_norms += (model * chunks + chunks_before(p_models, model, part, BA)) * N_NORMS
    for k0 in range(0, k, BA):
        moments_tile(
            k0, k, unit, p_place + row, p_dW_in + i, p_db + row, p_dW_out + out, in_parts, 1, rows.to(tl.int64),
            p_W_in + i, p_b + row, p_W_out + out, p_m_in + i, p_m_b + row, p_m_out + out,
            p_v_in + i, p_v_b + row, p_v_out + out, p_norms + k0 // BA * N_NORMS, o, LO, M, BA, BO,
        )  # fmt: skip


@triton.jit(noinline=True)
def apply_phase(
    p_models, model, part: tl.constexpr, p_factors, step, t, p_rates, rate_stride, p_corrections, unit,
    p_place, p_dW_in, p_db, p_dW_out, in_parts, rows, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out,
    p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, p_bad, p_changes, chunks, o, LO,
    OPTIMIZER: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """New parameters of all neurons, or of a linear path, and how many are not finite, for each chunk."""
    row, i, out, k = part_start(p_models, model, part, M, LO)
    lr = tl.load(p_rates + model * rate_stride + t)
    c1, c2 = tl.load(p_corrections + 2 * t), tl.load(p_corrections + 2 * t + 1)
    factor, strength = decay_of(p_models, p_factors, model, step)
    first = model * chunks + chunks_before(p_models, model, part, BA)
    ratios = trust_ratios(p_norms + first * N_NORMS, tl.cdiv(k, BA), OPTIMIZER)
    for k0 in range(0, k, BA):
        own = first + k0 // BA
        bad = apply_tile(
            k0, k, unit, lr, ratios[0], ratios[1], ratios[2], c1, c2, factor, strength,
            p_place + row, p_dW_in + i, p_db + row, p_dW_out + out, in_parts, 1, rows.to(tl.int64),
            p_W_in + i, p_b + row, p_W_out + out, p_q_in + i, p_q_b + row, p_q_out + out,
            p_m_in + i, p_m_b + row, p_m_out + out, p_v_in + i, p_v_b + row, p_v_out + out,
            p_changes + 2 * own, o, LO, OPTIMIZER, DECAY, PRECISION, M, BA, BO,
        )  # fmt: skip
        tl.store(p_bad + own, bad)


NUMBERS = [
    "n_steps", "rate_stride", "in_parts", "rows", "loss_parts", "loss_stride", "chunks", "o", "N", "B", "LO", "LB",
    "first",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def resident_kernel(
    p_models, p_factors, p_diverged, p_step, p_seeds, p_last, p_scale, p_P, p_P2, p_rates, p_corrections,
    p_x, p_tau, p_h, p_e, p_loss, p_bad, p_changes, p_norms, p_losses, p_flags, p_place, p_used,
    p_dW_in, p_db, p_dW_out, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out,
    p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out,
    n_steps, rate_stride, unit, in_parts, rows, loss_parts, loss_stride, chunks, o, N, B, LO, LB, first,
    TASK: tl.constexpr, ACTIVATION: tl.constexpr, OPTIMIZER: tl.constexpr, DECAY: tl.constexpr, LINEAR: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
    BP: tl.constexpr, BB: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Grid (models). Scratch for each model: x [B, M], tau and e [B, LO], h^T [k, LB], loss [loss_parts], bad [chunks],
    changes, norms, flags [k], and the gradients' parts: dW_in [in_parts, rows, M], db [in_parts, rows] and
    dW_out [rows, LO]."""
    LO, LB = whole_rows(LO), whole_rows(LB)
    model = (first + tl.program_id(0)).to(tl.int64)
    for t in range(n_steps):
        step = tl.load(p_step) + t
        if is_active(p_models, p_diverged, model, step):
            # Each phase finds out for itself where the model's numbers lie: held from phase to phase they spill.
            project_phase(
                p_models, model, p_seeds, step, p_last, p_scale, p_P, p_P2, p_x, p_tau, N, B, LO,
                TASK, PRECISION, M, BR, BN,
            )  # fmt: skip
            tl.debug_barrier()
            if ACTIVATION == "relu" and not LINEAR:  # noqa: SIM102 (known to the compiler)
                if is_surveyed(p_models, model, step):
                    survey_phase(p_models, model, step, p_x, p_W_in, p_b, p_flags, B, LO, PRECISION, M, BR, BK)
                    tl.debug_barrier()
                    gather_phase(
                        p_models, model, p_used, p_flags, p_place, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, LO,
                        PRECISION, M, BA, BP,
                    )  # fmt: skip
                    tl.debug_barrier()
            forward_phase(
                p_models, model, p_used, p_x, p_tau, p_q_in, p_q_b, p_q_out, p_h, p_e, p_loss, loss_stride,
                o, B, LO, LB, ACTIVATION, LINEAR, PRECISION, M, BR, BK, BO,
            )  # fmt: skip
            tl.debug_barrier()
            for part in tl.static_range(2 if LINEAR else 1):
                backward_phase(
                    p_models, model, part, p_used, p_factors, p_x, p_q_in, p_q_b, p_q_out, p_h, p_e,
                    p_dW_in, p_db, p_dW_out, rows, o, B, LO, LB, ACTIVATION, LINEAR, PRECISION, M, BB, BK, BP,
                )  # fmt: skip
            tl.debug_barrier()
            if OPTIMIZER != "sgd":
                for part in tl.static_range(2 if LINEAR else 1):
                    moments_phase(
                        p_models, model, part, unit, p_place, p_dW_in, p_db, p_dW_out, in_parts, rows,
                        p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, chunks, o, LO,
                        M, BA, BO,
                    )  # fmt: skip
                tl.debug_barrier()
            for part in tl.static_range(2 if LINEAR else 1):
                apply_phase(
                    p_models, model, part, p_factors, step, t, p_rates, rate_stride, p_corrections, unit,
                    p_place, p_dW_in, p_db, p_dW_out, in_parts, rows, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out,
                    p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out, p_norms, p_bad, p_changes, chunks, o, LO,
                    OPTIMIZER, DECAY, PRECISION, M, BA, BO,
                )  # fmt: skip
            tl.debug_barrier()
            finish_model(
                p_models, model, p_factors, step, t, rate_stride, p_loss, loss_parts, loss_stride, p_bad, p_losses,
                p_diverged, B, p_b, p_q_b, p_changes, chunks, DECAY, BA,
            )  # fmt: skip
            tl.debug_barrier()
