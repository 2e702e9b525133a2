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
    decay_of,
    is_active,
    is_surveyed,
    neurons_of,
    part_rows,
    rows_and_chunks,
    starts_of,
    takes_all,
    whole_rows,
)
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
def survey_phase(
    every, p_x, p_W_in, p_b, p_flags, k, B,
    PRECISION: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The flags of all neurons."""
    for k0 in range(0, k, BK):
        survey_tile(every, 0, B, k0, p_x, p_W_in, p_b, p_flags, k, PRECISION, M, BR, BK)


@triton.jit(noinline=True)
def gather_phase(
    p_used, p_flags, p_place, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, k, LO,
    PRECISION: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The operands of all active neurons, and how many they are."""
    used = 0
    for k0 in range(0, k, BG):
        used += gather_tile(
            k0, used, p_flags, 1, 0, p_place, p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, k, LO, PRECISION, M, BG, BO
        )  # fmt: skip
    tl.store(p_used, used)


@triton.jit(noinline=True)
def forward_phase(
    p_x, p_tau, p_W_in, p_b, p_W_out, p_h, p_e, p_loss, k, rank, o, B, LO, LB,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """h^T [k + rank, LB], e [B, LO] of all samples, and the parts of the loss, [row tiles, output tiles]."""
    tiles = tl.cdiv(o, BO)
    for row0 in range(0, B, BR):
        for tile in range(tiles):
            loss = forward_tile(
                row0, tile, tiles, p_x, p_tau, p_W_in, p_b, p_W_out, p_h, p_e, k, rank, o, B, LO, LB,
                ACTIVATION, LINEAR, PRECISION, M, BR, BK, BO, False,
            )  # fmt: skip
            tl.store(p_loss + row0 // BR * tiles + tile, loss)


@triton.jit(noinline=True)
def backward_phase(
    after, linear, half_l1, p_x, p_W_in, p_b, p_W_out, p_h, p_e, p_dW_in, p_db, p_dW_out, rows, k, o, B, LO, LB,
    ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The gradients of all neurons, or of a linear path: dW_in and db one part for each output tile."""
    p_W_in, p_b, p_W_out, p_h = p_W_in + after * M, p_b + after, p_W_out + after * LO, p_h + after * LB
    p_dW_in, p_db, p_dW_out = p_dW_in + after * M, p_db + after, p_dW_out + after * LO
    for k0 in range(0, k, BK):
        for tile in range(tl.cdiv(o, BO)):
            backward_tile(
                0, B, k0, tile * BO, half_l1, linear, p_x, p_W_in, p_b, p_W_out, p_h, p_e, p_dW_in + tile * rows * M,
                p_db + tile * rows, p_dW_out, k, LO, LB, ACTIVATION, LINEAR, PRECISION, M, BB, BK, BO, False,
            )  # fmt: skip


@triton.jit(noinline=True)
def moments_phase(
    after, k, unit, p_place, p_dW_in, p_db, p_dW_out, in_parts, rows, p_W_in, p_b, p_W_out, p_m_in, p_m_b, p_m_out,
    p_v_in, p_v_b, p_v_out, p_norms, o, LO, M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The moments of all neurons, or of a linear path, and the parts of the norms."""
    i, out = after * M, after * LO
    for k0 in range(0, k, BA):
        moments_tile(
            k0, k, unit, p_place + after, p_dW_in + i, p_db + after, p_dW_out + out, in_parts, 1, rows,
            p_W_in + i, p_b + after, p_W_out + out, p_m_in + i, p_m_b + after, p_m_out + out,
            p_v_in + i, p_v_b + after, p_v_out + out, p_norms + (tl.cdiv(after, BA) + k0 // BA) * N_NORMS, o, LO,
            M, BA, BO,
        )  # fmt: skip


@triton.jit(noinline=True)
def apply_phase(
    after, k, unit, lr, c1, c2, factor, strength, p_place, p_dW_in, p_db, p_dW_out, in_parts, rows,
    p_W_in, p_b, p_W_out, p_q_in, p_q_b, p_q_out, p_m_in, p_m_b, p_m_out, p_v_in, p_v_b, p_v_out,
    p_norms, p_bad, p_changes, o, LO, OPTIMIZER: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """New parameters of all neurons, or of a linear path, and how many are not finite, for each chunk."""
    i, out, before = after * M, after * LO, tl.cdiv(after, BA)
    for k0 in range(0, k, BA):
        own = before + k0 // BA
        bad = apply_tile(
            k0, k, unit, lr, c1, c2, factor, strength, p_place + after, p_dW_in + i, p_db + after, p_dW_out + out,
            in_parts, 1, rows, p_W_in + i, p_b + after, p_W_out + out, p_q_in + i, p_q_b + after, p_q_out + out,
            p_m_in + i, p_m_b + after, p_m_out + out, p_v_in + i, p_v_b + after, p_v_out + out,
            p_norms + before * N_NORMS, p_changes + 2 * own, o, LO, OPTIMIZER, DECAY, PRECISION, M, BA, BO,
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
    p_x, p_tau, p_e = p_x + model * B * M, p_tau + model * B * LO, p_e + model * B * LO
    p_loss, p_bad, p_norms = p_loss + model * loss_stride, p_bad + model * chunks, p_norms + model * chunks * N_NORMS
    p_changes += model * chunks * 2
    rows = rows.to(tl.int64)
    for t in range(n_steps):
        step = tl.load(p_step) + t
        if is_active(p_models, p_diverged, model, step):
            # Numbers of a model are read in each step, most where they are used, and where its rows begin in each
            # phase: held from step to step they spill.
            stream = tl.load(p_models + model * N_FIELDS + STREAM)
            project_phase(
                tl.load(p_seeds + stream), step, p_last + stream * N, p_scale + stream * N,
                p_P + stream * N * M, p_P2 + stream * N * M, p_x, p_tau, N, B, LO, TASK, PRECISION, M, BR, BN,
            )  # fmt: skip
            tl.debug_barrier()
            if ACTIVATION == "relu" and not LINEAR:  # noqa: SIM102 (known to the compiler)
                if is_surveyed(p_models, model, step):
                    k = neurons_of(p_models, model)
                    row, i, out = starts_of(p_models, model, M, LO)
                    survey_phase(
                        takes_all(p_models, model, step), p_x, p_W_in + i, p_b + row, p_flags + row, k, B,
                        PRECISION, M, BR, BK,
                    )  # fmt: skip
                    tl.debug_barrier()
                    gather_phase(
                        p_used + model, p_flags + row, p_place + row, p_W_in + i, p_b + row, p_W_out + out,
                        p_q_in + i, p_q_b + row, p_q_out + out, k, LO, PRECISION, M, BA, BP,
                    )  # fmt: skip
                    tl.debug_barrier()
            row, i, out = starts_of(p_models, model, M, LO)
            forward_phase(
                p_x, p_tau, p_q_in + i, p_q_b + row, p_q_out + out, p_h + row * LB, p_e, p_loss,
                tl.load(p_used + model), tl.load(p_models + model * N_FIELDS + RANK).to(tl.int32), o, B, LO, LB,
                ACTIVATION, LINEAR, PRECISION, M, BR, BK, BO,
            )  # fmt: skip
            tl.debug_barrier()
            row, i, out = starts_of(p_models, model, M, LO)
            for part in tl.static_range(2 if LINEAR else 1):
                after, own = part_rows(p_models, model, part)
                backward_phase(
                    after, part == 1, tl.load(p_factors + model * N_FACTORS + HALF_L1),
                    p_x, p_q_in + i, p_q_b + row, p_q_out + out, p_h + row * LB, p_e,
                    p_dW_in + i, p_db + row, p_dW_out + out, rows,
                    own if part == 1 else tl.load(p_used + model), o, B, LO, LB,
                    ACTIVATION, LINEAR, PRECISION, M, BB, BK, BP,
                )  # fmt: skip
            tl.debug_barrier()
            if OPTIMIZER != "sgd":
                row, i, out = starts_of(p_models, model, M, LO)
                for part in tl.static_range(2 if LINEAR else 1):
                    after, own = part_rows(p_models, model, part)
                    moments_phase(
                        after, own, unit, p_place + row, p_dW_in + i, p_db + row, p_dW_out + out, in_parts, rows,
                        p_W_in + i, p_b + row, p_W_out + out, p_m_in + i, p_m_b + row, p_m_out + out,
                        p_v_in + i, p_v_b + row, p_v_out + out, p_norms, o, LO, M, BA, BO,
                    )  # fmt: skip
                tl.debug_barrier()
            factor, strength = decay_of(p_models, p_factors, model, step)
            row, i, out = starts_of(p_models, model, M, LO)
            for part in tl.static_range(2 if LINEAR else 1):
                after, own = part_rows(p_models, model, part)
                apply_phase(
                    after, own, unit, tl.load(p_rates + model * rate_stride + t),
                    tl.load(p_corrections + 2 * t), tl.load(p_corrections + 2 * t + 1), factor, strength,
                    p_place + row, p_dW_in + i, p_db + row, p_dW_out + out, in_parts, rows,
                    p_W_in + i, p_b + row, p_W_out + out, p_q_in + i, p_q_b + row, p_q_out + out,
                    p_m_in + i, p_m_b + row, p_m_out + out, p_v_in + i, p_v_b + row, p_v_out + out,
                    p_norms, p_bad, p_changes, o, LO, OPTIMIZER, DECAY, PRECISION, M, BA, BO,
                )  # fmt: skip
            tl.debug_barrier()
            k, own = rows_and_chunks(p_models, model, BA)
            row, _, _ = starts_of(p_models, model, M, LO)
            finish_model(
                model, step, t, rate_stride, p_loss, loss_parts, p_bad, own, p_losses, p_diverged, B,
                p_b + row, p_q_b + row, k, strength, p_changes, DECAY, BA,
            )  # fmt: skip
            tl.debug_barrier()
