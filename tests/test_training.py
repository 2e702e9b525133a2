"""A run as a whole: its files, its resumption, its independence of workers and company."""

import csv
import json
import math
import warnings

import pytest
import torch

import fastmono as fm
from fastmono.metrics import NAMES
from fastmono.philox import FeatureSampler
from fastmono.store import checkpoint_steps, final_loss, logged_steps
from fastmono.tasks import ACTIVATION

TINY = fm.ModelSpec(
    n_features=12, d_embed=5, n_neurons=9, feature_prob=0.25, batch_size=24, steps=40, lr=0.01, seed=3
)  # sizes that are no multiples of 16
GRID = fm.Grid(TINY, lr=[0.003, 0.01, 0.03], init_bias=[0.0, -0.5])


def train(grid, out, **settings):
    return fm.train(grid, out, **{"workers": 1, "quiet": True, **settings})


def same_results(a, b, order=None):
    """Bitwise equality of two runs, model by model; `order[i]` is the number in b of a's model i."""
    order = range(len(a)) if order is None else order
    for i, j in enumerate(order):
        rows = [{k: (None if v != v else v) for k, v in run.table[n].items()} for run, n in ((a, i), (b, j))]
        assert rows[0] == rows[1]
        assert torch.equal(a.losses[i].nan_to_num(-1), b.losses[j].nan_to_num(-1))
        for name, tensor in a.parameters(i).items():
            assert torch.equal(tensor, b.parameters(j)[name]), (i, name)
        for name in NAMES:
            assert torch.equal(a.metrics[name][i].nan_to_num(-1), b.metrics[name][j].nan_to_num(-1))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(GRID, tmp_path_factory.mktemp("run") / "undisturbed")


def test_logged_steps_are_every_sixteenth_and_the_last():
    assert logged_steps(1).tolist() == [1]
    assert logged_steps(17).tolist() == [1, 17]
    assert logged_steps(40).tolist() == [1, 17, 33, 40]


def test_checkpoints_are_powers_of_two_and_the_last():
    assert checkpoint_steps(1) == [1]
    assert checkpoint_steps(40) == [1, 2, 4, 8, 16, 32, 40]
    assert checkpoint_steps(64) == [1, 2, 4, 8, 16, 32, 64]


def test_final_loss_is_the_mean_of_the_last_1024_steps_or_of_a_shorter_runs_second_half():
    long = logged_steps(4096)
    assert final_loss(long.float(), 4096) == long[long > 3072].double().mean()
    assert final_loss(logged_steps(40).float(), 40) == (33 + 40) / 2
    assert final_loss(torch.tensor([7.0]), 1) == 7.0
    whole = logged_steps(1024)
    assert final_loss(whole.float(), 1024) == whole.double().mean()


def test_a_run_directory_holds_what_the_design_lists(undisturbed):
    run = undisturbed
    assert run.losses.dtype == torch.float32 and run.losses.shape == (6, 4)
    assert run.logged_steps.tolist() == [1, 17, 33, 40]
    assert run.checkpoint_steps.tolist() == [1, 2, 4, 8, 16, 32, 40]
    grid = json.loads((run.path / "grid.json").read_text())
    assert [fm.ModelSpec(**spec) for spec in grid["models"]] == list(GRID)
    assert grid["engine"] == "cpu" and grid["precision"] == "fp32" and "torch" in grid["versions"]
    with (run.path / "models.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == [spec.lr for spec in GRID]
    assert list(rows[0])[18:] == [
        "status", "final_loss", "eval_loss", "mono_neurons", "mono_per_feature", "mono_per_neuron", "dead_neurons",
        "mean_bias", "density", "diverged_step",
    ]  # fmt: skip
    assert all(row["status"] == "done" and row["diverged_step"] == "" for row in rows)
    assert (run.path / "telemetry.csv").exists() and "6 done" in (run.path / "events.jsonl").read_text()
    assert not list(run.path.rglob("*.pt")) + list(run.path.rglob("*.pkl"))


def test_results_agree_with_a_computation_from_the_parameters(undisturbed):
    for i, row in enumerate(undisturbed.table):
        p = {name: tensor.double() for name, tensor in undisturbed.parameters(i).items()}
        f = FeatureSampler(TINY).evaluation(0, 8192).double()
        h = torch.relu(f @ p["P"].T @ p["W_in"].T + p["b"])
        loss = (h @ p["W_out"].T - f).square().sum(1).mean()
        # float32 sums over 8192 x 12 numbers of either engine: well within 1e-5.
        assert row["eval_loss"] == pytest.approx(float(loss), rel=1e-5)
        assert row["mean_bias"] == pytest.approx(float(p["b"].mean()), rel=1e-12)
        assert row["density"] == pytest.approx(float((h > 0).double().mean()), abs=2e-5)
        assert row["final_loss"] == float(undisturbed.losses[i, 2:].double().mean())


def test_the_initial_values_and_every_checkpoint_are_kept(undisturbed):
    assert undisturbed.kept_steps(0) == [0, 1, 2, 4, 8, 16, 32, 40]
    start = undisturbed.parameters(0, step=0)
    assert float(start["b"].abs().max()) <= 5**-0.5
    assert not torch.equal(start["W_in"], undisturbed.parameters(0, step=1)["W_in"])
    with pytest.raises(ValueError, match=r"step=3.*0, 1, 2, 4"):
        undisturbed.parameters(0, step=3)
    with pytest.raises(IndexError, match="0 to 5"):
        undisturbed.parameters(6)


def test_a_module_computes_what_the_tensors_say(undisturbed):
    p, module = undisturbed.parameters(4), undisturbed.module(4)
    f = FeatureSampler(TINY).evaluation(0, 32)
    expected = ACTIVATION["relu"](f @ p["P"].T @ p["W_in"].T + p["b"]) @ p["W_out"].T
    assert isinstance(module, torch.nn.Module)
    torch.testing.assert_close(module(module.embed(f)), expected)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_model_alone_in_a_permuted_grid_and_with_two_workers_is_bitwise_the_same(engine, tmp_path):
    whole = train(GRID, tmp_path / "whole", engine=engine)
    alone = train(fm.Grid.of([GRID[4]]), tmp_path / "alone", engine=engine)
    order = [3, 0, 5, 1, 4, 2]
    permuted = train(fm.Grid.of(GRID[i] for i in order), tmp_path / "permuted", engine=engine)
    same_results(permuted, whole, order)
    same_results(alone, whole, [4])
    if engine == "cpu":
        same_results(train(GRID, tmp_path / "two", workers=2), whole)


def test_two_workers_write_the_very_same_tables(undisturbed, tmp_path):
    train(GRID, tmp_path, workers=2)
    for name in ("models.csv", "history.safetensors"):
        assert (tmp_path / name).read_bytes() == (undisturbed.path / name).read_bytes()


@pytest.mark.parametrize("stop_at", [1, 5, 16, 37])
def test_a_run_stopped_and_continued_is_bitwise_the_undisturbed_one(stop_at, undisturbed, tmp_path, monkeypatch):
    from fastmono import trainer

    class Interrupting(trainer.BlockTrainer):
        def _progress(self, n, trained, seconds):
            if self.block.step >= stop_at:
                self.should_stop = lambda: True
            super()._progress(n, trained, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "BlockTrainer", Interrupting)
        train(GRID, tmp_path)
    stopped = fm.load_run(tmp_path)
    assert {row["status"] for row in stopped.table} <= {"pending", "done"}
    same_results(train(GRID, tmp_path), undisturbed)


def test_a_larger_grid_trains_only_what_is_new(tmp_path):
    small = train(GRID, tmp_path)
    states = {path.name: path.stat().st_mtime_ns for path in small.directory.checkpoints.glob("state-*")}
    larger = train(GRID + fm.Grid(TINY, lr=[0.1]), tmp_path)
    assert len(larger) == 7 and {row["status"] for row in larger.table} == {"done"}
    assert states.items() <= {p.name: p.stat().st_mtime_ns for p in small.directory.checkpoints.glob("state-*")}.items()
    same_results(small, larger)
    telemetry = (tmp_path / "telemetry.csv").read_text().splitlines()
    assert [line.split(",")[4] for line in telemetry[1:]] == ["1"] * 7  # no model was taken up twice


def test_a_directory_with_other_models_is_refused_with_the_differences(undisturbed):
    with pytest.raises(ValueError, match=r"6 models that this grid lacks \(steps 40 there, 41 here\)"):
        train(GRID.override(steps=[41]), undisturbed.path)
    with pytest.raises(ValueError, match=r"lr 0\.003 there"):
        train(fm.Grid(TINY, lr=[0.01, 0.03], init_bias=[0.0, -0.5]), undisturbed.path)


def test_a_directory_trained_with_another_engine_or_precision_is_refused_and_auto_takes_what_it_was(tmp_path):
    first = train(GRID, tmp_path, engine="reference", precision="tf32")
    with pytest.raises(ValueError, match="engine reference, and cpu is asked for"):
        train(GRID, tmp_path, engine="cpu")
    again = train(GRID, tmp_path)
    assert (again.engine, again.precision) == ("reference", "tf32")
    same_results(first, again)


def test_no_resume_discards_the_run_and_nothing_else(tmp_path):
    train(GRID, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    run = train(fm.Grid(TINY), tmp_path, resume=False)
    assert len(run) == 1 and (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(run.directory.checkpoints.glob("state-*"))) == 2


def test_no_resume_with_a_grid_that_cannot_be_trained_discards_nothing(tmp_path):
    run = train(GRID, tmp_path)
    with pytest.raises(ValueError, match="one such model takes"):
        train(TINY.replace(n_neurons=2**31 - 1), tmp_path, resume=False)
    same_results(fm.load_run(tmp_path), run)


def test_checkpoints_are_kept_as_asked_and_results_do_not_depend_on_it(undisturbed, tmp_path):
    for policy, steps in (("last", [40]), ("none", [])):
        run = train(GRID, tmp_path / policy, checkpoints=policy)
        assert [int(p.name.split("-")[1]) for p in run.directory.checkpoints.glob("step-*")] == steps
        same_results(run, undisturbed)


def test_models_of_different_lengths_share_a_run(tmp_path):
    grid = fm.Grid(TINY, steps=[8, 33, 40])
    run = train(grid, tmp_path)
    assert run.logged_steps.tolist() == [1, 8, 17, 33, 40]
    assert run.losses.isnan().tolist() == [
        [False, False, True, True, True],
        [False, True, False, False, True],
        [False, True, False, False, False],
    ]
    assert run.checkpoint_steps.tolist() == [1, 2, 4, 8, 16, 32, 33, 40]
    assert run.metrics["eval_loss"][1].isnan().tolist() == [False] * 7 + [True]
    assert torch.equal(run.losses[1, 0], run.losses[2, 0])


@pytest.mark.parametrize("task", ["decoder", "reprojector", "abs"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "solu"])
@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
def test_every_task_nonlinearity_and_frequency_trains_and_its_loss_falls(task, activation, frequency, tmp_path):
    spec = TINY.replace(task=task, activation=activation, frequency=frequency, n_neurons=24, steps=400, batch_size=64)
    run = train(spec, tmp_path, checkpoints="none")
    assert run.table[0]["status"] == "done"
    assert run.losses[0, -5:].mean() < 0.8 * run.losses[0, :2].mean()
    assert run.table[0]["eval_loss"] < 0.8 * float(run.metrics["eval_loss"][0, 0])


def test_a_diverging_model_is_reported_and_leaves_its_neighbours_bitwise_alone(tmp_path):
    calm = fm.Grid(TINY.replace(optimizer="sgd"), seed=[3, 4])
    wild = fm.Grid(TINY.replace(optimizer="sgd"), lr=[1e6])
    alone = train(calm, tmp_path / "calm")
    both = train(fm.Grid.of([calm[0], wild[0], calm[1]]), tmp_path / "both")
    same_results(alone, both, [0, 2])
    row = both.table[1]
    assert row["status"] == "diverged" and 1 < row["diverged_step"] <= 40
    assert math.isnan(row["final_loss"])
    assert both.losses[1][both.logged_steps > row["diverged_step"]].isnan().all()
    frozen = 1 << (row["diverged_step"] - 1).bit_length() - 1
    for step in (None, 40, frozen):
        parameters = both.parameters(1, step)
        assert all(tensor.isfinite().all() for tensor in parameters.values())
        assert torch.equal(parameters["W_in"], both.parameters(1, frozen)["W_in"])
    assert not torch.equal(both.parameters(1)["W_in"], both.parameters(0)["W_in"])


def test_a_run_whose_models_all_diverge_ends_well_and_is_not_trained_again(tmp_path):
    grid = fm.Grid(TINY.replace(optimizer="sgd", steps=300), lr=[1e6, 1e7])
    run = train(grid, tmp_path)
    assert [row["status"] for row in run.table] == ["diverged"] * 2
    before = (tmp_path / "models.csv").read_bytes(), (tmp_path / "history.safetensors").read_bytes()
    train(grid, tmp_path)
    assert before == ((tmp_path / "models.csv").read_bytes(), (tmp_path / "history.safetensors").read_bytes())


def test_on_checkpoint_is_called_once_for_each_step_in_order_with_a_run_that_has_it(tmp_path):
    seen = []

    def mine(run, step):
        seen.append((step, float(run.parameters(5, step)["b"].mean())))

    run = train(GRID, tmp_path, on_checkpoint=mine)
    assert [step for step, _ in seen] == [1, 2, 4, 8, 16, 32, 40]
    column = run.metrics["mean_bias"][5]
    assert [bias for _, bias in seen] == pytest.approx(column.tolist(), rel=1e-6)


def test_models_that_have_reached_their_end_are_done_in_the_table_while_others_still_train(tmp_path):
    seen = {}

    def look(run, step):
        seen[step] = [(row["status"], math.isfinite(row["final_loss"])) for row in run.table]

    train(fm.Grid(TINY, steps=[20, 40]), tmp_path, on_checkpoint=look)
    assert seen[20] == [("done", True), ("pending", False)]
    assert seen[40] == [("done", True), ("done", True)]


def test_on_checkpoint_is_not_called_for_steps_that_no_model_reached(tmp_path, monkeypatch):
    from fastmono.engines.cpu import CpuEngine

    advance = CpuEngine.advance

    def fails(self, block, n_steps):
        if block.step >= 8:
            raise ArithmeticError("at step 8")
        return advance(self, block, n_steps)

    monkeypatch.setattr(CpuEngine, "advance", fails)
    called = []
    with pytest.warns(RuntimeWarning, match="at step 8"):
        train(GRID, tmp_path, on_checkpoint=lambda run, step: called.append(step))
    assert called == [1, 2, 4, 8]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_on_checkpoint_is_raised_with_the_state_saved(workers, undisturbed, tmp_path):
    def broken(run, step):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(GRID, tmp_path, on_checkpoint=broken, workers=workers)
    same_results(train(GRID, tmp_path), undisturbed)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"workers": 0}, "workers=0"), ({"workers": 1.5}, "workers"), ({"engine": "gpu"}, "engine='gpu'"),
        ({"precision": "fp8"}, "precision='fp8'"), ({"engine": "cpu", "precision": "bf16"}, "reference"),
        ({"checkpoints": "some"}, "checkpoints='some'"), ({"save_every": -1}, "save_every=-1"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_and_nothing_is_written(settings, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        train(GRID, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_grid_that_does_not_fit_memory_is_refused_when_it_is_planned(tmp_path):
    for changes in ({"n_neurons": 2**31 - 1}, {"steps": 2**62}, {"batch_size": 2**31 - 1}, {"n_features": 2**31 - 1}):
        with pytest.raises(ValueError, match="one such model takes"):
            train(TINY.replace(**{"feature_prob": 0.5, **changes}), tmp_path)


def test_a_block_too_large_for_memory_is_split_and_its_results_do_not_change(undisturbed, tmp_path, monkeypatch):
    from fastmono import plan, runner

    need = plan.block_bytes(GRID.specs[:2], "cpu") + plan.PROCESS_BYTES
    small = plan.Machine(cores=1, memory=int(need / plan.MEMORY_SHARE) + 2, flops=1e11)
    monkeypatch.setattr(runner, "this_machine", lambda: small)
    planned = fm.plan_run(GRID, tmp_path)
    assert [len(job.specs) for job in planned.shards[0].jobs] == [2, 2, 2]
    same_results(train(GRID, tmp_path), undisturbed)


def test_every_precision_trains_and_differs(tmp_path):
    runs = {p: train(fm.Grid(TINY), tmp_path / p, precision=p) for p in ("fp32", "tf32", "bf16")}
    assert [run.engine for run in runs.values()] == ["cpu", "reference", "reference"]
    losses = {float(run.losses[0, -1]) for run in runs.values()}
    assert len(losses) == 3 and max(losses) < 1.05 * min(losses)


def test_training_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(GRID, tmp_path)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_block_that_memory_does_not_hold_is_halved_and_its_results_do_not_change(
    when, undisturbed, tmp_path, monkeypatch
):
    from fastmono.engines.cpu import CpuEngine

    advance = CpuEngine.advance

    def scarce(self, block, n_steps):
        if len(block.models) > 2 and (when == "at once" or block.step >= 16):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self, block, n_steps)

    monkeypatch.setattr(CpuEngine, "advance", scarce)
    run = train(GRID, tmp_path)
    same_results(run, undisturbed)
    assert "out of memory with 6 models; on with 3" in (tmp_path / "events.jsonl").read_text()


def test_one_model_that_memory_does_not_hold_is_reported(tmp_path, monkeypatch):
    from fastmono.engines.cpu import CpuEngine

    def none(self, block, n_steps):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CpuEngine, "advance", none)
    with pytest.warns(RuntimeWarning) as said:
        run = train(GRID, tmp_path)
    texts = [str(warning.message) for warning in said if warning.category is RuntimeWarning]
    assert texts == [f"model {i} failed: OutOfMemoryError: CUDA out of memory" for i in range(6)]
    assert {row["status"] for row in run.table} == {"failed"}
