"""The Triton kernels and their engine, in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest -m interpreter`.

Triton decides when it is imported whether it interprets, so the usual run of the suite starts a process for these.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmono as fm
from fastmono.block import PRECISIONS, Block
from fastmono.engines.launch import Launch, choose_launch
from fastmono.engines.reference import ReferenceEngine
from fastmono.philox import FeatureSampler

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
if INTERPRETING and HAS_TRITON:
    from feature_kernel import far_rows_kernel, features_kernel

    from fastmono.engines import triton as engine_module
    from fastmono.frequencies import presence_probabilities, scales, thresholds


interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not (INTERPRETING and HAS_TRITON), reason="needs TRITON_INTERPRET=1 and Triton"),
]
# Tiles are 16 in every direction (see `regime`): SMALL is one tile and a part of it, BASE one and a remainder.
SMALL = fm.ModelSpec(
    n_features=11, d_embed=5, n_neurons=9, feature_prob=0.2, batch_size=13, steps=12, lr=0.01, l1=0.05,
    bias_decay=0.03, init_bias=-0.1, seed=3,
)  # fmt: skip
BASE = SMALL.replace(n_features=18, n_neurons=19, batch_size=21)
REGIMES = ["resident", "streamed"]
TILES = {name: 16 for name in Launch.__annotations__ if name[0] == "B"}


def interpreted(test):
    for mark in interpreter:
        test = mark(test)
    return test


@pytest.mark.skipif(INTERPRETING, reason="this is the process for the interpreter")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_pass_their_tests_in_the_interpreter():
    """Two processes, of about equal time: the resident regime and runs of mixed blocks, and all the rest."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [
        str(path) for path in sorted(Path(__file__).parent.glob("test_*.py")) if "@interpreted" in path.read_text()
    ]
    assert len(files) >= 6  # those of the kernels, their options, the survey, narrow layers, the engine, mixed blocks
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter and not slow", "-p", "no:cacheprovider", *files]
    root = Path(__file__).resolve().parent.parent
    running = [
        subprocess.Popen([*command, "-k", chosen], env=environment, cwd=root, text=True, stdout=subprocess.PIPE)
        for chosen in ("resident or mixed_blocks", "not (resident or mixed_blocks)")
    ]
    for process in running:
        output = process.communicate()[0]
        assert process.returncode == 0, output[-5000:]
        assert " passed" in output and " skipped" not in output, output[-5000:]


@pytest.fixture
def regime(request, monkeypatch):
    """Forces a regime, whatever the shape, and small tiles, so that every loop has several turns and a remainder."""

    def launch(*arguments):
        rows = 32 if request.param == "streamed" else arguments[5]
        how = {"regime": request.param, "rows": rows, "bulk": rows == 32, "fused": False}
        for other_form in ("forward_carried", "backward_carried", "project_across"):  # the resident kernel has one
            how[other_form] = rows == 32
        return dataclasses.replace(choose_launch(*arguments), **how, **TILES)

    monkeypatch.setattr(engine_module, "choose_launch", launch)
    return request.param


both = pytest.mark.parametrize("regime", REGIMES, indirect=True)


def trained(specs, steps, precision="fp32", engine=None, plant=None, cuts=None):
    """A block after so many steps, and its losses."""
    block = Block.new(specs)
    if plant:
        plant(block)
    engine = engine or engine_module.TritonEngine(precision)
    losses = torch.cat([engine.advance(block, n) for n in cuts or [steps]], 1)
    engine.fetch(block)
    return block, losses


def check_against_the_reference(specs, precision, steps):
    """The three-way rule: no further from float64 than plain PyTorch in the same precision, plus rounding."""
    exact = Block.new(specs, torch.float64)
    exact_losses = ReferenceEngine().advance(exact, steps)
    plain, plain_losses = trained(specs, steps, engine=ReferenceEngine(precision))
    ours, our_losses = trained(specs, steps, precision)
    for truth, reference, model in zip(exact.models, plain.models, ours.models, strict=True):
        for name, tensor in truth.tensors.items():
            allowed = 2 * (reference.tensors[name] - tensor).norm() + 2.0**-21 * tensor.norm()
            assert (model.tensors[name] - tensor).norm() <= allowed, name
    # The loss is a sum of B o squares: sqrt(B o) units of 2^-24 by rounding at random, a factor of 4 for safety.
    bound = 4 * (specs[0].batch_size * specs[0].d_output) ** 0.5 * 2.0**-24 * exact_losses
    assert ((our_losses - exact_losses).abs() <= 2 * (plain_losses - exact_losses).abs() + bound).all()


@interpreted
@pytest.mark.parametrize("task", ["decoder", "abs"])
@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
@pytest.mark.parametrize("step", [0, 5, 2**32 + 7])
def test_features_are_bitwise_those_of_the_sampler(task, frequency, step):
    spec = BASE.replace(task=task, frequency=frequency, n_features=45, feature_prob=0.4, seed=2**32 - 5)
    signed = task == "abs"
    p = presence_probabilities(45, 0.2 if signed else 0.4, frequency)
    out = torch.full((48, 45), torch.nan)
    last, scale = torch.from_numpy(thresholds(p) - 1), torch.from_numpy(scales(p))
    seed, at = (torch.tensor(value, dtype=torch.int64) for value in (spec.seed, step))
    features_kernel[(3, 3)](out, last, scale, seed, at, 45, SIGNED=signed, BR=16, BN=16)
    assert torch.equal(out, FeatureSampler(spec).batch(step, 0, 48))


@interpreted
@both
@pytest.mark.parametrize("task", ["decoder", "reprojector", "abs"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "solu"])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_every_combination_agrees_with_the_reference(regime, task, activation, optimizer, precision):
    specs = [SMALL.replace(task=task, activation=activation, optimizer=optimizer)]
    check_against_the_reference(specs, precision, 2)


@interpreted
@both
@pytest.mark.parametrize("task", ["decoder", "reprojector", "abs"])
def test_float16_operands_agree_with_the_reference(regime, task, monkeypatch):
    """The operands that are rounded, and where, are those of bf16, which the interpreter cannot compute."""
    monkeypatch.setitem(PRECISIONS, "fp16", lambda x: x.half().float())
    check_against_the_reference([BASE.replace(task=task)], "fp16", 3)


@interpreted
@both
def test_tens_of_steps_of_mixed_widths_agree_with_the_reference(regime):
    check_against_the_reference([SMALL.replace(steps=24), SMALL.replace(n_neurons=20, l1=0.0, steps=24)], "fp32", 24)


@interpreted
@both
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 1, 5), (64, 16, 32, 16), (33, 17, 35, 50)])
def test_odd_shapes_agree_with_the_reference(regime, shape):
    N, m, k, B = shape
    spec = BASE.replace(n_features=N, d_embed=m, n_neurons=k, batch_size=B, feature_prob=0.6)
    check_against_the_reference([spec], "fp32", 2)


@interpreted
def test_rows_beyond_two_to_the_31_are_found():
    """The last 16 neurons of a model of 2^20 with rows of 4096: what they do must not depend on where they stand."""
    torch.manual_seed(0)
    found = []
    x, h, e = torch.randn(32, 16), torch.randn(16, 32).relu(), torch.randn(32, 4096)
    W_in, b, W_out = torch.randn(16, 16), torch.randn(16), torch.randn(16, 4096)
    for k0 in (0, 2**20):
        results = [W_in.clone(), b.clone(), W_out.clone(), torch.zeros(16, 16), torch.zeros(16), torch.zeros(16, 4096)]
        flags, place = torch.ones(16, dtype=torch.int8), torch.zeros(16, dtype=torch.int32)
        operands = [torch.full_like(tensor, torch.nan) for tensor in (W_in, b, W_out)]
        moments, norms, bad = torch.zeros(272 + 16 * 4096), torch.zeros(6), torch.full((1,), 9, dtype=torch.int32)
        far_rows_kernel[(1,)](x, h, e, flags, place, *operands, *results, moments, norms, bad, k0, 32, 4096)
        assert bad == 0 and not torch.equal(results[2], W_out)
        assert torch.equal(place, torch.arange(k0, k0 + 16, dtype=torch.int32)) and torch.equal(operands[0], W_in)
        assert torch.equal(operands[1], b) and torch.equal(operands[2], W_out)
        found.append([*results, moments, norms])
    assert all(torch.equal(near, far) for near, far in zip(*found, strict=True))


@interpreted
@both
def test_a_model_alone_in_a_block_of_mixed_widths_and_permuted_is_bitwise_the_same(regime):
    specs = [
        SMALL.replace(n_neurons=k, lr=lr, seed=s)
        for k, lr, s in ((9, 0.01, 3), (20, 0.03, 3), (16, 0.003, 9), (33, 0.01, 9))
    ]
    whole, losses = trained(specs, 3)
    permuted, permuted_losses = trained([specs[i] for i in (2, 0, 3, 1)], 3)
    alone, alone_loss = trained([specs[1]], 3)
    for i, j in enumerate((2, 0, 3, 1)):
        assert torch.equal(permuted.models[i].parameters, whole.models[j].parameters)
        assert torch.equal(permuted_losses[i], losses[j])
    assert torch.equal(alone.models[0].parameters, whole.models[1].parameters)
    assert torch.equal(alone_loss[0], losses[1])


@interpreted
@both
def test_where_the_steps_are_cut_changes_no_bit(regime):
    specs = [SMALL, SMALL.replace(lr=0.03, n_neurons=20)]
    whole, losses = trained(specs, 7)
    cut, cut_losses = trained(specs, 7, cuts=[1, 2, 4])
    assert torch.equal(losses, cut_losses)
    for one, other in zip(whole.models, cut.models, strict=True):
        for part in ("parameters", "first_moment", "second_moment"):
            assert torch.equal(getattr(one, part), getattr(other, part))


@interpreted
def test_both_regimes_give_the_same_bits_where_their_tiles_are_the_same(monkeypatch):
    found = []
    for name in REGIMES:
        how = {**TILES, "rows": 32, "regime": name, "fused": False, "bulk": name == "streamed"}
        launch = lambda *a, how=how: dataclasses.replace(choose_launch(*a), **how)  # noqa: E731
        monkeypatch.setattr(engine_module, "choose_launch", launch)
        found.append(trained([BASE, BASE.replace(n_neurons=35)], 3))
    (one, losses), (other, other_losses) = found
    assert torch.equal(losses, other_losses)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(one.models, other.models, strict=True))


@interpreted
@pytest.mark.parametrize(
    ("activation", "precision", "bulk"),
    [("relu", "fp32", True), ("relu", "fp16", False), ("gelu", "fp16", True), ("solu", "tf32", False)],
)
def test_what_is_carried_to_the_next_chunk_changes_no_bit(activation, bulk, precision, monkeypatch):
    """Ragged ends in every direction, neurons that fill no tile, a penalty, a linear path, dead neurons, and in one
    model a NaN in z."""
    monkeypatch.setitem(PRECISIONS, "fp16", lambda x: x.half().float())
    base = BASE.replace(batch_size=37, d_embed=17, activation=activation)
    ill = base.replace(seed=4, n_neurons=9)
    models = [base, ill, base.replace(linear_path=17, n_neurons=16, l1=0.0), base.replace(init_bias=-9.0)]

    def plant(block):
        block.models[1].tensors["b"][2] = torch.nan

    found = []
    for carried in (False, True):
        how = {**TILES, "rows": 32, "regime": "streamed", "fused": False, "bulk": bulk}
        how |= {"forward_carried": carried, "backward_carried": carried}
        launch = lambda *a, how=how: dataclasses.replace(choose_launch(*a), **how)  # noqa: E731
        monkeypatch.setattr(engine_module, "choose_launch", launch)
        found.append(trained(models, 1, precision, plant=plant))
    (one, losses), (other, other_losses) = found
    assert one.models[1].diverged_step == 1 and losses[[0, 2, 3]].isfinite().all()
    assert torch.equal(losses.nan_to_num(-1), other_losses.nan_to_num(-1))
    for a, b in zip(one.models, other.models, strict=True):
        assert torch.equal(a.parameters.nan_to_num(-1), b.parameters.nan_to_num(-1))


@interpreted
@both
def test_a_nan_is_seen_at_its_step_and_stays_in_its_model(regime, monkeypatch):
    """In a weight, a bias, a moment or a learning rate, each in a model of its own between two that stay well."""
    wheres = ["W_in", "b", "W_outT", "first_moment", "second_moment", "lr"]
    calm = [SMALL, SMALL.replace(seed=4, n_neurons=20)]
    ill = [SMALL.replace(seed=5 + i, lr=0.02 if where == "lr" else 0.03) for i, where in enumerate(wheres)]
    calm_block, calm_losses = trained(calm, 4)

    def plant(block):
        for model, where in zip(block.models[1:], wheres, strict=False):
            if where in model.tensors:
                model.tensors[where][..., 3] = torch.nan
            elif where != "lr":
                getattr(model, where)[3] = torch.nan

    rates = engine_module.rate_table

    def with_nan(specs, first, n):
        found = rates(specs, first, n)
        found[specs.index(ill[-1]), 2 - first] = torch.nan
        return found

    monkeypatch.setattr(engine_module, "rate_table", with_nan)
    block, losses = trained([calm[0], *ill, calm[1]], 4, plant=plant)
    for i, where in enumerate(wheres, 1):
        step = 3 if where == "lr" else 1
        assert block.models[i].diverged_step == step, where
        assert losses[i, 0].isnan() == (where in ("W_in", "b", "W_outT")), where  # a plain maximum would hide it
        assert losses[i, step:].isnan().all() and losses[i, : step - 1].isfinite().all(), where
    for i, j in ((0, 0), (-1, 1)):
        assert block.models[i].diverged_step is None
        assert torch.equal(losses[i], calm_losses[j])
        assert torch.equal(block.models[i].parameters, calm_block.models[j].parameters)


class Fences:
    """Moves every tensor of a packed block between two fences, and tells whether one was touched."""

    WIDTH, FLOAT, WHOLE = 4096, 1e30, 77  # what reads a fence computes something else

    def __init__(self, packed):
        self.found = {}
        for name, value in list(vars(packed).items()):
            if isinstance(value, torch.Tensor):
                setattr(packed, name, self.fenced(value))
            elif isinstance(value, dict):
                setattr(packed, name, {key: self.fenced(tensor) for key, tensor in value.items()})

    def fenced(self, tensor):
        if tensor.data_ptr() not in self.found:  # tensors that share memory go on doing so
            value = self.FLOAT if tensor.is_floating_point() else self.WHOLE
            whole = torch.full((tensor.numel() + 2 * self.WIDTH,), value, dtype=tensor.dtype)
            self.found[tensor.data_ptr()] = whole, whole[self.WIDTH : -self.WIDTH].view(tensor.shape).copy_(tensor)
        return self.found[tensor.data_ptr()][1]

    def whole(self):
        for whole, inside in self.found.values():
            value = self.FLOAT if inside.is_floating_point() else self.WHOLE
            yield bool((whole[: self.WIDTH] == value).all() and (whole[-self.WIDTH :] == value).all())


@interpreted
@both
@pytest.mark.parametrize("task", ["decoder", "reprojector"])
def test_nothing_is_written_or_read_beyond_the_ends_and_padding_stays_zero(regime, task):
    specs = [BASE.replace(task=task), BASE.replace(task=task, n_neurons=35)]
    plain, plain_losses = trained(specs, 2)
    engine, block = engine_module.TritonEngine("fp32"), Block.new(specs)
    packed = engine._pack(block)
    fences = Fences(packed)
    losses = engine.advance(block, 2)
    engine.fetch(block)
    assert len(fences.found) >= 25 and all(fences.whole())
    assert torch.equal(losses, plain_losses)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(block.models, plain.models, strict=True))
    m, o = BASE.d_embed, specs[0].d_output
    for part in (packed.parameters, packed.first_moment, packed.second_moment):
        assert (part["W_outT"][:, o:] == 0).all() and (part["W_in"][:, m:] == 0).all()
    # Scratch comes filled with NaN. Padding is zero or untouched, and what no model owns is untouched.
    padding = torch.cat([packed.dW_out[:, :, o:].flatten(), packed.e[:, :, o:].flatten()])
    assert ((padding == 0) | padding.isnan()).all()
    assert packed.losses[:, 2:].isnan().all()
    narrow = [model.spec.n_neurons for model in packed.models].index(19)
    assert packed.norms[narrow, 2:].isnan().all() and packed.norms[narrow, :2].isfinite().all()
