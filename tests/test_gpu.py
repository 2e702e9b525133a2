"""The compiled kernels on a CUDA device: `python -m pytest -m gpu`. Skipped where there is none."""

import math

import pytest
import torch

import fastmono as fm
from benchmarks.gpu.cases import (
    ACTIVATIONS,
    AGREEMENT,
    DEMO,
    OPTIMIZERS,
    PRECISIONS,
    SHAPES,
    TINY,
    agreement_spec,
    halved,
)
from fastmono.block import Block
from fastmono.engines import has_gpu
from fastmono.engines.reference import ReferenceEngine
from fastmono.philox import FeatureSampler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs a CUDA GPU and Triton")]

SWITCHES: dict[str, object] = {}
"""Arguments of the engine that a group of tests is run again with, to find out which mends it."""


@pytest.fixture(autouse=True, scope="module")
def switches(request):
    """Those of the command line, where the plugin benchmarks.gpu.outcomes is loaded."""
    SWITCHES.update(request.config.getoption("switches", default={}))


def trained(specs, steps, precision, cuts=None):
    from fastmono.engines.triton import TritonEngine

    engine, block = TritonEngine(precision, **SWITCHES), Block.new(specs)
    losses = torch.cat([engine.advance(block, n) for n in cuts or [steps]], 1)
    engine.fetch(block)
    return block, losses


def same(one, i, other, j):
    pairs = [(one[0].models[i], other[0].models[j])]
    for a, b in pairs:
        for part in ("parameters", "first_moment", "second_moment"):
            assert torch.equal(getattr(a, part), getattr(b, part)), part
    assert torch.equal(one[1][i], other[1][j])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("shape", "task"), AGREEMENT)
def test_kernels_are_no_further_from_float64_than_plain_pytorch_in_their_precision(shape, task, precision):
    spec = agreement_spec(shape, task)
    exact, plain = Block.new([spec], torch.float64), Block.new([spec])
    ReferenceEngine().advance(exact, 5)
    ReferenceEngine(precision).advance(plain, 5)
    ours, _ = trained([spec], 5, precision)
    for name, truth in exact.models[0].tensors.items():
        error = (ours.models[0].tensors[name] - truth).norm()
        allowed = 2 * (plain.models[0].tensors[name] - truth).norm() + 2.0**-20 * truth.norm()
        assert error <= allowed, (name, float(error), float(allowed))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_nonlinearity_and_optimizer_agrees_with_the_reference(activation, optimizer):
    spec = TINY.replace(activation=activation, optimizer=optimizer)
    exact, plain = Block.new([spec], torch.float64), Block.new([spec])
    ReferenceEngine().advance(exact, 5)
    ReferenceEngine().advance(plain, 5)
    ours, _ = trained([spec], 5, "fp32")
    for name, truth in exact.models[0].tensors.items():
        allowed = 4 * (plain.models[0].tensors[name] - truth).norm() + 2.0**-19 * truth.norm()
        assert (ours.models[0].tensors[name] - truth).norm() <= allowed, name


@pytest.mark.parametrize("step", [0, 2**21, 2**32 + 3])
@pytest.mark.parametrize("task", ["decoder", "abs"])
@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
def test_features_are_bitwise_those_of_the_cpu(task, frequency, step):
    from feature_kernel import features_kernel

    from fastmono.frequencies import presence_probabilities, scales, thresholds

    spec = TINY.replace(task=task, frequency=frequency, n_features=45)
    signed = task == "abs"
    p = presence_probabilities(45, spec.feature_prob * (0.5 if signed else 1.0), frequency)
    last, scale = (torch.from_numpy(x).cuda() for x in (thresholds(p) - 1, scales(p)))
    out = torch.full((256, 45), torch.nan, device="cuda")
    seed, at = (torch.tensor(value, device="cuda") for value in (spec.seed, step))
    features_kernel[(4, 1)](out, last, scale, seed, at, 45, SIGNED=signed, BR=64, BN=64, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), FeatureSampler(spec).batch(step, 0, 256))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 200, 2000])
def test_a_model_alone_is_bitwise_the_same_in_a_grid_and_permuted(shape, precision, count):
    base = SHAPES[shape]
    if count * base.n_parameters > 4e8:
        pytest.skip("does not fit every GPU")
    specs = [halved(shape, i) for i in range(count)]
    whole, alone = trained(specs, 12, precision), trained([specs[1]], 12, precision)
    same(alone, 0, whole, 1)
    if count <= 200:
        same(trained(specs[::-1], 12, precision), count - 2, whole, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_launches_graphs_and_cuts_change_no_bit(shape):
    specs = [SHAPES[shape], SHAPES[shape].replace(lr=0.03)]
    whole = trained(specs, 100, "bf16")
    for cuts in ([1] * 100, [33, 67], [100]):  # single launches; a graph and what is left of it; the same twice
        again = trained(specs, 100, "bf16", cuts)
        for i in range(2):
            same(again, i, whole, i)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diverging_model_leaves_its_neighbours_bitwise_alone(shape):
    base = SHAPES[shape].replace(optimizer="sgd")
    specs = [base.replace(lr=0.001), base.replace(lr=1e6, init_bias=0.0), base.replace(lr=0.002, seed=1)]
    both, calm = trained(specs, 20, "bf16"), trained([specs[0], specs[2]], 20, "bf16")
    assert both[0].models[1].diverged_step is not None
    assert both[1][1, both[0].models[1].diverged_step :].isnan().all()
    same(calm, 0, both, 0)
    same(calm, 1, both, 2)


def test_a_run_stopped_and_continued_is_bitwise_the_undisturbed_one(tmp_path):
    grid = fm.Grid(DEMO.replace(steps=300), lr=[0.003, 0.01])
    settings = {"quiet": True, "engine": "triton", "precision": "bf16", "self_check": "never"}
    whole = fm.train(grid, tmp_path / "whole", **settings)

    class Stopped(Exception):
        pass

    def stop(run, step):
        if step == 128:
            raise Stopped

    with pytest.raises(Stopped):
        fm.train(grid, tmp_path / "parts", on_checkpoint=stop, **settings)
    parts = fm.train(grid, tmp_path / "parts", **settings)
    assert torch.equal(whole.losses, parts.losses)
    assert all(torch.equal(a, parts.parameters(1)[name]) for name, a in whole.parameters(1).items())


@pytest.mark.slow
def test_bf16_and_tf32_end_where_fp32_does_within_the_spread_over_seeds(tmp_path):
    base = DEMO.replace(steps=4096, lr=0.02)
    found = {}
    for precision in ("fp32", "tf32", "bf16"):
        how = {"precision": precision, "quiet": True, "self_check": "never"}
        run = fm.train(fm.Grid(base, seed=range(8)), tmp_path / precision, **how)
        rows = torch.tensor([[row["final_loss"], row["mono_per_feature"]] for row in run.table], dtype=torch.float64)
        found[precision] = rows.mean(0), rows.std(0)
    for precision in ("tf32", "bf16"):
        difference = (found[precision][0] - found["fp32"][0]).abs()
        # Means of eight seeds each: 4.1 standard errors, once in a thousand times by chance (14 degrees of freedom).
        error = (found[precision][1].square() + found["fp32"][1].square()).sqrt() / math.sqrt(8)
        assert (difference <= 4.1 * error).all(), (precision, difference, error)
