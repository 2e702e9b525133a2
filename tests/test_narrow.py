"""Forward and backward pass of narrow layers in one kernel, in the interpreter, run by `test_kernels.py`."""

import dataclasses

import pytest
import torch
from engine_cases import same_state
from test_kernels import (
    BASE,
    HAS_TRITON,
    INTERPRETING,
    SMALL,
    TILES,
    Fences,
    check_against_the_reference,
    interpreted,
    trained,
)

from fastmono.block import PRECISIONS, Block
from fastmono.engines.launch import choose_launch, loss_parts, power_of_two

if INTERPRETING and HAS_TRITON:
    from fastmono.engines import triton as engine_module


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """One kernel, whatever the precision, with tiles of 16 samples and outputs: every loop has several turns."""
    if not (INTERPRETING and HAS_TRITON):
        return

    def launch(*arguments):
        tiles = {**TILES, "BL": power_of_two(arguments[3], 16, 64)}
        fused = not arguments[8]
        found = choose_launch(*arguments)
        return dataclasses.replace(found, regime="streamed", rows=32, bulk=True, fused=fused, **tiles)

    monkeypatch.setattr(engine_module, "choose_launch", launch)


@interpreted
@pytest.mark.parametrize("task", ["decoder", "reprojector", "abs"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "solu"])
def test_one_kernel_agrees_with_the_reference(task, activation):
    check_against_the_reference([BASE.replace(task=task, activation=activation)], "fp32", 3)


@interpreted
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_its_operands_are_rounded_as_in_the_reference(precision, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "fp16", lambda x: x.half().float())
    check_against_the_reference([BASE.replace(n_neurons=35)], precision, 3)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 1, 5), (64, 16, 32, 16), (33, 17, 35, 70)])
def test_odd_shapes_agree_with_the_reference(shape):
    N, m, k, B = shape
    spec = BASE.replace(n_features=N, d_embed=m, n_neurons=k, batch_size=B, feature_prob=0.6)
    check_against_the_reference([spec], "fp32", 2)


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradients_and_loss_are_those_of_the_two_kernels_up_to_the_order_of_their_sums(
    precision, activation, monkeypatch
):
    """An operand that is not rounded as there would show: 2^-12 and more, where the order of sums shows below 2^-16."""
    monkeypatch.setitem(PRECISIONS, "fp16", lambda x: x.half().float())
    spec = BASE.replace(n_neurons=16, batch_size=70, activation=activation)
    choose, found = engine_module.choose_launch, []
    for fused in (True, False):
        monkeypatch.setattr(
            engine_module, "choose_launch", lambda *a, f=fused: dataclasses.replace(choose(*a), fused=f)
        )
        engine, block = engine_module.TritonEngine(precision), Block.new([spec])
        loss = engine.advance(block, 1)
        packed = engine._packed
        found.append([loss, *(parts.nan_to_num().sum(0) for parts in (packed.dW_in, packed.db, packed.dW_out))])
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 2.0**-15 * two.norm() and two.norm() > 0


@interpreted
def test_models_beside_others_with_a_linear_path_or_dead_neurons_are_bitwise_what_they_are_alone():
    dead = BASE.replace(n_neurons=9, init_bias=-0.6)
    specs = [SMALL, dead, SMALL.replace(n_neurons=20, linear_path=3), SMALL.replace(n_neurons=33, seed=5, lr=0.03)]
    specs = [
        spec.replace(n_features=18, batch_size=70, steps=2 if i == 3 else 12) for i, spec in enumerate(specs)
    ]  # three row parts
    whole, losses = trained(specs, 3)
    order = [2, 0, 3, 1]
    permuted, permuted_losses = trained([specs[i] for i in order], 3)
    for i, spec in enumerate(specs):
        alone, alone_losses = trained([spec], 3, cuts=[1, 2])
        for block, found, at in ((whole, losses, i), (permuted, permuted_losses, order.index(i))):
            assert torch.equal(found[at].nan_to_num(-1), alone_losses[0].nan_to_num(-1))
            assert same_state(block.models[at], alone.models[0]), i


@interpreted
def test_layers_with_dead_neurons_agree_with_the_reference():
    base = BASE.replace(init_bias=-0.6)
    check_against_the_reference([base.replace(n_neurons=40), base.replace(init_bias=-9.0)], "fp32", 3)


@interpreted
@pytest.mark.parametrize("where", ["W_in", "b", "W_outT"])
def test_a_nan_is_seen_at_its_step_and_stays_in_its_model(where):
    def plant(block):
        block.models[0].tensors[where][..., 3] = torch.nan

    block, losses = trained([SMALL.replace(seed=5), SMALL], 2, plant=plant)
    calm, calm_losses = trained([SMALL], 2)
    assert block.models[0].diverged_step == 1 and losses[0].isnan().all()
    assert torch.equal(losses[1], calm_losses[0])
    assert torch.equal(block.models[1].parameters, calm.models[0].parameters)


@interpreted
@pytest.mark.parametrize("task", ["decoder", "reprojector"])
def test_nothing_is_written_or_read_beyond_the_ends_and_e_and_h_take_no_memory(task):
    specs = [BASE.replace(task=task, batch_size=70), BASE.replace(task=task, batch_size=70, n_neurons=35)]
    plain, plain_losses = trained(specs, 2)
    engine, block = engine_module.TritonEngine("fp32"), Block.new(specs)
    packed = engine._pack(block)
    assert packed.e.numel() == packed.h.numel() == 0
    taken = {t.data_ptr() if t.numel() else 0: t.numel() * t.element_size() for t in _tensors(packed)}
    assert engine_module.TritonEngine.device_bytes(specs, "fp32", 0) == sum(taken.values())
    fences = Fences(packed)
    losses = engine.advance(block, 2)
    engine.fetch(block)
    assert all(fences.whole()) and torch.equal(losses, plain_losses)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(block.models, plain.models, strict=True))


def _tensors(packed):
    for value in vars(packed).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from value.values()


def test_narrow_layers_of_large_batches_in_bf16_are_fused_in_every_architecture_alike():
    for architecture in (0, 80, 86, 90, 100, 120):
        for k, activation, fused in (
            (16, "gelu", True), (32, "solu", True), (64, "relu", True), (33, "gelu", False), (65, "relu", False),
        ):  # fmt: skip
            shape = 512, 64, k, 512, 2**23 // k
            launch = choose_launch(architecture, *shape, "bf16", activation)
            assert launch.regime == "streamed" and launch.fused == fused, (architecture, k, activation)
            assert not fused or k <= launch.BL  # all neurons in one tile
            assert not choose_launch(architecture, *shape, "bf16", activation, True).fused
            assert not choose_launch(architecture, *shape, "fp32", activation).fused
            parts = -(-shape[4] // launch.rows) * -(-512 // launch.BP)
            assert loss_parts(launch, shape[4], 512) == parts or not fused
    assert not choose_launch(90, 512, 65, 64, 512, 2**17, "bf16").fused
    assert not choose_launch(90, 64, 16, 64, 64, 256, "bf16").fused  # resident
