"""A linear path beside the neurons: its fields, its place in memory and in files, and the CPU engine's arithmetic.

Its gradients and updates are compared with autograd in test_reference.py; independence of company, cuts and divergence
are tested with all else in test_engines.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_cases import ACTIVATIONS, OPTIMIZERS, TASKS, spec_of
from test_cpu_engine import compare_with_reference
from torch.nn import functional as F

import fastmono as fm
from fastmono.block import Block, Model, padded
from fastmono.engines import cpu as cpu_engine
from fastmono.engines import cpu_dense
from fastmono.engines.cpu import CpuEngine
from fastmono.engines.reference import ReferenceEngine
from fastmono.philox import FeatureSampler
from fastmono.spec import Grid, ModelSpec

LINEAR = spec_of(linear_path=3)


def test_fields_that_came_later_leave_the_names_of_older_models_as_they_were() -> None:
    # Written before there were linear_path and bias_decay_mode.
    assert ModelSpec().content_hash("cpu", "fp32", 1) == "a2afff88ffbbb7e319ca4ca7519081a7"
    older = ModelSpec(task="abs", n_neurons=7, lr=0.02, bias_decay=0.03, seed=5)
    assert older.content_hash("triton", "bf16", 1) == "cc89bbaba41b9667825862b240e7c872"
    assert older.replace(linear_path=0, bias_decay_mode="global").identity() == older.identity()
    assert {"linear_path", "bias_decay_mode"}.isdisjoint(older.identity())
    newer = older.replace(linear_path=3, bias_decay_mode="rate")
    assert newer.identity() == newer.to_dict()


def test_rank_above_the_embedding_and_per_neuron_decay_of_a_reprojector_are_refused() -> None:
    assert ModelSpec(linear_path=64).linear_path == 64
    with pytest.raises(ValueError, match=r"^linear_path=65: must be at most d_embed, which is 64"):
        ModelSpec(linear_path=65)
    with pytest.raises(ValueError, match=r"^bias_decay_mode='per_neuron': .*reprojector.*must be global or rate"):
        ModelSpec(task="reprojector", bias_decay_mode="per_neuron")


@pytest.mark.parametrize("task", TASKS)
def test_linear_path_leaves_other_initial_values_alone_and_lies_behind_them_in_memory(task: str) -> None:
    spec = spec_of(task=task, seed=7, linear_path=3)
    without, with_path = Model(spec.replace(linear_path=0)), Model(spec)
    for name, value in without.tensors.items():
        assert torch.equal(with_path.tensors[name], value), name
    assert set(with_path.tensors) == {*without.tensors, "L_in", "L_outT"}
    drawn = torch.cat([with_path.tensors[name].flatten() for name in with_path.tensors])
    assert len(drawn.unique()) == len(drawn) == spec.n_parameters
    for first, second in (("W_in", "L_in"), ("W_outT", "L_outT")):  # one matrix of k + r rows
        a, b = with_path.tensors[first], with_path.tensors[second]
        assert b.data_ptr() - a.data_ptr() == 4 * a.stride(0) * len(a) and a.stride() == b.stride()


# The CPU engine.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_cpu_engine_agrees_with_the_reference(task: str, activation: str, optimizer: str) -> None:
    compare_with_reference(LINEAR.replace(task=task, activation=activation, optimizer=optimizer))


SHAPES = {  # the path through the CPU engine that they take, and the shape
    "neurons and ranks that are no multiples of 16": ("features", {"n_neurons": 150, "d_embed": 37, "linear_path": 31}),
    "neurons that fill their rows": ("features", {
        "n_features": 100, "n_neurons": 64, "d_embed": 20, "linear_path": 16,
    }),
    "a rank of more than one block, and few neurons": ("embedding", {
        "n_neurons": 5, "d_embed": 145, "linear_path": 70, "batch_size": 65,
    }),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("poisoned_memory")
def test_relu_of_every_arrangement_agrees_with_the_reference(task: str, shape: str) -> None:
    path, fields = SHAPES[shape]
    base = spec_of(task=task, **{"n_features": 200, "batch_size": 300, "feature_prob": 0.05, **fields})
    assert cpu_engine.path_of(base) == path
    compare_with_reference(base, steps=4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", ["decoder", "abs"])
@pytest.mark.usefixtures("poisoned_memory")
def test_gram_matrices_of_narrow_layers_agree_with_the_reference(
    task: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_engine, "LEAST_NARROW", 1)
    monkeypatch.setattr(cpu_dense, "TILE_NUMBERS", 1)  # tiles of 32, 32 and 13 rows
    base = LINEAR.replace(task=task, activation=activation, n_features=53)
    assert cpu_engine.path_of(base) == "narrow"
    assert cpu_engine.path_of(base.replace(n_neurons=23)) == "narrow"
    assert cpu_engine.path_of(base.replace(n_neurons=24)) != "narrow"  # 27 rows are more than half the outputs
    compare_with_reference(base)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_that_is_planned_covers_a_linear_path(activation: str) -> None:
    shape = {"n_features": 512, "d_embed": 64, "n_neurons": 100, "batch_size": 1024, "linear_path": 64}
    spec = spec_of(activation=activation, **shape)
    batches = cpu_engine.Batches(spec)
    stream, work = cpu_engine.Stream(Model(spec), batches), cpu_engine.Workspace(spec, cpu_engine.path_of(spec))
    tensors = [
        batches.starts,
        batches.indices,
        batches.values,
        stream.P_T,
        stream.P,
        work.gradient,
        *work.buffers.values(),
    ]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Besides, PyTorch makes up to four tiles of activations on the way where products are dense.
    passing = 0 if activation == "relu" else 16 * cpu_dense.tile_rows(spec) * padded(164)
    assert taken + passing == pytest.approx(CpuEngine.workspace_bytes(spec, 1), rel=0.1, abs=2**13)


@pytest.mark.parametrize("engine", [ReferenceEngine, CpuEngine])
def test_penalty_and_bias_do_not_reach_the_linear_path(engine: type[ReferenceEngine] | type[CpuEngine]) -> None:
    # Without neurons that fire, what is left is linear, and the same with any penalty.
    specs = [spec_of(linear_path=3, init_bias=-100.0, l1=l1, optimizer="sgd") for l1 in (0.0, 5.0)]
    blocks = [Block.new([spec]) for spec in specs]
    losses = [engine().advance(block, 10) for block in blocks]
    (plain,), (penalised,) = (block.models for block in blocks)
    assert torch.equal(plain.parameters, penalised.parameters) and torch.equal(*losses)
    assert not torch.equal(plain.tensors["L_in"], Model(specs[0]).tensors["L_in"])
    for name in ("W_in", "b", "W_outT"):
        assert torch.equal(plain.tensors[name], Model(specs[0]).tensors[name])


# Runs.

TINY = ModelSpec(n_features=12, d_embed=5, n_neurons=9, feature_prob=0.25, batch_size=24, steps=10, lr=0.01, seed=3)
GRID = Grid(TINY, linear_path=[0, 2, 5], bias_decay_mode=["global", "rate"], bias_decay=[1.0])


def train(grid: Grid, out: Path, **settings: object) -> fm.Run:
    return fm.train(grid, out, **{"workers": 1, "quiet": True, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fm.Run:
    return train(GRID, tmp_path_factory.mktemp("run") / "all")


def test_results_tensors_and_modules_of_a_run_have_the_linear_path(run: fm.Run) -> None:
    f = FeatureSampler(TINY).evaluation(0, 8192)
    for i, spec in enumerate(GRID):
        p = run.parameters(i)
        r = spec.linear_path
        expected = {"W_in": (9, 5), "b": (9,), "W_out": (12, 9), "P": (5, 12)}
        assert {n: tuple(t.shape) for n, t in p.items()} == expected | ({"L_in": (r, 5), "L_out": (12, r)} if r else {})
        x = f @ p["P"].T
        y = F.linear(torch.relu(F.linear(x, p["W_in"], p["b"])), p["W_out"])
        if r:
            y += F.linear(F.linear(x, p["L_in"]), p["L_out"])
        # float32 sums over 8192 x 12 numbers of either way: well within 1e-5
        assert run.table[i]["eval_loss"] == pytest.approx(float((y - f).square().sum(1).mean()), rel=1e-5)
        module = run.module(i)
        torch.testing.assert_close(module(module.embed(f)), y)
        assert sum(weight.numel() for weight in module.parameters()) == spec.n_parameters
        assert (run.table[i]["linear_path"], run.table[i]["bias_decay_mode"]) == (r, spec.bias_decay_mode)
    losses = [row["eval_loss"] for row in run.table]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("stop_at", [1, 3, 8])
def test_a_run_stopped_and_continued_is_bitwise_the_undisturbed_one(
    stop_at: int, run: fm.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(fm.trainer.BlockTrainer):
        def _progress(self, n: int, trained: list[int], seconds: float) -> None:
            if self.block.step >= stop_at:
                self.should_stop = lambda: True
            super()._progress(n, trained, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(fm.trainer, "BlockTrainer", Interrupting)
        assert "done" not in {row["status"] for row in train(GRID, tmp_path).table}
    again = train(GRID, tmp_path)
    assert again.table == run.table and torch.equal(again.losses, run.losses)
    for i in range(len(GRID)):
        for step in run.kept_steps(i):
            for name, tensor in run.parameters(i, step).items():
                assert torch.equal(again.parameters(i, step)[name], tensor), (i, step, name)


def test_directory_from_before_there_were_these_fields_is_read_and_its_models_are_done(tmp_path: Path) -> None:
    grid = Grid(TINY, lr=[0.01, 0.02])
    before = train(grid, tmp_path)
    # As an older version wrote them: without the fields.
    values = json.loads((tmp_path / "grid.json").read_text())
    for spec in values["models"]:
        del spec["linear_path"], spec["bias_decay_mode"]
    (tmp_path / "grid.json").write_text(json.dumps(values))
    rows = [line.split(",") for line in (tmp_path / "models.csv").read_text().splitlines()]
    gone = [rows[0].index(name) for name in ("linear_path", "bias_decay_mode")]
    kept = [",".join(cell for i, cell in enumerate(row) if i not in gone) for row in rows]
    (tmp_path / "models.csv").write_text("\n".join(kept) + "\n")

    older = fm.load_run(tmp_path)
    assert older.grid == grid and older.table == before.table
    assert torch.equal(older.parameters(1)["W_in"], before.parameters(1)["W_in"])
    assert fm.runner.plan_run(grid, tmp_path).finished == 2
    assert train(grid, tmp_path).table == before.table
