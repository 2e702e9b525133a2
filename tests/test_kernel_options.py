"""A linear path and the modes of bias decay in the Triton kernels, run in the interpreter by `test_kernels.py`."""

import pytest
import torch
from test_kernels import (
    BASE,
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

from fastmono.block import PRECISIONS, Block, Model
from fastmono.engines.reference import ReferenceEngine

if INTERPRETING and HAS_TRITON:
    from fastmono.engines import triton as engine_module

__all__ = ["regime"]  # a fixture

DECAYING = SMALL.replace(bias_decay=2.0, init_bias=-0.2, linear_path=3)
MODES = ["global", "per_neuron", "rate"]
MIXED = [
    DECAYING.replace(n_neurons=20, lr=0.03, bias_decay_mode="rate"),
    DECAYING.replace(n_neurons=9, linear_path=0, seed=5, bias_decay_mode="per_neuron"),
    DECAYING.replace(n_neurons=33, linear_path=5, bias_decay_mode="per_neuron"),
    DECAYING.replace(n_neurons=16, lr=0.003, seed=5),
    DECAYING.replace(n_neurons=9, linear_path=1, bias_decay_mode="rate", steps=3),
    DECAYING.replace(n_neurons=9, linear_path=0, bias_decay=0.0, bias_decay_mode="rate"),
]


@interpreted
@both
@pytest.mark.parametrize(
    ("task", "activation", "optimizer", "mode"),
    [
        ("decoder", "relu", "lamb", "per_neuron"), ("abs", "gelu", "adamw", "per_neuron"),
        ("reprojector", "solu", "sgd", "rate"), ("decoder", "relu", "lamb", "rate"), ("abs", "solu", "adamw", "rate"),
        ("reprojector", "gelu", "lamb", "global"), ("decoder", "relu", "sgd", "per_neuron"),
    ],
)  # fmt: skip
def test_linear_path_and_modes_of_decay_agree_with_the_reference(regime, task, activation, optimizer, mode):
    base = BASE.replace(task=task, activation=activation, optimizer=optimizer, bias_decay=2.0, bias_decay_mode=mode)
    check_against_the_reference([base.replace(linear_path=3), base.replace(n_neurons=9, lr=0.03)], "fp32", 2)


@interpreted
@both
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_operands_of_the_linear_path_are_rounded_as_in_the_reference(regime, precision, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "fp16", lambda x: x.half().float())
    check_against_the_reference([BASE.replace(linear_path=4, bias_decay_mode="rate")], precision, 3)


@interpreted
@both
def test_ranks_that_fill_tiles_or_more_than_one_agree_with_the_reference(regime):
    shape = {"n_features": 40, "d_embed": 35, "batch_size": 17}
    specs = [BASE.replace(**shape, n_neurons=k, linear_path=r) for k, r in ((16, 16), (3, 35), (32, 1))]
    check_against_the_reference(specs, "fp32", 2)


@interpreted
@both
def test_models_of_any_rank_and_mode_share_a_block_and_are_bitwise_what_they_are_alone(regime):
    whole, losses = trained(MIXED, 4)
    order = [3, 5, 0, 4, 2, 1]
    permuted, permuted_losses = trained([MIXED[i] for i in order], 4)
    for i, spec in enumerate(MIXED):
        j = order.index(i)
        alone, alone_losses = trained([spec], 4)
        for block, found, at in ((whole, losses, i), (permuted, permuted_losses, j)):
            assert torch.equal(found[at].nan_to_num(-1), alone_losses[0].nan_to_num(-1))
            for part in ("parameters", "first_moment", "second_moment"):
                assert torch.equal(getattr(block.models[at], part), getattr(alone.models[0], part)), (i, part)
    assert len({float(loss) for loss in losses[:, 2]}) == len(MIXED)


@interpreted
@both
def test_where_the_steps_are_cut_changes_no_bit(regime):
    specs = [spec.replace(steps=7) for spec in MIXED[:3]]
    whole, losses = trained(specs, 7)
    cut, cut_losses = trained(specs, 7, cuts=[1, 2, 4])
    assert torch.equal(losses, cut_losses)
    for one, other in zip(whole.models, cut.models, strict=True):
        for part in ("parameters", "first_moment", "second_moment"):
            assert torch.equal(getattr(one, part), getattr(other, part))


@interpreted
@both
def test_decay_stops_half_way_in_every_mode(regime):
    for mode in MODES:
        spec = DECAYING.replace(steps=4, bias_decay=9.0, bias_decay_mode=mode)
        check_against_the_reference([spec], "fp32", 4)
        without, _ = trained([spec.replace(bias_decay=0.0)], 1)
        decayed, _ = trained([spec], 1)
        assert (decayed.models[0].tensors["b"].abs() <= without.models[0].tensors["b"].abs()).all(), mode
        assert not torch.equal(decayed.models[0].tensors["b"], without.models[0].tensors["b"]), mode
        for name in ("W_in", "W_outT", "L_in", "L_outT"):
            assert torch.equal(decayed.models[0].tensors[name], without.models[0].tensors[name]), (mode, name)


@interpreted
@both
def test_a_nan_in_the_linear_path_is_seen_at_its_step_and_stays_in_its_model(regime):
    specs = [spec.replace(steps=12) for spec in MIXED[:3]]
    calm, calm_losses = trained(specs[:1] + specs[2:], 3)

    def plant(block):
        block.models[1].tensors[where][-1, 2] = torch.nan

    specs[1] = specs[1].replace(linear_path=2)
    for where in ("L_in", "L_outT"):
        block, losses = trained(specs, 3, plant=plant)
        assert block.models[1].diverged_step == 1 and losses[1].isnan().all(), where
        for i, j in ((0, 0), (2, 1)):
            assert block.models[i].diverged_step is None and torch.equal(losses[i], calm_losses[j])
            assert torch.equal(block.models[i].parameters, calm.models[j].parameters)


@interpreted
@both
@pytest.mark.parametrize("mode", ["per_neuron", "rate"])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # NumPy, for the interpreter
def test_a_factor_beyond_float32_diverges_where_it_is_used(regime, mode):
    wild = DECAYING.replace(bias_decay=3e38, lr=30.0, bias_decay_mode=mode)
    block, losses = trained([wild, DECAYING], 3)
    calm, calm_losses = trained([DECAYING], 3)
    assert block.models[0].diverged_step is not None and losses[0, 2].isnan()
    assert torch.equal(losses[1], calm_losses[0]) and torch.equal(block.models[1].parameters, calm.models[0].parameters)


@interpreted
@both
def test_nothing_is_written_or_read_beyond_the_ends_and_padding_and_biases_stay_zero(regime):
    specs = [BASE.replace(linear_path=3, bias_decay_mode="rate"), BASE.replace(n_neurons=35, linear_path=5)]
    plain, plain_losses = trained(specs, 2)
    engine, block = engine_module.TritonEngine("fp32"), Block.new(specs)
    packed = engine._pack(block)
    fences = Fences(packed)
    losses = engine.advance(block, 2)
    engine.fetch(block)
    assert all(fences.whole()) and torch.equal(losses, plain_losses)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(block.models, plain.models, strict=True))
    for part in (packed.parameters, packed.first_moment, packed.second_moment):
        assert (part["W_outT"][:, BASE.d_output :] == 0).all() and (part["W_in"][:, BASE.d_embed :] == 0).all()
        for model, rows in zip(packed.models, packed.slices, strict=True):
            assert not part["b"][rows][model.spec.n_neurons :].any() and part["b"][rows].isfinite().all()


@interpreted
@both
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # forward, of no sample
def test_padded_samples_do_not_reach_the_gradient_where_a_bias_alone_overflows_the_nonlinearity(regime):
    # Samples have z below 0, their f being above .001; those that fill the last tile have z = b = 100, and exp(100) is
    # beyond float32.
    spec = SMALL.replace(
        n_features=1, d_embed=1, n_neurons=2, feature_prob=1.0, activation="solu", l1=0.0, bias_decay=0.0, steps=9
    )

    def plant(block):
        tensors = block.models[0].tensors
        tensors["W_in"][:] = -1e5 * Model(spec).P
        tensors["b"][:] = 100.0

    block, losses = trained([spec], 2, plant=plant)
    reference = Block.new([spec])
    plant(reference)
    assert (spec.batch_size % 16) and block.models[0].diverged_step is None
    torch.testing.assert_close(losses, ReferenceEngine().advance(reference, 2))
    torch.testing.assert_close(block.models[0].parameters, reference.models[0].parameters)
