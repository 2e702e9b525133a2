"""Launches of the kernels over packed models: one step of large ones, or many steps of small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmono.engines.launch import LARGEST_GRID, ROWS_A_SURVEY, Launch, loss_parts
from fastmono.kernels.backward import backward_kernel
from fastmono.kernels.forward import forward_kernel
from fastmono.kernels.narrow import narrow_kernel
from fastmono.kernels.project import project_kernel
from fastmono.kernels.resident import resident_kernel
from fastmono.kernels.survey import gather_kernel, survey_kernel
from fastmono.kernels.update import apply_kernel, finish_kernel, moments_kernel, tick_kernel

if TYPE_CHECKING:
    from fastmono.engines.triton import Packed

STEPS_A_CALL = 1024
"""Capacity of the tables of learning rates and losses."""
SIDE_BY_SIDE = 16
"""Models whose forward programs run at the same time: they share x and tau, and hold so many W_out in the cache."""


def launch_step(packed: Packed, groups: list[tuple[Launch, int, int]], surveys: bool) -> None:
    """One step of the streamed models; `surveys` may be False where none of them looks for dead neurons any more."""
    spec, precision = packed.spec, packed.precision
    N, o, B, M, LO, LB = spec.n_features, spec.d_output, spec.batch_size, packed.M, packed.LO, packed.LB
    unit, A = 2.0 / B, packed
    launch = groups[0][0]
    for first in range(0, len(A.seeds), LARGEST_GRID):
        project_kernel[(-(-B // launch.BS), min(LARGEST_GRID, len(A.seeds) - first))](
            A.step, A.seeds, A.last, A.scale, A.P, A.P2, A.x, A.tau, N, B, LO, first,
            TASK=spec.task, PRECISION=precision, ACROSS=launch.project_across, M=M, BR=launch.BS, BN=launch.BN,
            **launch.options("project"),
        )  # fmt: skip
    for launch, first, count in groups:
        p, q = A.parameters, A.operands
        row_tiles, tiles, row_parts = -(-B // launch.BR), -(-o // launch.BO), -(-B // launch.rows)
        parts = row_parts * -(-o // launch.BP)
        k, r = A.neurons[first : first + count], A.ranks[first : first + count]
        back, chunks = (int((-(-k // size) + -(-r // size)).max()) for size in (launch.BL, launch.BA))
        beside = min(count, SIDE_BY_SIDE)
        if surveys and max(A.last_surveys[first : first + count]) >= 0:
            widest = int(k.max())
            survey_kernel[(-(-widest // launch.BV), len(A.flags), count)](
                A.table, A.diverged, A.step, A.x, p["W_in"], p["b"], A.flags, B, ROWS_A_SURVEY, A.rows, first,
                PRECISION=precision, M=M, BR=launch.BV, BK=launch.BV, **launch.options("survey"),
            )  # fmt: skip
            gather_kernel[(-(-widest // launch.BA), count)](
                A.table, A.diverged, A.step, A.flags, A.place, A.used, p["W_in"], p["b"], p["W_outT"],
                q["W_in"], q["b"], q["W_outT"], len(A.flags), A.rows, LO, first,
                PRECISION=precision, M=M, BG=launch.BA, BO=launch.BU, **launch.options("gather"),
            )  # fmt: skip
        if launch.fused:
            narrow_kernel[(parts, count)](
                A.table, A.used, A.factors, A.diverged, A.step, A.x, A.tau, q["W_in"], q["b"], q["W_outT"],
                A.loss, A.dW_in, A.db, A.dW_out, o, B, LO, launch.rows, row_parts, A.loss_parts, first, A.rows,
                ACTIVATION=spec.activation, PRECISION=precision,
                M=M, BR=launch.BB, BK=launch.BL, BO=launch.BP, BULK=launch.bulk, **launch.options("narrow"),
            )  # fmt: skip
        else:
            forward_kernel[(row_tiles * tiles * beside, -(-count // beside))](
                A.table, A.used, A.diverged, A.step, A.x, A.tau, q["W_in"], q["b"], q["W_outT"], A.h, A.e, A.loss,
                o, B, LO, LB, A.loss_parts, tiles, beside, first, count,
                ACTIVATION=spec.activation, LINEAR=launch.linear, PRECISION=precision, CARRIED=launch.forward_carried,
                M=M, BR=launch.BR, BK=launch.BK, BO=launch.BO, BULK=launch.bulk, **launch.options("forward"),
            )  # fmt: skip
            backward_kernel[(back, parts, count)](
                A.table, A.used, A.factors, A.diverged, A.step, A.x, q["W_in"], q["b"], q["W_outT"], A.h, A.e,
                A.dW_in, A.db, A.dW_out, B, LO, LB, launch.rows, row_parts, first, A.rows,
                ACTIVATION=spec.activation, LINEAR=launch.linear, PRECISION=precision, CARRIED=launch.backward_carried,
                M=M, BR=launch.BB, BK=launch.BL, BO=launch.BP, BULK=launch.bulk, **launch.options("backward"),
            )  # fmt: skip
        m, v = A.first_moment, A.second_moment
        if spec.optimizer != "sgd":
            moments_kernel[(chunks, count)](
                A.table, A.diverged, A.step, unit, A.place, A.dW_in, A.db, A.dW_out, parts, row_parts, A.rows,
                p["W_in"], p["b"], p["W_outT"], m["W_in"], m["b"], m["W_outT"], v["W_in"], v["b"], v["W_outT"],
                A.norms, o, LO, A.chunks, first,
                LINEAR=launch.linear, M=M, BA=launch.BA, BO=launch.BU, **launch.options("moments"),
            )  # fmt: skip
        apply_kernel[(chunks, count)](
            A.table, A.factors, A.diverged, A.step, A.rates, A.corrections, STEPS_A_CALL, unit,
            A.place, A.dW_in, A.db, A.dW_out, parts, row_parts, A.rows,
            p["W_in"], p["b"], p["W_outT"], q["W_in"], q["b"], q["W_outT"],
            m["W_in"], m["b"], m["W_outT"], v["W_in"], v["b"], v["W_outT"],
            A.norms, A.bad, A.changes, o, LO, A.chunks, first,
            OPTIMIZER=spec.optimizer, DECAY=launch.decay, LINEAR=launch.linear, PRECISION=precision,
            M=M, BA=launch.BA, BO=launch.BU, **launch.options("apply"),
        )  # fmt: skip
        finish_kernel[(count,)](
            A.table, A.factors, A.diverged, A.step, A.loss, A.bad, A.losses, p["b"], q["b"], A.changes,
            STEPS_A_CALL, loss_parts(launch, B, o), A.loss_parts, A.chunks, B, first,
            DECAY=launch.decay, BA=launch.BA, **launch.options("finish"),
        )  # fmt: skip
    tick_kernel[(1,)](A.step, num_warps=1)


def launch_resident(packed: Packed, launch: Launch, first: int, count: int, n_steps: int) -> None:
    """All steps of the resident models of one group, in one launch."""
    spec, A = packed.spec, packed
    N, o, B = spec.n_features, spec.d_output, spec.batch_size
    tiles = -(-o // launch.BO)
    p, q, m, v = A.parameters, A.operands, A.first_moment, A.second_moment
    resident_kernel[(count,)](
        A.table, A.factors, A.diverged, A.step, A.seeds, A.last, A.scale, A.P, A.P2, A.rates, A.corrections,
        A.x, A.tau, A.h, A.e, A.loss, A.bad, A.changes, A.norms, A.losses, A.flags, A.place, A.used,
        A.dW_in, A.db, A.dW_out, p["W_in"], p["b"], p["W_outT"], q["W_in"], q["b"], q["W_outT"],
        m["W_in"], m["b"], m["W_outT"], v["W_in"], v["b"], v["W_outT"],
        n_steps, STEPS_A_CALL, 2.0 / B, -(-o // launch.BP), A.rows, -(-B // launch.BR) * tiles, A.loss_parts, A.chunks,
        o, N, B, A.LO, A.LB, first,
        TASK=spec.task, ACTIVATION=spec.activation, OPTIMIZER=spec.optimizer, DECAY=launch.decay, LINEAR=launch.linear,
        PRECISION=A.precision, M=A.M, BN=launch.BN, BR=launch.BR, BK=launch.BK, BO=launch.BO, BP=launch.BP,
        BB=launch.BB, BA=launch.BA,
        **launch.options("resident"),
    )  # fmt: skip
