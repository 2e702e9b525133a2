"""The Triton engine around its kernels: settings, memory, errors, the main job. `test_kernels.py` runs these too."""

import dataclasses
import math
import time

import pytest
import torch
from test_kernels import BASE, HAS_TRITON, INTERPRETING, SMALL, both, interpreted, regime, trained

import fastmono as fm
from fastmono.block import Block, Model, views
from fastmono.engines.launch import choose_launch, note_on
from fastmono.frequencies import presence_probabilities, scales, thresholds
from fastmono.optim import learning_rates
from fastmono.plan import MEMORY_SHARE, Machine, make_plan
from fastmono.trainer import Options

if HAS_TRITON:
    from fastmono.engines import device_memory, triton_launch
    from fastmono.engines import triton as engine_module

__all__ = ["regime"]  # a fixture
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
PARTS = ("parameters", "first_moment", "second_moment")


@pytest.fixture
def no_launches(monkeypatch):
    """The engine's host side alone, as for an H100: whatever it would launch is nothing."""

    class Idle(engine_module.TritonEngine):
        def __init__(self, precision):
            super().__init__(precision)
            self.architecture = 90

        def _run(self, *arguments):
            pass

    monkeypatch.setattr(engine_module, "is_interpreting", lambda: True)
    return Idle("fp32")


def filled(specs, seed=0):
    """A block whose models hold random numbers, those of each another."""
    generator, block = torch.Generator().manual_seed(seed), Block.new(specs)
    for model in block.models:
        for part in PARTS:
            flat = getattr(model, part)
            for tensor in views(model.spec, flat).values() if len(flat) else ():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return block


def rows_of_one_model(model, part, M, LO):
    """Its rows of the packed tensors, tensor by tensor, zero where there is none."""
    spec, flat = model.spec, getattr(model, part)
    k, r = spec.n_neurons, spec.linear_path
    found = {"W_in": torch.zeros(k + r, M), "b": torch.zeros(k + r), "W_outT": torch.zeros(k + r, LO)}
    own = views(spec, flat) if len(flat) else {}
    for name, tensor in own.items():
        if name == "b":
            found["b"][:k] = tensor
        else:
            rows = slice(k, k + r) if name.startswith("L_") else slice(0, k)
            found[name.replace("L_in", "W_in").replace("L_out", "W_out")][rows, : tensor.shape[1]] = tensor
    return found


@needs_triton
@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
@pytest.mark.parametrize("at_once", [1, 1000, 2**18])
def test_packed_tensors_are_those_of_the_models_one_after_another(optimizer, at_once, monkeypatch):
    """Widths, ranks and streams mixed, some of them in runs; a diverged model in one of them keeps what it has."""
    monkeypatch.setattr(engine_module, "NUMBERS_A_COPY", at_once)
    base = BASE.replace(optimizer=optimizer)
    shapes = [(19, 0), (19, 0), (9, 2), (9, 2), (9, 2), (9, 2), (35, 0), (19, 0), (2, 3)]
    specs = [
        base.replace(
            n_neurons=k, linear_path=r, seed=i % 3, lr=0.01 * (1 + i % 2), steps=5 + i % 2,
            frequency="power_law" if i == 4 else "uniform", feature_prob=0.1 if i == 7 else 0.2,
        )
        for i, (k, r) in enumerate(shapes)
    ]  # fmt: skip
    block = filled(specs)
    block.models[3].diverged_step = 2
    packed = engine_module.Packed(block, "fp32", torch.device("cpu"), 90)
    assert packed.models == [block.models[i] for i in packed.order]
    for part in PARTS:
        each = [rows_of_one_model(model, part, packed.M, packed.LO) for model in packed.models]
        for name, tensor in getattr(packed, part).items():
            assert torch.equal(tensor, torch.cat([rows[name] for rows in each])), (part, name)
    assert packed.place.tolist() == [i for m in packed.models for n in (m.spec.n_neurons, m.spec.linear_path)
                                     for i in range(n)]  # fmt: skip
    for model, row in zip(packed.models, packed.table.tolist(), strict=True):
        spec, stream = model.spec, row[2]
        assert (row[0], row[3], row[4]) == (spec.n_neurons, spec.steps, spec.linear_path)
        p = presence_probabilities(spec.n_features, spec.feature_prob, spec.frequency)
        assert packed.seeds[stream] == spec.seed and torch.equal(packed.P[stream, :, : len(model.P)], model.P.T)
        assert packed.last[stream].tolist() == (thresholds(p) - 1).tolist()
        assert packed.scale[stream].tolist() == scales(p).tolist()
    assert len(packed.seeds) == len({(spec.seed, spec.frequency, spec.feature_prob) for spec in specs})

    other = filled(specs, seed=1)
    trained_since = engine_module.Packed(other, "fp32", torch.device("cpu"), 90)
    kept = [getattr(block.models[3], part).clone() for part in PARTS]
    for part in PARTS:
        setattr(packed, part, getattr(trained_since, part))
    packed.fetch()
    for i, (model, new) in enumerate(zip(block.models, other.models, strict=True)):
        expected = kept if i == 3 else [getattr(new, part) for part in PARTS]
        assert all(torch.equal(getattr(model, part), flat) for part, flat in zip(PARTS, expected, strict=True)), i


@needs_triton
def test_each_model_is_given_the_learning_rates_of_its_own_schedule(no_launches):
    specs = [
        SMALL.replace(schedule=schedule, lr=lr, steps=steps, seed=seed)
        for seed in range(2)
        for schedule in ("published", "cosine", "constant")
        for lr, steps in ((0.01, 1500), (0.01, 2000), (0.03, 1500))
    ]
    block = Block.new(specs)
    no_launches.advance(block, 1100)
    packed = no_launches._packed
    for row, model in zip(packed.rates, packed.models, strict=True):
        assert row[:76].tolist() == learning_rates(model.spec, 1024, 76)
        assert row[76:].tolist() == learning_rates(model.spec, 76, 948)  # of the call before


@needs_triton
@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"}, {"linear_path": 8}, {"n_neurons": 48}])
def test_the_memory_of_descriptors_is_that_of_the_programs_that_make_them(changes, monkeypatch):
    base = fm.ModelSpec(batch_size=2048, n_features=128, d_embed=16, n_neurons=300).replace(**changes)
    specs = [base.replace(n_neurons=base.n_neurons + 8 * (i % 3), lr=0.01 * (i + 1)) for i in range(37)]
    packed = engine_module.Packed(Block.new(specs), "bf16", torch.device("cpu"), 90)
    programs = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            programs[self.name] = programs.get(self.name, 0) + math.prod(grid)
            return lambda *arguments, **settings: None

    for name in [name for name in vars(triton_launch) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_launch, name, Recorder(name.removesuffix("_kernel")))
    triton_launch.launch_step(packed, packed.groups, True)
    launches = engine_module.launches_of(specs, "bf16", 90)
    found = 0
    for kernel, each in device_memory.descriptors_of(launches[0], base.activation).items():
        found += 128 * each * programs[kernel]
    assert found == device_memory.descriptor_bytes(specs, launches) > 0
    assert ("narrow" in programs) == (base.n_neurons == 48)
    # sm_80 has no such descriptors.
    old = engine_module.launches_of(specs, "bf16", 80)
    assert device_memory.descriptor_bytes(specs, old) == 0


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("widths", [(128,), (128, 96)])
def test_the_host_work_of_thousands_of_models_takes_seconds(no_launches, widths):
    """Some 2 s are usual on one core of a server; what grows with the square of the models would take minutes."""
    base = fm.ModelSpec(n_features=64, d_embed=16, feature_prob=1 / 16, batch_size=256)
    P = torch.randn(16, 64)
    specs = [base.replace(n_neurons=widths[i % len(widths)], lr=1e-5 * (i + 1), seed=i) for i in range(4096)]
    block = Block([Model(spec, projections=(P.clone(), None)) for spec in specs])
    start = time.perf_counter()
    no_launches.device_bytes(specs, "fp32", 90)
    no_launches.advance(block, 2048)
    no_launches.fetch(block)
    assert time.perf_counter() - start < 20


@needs_triton
def test_a_grid_larger_than_the_gpu_is_planned_as_blocks_that_fit_it():
    grid = fm.Grid(SMALL, lr=[0.01, 0.02], seed=range(5))
    needed = engine_module.TritonEngine.device_bytes(grid.specs[:3], "bf16", 90)
    machine = Machine(2, None, 1e11, int(needed / MEMORY_SHARE) + 1, 90)
    plan = make_plan(grid, Options("triton", "bf16"), "", {}, "auto", machine)
    assert [len(job.specs) for job in plan.shards[0].jobs] == [3, 3, 3, 1] and len(plan.shards) == 1
    roomy = dataclasses.replace(machine, device_memory=2**40)
    assert [len(job.specs) for job in make_plan(grid, plan.options, "", {}, "auto", roomy).shards[0].jobs] == [10]


@interpreted
@both
@pytest.mark.parametrize("task", ["decoder", "reprojector"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_the_memory_that_is_planned_is_the_memory_that_is_taken(regime, task, precision):
    specs = [BASE.replace(task=task, seed=i % 3, n_neurons=20 + i, linear_path=i) for i in range(5)]
    packed = engine_module.Packed(Block.new(specs), precision, torch.device("cpu"), 0)
    tensors = [value for value in vars(packed).values() if isinstance(value, torch.Tensor)]
    tensors += [t for value in vars(packed).values() if isinstance(value, dict) for t in value.values()]
    taken = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
    assert engine_module.TritonEngine.device_bytes(specs, precision, 0) == taken


@interpreted
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("Triton Error [CUDA]: out of memory")])  # fmt: skip
def test_a_block_that_the_device_does_not_hold_is_halved(error, tmp_path, monkeypatch):
    launch = engine_module.launch_resident

    def short_of_memory(packed, *arguments):
        if len(packed.models) > 1:
            raise error
        launch(packed, *arguments)

    monkeypatch.setattr(engine_module, "launch_resident", short_of_memory)
    grid = fm.Grid(SMALL.replace(steps=2), lr=[0.01, 0.02])
    run = fm.train(grid, tmp_path, engine="triton", precision="fp32", workers=1, quiet=True)
    assert [row["status"] for row in run.table] == ["done", "done"]
    assert "out of memory with 2 models; on with 1" in (tmp_path / "events.jsonl").read_text()


@interpreted
def test_an_old_triton_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(engine_module.triton, "__version__", "3.3.1")
    with pytest.raises(ValueError, match=r"Triton 3\.3\.1 is too old; use 3\.4"):
        engine_module.TritonEngine("fp32")


@interpreted
def test_more_models_than_a_grid_may_have_go_into_several_launches(monkeypatch):
    specs = [SMALL.replace(seed=i) for i in range(3)]
    monkeypatch.setattr("fastmono.engines.launch.RESIDENT_BYTES", 0)
    whole, losses = trained(specs, 2)
    monkeypatch.setattr(engine_module, "LARGEST_GRID", 2)
    engine = engine_module.TritonEngine("fp32")
    split, split_losses = trained(specs, 2, engine=engine)
    assert [count for _, _, count in engine._packed.groups] == [2, 1]
    assert torch.equal(losses, split_losses)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(whole.models, split.models, strict=True))


@interpreted
@pytest.mark.parametrize("beside", [2, 3])
def test_how_many_models_stand_side_by_side_changes_no_bit(beside, monkeypatch):
    """The last row of models is not full, and what would stand there is no model."""
    specs = [SMALL.replace(seed=i % 2, n_neurons=9 + i) for i in range(5)]
    monkeypatch.setattr("fastmono.engines.launch.RESIDENT_BYTES", 0)
    whole, losses = trained(specs, 2)
    monkeypatch.setattr("fastmono.engines.triton_launch.SIDE_BY_SIDE", beside)
    split, split_losses = trained(specs, 2)
    assert torch.equal(losses, split_losses)
    assert all(torch.equal(a.parameters, b.parameters) for a, b in zip(whole.models, split.models, strict=True))


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
        RuntimeWarning, match=r"failed at N 18, m 5, .*regime='resident'.*PassManager::run failed"
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
    shapes = [(512, 64, 1024, 512, 8192), (128, 32, 256, 128, 512), (1, 1, 1, 1, 1), (2048, 512, 16, 2048, 3)]
    for architecture in (0, 80, 86, 89, 90, 100, 103, 120):
        for shape in shapes:
            for precision in ("fp32", "tf32", "bf16"):
                launch = choose_launch(architecture, *shape, precision)
                assert launch == choose_launch(architecture, *shape, precision)
                tiles = [value for name, value in vars(launch).items() if name[0] in "BM"]
                assert all(tile >= 16 and tile & (tile - 1) == 0 for tile in tiles)
                # The backward pass fills all of a padded row of dW_out that the update reads.
                assert launch.BP == launch.BU or launch.BP >= 32
                assert launch.BB <= launch.BR  # the forward pass writes all of h^T that the backward pass reads
    # As many parts of the samples as give a model 32 backward programs, but none of less than 512 samples.
    parts = {k: -(-8192 // choose_launch(90, 512, 64, k, 512, 8192, "bf16").rows) for k in (512, 1024, 2048)}
    assert parts == {512: 4, 1024: 2, 2048: 2}
    assert choose_launch(90, 512, 64, 256, 512, 2048, "bf16").rows == 512
    assert choose_launch(90, *shapes[0], "bf16").regime == "streamed"
    assert choose_launch(90, *shapes[1], "bf16").regime == "resident"
    # A narrow layer of the paper's width sweep, 65,536 samples a step: not for one multiprocessor alone.
    assert choose_launch(90, 512, 64, 64, 512, 2**17, "bf16").regime == "streamed"
    # What is not known gets the settings of sm_80, which fit its siblings' 99 KiB of shared memory, and a note.
    for shape in shapes:
        for precision in ("fp32", "tf32", "bf16"):
            assert len({choose_launch(a, *shape, precision) for a in (80, 86, 89, 120)}) == 1
    assert not any(map(note_on, (80, 86, 89, 90, 100, 103))) and note_on(120).startswith("sm_120 gets")
    with pytest.raises(ValueError, match=r"sm_75: .* sm_80 or newer"):
        choose_launch(75, *shapes[0], "fp32")
    with pytest.raises(ValueError, match=f"d_output={2**21}, batch_size={2**20}"):
        choose_launch(90, 2**21, 16, 16, 2**21, 2**20, "fp32")
    assert choose_launch(80, 2048, 1024, 16, 2048, 3, "bf16").M == choose_launch(90, 2048, 1024, 16, 2048, 3, "fp32").M
    with pytest.raises(ValueError, match=r"d_embed=513: .* in tf32 up to 512"):
        choose_launch(86, 2048, 513, 16, 2048, 64, "tf32")
    with pytest.raises(ValueError, match="d_embed=1025"):
        choose_launch(90, 2048, 1025, 16, 2048, 64, "bf16")
