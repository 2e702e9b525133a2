"""The reference and the CPU engine alike: a model's bits do not depend on its company, and divergence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from engine_cases import (
    ACTIVATIONS,
    ENGINES,
    OPTIMIZERS,
    SMALL,
    TASKS,
    TILED,
    Engine,
    mixed_specs,
    same_bits,
    same_state,
    spec_of,
    train,
)
from torch import Tensor

from fastmono.block import Block, Model, views
from fastmono.engines.reference import ReferenceEngine
from fastmono.optim import learning_rates
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec
from fastmono.tasks import ACTIVATION


@ENGINES
@pytest.mark.parametrize("task", TASKS)
def test_loss_of_each_step_is_that_of_the_parameters_before_it(engine: Engine, task: str) -> None:
    spec = spec_of(task=task, l1=0.3, seed=3)
    block, trainer = Block.new([spec]), engine()
    sampler = FeatureSampler(spec)
    for step in range(6):
        model = block.models[0]
        f = sampler.batch(step, 0, spec.batch_size).double()
        W_in, b, W_outT = (tensor.double() for tensor in model.tensors.values())
        y = ACTIVATION["relu"](f @ model.P.double().T @ W_in.T + b) @ W_outT
        tau = f @ model.P2.double().T if model.P2 is not None else f.abs() if task == "abs" else f
        expected = float((y - tau).square().sum(1).mean())  # without the l1 term
        loss = trainer.advance(block, 1)
        assert loss.shape == (1, 1) and loss.dtype == torch.float32
        # products of at most 19 terms rounded to float32, then a sum of B o squares, a random walk of 2**-24 each
        assert float(loss) == pytest.approx(expected, rel=(spec.batch_size * spec.d_output) ** 0.5 * 2.0**-24)


# The same bits, whatever stands beside.


WIDE = {"n_features": 45, "d_embed": 11, "n_neurons": 150, "batch_size": 101, "feature_prob": 0.1}
SHAPES = [SMALL, {**WIDE, "linear_path": 7}]


@ENGINES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=["small", "wide"])
def test_model_alone_equals_model_in_block_and_in_permuted_block_bitwise(
    engine: Engine, task: str, optimizer: str, shape: dict[str, object]
) -> None:
    specs = mixed_specs(spec_of(task=task, optimizer=optimizer, **shape))
    together, losses = train(engine, specs, 7)
    order = [2, 0, 3, 1]
    permuted, permuted_losses = train(engine, [specs[i] for i in order], 7)
    for i, spec in enumerate(specs):
        alone, alone_losses = train(engine, [spec], 7)
        j = order.index(i)
        assert same_state(alone[0], together[i]) and same_state(alone[0], permuted[j])
        assert same_bits(alone_losses[0], losses[i]) and same_bits(alone_losses[0], permuted_losses[j])
    assert losses.isfinite().all() and len({float(loss) for loss in losses[:, -1]}) == len(specs)


@ENGINES
def test_model_alone_equals_model_among_seventeen_bitwise(engine: Engine) -> None:
    specs = [spec_of(seed=i % 3, lr=0.01 / (1 + i), activation="gelu") for i in range(17)]
    together, losses = train(engine, specs, 5)
    for i in (0, 8, 16):
        alone, alone_losses = train(engine, [specs[i]], 5)
        assert same_state(alone[0], together[i]) and same_bits(alone_losses[0], losses[i])


@ENGINES
@pytest.mark.parametrize("task", TASKS)
def test_model_in_several_row_tiles_keeps_its_bits_in_company(engine: Engine, task: str) -> None:
    specs = [spec_of(task=task, seed=seed, linear_path=4, **TILED) for seed in (1, 2, 1)]
    specs[2] = specs[2].replace(lr=0.03, l1=0.1)
    together, losses = train(engine, specs, 3)
    alone, alone_losses = train(engine, specs[2:], 1, 2)
    assert same_state(alone[0], together[2]) and same_bits(alone_losses[0], losses[2])


@ENGINES
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e6), ("lamb", 1e30), ("adamw", 1e30)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_diverging_neighbour_changes_no_bit(engine: Engine, activation: str, optimizer: str, lr: float) -> None:
    base = spec_of(optimizer=optimizer, activation=activation, bias_decay=1.0, linear_path=3)
    calm = [
        base.replace(seed=1, bias_decay_mode="rate"),
        base.replace(seed=2, l1=0.1, bias_decay_mode="per_neuron"),
    ]
    wild = calm[0].replace(lr=lr)  # shares a stream with the first
    for specs in ([wild, *calm], [calm[0], wild, calm[1]], [*calm, wild]):
        models, losses = train(engine, specs, 12)
        assert models[specs.index(wild)].diverged_step is not None
        for spec in calm:
            alone, alone_losses = train(engine, [spec], 12)
            i = specs.index(spec)
            assert alone[0].diverged_step is None and alone_losses.isfinite().all()
            assert same_state(alone[0], models[i]) and same_bits(alone_losses[0], losses[i])


@ENGINES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_where_calls_cut_the_steps_changes_no_bit(engine: Engine, optimizer: str) -> None:
    # steps=19: bias decay ends within
    specs = mixed_specs(spec_of(optimizer=optimizer, steps=19, linear_path=2))
    whole, losses = train(engine, specs, 19)
    for cuts in ((1,) * 19, (3, 16), (18, 1), (5, 0, 4, 10)):
        models, found = train(engine, specs, *cuts)
        assert same_bits(found, losses)
        assert all(same_state(a, b) for a, b in zip(models, whole, strict=True))


@ENGINES
def test_resuming_with_another_engine_object_and_block_changes_no_bit(engine: Engine) -> None:
    specs = mixed_specs(spec_of(linear_path=3))
    whole, losses = train(engine, specs, 10)
    first = Block.new(specs)
    head = engine().advance(first, 4)
    second = Block.new(specs)
    second.step = 4
    for old, new in zip(first.models, second.models, strict=True):
        for part in ("parameters", "first_moment", "second_moment"):
            getattr(new, part).copy_(getattr(old, part))
        new.order = old.order
    tail = engine().advance(second, 6)
    assert same_bits(torch.cat([head, tail], 1), losses)
    assert all(same_state(a, b) for a, b in zip(second.models, whole, strict=True))


@ENGINES
def test_engine_object_that_serves_several_blocks_changes_no_bit(engine: Engine) -> None:
    lists = [mixed_specs(spec_of()), mixed_specs(spec_of(task="abs", n_neurons=9)), [spec_of(seed=1, d_embed=3)]]
    lists.append(mixed_specs(spec_of(linear_path=5)))
    expected = [train(engine, specs, 6)[0] for specs in lists]
    shared, blocks = engine(), [Block.new(specs) for specs in lists]
    for _ in range(3):
        for block in blocks:
            shared.advance(block, 2)
    for block, models in zip(blocks, expected, strict=True):
        assert all(same_state(a, b) for a, b in zip(block.models, models, strict=True))


@ENGINES
def test_number_of_threads_changes_no_bit_and_is_put_back(engine: Engine) -> None:
    # large enough for PyTorch to share products (by MKL) and norms (above 32,768 numbers) among threads
    specs = mixed_specs(spec_of(**{**TILED, "n_features": 70, "linear_path": 9}))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(train(engine, specs, 4))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert same_bits(found[0][1], found[1][1])
    assert all(same_state(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


@ENGINES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_leaves_projections_and_padding_alone(engine: Engine, optimizer: str) -> None:
    specs = mixed_specs(spec_of(task="reprojector", optimizer=optimizer, d_embed=3, linear_path=2))
    models, _ = train(engine, specs, 20)
    for spec, model in zip(specs, models, strict=True):
        covered = torch.zeros_like(model.parameters)
        for tensor in views(spec, covered).values():
            tensor.fill_(1)
            assert tensor.data_ptr() % 64 == covered.data_ptr() % 64  # each starts on a boundary of its own
        assert int(covered.sum()) == spec.n_parameters < len(covered)
        for flat in (model.parameters, model.first_moment, model.second_moment):
            assert not len(flat) or not flat[covered == 0].any()
        fresh = Model(spec)
        assert fresh.P2 is not None and model.P2 is not None
        assert torch.equal(model.P, fresh.P) and torch.equal(model.P2, fresh.P2)


@ENGINES
def test_model_whose_steps_are_done_stands_still(engine: Engine) -> None:
    spec = spec_of(steps=5)
    done, losses = train(engine, [spec], 5)
    more, more_losses = train(engine, [spec], 3, 5)
    assert losses.isfinite().all() and same_bits(more_losses[:, :5], losses) and more_losses[:, 5:].isnan().all()
    assert same_state(done[0], more[0]) and more[0].diverged_step is None


# Divergence.


@ENGINES
@pytest.mark.parametrize(
    ("optimizer", "lr"), [("sgd", 1e6), ("sgd", 30.0), ("lamb", 1e12), ("adamw", 1e30), ("adamw", 1e38)]
)
def test_divergence_is_the_first_step_whose_loss_or_update_is_not_finite(
    engine: Engine, optimizer: str, lr: float
) -> None:
    spec = spec_of(optimizer=optimizer, lr=lr, schedule="constant", seed=1)
    block, trainer, expected, one_by_one = Block.new([spec]), engine(), None, []
    for step in range(1, 31):
        one_by_one.append(float(trainer.advance(block, 1)))
        entries = [entry for tensor in block.models[0].tensors.values() for entry in tensor.flatten().tolist()]
        if not all(map(math.isfinite, [one_by_one[-1], *entries])):
            expected = step
            break
        assert block.models[0].diverged_step is None
    assert expected is not None and block.models[0].diverged_step == expected
    models, losses = train(engine, [spec], 30)
    assert models[0].diverged_step == expected
    np.testing.assert_array_equal(losses[0, :expected].numpy(), np.array(one_by_one, np.float32))
    assert losses[0, expected:].isnan().all()
    assert same_bits(models[0].parameters, block.models[0].parameters)  # and no step after that one


@ENGINES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "extreme",
    [
        {"lr": 3.4028234663852886e38},
        {
            "lr": 3.4028234663852886e38,
            "init_bias": 9.0,
            "n_neurons": 2,
        },  # |b| above |u|: LAMB's factor is beyond float32
        {"bias_decay": 3.4028234663852886e38, "lr": 1e3},  # a factor beyond float32
        {"bias_decay": 3.4028234663852886e38, "lr": 3e38},
        {"bias_decay": 3.4028234663852886e38, "lr": 3e38, "bias_decay_mode": "per_neuron"},
        {"bias_decay": 3.4028234663852886e38, "bias_decay_mode": "per_neuron"},
        {"bias_decay": 3.4028234663852886e38, "bias_decay_mode": "rate"},
        {"lr": 3e38, "bias_decay": 1.0, "bias_decay_mode": "rate", "linear_path": 2},
        {"l1": 3.4028234663852886e38},
        {"init_bias": 3.4028234663852886e38},
        {"init_bias": -3.4028234663852886e38},
        {"lr": 2.0**-149, "schedule": "published"},
    ],
    ids=str,
)
def test_any_valid_spec_trains_or_diverges_and_raises_nothing(
    engine: Engine, optimizer: str, extreme: dict[str, object]
) -> None:
    calm = spec_of(optimizer=optimizer, seed=1, n_neurons=extreme.get("n_neurons", 19))
    calm = calm.replace(linear_path=extreme.get("linear_path", 0))
    for task, activation in itertools.product(TASKS, ACTIVATIONS):
        if task == "reprojector" and extreme.get("bias_decay_mode") == "per_neuron":
            continue  # refused
        wild = spec_of(task=task, activation=activation, optimizer=optimizer, **extreme)
        models, losses = train(engine, [wild, calm.replace(task=task, activation=activation)], 4)
        at, finite = models[0].diverged_step, bool(models[0].parameters.isfinite().all())
        assert models[1].diverged_step is None and losses[1].isfinite().all()
        if at is None:
            assert finite and losses[0].isfinite().all()
        else:
            assert losses[0, : at - 1].isfinite().all() and losses[0, at:].isnan().all()
            assert not (finite and losses[0, at - 1].isfinite())


PLACES = [
    ("W_in", "first"), ("W_in", "middle"), ("b", "last"), ("W_outT", "first"), ("W_outT", "last"),
    ("L_in", "last"), ("L_outT", "first"),
]  # fmt: skip


def plant(spec: ModelSpec, flat: Tensor, place: tuple[str, str], value: float) -> None:
    tensor = views(spec, flat)[place[0]]
    where = {"first": 0, "middle": tensor.numel() // 2, "last": tensor.numel() - 1}[place[1]]
    tensor[np.unravel_index(where, tensor.shape)] = value


def is_active(model: Model, place: tuple[str, str]) -> bool:
    """Whether a sample of the batch that three steps precede activates the first or last neuron."""
    f = FeatureSampler(model.spec).batch(3, 0, model.spec.batch_size)
    z = f @ model.P.T @ model.tensors["W_in"].T + model.tensors["b"]
    return bool((z[:, 0 if place[1] == "first" else -1] > 0).any())


@ENGINES
@pytest.mark.parametrize("place", PLACES, ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_a_parameter_shows_at_the_next_step(engine: Engine, activation: str, place: tuple[str, str]) -> None:
    spec = spec_of(optimizer="sgd", activation=activation, seed=1, linear_path=3 * place[0].startswith("L_"))
    block, trainer = Block.new([spec.replace(seed=2), spec]), engine()
    before = trainer.advance(block, 3)
    assert before.isfinite().all()
    plant(spec, block.models[1].parameters, place, math.nan)
    active = (
        place[0] != "W_outT" or engine is ReferenceEngine or activation != "relu" or is_active(block.models[1], place)
    )
    after = trainer.advance(block, 4)
    assert block.models[1].diverged_step == 4 and after[1, 1:].isnan().all()
    # Where zeros are skipped, an output weight of a neuron that no sample activates is not in the loss.
    assert bool(after[1, 0].isnan()) == active
    assert block.models[0].diverged_step is None and after[0].isfinite().all()


@ENGINES
def test_infinite_bias_that_relu_hides_from_the_loss_still_diverges(engine: Engine) -> None:
    spec = spec_of(optimizer="sgd", seed=1)
    block, trainer = Block.new([spec]), engine()
    trainer.advance(block, 3)
    plant(spec, block.models[0].parameters, ("b", "last"), -math.inf)
    losses = trainer.advance(block, 2)
    assert block.models[0].diverged_step == 4
    assert losses[0, 0].isfinite() and losses[0, 1].isnan()


@ENGINES
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
@pytest.mark.parametrize("moment", ["first_moment", "second_moment"])
@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_nan_in_a_moment_diverges_at_the_step_that_uses_it_with_a_finite_loss(
    engine: Engine, optimizer: str, moment: str, place: tuple[str, str]
) -> None:
    spec = spec_of(optimizer=optimizer, seed=1, linear_path=3)
    block, trainer = Block.new([spec]), engine()
    trainer.advance(block, 3)
    plant(spec, getattr(block.models[0], moment), place, math.nan)
    losses = trainer.advance(block, 3)
    assert block.models[0].diverged_step == 4
    assert losses[0, 0].isfinite() and losses[0, 1:].isnan().all()


@ENGINES
def test_learning_rate_that_is_not_finite_diverges_at_its_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(spec: ModelSpec, first: int, count: int) -> list[float]:
        rates = learning_rates(spec, first, count)
        return [math.nan if first + t == 4 else rate for t, rate in enumerate(rates)]

    monkeypatch.setattr(f"{engine.__module__}.learning_rates", spoiled)
    for optimizer, cuts in itertools.product(OPTIMIZERS, ((8,), (4, 4), (5, 3))):
        models, losses = train(engine, [spec_of(optimizer=optimizer)], *cuts)
        assert models[0].diverged_step == 5  # the update that four precede
        assert losses[0, :5].isfinite().all() and losses[0, 5:].isnan().all()
