"""Neurons that a batch leaves dead are left out of its step: the Triton kernels in the interpreter, run by
`test_kernels.py`, and for how many steps they look."""

import math

import pytest
import torch
from engine_cases import same_state
from test_kernels import (
    HAS_TRITON,
    INTERPRETING,
    SMALL,
    Fences,
    both,
    check_against_the_reference,
    interpreted,
    regime,
    trained,
)

import fastmono as fm
from fastmono.block import PRECISIONS, Block
from fastmono.engines.launch import LEAST_BIAS, last_survey
from fastmono.engines.reference import ReferenceEngine
from fastmono.philox import FeatureSampler

if INTERPRETING and HAS_TRITON:
    from fastmono.kernels.survey import gather_kernel

    from fastmono.engines import triton as engine_module

__all__ = ["regime"]  # a fixture

HALF_DEAD = SMALL.replace(n_neurons=20, batch_size=21, init_bias=-0.6)
ALL_DEAD = HALF_DEAD.replace(init_bias=-9.0, n_neurons=9, seed=4)
NONE_DEAD = HALF_DEAD.replace(init_bias=0.0, n_neurons=9)
WAKING = HALF_DEAD.replace(bias_decay=30.0, n_neurons=17)
"""Its bias is multiplied with 0.7 at each step: the survey of step 2 is the last."""


def active(model, step):
    """Which neurons a batch activates, in float64: bool [k]."""
    f = FeatureSampler(model.spec).batch(step, 0, model.spec.batch_size).double()
    z = f @ model.P.double().T @ model.tensors["W_in"].double().T + model.tensors["b"].double()
    return (z > 0).any(0)


@interpreted
@both
@pytest.mark.parametrize("rows", [16, 1024])
def test_those_and_only_those_that_the_batch_activates_take_part_in_their_order(regime, rows, monkeypatch):
    monkeypatch.setattr(engine_module, "ROWS_A_SURVEY", rows)
    monkeypatch.setattr("fastmono.engines.triton_launch.ROWS_A_SURVEY", rows)
    wide = HALF_DEAD.replace(n_neurons=53)
    specs = [wide, wide.replace(init_bias=-0.35), ALL_DEAD, NONE_DEAD]
    engine, block = engine_module.TritonEngine("fp32"), Block.new(specs)
    packed, seen = engine._pack(block), []
    for step in range(3):
        expected = [active(model, step) for model in block.models]
        engine.advance(block, 1)
        engine.fetch(block)
        for i, found in enumerate(expected):
            at = packed.order.index(i)
            place, count = packed.place[packed.slices[at]], int(found.sum())
            if specs[i] is NONE_DEAD:  # is not surveyed
                found, count = torch.ones_like(found), len(found)
            assert torch.equal(place >= 0, found)
            assert torch.equal(place[found], torch.arange(count, dtype=torch.int32))
            assert packed.used[at] == count
            if step == 0:  # scratch comes filled with NaN: nothing is computed of those that are left out
                written = packed.db[:, packed.slices[at]].isfinite()
                assert torch.equal(written, (torch.arange(len(found)) < count).expand_as(written))
            seen.append(count)
    assert 0 in seen and 16 < max(seen) < 53 and len(set(seen)) > 3, seen


@interpreted
@both
@pytest.mark.parametrize(("task", "optimizer"), [("decoder", "lamb"), ("reprojector", "sgd"), ("abs", "adamw")])
def test_training_without_dead_neurons_agrees_with_the_reference(regime, task, optimizer):
    specs = [spec.replace(task=task, optimizer=optimizer) for spec in (HALF_DEAD, ALL_DEAD, NONE_DEAD)]
    check_against_the_reference(specs, "fp32", 3)


@interpreted
@both
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_training_in_every_precision_agrees_with_the_reference(regime, precision, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "fp16", lambda x: x.half().float())
    check_against_the_reference([HALF_DEAD], precision, 3)


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_chosen_neurons_are_copied_one_after_another_as_operands(precision, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "fp16", lambda x: x.half().float())
    packed = engine_module.Packed(Block.new([HALF_DEAD.replace(n_neurons=53)]), precision, torch.device("cpu"), 0)
    chosen = torch.arange(53) % 3 != 1
    packed.flags[0], count = chosen.to(torch.int8), int(chosen.sum())
    p, q = packed.parameters, packed.operands
    for tensor in q.values():
        tensor.fill_(torch.nan)
    gather_kernel[(4, 1)](
        packed.table, packed.diverged, packed.step, packed.flags, packed.place, packed.used, p["W_in"], p["b"],
        p["W_outT"], q["W_in"], q["b"], q["W_outT"], 1, 53, packed.LO, 0, PRECISION=precision, M=16, BG=16, BO=16,
    )  # fmt: skip
    assert packed.used == count and torch.equal(packed.place >= 0, chosen)
    for name, tensor in q.items():
        expected = p[name][chosen] if name == "b" else PRECISIONS[precision](p[name][chosen])
        assert torch.equal(tensor[:count].float(), expected), name
        assert tensor[count:].isnan().all(), name


@interpreted
@both
@pytest.mark.parametrize("mode", ["per_neuron", "rate"])
def test_every_mode_of_decay_agrees_with_the_reference(regime, mode):
    check_against_the_reference([HALF_DEAD.replace(bias_decay=2.0, bias_decay_mode=mode)], "fp32", 2)


@interpreted
@both
def test_after_the_last_survey_all_take_part_and_no_cut_or_new_engine_changes_a_bit(regime):
    assert last_survey(WAKING) == 2
    whole, losses = trained([WAKING], 5)
    block, parts = Block.new([WAKING]), []
    for n in (1, 1, 1, 2):
        engine = engine_module.TritonEngine("fp32")
        parts.append(engine.advance(block, n))
        engine.fetch(block)
        everyone = torch.equal(engine._packed.place, torch.arange(17, dtype=torch.int32))
        assert everyone == (block.step > 2), block.step
    assert torch.equal(losses, torch.cat(parts, 1)) and same_state(block.models[0], whole.models[0])
    check_against_the_reference([WAKING], "fp32", 5)


@interpreted
@both
def test_models_that_leave_neurons_out_are_bitwise_what_they_are_alone(regime):
    specs = [HALF_DEAD, NONE_DEAD, WAKING, HALF_DEAD.replace(seed=8, lr=0.03, n_neurons=9, steps=2)]
    whole, losses = trained(specs, 4)
    order = [3, 0, 2, 1]
    permuted, permuted_losses = trained([specs[i] for i in order], 4)
    for i, spec in enumerate(specs):
        j = order.index(i)
        alone, alone_losses = trained([spec], 4)
        for block, found, at in ((whole, losses, i), (permuted, permuted_losses, j)):
            assert torch.equal(found[at].nan_to_num(-1), alone_losses[0].nan_to_num(-1))
            assert same_state(block.models[at], alone.models[0])


@interpreted
@both
@pytest.mark.parametrize("where", ["W_in", "b", "W_outT"])
def test_a_nan_in_a_dead_neuron_is_seen_at_its_step_and_stays_in_its_model(regime, where):
    def plant(block):
        block.models[1].tensors[where][..., 3] = torch.nan

    block, losses = trained([HALF_DEAD, ALL_DEAD, NONE_DEAD], 2, plant=plant)
    calm, calm_losses = trained([HALF_DEAD, NONE_DEAD], 2)
    assert block.models[1].diverged_step == 1
    # 0 times NaN is never formed for W_out, which is seen in the parameters; z is NaN, and reaches the loss.
    assert losses[1, 0].isnan() == (where != "W_outT") and losses[1, 1:].isnan().all()
    for i, j in ((0, 0), (2, 1)):
        assert torch.equal(losses[i], calm_losses[j]) and same_state(block.models[i], calm.models[j])


@interpreted
@both
def test_nothing_is_written_or_read_beyond_the_ends(regime):
    specs = [HALF_DEAD, ALL_DEAD, NONE_DEAD]
    plain, plain_losses = trained(specs, 2)
    engine, block = engine_module.TritonEngine("fp32"), Block.new(specs)
    fences = Fences(engine._pack(block))
    losses = engine.advance(block, 2)
    engine.fetch(block)
    assert all(fences.whole()) and torch.equal(losses, plain_losses)
    assert all(map(same_state, block.models, plain.models))


@interpreted
@both
def test_a_model_whose_neurons_are_all_dead_changes_by_its_bias_decay_alone(regime):
    block, losses = trained([ALL_DEAD], 3)
    start = Block.new([ALL_DEAD]).models[0].tensors
    for name in ("W_in", "W_outT"):
        assert torch.equal(block.models[0].tensors[name], start[name])
    torch.testing.assert_close(block.models[0].tensors["b"], start["b"] * (1 - 0.03 * ALL_DEAD.lr) ** 3)
    torch.testing.assert_close(losses, ReferenceEngine().advance(Block.new([ALL_DEAD]), 3))


def test_surveys_end_where_decay_alone_brings_the_bias_near_0():
    spec = fm.ModelSpec(init_bias=-1.0, bias_decay=0.03, lr=0.003, steps=2**17)
    last = last_survey(spec)
    assert (1 - 0.03 * 0.003) ** last <= LEAST_BIAS < (1 - 0.03 * 0.003) ** (last - 1)
    assert math.isclose(last, math.log(1 / LEAST_BIAS) / (0.03 * 0.003), rel_tol=1e-3)
    assert last_survey(spec.replace(steps=2 * last)) == 2 * last  # not before decay ends, at half of the steps
    assert last_survey(spec.replace(bias_decay=0.0)) == spec.steps
    assert last_survey(spec.replace(bias_decay=400.0)) == 1  # a factor below 0
    for never in (
        {"init_bias": 0.0}, {"init_bias": -LEAST_BIAS}, {"init_bias": 1.0}, {"activation": "gelu"}, {"linear_path": 2},
    ):  # fmt: skip
        assert last_survey(spec.replace(**never)) == -1, never
