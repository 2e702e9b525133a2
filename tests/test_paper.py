"""`python scripts/paper.py`: what it plans, that models are shared and trained once, and that it can be stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import fastmono as fm
from fastmono import paper
from fastmono.presets import SWEEPS

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("paper_script", ROOT / "scripts" / "paper.py")
paper_script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(paper_script)
main = paper_script.main


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("flags", "models"),
    [
        (["--scale", "full"], 258),
        ([], 243),
        (["--quick"], 98),
        (["--only", "width"], 36),
        (["--only", "l1", "task"], 63),
    ],
)
def test_the_plan_counts_shared_models_once_and_writes_nothing(flags, models, capsys):
    assert main([*flags, "--dry-run"]) == 0
    *sweeps, total, _ = capsys.readouterr().out.splitlines()
    left = [int(line.split("models,")[1].split()[0]) for line in sweeps]
    assert sum(left) == models and f" {models} to train" in total and "FLOP" in total
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scale", "huge"], "scale='huge': must be small or full"), (["--only", "none"], "only='none'"),
        (["--quick", "--scale", "full"], "--quick"), (["--workers", "x"], "workers='x'"),
        (["--workers", "0"], "workers=0"), (["--out", ""], "out=''"), (["--out", "/dev/null"], "/dev/null"),
        (["--lr", "1"], "--lr"), (["stray"], "stray"),
    ],
)  # fmt: skip
def test_bad_arguments_end_in_exit_code_2_and_one_line(flags, said, capsys):
    assert main(flags) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and said in errors and errors.count("\n") == 1
    assert not list(Path.cwd().iterdir())


def test_a_directory_of_other_models_is_not_grown_by_accident(capsys):
    fm.train(fm.ModelSpec(n_features=4, d_embed=2, n_neurons=4, feature_prob=0.5, batch_size=4, steps=4), "other")
    assert main(["--quick", "--out", "other"]) == 2
    assert "other holds 1 models that are in no sweep of scale quick" in capsys.readouterr().err


def test_sweeps_share_models_and_what_is_done_is_not_trained_again(capsys, monkeypatch):
    assert main(["--quick", "--only", "l1", "--out", "run"]) == 0
    first = Path("run/report.md").read_text()
    assert SWEEPS["l1"].title in first and SWEEPS["init-bias"].title not in first
    assert "4 done" in first
    before = dict(zip(fm.load_run("run").specs, fm.load_run("run").table, strict=True))
    capsys.readouterr()
    assert main(["--quick", "--only", "lr-zero-bias", "--out", "run"]) == 0
    assert "6 models,    4 to train" in capsys.readouterr().out
    run = fm.load_run("run")
    assert len(run) == 8 and {row["status"] for row in run.table} == {"done"}
    for spec, row in before.items():  # nothing of them has changed
        assert run.table[run.specs.index(spec)] == pytest.approx(row, nan_ok=True)
    second = Path("run/report.md").read_text()
    assert second.index(SWEEPS["lr-zero-bias"].title) < second.index(SWEEPS["l1"].title)

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(paper, "train", refuse)
    assert main(["--quick", "--only", "lr-zero-bias", "l1", "--out", "run"]) == 0
    assert Path("run/report.md").read_text() == second


def test_what_was_begun_is_finished_first_and_ctrl_c_loses_no_sweep_that_is_done(capsys, monkeypatch):
    trained = paper.train

    def stops(grid, *arguments, **settings):
        if len(grid) > 4:
            raise KeyboardInterrupt
        return trained(grid, *arguments, **settings)

    monkeypatch.setattr(paper, "train", stops)
    assert main(["--quick", "--only", "l1", "width", "--out", "run"]) == 1
    assert "the same command continues" in capsys.readouterr().err
    assert SWEEPS["l1"].title in Path("run/report.md").read_text()
    half = paper._grown(SWEEPS["l1"].grid("quick"), [SWEEPS["width"].grid("quick")[0]])
    monkeypatch.setattr(paper, "train", trained)
    torch.manual_seed(0)
    ((_, run),) = paper.train_sweeps([SWEEPS["l1"]], "quick", "run")
    assert len(run) == 4
    fm.train(half, "run", quiet=True)
    ((_, run),) = paper.train_sweeps([SWEEPS["activation"]], "quick", "run")
    assert set(half) < set(run.specs) and {row["status"] for row in run.table} == {"done"}


def test_models_that_failed_end_in_exit_code_1_and_are_not_results(capsys, monkeypatch):
    from fastmono.engines.cpu import CpuEngine

    def fails(self, block, n_steps):
        raise MemoryError("nothing left")

    monkeypatch.setattr(CpuEngine, "advance", fails)
    assert main(["--quick", "--only", "l1", "--out", "run"]) == 1
    said = capsys.readouterr()
    errors = said.err.splitlines()
    assert len(errors) == 4 and all(line.endswith("failed: MemoryError: nothing left") for line in errors)
    assert "4 failed" in Path("run/report.md").read_text()


def test_a_part_of_a_run_is_that_part_of_its_results():
    base = fm.ModelSpec(n_features=6, d_embed=3, n_neurons=8, feature_prob=0.25, batch_size=8, steps=40)
    run = fm.train(fm.Grid(base, lr=[1e-3, 1e-2]) + fm.Grid(base.replace(steps=100), lr=[1e-2]), "run", quiet=True)
    part = run.subset([run.specs[1], run.specs[0]])
    assert part.specs == (run.specs[1], run.specs[0]) and part.table == [run.table[1], run.table[0]]
    assert part.logged_steps.tolist() == [1, 17, 33, 40] and part.checkpoint_steps.tolist() == [1, 2, 4, 8, 16, 32, 40]
    assert not part.losses.isnan().any() and len(part) == 2
    for i, j in enumerate((1, 0)):
        own = run.losses[j][~run.losses[j].isnan()]
        assert torch.equal(part.losses[i], own)
        assert all(torch.equal(part.parameters(i)[name], value) for name, value in run.parameters(j).items())
        alone = run.metrics["mean_bias"][j]
        assert torch.equal(part.metrics["mean_bias"][i], alone[~alone.isnan()])
    assert len(run) == 3 and len(run.logged_steps) > 4  # as it was
    with pytest.raises(ValueError, match="has no model with"):
        run.subset([base.replace(lr=0.5)])


@pytest.mark.slow
def test_the_whole_paper_at_its_quickest(capsys):
    assert main(["--quick", "--out", "run"]) == 0
    text = Path("run/report.md").read_text()
    assert all(sweep.title in text for sweep in SWEEPS.values()) and "98 done" in text and "Inside the models" in text
