"""Models of different widths and numbers of steps in one block: planned, trained, cut, resumed, written as if alone."""

import csv
import dataclasses

import pytest
import torch
from test_kernels import HAS_TRITON, SMALL, interpreted

import fastmono as fm
from fastmono import trainer
from fastmono.block import Block
from fastmono.plan import MEMORY_SHARE, Machine, block_bytes, make_plan
from fastmono.progress import Progress
from fastmono.store import RunDirectory, Saved, checkpoint_steps
from fastmono.trainer import Options

if HAS_TRITON:
    from fastmono.engines import triton as engine_module

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
BOUND = 1500  # bytes of W_in and W_out as they are packed: 972 at 9 neurons (resident), 2,052 at 19 (streamed)
MIXED = fm.Grid(SMALL, n_neurons=[19, 9], steps=[5, 3]) + fm.Grid(SMALL, steps=[17], lr=[0.02])
MACHINE = Machine(2, None, 1e11, 2**40, 90)


def train(grid, out, **settings):
    return fm.train(grid, out, **{"engine": "triton", "precision": "fp32", "workers": 1, "quiet": True, **settings})


def same_model(whole, i, alone):
    """Bitwise equality of model i of a run, and of the one model of another."""
    rows = [{k: None if v != v else v for k, v in row.items()} for row in (whole.table[i], alone.table[0])]
    assert rows[0] == rows[1]
    own = torch.isin(whole.logged_steps, alone.logged_steps)
    assert torch.equal(whole.losses[i, own].nan_to_num(-1), alone.losses[0].nan_to_num(-1))
    assert whole.losses[i, ~own].isnan().all()
    own = torch.isin(whole.checkpoint_steps, alone.checkpoint_steps)
    for name, values in alone.metrics.items():
        assert torch.equal(whole.metrics[name][i, own].nan_to_num(-1), values[0].nan_to_num(-1)), name
        assert whole.metrics[name][i, ~own].isnan().all()
    steps = alone.kept_steps(0)
    assert {0, *checkpoint_steps(alone.specs[0].steps)} <= set(steps) or rows[0]["status"] == "diverged"
    for step in steps:
        for name, tensor in alone.parameters(0, step).items():
            assert torch.equal(tensor, whole.parameters(i, step)[name]), (i, step, name)


@pytest.fixture
def two_regimes(monkeypatch):
    """The narrow models resident, the wide ones streamed."""
    monkeypatch.setattr("fastmono.engines.launch.RESIDENT_BYTES", BOUND)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each model of MIXED trained alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastmono.engines.launch.RESIDENT_BYTES", BOUND)
        return [train(spec, tmp_path_factory.mktemp("alone") / str(i)) for i, spec in enumerate(MIXED)]


@pytest.fixture
def heard(monkeypatch):
    """The trainer's events, and after each call of the engine what was on the device."""
    events, update, advance = [], Progress.update, engine_module.TritonEngine.advance

    def listening(self, event):
        events.append(event)
        update(self, event)

    def counting(self, block, n_steps):
        losses = advance(self, block, n_steps)
        events.append({"kind": "call", "step": block.step, "models": len(block.models)})
        events[-1] |= {
            "streams": len(self._packed.seeds),
            "regimes": {launch.regime for launch, *_ in self._packed.groups},
        }
        return losses

    monkeypatch.setattr(Progress, "update", listening)
    monkeypatch.setattr(engine_module.TritonEngine, "advance", counting)
    return lambda kind: [event for event in events if event["kind"] == kind]


def plan(grid, engine="triton", saved=None, machine=MACHINE):
    made = make_plan(grid, Options(engine, "fp32"), "", saved or {}, 1, machine)
    return [job for shard in made.shards for job in shard.jobs]


@needs_triton
def test_only_widths_and_steps_are_mixed_and_only_by_the_triton_engine():
    assert [len(job.specs) for job in plan(MIXED)] == [5]
    assert [len({(s.n_neurons, s.steps) for s in job.specs}) for job in plan(MIXED, "cpu")] == [1] * 5
    for name, value in (
        ("n_features", 12), ("d_embed", 4), ("task", "abs"), ("activation", "gelu"), ("optimizer", "sgd"),
        ("batch_size", 14),
    ):  # fmt: skip
        jobs = plan(MIXED + MIXED.override(**{name: [value]}))
        assert [len({getattr(spec, name) for spec in job.specs}) for job in jobs] == [1, 1], name


@needs_triton
def test_blocks_hold_models_of_one_step_and_none_that_is_done():
    names = fm.plan.content_hashes(MIXED, Options("triton", "fp32"))
    done = {name: spec.steps for spec, name in zip(MIXED, names, strict=True)}
    saved = {name: Saved("state-x.safetensors", 0, min(3, steps), None) for name, steps in done.items()}
    del saved[names[2]]
    jobs = plan(MIXED, saved=saved)
    assert [sorted(spec.steps for spec in job.specs) for job in jobs] == [[5], [5, 17]]
    assert [{state and state.step for state in job.saved} for job in jobs] == [{None}, {3}]


@needs_triton
def test_each_block_of_a_mixed_grid_fits_the_device_and_the_host():
    grid = fm.Grid(SMALL, n_neurons=[2000, 20, 200, 20_000], steps=[6, 40], seed=range(4))
    bytes_of = engine_module.TritonEngine.device_bytes
    widest = [spec for spec in grid if spec.n_neurons == 20_000]
    for limit in (bytes_of(widest[:1], "fp32", 90), bytes_of(widest[:3], "fp32", 90)):
        machine = dataclasses.replace(MACHINE, device_memory=int(limit / MEMORY_SHARE) + 1)
        jobs = plan(grid, machine=machine)
        assert all(bytes_of(job.specs, "fp32", 90) <= limit for job in jobs)
        assert sorted(name for job in jobs for name in job.hashes) == sorted(plan(grid)[0].hashes)
        assert len(jobs[0].specs) > len(jobs[-1].specs) > 0
    # What is stacked for a file is a part of the block: less than all its models at the size of the largest.
    one, both = block_bytes(widest, "triton"), block_bytes([*widest, grid[4]], "triton")
    assert block_bytes([grid[4]], "triton") < one < both < one + 4 * block_bytes([grid[4]], "triton")


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_the_memory_planned_for_a_mixed_block_is_the_memory_taken(precision, two_regimes):
    specs = [spec.replace(seed=seed) for seed in range(2) for spec in MIXED]
    packed = engine_module.Packed(Block.new(specs), precision, torch.device("cpu"), 0)
    assert {launch.regime for launch, *_ in packed.groups} == {"resident", "streamed"}
    values = [v for value in vars(packed).values() for v in (value.values() if isinstance(value, dict) else [value])]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    taken = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
    assert engine_module.TritonEngine.device_bytes(specs, precision, 0) == taken


@interpreted
def test_a_grid_of_mixed_widths_and_steps_is_one_block_and_every_model_what_it_is_alone(
    two_regimes, heard, alone, tmp_path
):
    seen = []

    def look(run, step):
        rows = [(i, run.table[i]["status"]) for i, spec in enumerate(MIXED) if step in checkpoint_steps(spec.steps)]
        assert all(status == "done" for i, status in rows if MIXED[i].steps == step)
        seen.append((step, [float(run.parameters(i, step)["b"].mean()) for i, _ in rows]))

    run = train(MIXED, tmp_path, on_checkpoint=look)
    for i, one in enumerate(alone):
        same_model(run, i, one)
    assert len(heard("start")) == 1 and {event["models"] for event in heard("call")} == {5}
    assert all(event["regimes"] == {"resident", "streamed"} for event in heard("call"))
    assert {1, 2, 3, 4, 5, 8, 16, 17} <= {event["step"] for event in heard("call")}

    # Each checkpoint once, when all models that have it are there.
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 8, 16, 17]
    assert [len(means) for _, means in seen] == [5, 5, 2, 3, 2, 1, 1, 1]
    for event in heard("checkpoint"):
        (steps,) = {MIXED[run._hashes.index(name)].steps for name in event["models"]}
        assert event["step"] <= steps and event["last"] == (event["step"] == steps)

    # Only what was trained is counted.
    assert sum(e["model_steps"] for e in heard("progress")) == sum(spec.steps for spec in MIXED)
    assert sum(e["flops"] for e in heard("progress")) == sum(spec.steps * spec.flops_per_step for spec in MIXED)
    with (tmp_path / "telemetry.csv").open() as file:
        assert [int(row["model_steps"]) for row in csv.DictReader(file)] == [spec.steps for spec in MIXED]


@interpreted
def test_a_mixed_run_stopped_and_continued_is_bitwise_the_undisturbed_one(
    two_regimes, heard, alone, tmp_path, monkeypatch
):
    class Interrupting(trainer.BlockTrainer):
        def _progress(self, n, trained, seconds):
            if self.block.step >= stop_at:
                self.should_stop = lambda: True
            super()._progress(n, trained, seconds)

    for stop_at in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "BlockTrainer", Interrupting)
            stopped = train(MIXED, tmp_path)
        assert heard("call")[-1]["step"] == stop_at
        expected = ["done" if spec.steps <= stop_at else "pending" for spec in MIXED]
        assert [row["status"] for row in stopped.table] == expected
    run = train(MIXED, tmp_path, save_every=0.0)
    for i, one in enumerate(alone):
        same_model(run, i, one)
    # One block goes on, though its models come from several files; and all share one copy of the projection.
    assert [(event["step"], len(event["models"])) for event in heard("start")] == [(0, 5), (2, 5), (4, 3)]
    assert {event["streams"] for event in heard("call")} == {1}


@interpreted
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # NumPy, for the interpreter
def test_models_that_diverge_leave_others_of_their_block_alone(two_regimes, heard, tmp_path):
    calm = SMALL.replace(optimizer="sgd", steps=5)
    wide = calm.replace(n_neurons=19)
    # The second shares its files with a calm one; the last has none to share with, and diverges after others' ends.
    grid = fm.Grid.of([calm, calm.replace(lr=50.0), wide.replace(steps=3), wide.replace(lr=20.0, steps=700)])
    run = train(grid, tmp_path / "all")
    assert [row["status"] for row in run.table] == ["done", "diverged"] * 2
    assert run.table[1]["diverged_step"] <= 5 < run.table[3]["diverged_step"]
    for i, spec in enumerate(grid):
        same_model(run, i, train(spec, tmp_path / str(i)))
    assert heard("start")[0]["models"] == list(run._hashes)
    last = [event for event in heard("checkpoint") if run._hashes[3] in event["models"] and event["last"]]
    assert last[0]["step"] == 700 and run.kept_steps(3)[-1] == 700
    assert max(event["step"] for event in heard("call")) <= 8  # none for steps that nobody trains
    assert run.kept_steps(3) == [0, *(s for s in checkpoint_steps(700) if s < run.table[3]["diverged_step"]), 700]


@interpreted
def test_a_mixed_block_that_memory_does_not_hold_is_halved_wherever_its_parts_are(
    two_regimes, heard, alone, tmp_path, monkeypatch
):
    write, failed = RunDirectory.write_state, []

    def short_of_memory(self, models, hashes, step, history):
        if step == 4 and heard("checkpoint")[-1]["step"] == 4 and not failed:  # one part is at step 4, others are not
            failed.append(hashes)
            raise MemoryError
        write(self, models, hashes, step, history)

    monkeypatch.setattr(RunDirectory, "write_state", short_of_memory)
    run = train(MIXED, tmp_path)
    assert failed and "out of memory with 5 models; on with 2" in (tmp_path / "events.jsonl").read_text()
    assert {event["step"] for event in heard("start")} == {0, 2, 4}
    for i, one in enumerate(alone):
        same_model(run, i, one)
