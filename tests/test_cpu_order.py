"""The order of a model's neurons, and the blocks of them that a sample leaves out (cpu_hidden.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import same_state, train
from numba import njit
from safetensors.torch import load_file

from fastmono.block import Block, Model, views
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
def tile(p, first, count):
    prepare(p)
    hidden_tile(p, p.STARTS, first, count)


class Hidden:
    """The hidden layer of a model's first batch, as the engine finds it.

    Attributes:
        active: bool [B, k], by neuron.
        share: of (sample, block) pairs that were looked at.
    """

    def __init__(self, model: Model, order: torch.Tensor) -> None:
        spec, block, engine = model.spec, Block([model]), CpuEngine()
        ((stream, _),) = engine._by_stream(block, [0])
        self.work = work = engine._workspace(model)
        assert work.path == "features"
        stream.sample(0, 1)
        k, blocks = spec.n_neurons, -(-spec.n_neurons // BLOCK)
        work.buffers["NEURONS"][: work.fields["K"]] = order[-1]
        work.buffers["NEURONS"][:k] = order
        self.active, looked = torch.zeros(spec.batch_size, k, dtype=torch.bool), 0
        for first in range(0, spec.batch_size, TILE):
            count = min(TILE, spec.batch_size - first)
            work.buffers["CHANGED"].fill_(1.0)
            tile(work.problem(model, stream), first, count)
            words, needed = (work.buffers[name].numpy().view(np.uint64) for name in ("WORDS", "NEEDED"))
            bits = words[:k] >> np.arange(TILE, dtype=np.uint64)[:, None] & np.uint64(1)
            self.active[first : first + count, order.long()] = torch.from_numpy(bits.astype(bool)[:count])
            looked += sum(int(word).bit_count() for word in needed[:blocks])
        self.share = looked / spec.batch_size / blocks
        self.F = torch.zeros(spec.batch_size, spec.n_features, dtype=torch.float64)
        room = stream.batches
        for r in range(spec.batch_size):
            present = slice(int(room.starts[0, r]), int(room.starts[0, r + 1]))
            self.F[r, room.indices[present].long()] = room.values[present].double()


SHAPES = {
    "a short last block": {},
    "one neuron": {"n_neurons": 1},
    "more blocks than a word has bits": {"n_neurons": 4200},
    "four tiles, the last one short": {
        "n_features": 200,
        "n_neurons": 700,
        "batch_size": 250,
        "feature_prob": 0.02,
        "d_embed": 24,
    },
}


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("task", ["decoder", "abs"])
def test_active_neurons_are_those_of_float64_though_samples_leave_blocks_out(
    task: str, shape: str, negative: bool
) -> None:
    spec = SPEC.replace(task=task, **SHAPES[shape])
    model, k = Model(spec), spec.n_neurons
    draw = torch.Generator().manual_seed(3)
    model.tensors["W_in"].copy_(0.2 * torch.randn(k, spec.d_embed, generator=draw))
    model.tensors["b"].copy_(1.5 * torch.rand(k, generator=draw) - (1.6 if negative else 0.1))
    found = Hidden(model, model.tensors["b"].argsort(stable=True).int())
    assert (found.F < 0).any() == (task == "abs")
    z = found.F @ (model.tensors["W_in"].double() @ model.P.double()).T + model.tensors["b"].double()
    certain = z.abs() > 1e-5
    assert torch.equal(found.active[certain], (z > 0)[certain]) and certain.double().mean() > 0.999
    assert k == 1 or (found.share < 0.8 if negative else found.share > 0.8), "or nothing was tested"


@pytest.mark.parametrize("task", ["decoder", "abs"])
def test_a_bound_is_not_rounded_below_what_it_bounds(task: str) -> None:
    """64 equal neurons: their bound is their z, and is above 0 for the samples that activate them and no others."""
    spec, draw = (
        SPEC.replace(task=task, n_neurons=BLOCK, feature_prob=0.25, d_embed=30),
        torch.Generator().manual_seed(5),
    )
    seen = 0
    for _ in range(40):
        model = Model(spec)
        model.tensors["W_in"].copy_(torch.randn(30, generator=draw).expand(BLOCK, 30))
        g = model.tensors["W_in"][0].double() @ model.P.double()
        F = Hidden(model, torch.arange(BLOCK, dtype=torch.int32)).F
        r = int(torch.randint(TILE, (), generator=draw))
        model.tensors["b"].fill_(float(-(F[r] @ g).float()))  # z of sample r is rounding alone
        found = Hidden(model, torch.arange(BLOCK, dtype=torch.int32))
        needed = int(found.work.buffers["NEEDED"].numpy().view(np.uint64)[0])
        by_place = found.active[:, 0][found.work.buffers["SAMPLES"].long()]
        assert [bool(needed >> i & 1) for i in range(TILE)] == by_place.tolist()
        assert found.active.all(1).logical_or(~found.active.any(1)).all()
        seen += int(by_place[found.work.buffers["SAMPLES"] == r])
    assert 5 < seen < 35  # rounding fell to either side


def test_neurons_are_put_in_order_at_fixed_steps_and_cuts_change_no_bit() -> None:
    assert path_of(SPEC) == "features"
    (whole,), _ = train(CpuEngine, [SPEC], 200)
    # A call begins with everything computed anew, and leaves out in its later steps what has not changed.
    for cuts in ([3, 60, 30, 35, 72], [1] * 200):
        (cut,), _ = train(CpuEngine, [SPEC], *cuts)
        assert same_state(whole, cut)
    (before,), _ = train(CpuEngine, [SPEC], ORDER_EVERY * 3)
    assert torch.equal(whole.order, before.tensors["b"].argsort(stable=True).int())
    assert not torch.equal(whole.order, torch.arange(200, dtype=torch.int32))


def test_models_of_several_blocks_keep_their_bits_in_company_and_when_cut() -> None:
    specs = [
        SPEC.replace(seed=seed, lr=lr, init_bias=bias, linear_path=3, n_neurons=150)
        for seed, lr, bias in ((1, 0.03, -0.4), (1, 0.003, 0.0), (2, 0.01, -1.0), (1, 3.0, 0.2))
    ]
    together, _ = train(CpuEngine, specs, 100)
    cut, _ = train(CpuEngine, specs[::-1], 20, 45, 35)
    assert together[3].diverged_step or together[3].tensors["b"].isfinite().all()
    for spec, model, other in zip(specs, together, cut[::-1], strict=True):
        assert same_state(model, other)
        assert same_state(model, train(CpuEngine, [spec], 100)[0][0])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["W_in", "W_outT"])
def test_a_weight_of_a_neuron_at_rest_that_is_not_finite_ends_the_model_with_its_next_step(
    name: str, value: float
) -> None:
    block, engine = Block.new([SPEC]), CpuEngine()
    engine.advance(block, 10)
    model = block.models[0]
    model.tensors["b"][7] = -60.0
    for part in (model.first_moment, model.second_moment):
        for tensor in views(SPEC, part).values():
            tensor[7] = 0.0
    model.tensors[name][7, 3] = value
    engine.advance(block, 4)
    assert model.diverged_step == 11


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


def test_a_state_whose_order_names_a_neuron_twice_is_set_aside_and_one_without_any_is_read(tmp_path: Path) -> None:
    directory, _ = saved_at(90, tmp_path)
    (path,) = directory.checkpoints.glob("state-*")
    tensors, header = load_file(path), TensorFile(path).header
    for wrong in (0, 200, -1, 2**40):
        broken = {name: tensor.clone() for name, tensor in tensors.items()}
        broken["order"][0, 5] = wrong if broken["order"][0, 5] != wrong else 1
        write_tensors(path, broken, header)
        (saved,) = directory.newest_states([NAME], verify=False).values()
        with pytest.raises(BadFile, match="order does not have each neuron once"):
            RunDirectory(tmp_path).restore(SPEC, saved)
        with pytest.warns(UserWarning, match="each neuron once; renamed to state-.*damaged"):
            assert directory.newest_states([NAME]) == {}
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "order"}, header)
    (saved,) = directory.newest_states([NAME]).values()
    assert torch.equal(RunDirectory(tmp_path).restore(SPEC, saved)[0].order, torch.arange(200, dtype=torch.int32))
