"""The CPU engine against the reference, and its compiled parts by themselves."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    ACTIVATIONS,
    OPTIMIZERS,
    TASKS,
    TILED,
    mixed_specs,
    same_bits,
    same_state,
    spec_of,
    train,
)
from torch import Tensor

from fastmono import optim, philox
from fastmono.block import Block, EngineError, Model, padded, views
from fastmono.engines import cpu as cpu_engine
from fastmono.engines import (
    cpu_dense,
    cpu_hidden,
    cpu_kernels,
    cpu_problem,
    cpu_rows,
    cpu_sampler,
    cpu_update,
    simd,
    simd_moves,
)
from fastmono.engines.cpu import CpuEngine
from fastmono.engines.reference import ReferenceEngine
from fastmono.philox import FeatureSampler
from fastmono.spec import ModelSpec


def compare_with_reference(base: ModelSpec, steps: int = 20, engine: Any = CpuEngine) -> None:
    """The three-way rule, for every tensor, moment and loss of a block of mixed models: the error against a float64
    reference may be 3 times that of the float32 reference, plus sqrt(B) units of rounding."""
    specs = mixed_specs(base)
    blocks = [Block.new(specs, torch.float64), Block.new(specs), Block.new(specs)]
    engines = (ReferenceEngine(), ReferenceEngine(), engine())
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


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_relu_with_dense_products_agrees_with_the_reference(task: str) -> None:
    compare_with_reference(spec_of(task=task), engine=partial(CpuEngine, skips_zeros=False))


@pytest.mark.parametrize(("task", "activation", "optimizer"), [(t, a, o) for t in TASKS for a, o in zip(ACTIVATIONS, OPTIMIZERS, strict=True)])  # fmt: skip # noqa: E501
@pytest.mark.usefixtures("poisoned_memory")
def test_row_tiles_with_a_short_last_one_agree_with_the_reference(
    task: str, activation: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_dense, "TILE_NUMBERS", 1)  # tiles of 32, 32 and 13 rows
    base = spec_of(task=task, activation=activation, optimizer=optimizer)
    assert cpu_dense.tile_rows(base) == 32
    compare_with_reference(base)


@pytest.mark.parametrize(
    ("task", "activation", "optimizer"),
    [("decoder", "relu", "lamb"), ("reprojector", "solu", "sgd"), ("abs", "gelu", "adamw")],
)
def test_batch_larger_than_a_row_tile_agrees_with_the_reference(task: str, activation: str, optimizer: str) -> None:
    base = spec_of(task=task, activation=activation, optimizer=optimizer, **TILED)
    assert cpu_dense.tile_rows(base) < base.batch_size / 2  # three tiles, the last one shorter
    assert base.batch_size % cpu_dense.tile_rows(base)
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


RELU_SHAPES = {  # the path that they take, and the shape
    "every width of piece, more than one tile and block": ("features", {
        "n_features": 230, "d_embed": 37, "n_neurons": 150, "batch_size": 400, "feature_prob": 0.05,
    }),
    "all features present": ("embedding", {
        "n_features": 16, "d_embed": 16, "n_neurons": 40, "batch_size": 70, "feature_prob": 1.0, "frequency": "uniform",
    }),
    "an embedding of more than one piece": ("embedding", {
        "n_features": 150, "d_embed": 145, "n_neurons": 20, "batch_size": 65, "feature_prob": 0.1,
    }),
}  # fmt: skip


@pytest.mark.parametrize("shape", RELU_SHAPES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_relu_of_every_arrangement_agrees_with_the_reference(task: str, shape: str) -> None:
    path, fields = RELU_SHAPES[shape]
    base = spec_of(task=task, **fields)
    specs = [s.replace(frequency=fields.get("frequency", s.frequency)) for s in mixed_specs(base)]
    assert cpu_engine.path_of(base) == path
    truth, reference, found = Block.new(specs, torch.float64), Block.new(specs), Block.new(specs)
    for engine, block in ((ReferenceEngine(), truth), (ReferenceEngine(), reference), (CpuEngine(), found)):
        engine.advance(block, 3)
    for i, model in enumerate(found.models):
        for name, right in truth.models[i].tensors.items():
            worse = float((reference.models[i].tensors[name] - right).norm())
            allowed = 3 * worse + base.batch_size**0.5 * 2.0**-24 * float(right.norm())
            assert float((model.tensors[name] - right).norm()) <= allowed, (i, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", ["decoder", "abs"])
@pytest.mark.usefixtures("poisoned_memory")
def test_gram_matrices_of_narrow_layers_agree_with_the_reference(
    task: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_engine, "LEAST_NARROW", 1)
    monkeypatch.setattr(cpu_dense, "TILE_NUMBERS", 1)  # tiles of 32, 32 and 13 rows
    base = spec_of(task=task, activation=activation, n_features=53, n_neurons=19)
    assert cpu_engine.path_of(base) == "narrow"
    assert cpu_engine.path_of(base.replace(n_neurons=27)) != "narrow"  # wider than half the outputs
    assert (cpu_engine.path_of(base.replace(init_bias=-0.1)) == "narrow") == (activation != "relu")
    compare_with_reference(base)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_narrow_models_keep_their_bits_in_company_when_cut_and_beside_one_that_diverges(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_engine, "LEAST_NARROW", 1)
    base = spec_of(activation=activation, n_features=53, seed=1, optimizer="sgd", lr=0.001)
    wild = base.replace(lr=1e6)
    specs = [wild, base, base.replace(lr=0.002, seed=2), base.replace(lr=0.0003)]
    together, losses = train(CpuEngine, specs, 5, 7)
    assert together[0].diverged_step is not None
    for i in (1, 2, 3):
        alone, alone_losses = train(CpuEngine, [specs[i]], 12)
        assert cpu_engine.path_of(specs[i]) == "narrow" and alone[0].diverged_step is None
        assert same_state(alone[0], together[i]) and same_bits(alone_losses[0], losses[i])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_how_many_steps_a_model_trains_at_once_changes_no_bit(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = mixed_specs(spec_of(optimizer=optimizer, steps=19))
    specs.append(specs[0].replace(lr=1e30 if optimizer != "sgd" else 1e6))
    whole, losses = train(CpuEngine, specs, 19)
    monkeypatch.setattr(cpu_engine, "STEPS_AT_ONCE", 3)
    pieces, found = train(CpuEngine, specs, 19)
    assert whole[-1].diverged_step is not None
    assert same_bits(found, losses) and all(same_state(a, b) for a, b in zip(pieces, whole, strict=True))


def test_pytorch_s_default_type_changes_no_bit() -> None:
    specs = [spec_of(), spec_of(activation="gelu"), spec_of(optimizer="adamw", task="abs")]
    expected = [train(CpuEngine, [spec], 4) for spec in specs]
    torch.set_default_dtype(torch.float64)
    try:
        found = [train(CpuEngine, [spec], 4) for spec in specs]
    finally:
        torch.set_default_dtype(torch.float32)
    for (models, losses), (its_models, its_losses) in zip(expected, found, strict=True):
        assert same_bits(losses, its_losses) and same_state(models[0], its_models[0])


def test_a_batch_with_more_features_than_32_bits_count_is_refused_in_a_line() -> None:
    spec = spec_of(n_features=4096, batch_size=2**20, feature_prob=0.6)
    model = Model(spec_of())
    model.spec = spec
    with pytest.raises(EngineError, match=r"batch_size=1048576.*2\*\*31"):
        cpu_engine.Stream(model, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_memory_that_is_planned_covers_what_is_allocated_and_not_much_more(task: str, activation: str) -> None:
    large = {"n_features": 512, "d_embed": 64, "batch_size": 1024}
    wide = {**large, "n_neurons": 1024, "feature_prob": 1 / 64}
    for fields in ({}, {"feature_prob": 0.9}, {**large, "n_neurons": 256}, wide):
        spec = spec_of(task=task, activation=activation, **fields)
        batches = cpu_engine.Batches(spec)
        streams = [cpu_engine.Stream(Model(spec.replace(seed=seed)), batches) for seed in range(3)]
        work = cpu_engine.Workspace(spec, cpu_engine.path_of(spec))
        tensors = [batches.starts, batches.indices, batches.values, work.gradient, *work.buffers.values()]
        for stream in streams:
            tensors += [stream.P_T, stream.P, *([] if stream.P2_T is None else [stream.P2_T])]
        taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # Besides, PyTorch makes up to four tiles of activations on the way where products are dense.
        passing = 0 if activation == "relu" else 16 * cpu_dense.tile_rows(spec) * padded(spec.n_neurons)
        assert taken + passing == pytest.approx(CpuEngine.workspace_bytes(spec, 3), rel=0.05, abs=2**12)


def test_models_of_one_shape_that_take_different_paths_keep_their_bits_in_company() -> None:
    few = spec_of(n_features=40, d_embed=20, n_neurons=24, batch_size=200, feature_prob=0.05)
    specs = [few, few.replace(feature_prob=0.9), few.replace(lr=0.02)]
    assert {cpu_engine.path_of(spec) for spec in specs} == {"features", "embedding"}
    for order in ([0, 1, 2], [1, 2, 0]):
        together, losses = train(CpuEngine, [specs[i] for i in order], 4)
        for at, i in enumerate(order):
            alone, alone_losses = train(CpuEngine, [specs[i]], 4)
            assert same_state(alone[0], together[at]) and same_bits(alone_losses[0], losses[at])


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
    stream = cpu_engine.Stream(Model(spec), cpu_engine.Batches(spec))
    stream.sample(step, 2)
    for i in range(2):
        starts = stream.batches.starts[i].tolist()
        f = torch.zeros(B, N)
        for r in range(B):
            present = slice(starts[r], starts[r + 1])
            f[r, stream.batches.indices[present].long()] = stream.batches.values[present]
        assert same_bits(f, FeatureSampler(spec).batch(step + i, 0, B))


@pytest.mark.parametrize(
    ("module", "sources"),
    [
        (cpu_kernels, [simd, simd_moves, cpu_problem, cpu_rows, cpu_hidden, cpu_update, optim]),
        (cpu_update, [simd, cpu_problem, cpu_rows, optim]),
        (cpu_sampler, [simd, simd_moves, philox]),
    ],
)
def test_what_numba_keeps_is_dropped_when_what_it_was_made_of_changes(module: Any, sources: list[Any]) -> None:
    digest = hashlib.sha256(b"".join(Path(source.__file__).read_bytes() for source in sources)).hexdigest()[:16]
    assert digest == module.SOURCES, f"set SOURCES in {module.__file__} to {digest}"


def test_moments_that_denormal_numbers_would_hold_are_zero_and_the_thread_is_left_as_it_was() -> None:
    spec = spec_of(init_bias=-50.0)  # no neuron is ever active
    block, reference = Block.new([spec]), Block.new([spec])
    for models in (block, reference):
        views(spec, models.models[0].first_moment)["W_outT"].fill_(2.0**-125)
    CpuEngine().advance(block, 20)
    ReferenceEngine().advance(reference, 20)
    assert 0 < reference.models[0].first_moment.max() < 2.0**-126
    assert not block.models[0].first_moment.any()
    assert torch.equal(block.models[0].parameters, reference.models[0].parameters)
    assert torch.tensor([1e-39]).mul(1.0).item() > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_neurons_at_rest_are_what_they_are_when_every_row_is_updated(optimizer: str) -> None:
    # A third of the neurons work, a third never do, and a third wake up when their biases have decayed; all have second
    # moments from a past. One call of 60 steps, and calls of one step, in which nothing can be put off.
    spec = spec_of(optimizer=optimizer, bias_decay=2.0, lr=0.01, n_neurons=60, steps=1000, l1=0.0, frequency="uniform")
    whole, cut, truth = Block.new([spec]), Block.new([spec]), Block.new([spec], torch.float64)
    for block in (whole, cut, truth):
        tensors = block.models[0].tensors
        tensors["b"][20:40], tensors["b"][40:] = -60.0, -2.5
        if optimizer != "sgd":
            for tensor in views(spec, block.models[0].second_moment).values():
                tensor.fill_(1e-6)
    assert tensors["W_in"][40:].norm() > 0
    before = whole.models[0].tensors["W_outT"].clone()
    losses = CpuEngine().advance(whole, 60)
    engine = CpuEngine()
    ones = torch.cat([engine.advance(cut, 1) for _ in range(60)], 1)
    assert same_bits(losses, ones) and same_state(whole.models[0], cut.models[0])
    ReferenceEngine().advance(truth, 60)
    found = whole.models[0]
    for part in ("parameters", "second_moment") if optimizer != "sgd" else ("parameters",):
        its, right = (views(spec, getattr(block.models[0], part)) for block in (whole, truth))
        for name in right:
            assert float((its[name][20:40] - right[name][20:40]).norm() / right[name][20:40].norm()) < 60 * 2.0**-24
            assert float((its[name] - right[name]).norm() / right[name].norm()) < 1e-3, (part, name)
    moved = (found.tensors["W_outT"] != before).any(1)
    assert moved[:20].any() and moved[40:].any() and (optimizer == "adamw" or not moved[20:40].any())


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


def test_cpu_engine_refuses_other_precisions() -> None:
    for precision in ("bf16", "tf32", "float32"):
        with pytest.raises(ValueError, match=rf"precision='{precision}'.*fp32"):
            CpuEngine(precision)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_that_was_not_written_is_not_read(activation: str, request: pytest.FixtureRequest) -> None:
    specs = mixed_specs(spec_of(task="reprojector", activation=activation))
    clean, losses = train(CpuEngine, specs, 3)
    request.getfixturevalue("poisoned_memory")
    poisoned, found = train(CpuEngine, specs, 3)
    assert same_bits(found, losses) and all(same_state(a, b) for a, b in zip(poisoned, clean, strict=True))
