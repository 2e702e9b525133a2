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
from fastmono.block import Block
from fastmono.engines.launch import choose_launch
from fastmono.engines.reference import ReferenceEngine
from fastmono.philox import FeatureSampler

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
if INTERPRETING and HAS_TRITON:
    from feature_kernel import features_kernel

    from fastmono.engines import triton as engine_module
    from fastmono.frequencies import presence_probabilities, scales, thresholds


interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not (INTERPRETING and HAS_TRITON), reason="needs TRITON_INTERPRET=1 and Triton"),
]
BASE = fm.ModelSpec(
    n_features=22, d_embed=5, n_neurons=19, feature_prob=0.2, batch_size=37, steps=12, lr=0.01, l1=0.05,
    bias_decay=0.03, init_bias=-0.1, seed=3,
)  # fmt: skip
REGIMES = ["resident", "streamed"]


def interpreted(test):
    for mark in interpreter:
        test = mark(test)
    return test


@pytest.mark.skipif(INTERPRETING, reason="this is the process for the interpreter")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernels_pass_their_tests_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "interpreter and not slow",
        __file__,
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture
def regime(request, monkeypatch):
    """Forces a regime, whatever the shape, and small tiles, so that every loop has several turns and a remainder."""

    def launch(*arguments):
        tiles = {"BR": 16, "BK": 16, "BO": 16, "BP": 16, "BB": 16, "BN": 16}
        rows = 32 if request.param == "streamed" else arguments[5]
        return dataclasses.replace(choose_launch(*arguments), regime=request.param, rows=rows, **tiles)

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
    bound = 4 * (37 * 22) ** 0.5 * 2.0**-24 * exact_losses
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
def test_every_task_and_nonlinearity_agrees_with_the_reference(regime, task, activation):
    base = BASE.replace(task=task, activation=activation)
    check_against_the_reference([base, base.replace(n_neurons=40, seed=4, lr=0.03, l1=0.0)], "fp32", 3)


@interpreted
@both
@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_every_optimizer_and_precision_agrees_with_the_reference(regime, optimizer, precision):
    check_against_the_reference([BASE.replace(optimizer=optimizer)], precision, 8)


@interpreted
@both
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 1, 5), (64, 16, 32, 16), (33, 17, 35, 50)])
def test_odd_shapes_agree_with_the_reference(regime, shape):
    N, m, k, B = shape
    spec = BASE.replace(n_features=N, d_embed=m, n_neurons=k, batch_size=B, feature_prob=0.6)
    check_against_the_reference([spec], "fp32", 3)


@interpreted
@both
def test_a_model_alone_in_a_block_of_mixed_widths_and_permuted_is_bitwise_the_same(regime):
    specs = [
        BASE.replace(n_neurons=k, lr=lr, seed=s)
        for k, lr, s in ((19, 0.01, 3), (40, 0.03, 3), (16, 0.003, 9), (33, 0.01, 9))
    ]
    whole, losses = trained(specs, 4)
    permuted, permuted_losses = trained([specs[i] for i in (2, 0, 3, 1)], 4)
    alone, alone_loss = trained([specs[1]], 4)
    for i, j in enumerate((2, 0, 3, 1)):
        assert torch.equal(permuted.models[i].parameters, whole.models[j].parameters)
        assert torch.equal(permuted_losses[i], losses[j])
    assert torch.equal(alone.models[0].parameters, whole.models[1].parameters)
    assert torch.equal(alone_loss[0], losses[1])


@interpreted
@both
def test_where_the_steps_are_cut_changes_no_bit(regime):
    specs = [BASE, BASE.replace(lr=0.03)]
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
        tiles = {"BR": 16, "BK": 16, "BO": 16, "BP": 16, "BB": 16, "BN": 16, "rows": 37, "regime": name}
        launch = lambda *a, tiles=tiles: dataclasses.replace(choose_launch(*a), **tiles)  # noqa: E731
        monkeypatch.setattr(engine_module, "choose_launch", launch)
        found.append(trained([BASE, BASE.replace(n_neurons=35)], 4))
    (one, losses), (other, other_losses) = found
    assert torch.equal(losses, other_losses)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(one.models, other.models, strict=True))


@interpreted
@both
@pytest.mark.parametrize("where", ["W_in", "b", "W_outT", "first_moment", "second_moment", "lr"])
def test_a_nan_is_seen_at_its_step_and_stays_in_its_model(regime, where, monkeypatch):
    specs = [BASE, BASE.replace(lr=0.03), BASE.replace(seed=4)]
    calm, calm_losses = trained(specs, 5)

    def plant(block):
        model = block.models[1]
        if where in model.tensors:
            model.tensors[where].view(-1)[3] = torch.nan
        elif where != "lr":
            getattr(model, where)[3] = torch.nan

    step = 1
    if where == "lr":
        step = 3
        rates = engine_module.learning_rates
        monkeypatch.setattr(
            engine_module,
            "learning_rates",
            lambda spec, first, n: [
                float("nan") if spec.lr == 0.03 and first + i == 2 else r for i, r in enumerate(rates(spec, first, n))
            ],
        )
    block, losses = trained(specs, 5, plant=plant)
    assert [model.diverged_step for model in block.models] == [None, step, None]
    assert losses[1, step:].isnan().all()
    for i in (0, 2):
        assert torch.equal(losses[i], calm_losses[i])
        assert torch.equal(block.models[i].parameters, calm.models[i].parameters)


@interpreted
@both
def test_padding_stays_zero_and_scratch_that_no_model_owns_stays_poisoned(regime):
    engine = engine_module.TritonEngine("fp32")
    trained([BASE, BASE.replace(n_neurons=40)], 3, engine=engine)
    packed = engine._packed
    for part in (packed.parameters, packed.first_moment, packed.second_moment):
        assert (part["W_outT"][:, BASE.d_output :] == 0).all() and (part["W_in"][:, BASE.d_embed :] == 0).all()
    assert packed.losses[:, 3:].isnan().all()
    assert packed.dW_out[:, :, BASE.d_output :].isnan().all()  # nothing wrote beyond the outputs


@interpreted
@pytest.mark.parametrize("bound", [0, 2**18])
def test_the_main_job_trains_a_small_grid_end_to_end(bound, tmp_path, monkeypatch, capsys):
    from test_cli import TINY, main

    monkeypatch.setattr("fastmono.engines.launch.RESIDENT_BYTES", bound)
    flags = [*TINY, "--lr", "0.01", "--engine", "triton", "--precision", "fp32", "--out", str(tmp_path), "--no-plots"]
    assert main(flags) == 0, capsys.readouterr()
    run = fm.load_run(tmp_path)
    assert run.engine == "triton" and {row["status"] for row in run.table} == {"done"}
    plain = fm.train(run.grid, tmp_path / "plain", engine="reference", workers=1, quiet=True)
    assert torch.allclose(run.losses, plain.losses, rtol=1e-5)


@interpreted
def test_an_error_of_a_kernel_names_shape_and_settings_in_one_line(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a page of compiler output\nPassManager::run failed")

    monkeypatch.setattr(engine_module, "launch_resident", broken)
    with pytest.warns(
        RuntimeWarning, match=r"failed at N 22, m 5, .*regime='resident'.*PassManager::run failed"
    ) as said:
        run = fm.train(BASE, tmp_path, engine="triton", precision="fp32", workers=1, quiet=True)
    assert "\n" not in str(said[0].message) and run.table[0]["status"] == "failed"


@interpreted
def test_bf16_in_the_interpreter_is_refused():
    with pytest.raises(ValueError, match=r"bf16.*wrongly"):
        engine_module.TritonEngine("bf16")


@pytest.mark.skipif(INTERPRETING, reason="the interpreter is available there")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_triton_engine_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"engine='triton': (needs a CUDA GPU|Triton is not installed)"):
        fm.train(BASE, tmp_path, engine="triton")


def test_launch_settings_follow_from_architecture_shape_and_precision_alone():
    shapes = [(512, 64, 1024, 512, 8192), (128, 32, 256, 128, 512), (1, 1, 1, 1, 1), (2048, 1024, 16, 2048, 3)]
    for architecture in (0, 80, 86, 89, 90, 100, 120):
        for shape in shapes:
            for precision in ("fp32", "tf32", "bf16"):
                launch = choose_launch(architecture, *shape, precision)
                assert launch == choose_launch(architecture, *shape, precision)
                tiles = (launch.M, launch.BN, launch.BR, launch.BK, launch.BO, launch.BP, launch.BB, launch.BA)
                assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in tiles)
    assert choose_launch(90, *shapes[0], "bf16").regime == "streamed"
    assert choose_launch(90, *shapes[1], "bf16").regime == "resident"
    with pytest.raises(ValueError, match="d_embed=1025"):
        choose_launch(90, 2048, 1025, 16, 2048, 64, "bf16")
