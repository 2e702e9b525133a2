"""The CPU engine against the reference; and for both engines, that a model's bits do not depend on its company."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmono.block import Block, Model, views
from fastmono.engines import cpu as cpu_engine
from fastmono.engines import cpu_kernels, cpu_rows, cpu_sampler, simd
from fastmono.engines.cpu import CpuEngine
from fastmono.engines.reference import ReferenceEngine
from fastmono.optim import learning_rates
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec
from fastmono.tasks import ACTIVATION

TASKS = ("decoder", "reprojector", "abs")
ACTIVATIONS = ("relu", "gelu", "solu")
OPTIMIZERS = ("lamb", "adamw", "sgd")
ENGINES = pytest.mark.parametrize("engine", [ReferenceEngine, CpuEngine])
Engine = type[ReferenceEngine] | type[CpuEngine]

SMALL = {"n_features": 13, "d_embed": 5, "n_neurons": 19, "batch_size": 77, "feature_prob": 0.3}
TILED = {"n_features": 24, "d_embed": 9, "n_neurons": 530, "batch_size": 600, "feature_prob": 0.1}
RATES = {"lamb": 0.01, "adamw": 0.01, "sgd": 0.02}


def spec_of(**fields: object) -> ModelSpec:
    return ModelSpec(**{**SMALL, "steps": 64, "lr": 0.01, **fields})  # type: ignore[arg-type]


def mixed_specs(base: ModelSpec) -> list[ModelSpec]:
    """Models of one shape that differ in all else; the first and the last two share a seed."""
    lr = RATES[base.optimizer]
    return [
        base.replace(lr=lr, seed=1),
        base.replace(lr=lr / 3, seed=2, init_bias=-0.2, bias_decay=2.0, l1=0.05),
        base.replace(lr=lr / 2, seed=1, schedule="constant", frequency="power_law", init_bias=0.1),
        base.replace(lr=lr / 2, seed=1, schedule="cosine", l1=0.2, init_bias=-0.1),
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def same_state(a: Model, b: Model) -> bool:
    parts = ("parameters", "first_moment", "second_moment")
    return all(same_bits(getattr(a, part), getattr(b, part)) for part in parts) and a.diverged_step == b.diverged_step


def train(engine: Engine, specs: Sequence[ModelSpec], *cuts: int) -> tuple[list[Model], Tensor]:
    block, trainer = Block.new(specs), engine()
    losses = torch.cat([trainer.advance(block, n) for n in cuts], 1)
    assert block.step == sum(cuts)
    return block.models, losses


# The same numbers as the reference.


def compare_with_reference(base: ModelSpec, steps: int = 20) -> None:
    """The three-way rule, for every tensor, moment and loss of a block of mixed models: the error against a float64
    reference may be 3 times that of the float32 reference, plus sqrt(B) units of rounding."""
    specs = mixed_specs(base)
    blocks = [Block.new(specs, torch.float64), Block.new(specs), Block.new(specs)]
    engines = (ReferenceEngine(), ReferenceEngine(), CpuEngine())
    losses = [engine.advance(block, steps) for engine, block in zip(engines, blocks, strict=True)]
    assert losses[2].shape == (len(specs), steps) and losses[2].dtype == torch.float32

    def check(what: str, truth: Tensor, reference: Tensor, found: Tensor) -> None:
        def error(value: Tensor) -> float:
            # Without the 2 % of entries that are furthest off: where a gradient is within rounding of 0 (a relu at
            # its kink), LAMB and AdamW make a whole step of it, in either engine, whichever way it falls.
            difference = (value.double() - truth).flatten().abs().sort().values
            return float(difference[: math.ceil(0.98 * len(difference))].norm() / truth.norm())

        # A sum over the batch, one term after another, is off by a random walk of B roundings.
        allowed = 3 * error(reference) + base.batch_size**0.5 * 2.0**-24
        assert found.isfinite().all() and error(found) <= allowed, f"{what}: {error(found):.2g} above {allowed:.2g}"

    for i, (truth, reference, found) in enumerate(zip(*(block.models for block in blocks), strict=True)):
        for part in ("parameters", "first_moment", "second_moment"):
            if len(getattr(truth, part)):
                tensors = [views(base, getattr(model, part)) for model in (truth, reference, found)]
                for name in tensors[0]:
                    check(f"model {i}, {part}, {name}", *(tensor[name] for tensor in tensors))
        check(f"model {i}, losses", losses[0][i].double(), losses[1][i], losses[2][i])
        moved = (truth.parameters - Model(specs[i]).parameters).norm() / truth.parameters.norm()
        assert moved > 1e-3  # so that agreement means something


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_cpu_engine_agrees_with_the_reference_over_twenty_steps(task: str, activation: str, optimizer: str) -> None:
    compare_with_reference(spec_of(task=task, activation=activation, optimizer=optimizer))


@pytest.mark.parametrize(("task", "activation", "optimizer"), [(t, a, o) for t in TASKS for a, o in zip(ACTIVATIONS, OPTIMIZERS, strict=True)])  # fmt: skip # noqa: E501
@pytest.mark.usefixtures("poisoned_memory")
def test_row_tiles_with_a_short_last_one_agree_with_the_reference(
    task: str, activation: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_engine, "TILE_NUMBERS", 1)  # tiles of 32, 32 and 13 rows
    base = spec_of(task=task, activation=activation, optimizer=optimizer)
    assert cpu_engine.tile_rows(base) == 32
    compare_with_reference(base)


@pytest.mark.parametrize(
    ("task", "activation", "optimizer"),
    [("decoder", "relu", "lamb"), ("reprojector", "solu", "sgd"), ("abs", "gelu", "adamw")],
)
def test_batch_larger_than_a_row_tile_agrees_with_the_reference(task: str, activation: str, optimizer: str) -> None:
    base = spec_of(task=task, activation=activation, optimizer=optimizer, **TILED)
    assert cpu_engine.tile_rows(base) < base.batch_size / 2  # three tiles, the last one shorter
    assert base.batch_size % cpu_engine.tile_rows(base)
    compare_with_reference(base)


@pytest.mark.parametrize(
    "shape",
    [
        {"n_features": 1, "d_embed": 1, "n_neurons": 1, "batch_size": 1, "feature_prob": 1.0},
        {"n_features": 7, "d_embed": 7, "n_neurons": 1, "batch_size": 33},
        {"n_features": 66, "d_embed": 1, "n_neurons": 65, "batch_size": 1, "feature_prob": 1.0},
        {"n_features": 31, "d_embed": 17, "n_neurons": 3, "batch_size": 129},
    ],
    ids=str,
)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_odd_shapes_agree_with_the_reference(task: str, shape: dict[str, object]) -> None:
    # power_law is refused at N = 1 and p = 1, and a lone neuron of relu may be dead: gelu, uniform
    base = spec_of(task=task, activation="gelu", **shape)
    specs = [base.replace(seed=1), base.replace(seed=2, lr=0.003, init_bias=0.2, l1=0.05, bias_decay=1.0)]
    truth, reference, found = Block.new(specs, torch.float64), Block.new(specs), Block.new(specs)
    ReferenceEngine().advance(truth, 20)
    ReferenceEngine().advance(reference, 20)
    CpuEngine().advance(found, 20)
    for i, spec in enumerate(specs):
        for name, right in truth.models[i].tensors.items():
            # one number may be right by luck in the reference: 8 roundings more, for twenty updates of it
            worse = float((reference.models[i].tensors[name] - right).norm())
            allowed = 3 * worse + (spec.batch_size**0.5 + 8) * 2.0**-24 * float(right.norm())
            assert float((found.models[i].tensors[name] - right).norm()) <= allowed, name


RELU_SHAPES = {  # whether z comes from the features present, and the shape
    "every width of piece, more than one tile and block": (True, {
        "n_features": 245, "d_embed": 37, "n_neurons": 150, "batch_size": 400, "feature_prob": 0.05,
    }),
    "all features present": (False, {
        "n_features": 16, "d_embed": 16, "n_neurons": 40, "batch_size": 70, "feature_prob": 1.0, "frequency": "uniform",
    }),
    "an embedding of more than one piece": (False, {
        "n_features": 150, "d_embed": 145, "n_neurons": 20, "batch_size": 65, "feature_prob": 0.1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("shape", RELU_SHAPES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_relu_of_every_arrangement_agrees_with_the_reference(task: str, shape: str) -> None:
    through, fields = RELU_SHAPES[shape]
    base = spec_of(task=task, **fields)
    specs = [s.replace(frequency=fields.get("frequency", s.frequency)) for s in mixed_specs(base)]
    assert cpu_engine.through_features(base) == through
    truth, reference, found = Block.new(specs, torch.float64), Block.new(specs), Block.new(specs)
    for engine, block in ((ReferenceEngine(), truth), (ReferenceEngine(), reference), (CpuEngine(), found)):
        engine.advance(block, 3)
    for i, model in enumerate(found.models):
        for name, right in truth.models[i].tensors.items():
            worse = float((reference.models[i].tensors[name] - right).norm())
            allowed = 3 * worse + base.batch_size**0.5 * 2.0**-24 * float(right.norm())
            assert float((model.tensors[name] - right).norm()) <= allowed, (i, name)


@pytest.mark.parametrize("step", [0, 2**32 - 1])
@pytest.mark.parametrize("task", ["decoder", "abs"])
@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
@pytest.mark.parametrize("shape", [(1, 1.0, 5), (45, 0.4, 70), (128, 1 / 32, 64)])
def test_compiled_sampler_gives_the_bits_of_the_feature_sampler(
    shape: tuple[int, float, int], frequency: str, task: str, step: int
) -> None:
    N, p, B = shape
    if N == 1 and frequency == "power_law":
        pytest.skip("refused: the only feature would be clipped")
    spec = spec_of(
        n_features=N, d_embed=1, feature_prob=p, batch_size=B, frequency=frequency, task=task, seed=2**32 - 3
    )
    stream = cpu_engine.Stream(Model(spec))
    stream.sample(step, 2)
    for i in range(2):
        starts = stream.starts[i].tolist()
        f = torch.zeros(B, N)
        for r in range(B):
            present = slice(starts[r], starts[r + 1])
            f[r, stream.indices[present].long()] = stream.values[present]
        assert same_bits(f, FeatureSampler(spec).batch(step + i, 0, B))


@pytest.mark.parametrize(("module", "sources"), [(cpu_kernels, [simd, cpu_rows]), (cpu_sampler, [simd])])
def test_what_numba_keeps_is_dropped_when_what_it_was_made_of_changes(module: Any, sources: list[Any]) -> None:
    digest = hashlib.sha256(b"".join(Path(source.__file__).read_bytes() for source in sources)).hexdigest()[:16]
    assert digest == module.SOURCES, f"set SOURCES in {module.__file__} to {digest}"


@pytest.mark.slow
def test_processors_without_the_widest_registers_agree_with_the_reference() -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+popcnt"}
    code = (
        "import sys, pytest; from fastmono.engines.simd import WIDEST; assert WIDEST == 32; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    flags = ["-q", "-x", "-p", "no:cacheprovider", "-k", "(agree or agrees) and not (gelu or solu or widest)", __file__]
    done = subprocess.run([sys.executable, "-c", code, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


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


def test_cpu_engine_refuses_other_precisions() -> None:
    for precision in ("bf16", "tf32", "float32"):
        with pytest.raises(ValueError, match=rf"precision='{precision}'.*fp32"):
            CpuEngine(precision)


# The same bits, whatever stands beside.


SHAPES = [SMALL, {"n_features": 45, "d_embed": 11, "n_neurons": 150, "batch_size": 101, "feature_prob": 0.1}]


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
    specs = [spec_of(task=task, seed=seed, **TILED) for seed in (1, 2, 1)]
    specs[2] = specs[2].replace(lr=0.03, l1=0.1)
    together, losses = train(engine, specs, 3)
    alone, alone_losses = train(engine, specs[2:], 1, 2)
    assert same_state(alone[0], together[2]) and same_bits(alone_losses[0], losses[2])


@ENGINES
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 1e6), ("lamb", 1e30), ("adamw", 1e30)])
def test_diverging_neighbour_changes_no_bit(engine: Engine, optimizer: str, lr: float) -> None:
    calm = [spec_of(optimizer=optimizer, seed=1), spec_of(optimizer=optimizer, seed=2, l1=0.1)]
    wild = spec_of(optimizer=optimizer, seed=1, lr=lr)  # shares a stream with the first
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
    # steps=19: bias decay, in the second model, ends within
    specs = mixed_specs(spec_of(optimizer=optimizer, steps=19))
    whole, losses = train(engine, specs, 19)
    for cuts in ((1,) * 19, (3, 16), (18, 1), (5, 0, 4, 10)):
        models, found = train(engine, specs, *cuts)
        assert same_bits(found, losses)
        assert all(same_state(a, b) for a, b in zip(models, whole, strict=True))


@ENGINES
def test_resuming_with_another_engine_object_and_block_changes_no_bit(engine: Engine) -> None:
    specs = mixed_specs(spec_of())
    whole, losses = train(engine, specs, 10)
    first = Block.new(specs)
    head = engine().advance(first, 4)
    second = Block.new(specs)
    second.step = 4
    for old, new in zip(first.models, second.models, strict=True):
        for part in ("parameters", "first_moment", "second_moment"):
            getattr(new, part).copy_(getattr(old, part))
    tail = engine().advance(second, 6)
    assert same_bits(torch.cat([head, tail], 1), losses)
    assert all(same_state(a, b) for a, b in zip(second.models, whole, strict=True))


@ENGINES
def test_engine_object_that_serves_several_blocks_changes_no_bit(engine: Engine) -> None:
    lists = [mixed_specs(spec_of()), mixed_specs(spec_of(task="abs", n_neurons=9)), [spec_of(seed=1, d_embed=3)]]
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
    specs = mixed_specs(spec_of(**{**TILED, "n_features": 70}))
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
    specs = mixed_specs(spec_of(task="reprojector", optimizer=optimizer, d_embed=3))
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_that_was_not_written_is_not_read(activation: str, request: pytest.FixtureRequest) -> None:
    specs = mixed_specs(spec_of(task="reprojector", activation=activation))
    clean, losses = train(CpuEngine, specs, 3)
    request.getfixturevalue("poisoned_memory")
    poisoned, found = train(CpuEngine, specs, 3)
    assert same_bits(found, losses) and all(same_state(a, b) for a, b in zip(poisoned, clean, strict=True))


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
    for task, activation in itertools.product(TASKS, ACTIVATIONS):
        wild = spec_of(task=task, activation=activation, optimizer=optimizer, **extreme)
        models, losses = train(engine, [wild, calm.replace(task=task, activation=activation)], 4)
        at, finite = models[0].diverged_step, bool(models[0].parameters.isfinite().all())
        assert models[1].diverged_step is None and losses[1].isfinite().all()
        if at is None:
            assert finite and losses[0].isfinite().all()
        else:
            assert losses[0, : at - 1].isfinite().all() and losses[0, at:].isnan().all()
            assert not (finite and losses[0, at - 1].isfinite())


PLACES = [("W_in", "first"), ("W_in", "middle"), ("b", "last"), ("W_outT", "first"), ("W_outT", "last")]


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
    spec = spec_of(optimizer="sgd", activation=activation, seed=1)
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
    spec = spec_of(optimizer=optimizer, seed=1)
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
