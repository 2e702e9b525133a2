"""The order of a model's neurons, and the blocks of them that a sample leaves out (cpu_hidden.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import same_state, train
from numba import njit
from safetensors.torch import load_file

from fastmono.block import Block, Model
from fastmono.engines.cpu import ORDER_EVERY, CpuEngine, path_of
from fastmono.engines.cpu_hidden import BLOCK, TILE, hidden_tile, prepare
from fastmono.files import BadFile, TensorFile, write_tensors
from fastmono.layout import n_checkpoints
from fastmono.metrics import NAMES
from fastmono.spec import Grid, ModelSpec
from fastmono.store import BlockHistory, RunDirectory

SPEC = ModelSpec(
    n_features=40, d_embed=12, n_neurons=200, batch_size=TILE, feature_prob=0.1, steps=256, lr=0.03, init_bias=-0.4,
    bias_decay=0.1,
)  # fmt: skip


NAME = "0" * 32


@njit
def first_tile(p):
    prepare(p)
    hidden_tile(p, p.STARTS, 0, p.B)


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("task", ["decoder", "abs"])
def test_active_neurons_are_those_of_float64_though_samples_leave_blocks_out(task: str, negative: bool) -> None:
    block, engine = Block.new([SPEC.replace(task=task)]), CpuEngine()
    model = block.models[0]
    draw = torch.Generator().manual_seed(3)
    model.tensors["W_in"].copy_(0.2 * torch.randn(200, 12, generator=draw))
    model.tensors["b"].copy_(1.5 * torch.rand(200, generator=draw) - (1.6 if negative else 0.1))
    model.order = model.tensors["b"].argsort(stable=True).int()
    ((stream, _),) = engine._by_stream(block, [0])
    work = engine._workspace(model)
    assert work.path == "features"
    stream.sample(0, 1)
    work.buffers["NEURONS"][:200] = model.order
    work.buffers["CHANGED"].fill_(1.0)
    first_tile(work.problem(model, stream))

    room, F = stream.batches, torch.zeros(TILE, 40, dtype=torch.float64)
    for r in range(TILE):
        present = slice(int(room.starts[0, r]), int(room.starts[0, r + 1]))
        F[r, room.indices[present].long()] = room.values[present].double()
    assert (F < 0).any() == (task == "abs")
    z = F @ (model.tensors["W_in"].double() @ model.P.double()).T + model.tensors["b"].double()
    words = work.buffers["WORDS"][:200].numpy().view(np.uint64)
    found = torch.zeros(TILE, 200, dtype=torch.bool)
    for place, j in enumerate(model.order.tolist()):
        found[:, j] = torch.tensor([bool(int(words[place]) >> r & 1) for r in range(TILE)])
    certain = z.abs() > 1e-5
    assert torch.equal(found[certain], (z > 0)[certain]) and certain.double().mean() > 0.999

    needed = work.buffers["NEEDED"][: -(-200 // BLOCK)].numpy().view(np.uint64)
    share = sum(int(word).bit_count() for word in needed) / TILE / len(needed)
    assert share < 0.8 if negative else share > 0.9, "or nothing was tested"


def test_neurons_are_put_in_order_at_fixed_steps_and_cuts_change_no_bit() -> None:
    assert path_of(SPEC) == "features"
    (whole,), _ = train(CpuEngine, [SPEC], 200)
    (cut,), _ = train(CpuEngine, [SPEC], 3, 60, 30, 35, 72)
    assert same_state(whole, cut) and torch.equal(whole.order, cut.order)
    (before,), _ = train(CpuEngine, [SPEC], ORDER_EVERY * 3)
    assert torch.equal(whole.order, before.tensors["b"].argsort(stable=True).int())
    assert not torch.equal(whole.order, torch.arange(200, dtype=torch.int32))


def saved_at(step: int, path: Path) -> tuple[RunDirectory, Block]:
    directory, grid = RunDirectory(path), Grid.of([SPEC])
    directory.expected = {NAME: SPEC}
    block = Block.new(grid)
    losses = CpuEngine().advance(block, step)
    measures = [torch.zeros(1, len(NAMES), dtype=torch.float64)] * n_checkpoints(step, SPEC.steps)
    history = BlockHistory([losses[:, i] for i in range(0, step, 16)], measures)
    path.mkdir(exist_ok=True)
    directory.write_state(block.models, [NAME], step, history)
    return directory, block


def test_a_state_keeps_the_order_and_its_bits_depend_on_it(tmp_path: Path) -> None:
    (whole,), _ = train(CpuEngine, [SPEC], 120)
    directory, block = saved_at(90, tmp_path)
    saved = directory.newest_states([NAME])[NAME]
    for kept in (True, False):
        model: Model = directory.restore(SPEC, saved)[0]
        assert torch.equal(model.order, block.models[0].order)
        if not kept:
            model.order = torch.arange(200, dtype=torch.int32)
        CpuEngine().advance(Block([model], 90), 30)
        assert same_state(model, whole) == kept


def test_a_state_whose_order_names_a_neuron_twice_is_named_and_one_without_any_is_read(tmp_path: Path) -> None:
    directory, _ = saved_at(90, tmp_path)
    (path,) = directory.checkpoints.glob("state-*")
    tensors, header = load_file(path), TensorFile(path).header
    for wrong in (0, 200, -1, 2**40):
        broken = {name: tensor.clone() for name, tensor in tensors.items()}
        broken["order"][0, 5] = wrong if broken["order"][0, 5] != wrong else 1
        write_tensors(path, broken, header)
        saved = directory.newest_states([NAME])[NAME]
        with pytest.raises(BadFile, match="order does not have each neuron once"):
            RunDirectory(tmp_path).restore(SPEC, saved)
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "order"}, header)
    saved = directory.newest_states([NAME])[NAME]
    assert torch.equal(RunDirectory(tmp_path).restore(SPEC, saved)[0].order, torch.arange(200, dtype=torch.int32))
