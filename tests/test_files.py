"""What a run directory does with damaged, foreign and half-written files, and with a second process."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

import fastmono as fm
from fastmono import store, tables
from fastmono.files import BadFile, DirectoryLock, TensorFile, write_bytes, write_tensors

TINY = fm.ModelSpec(n_features=12, d_embed=5, n_neurons=9, feature_prob=0.25, batch_size=24, steps=40, lr=0.01)
GRID = fm.Grid(TINY, lr=[0.003, 0.01])


def train(out, **settings):
    return fm.train(GRID, out, **{"workers": 1, "quiet": True, **settings})


@pytest.fixture
def run(tmp_path):
    return train(tmp_path / "run")


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "one bit changed":
        data[-5] ^= 4
    elif how == "header changed":
        data[data.index(b"fastmono") + 40] ^= 1
    elif how == "foreign":
        data = bytearray(b"PK\x03\x04 something else entirely" * 50)
    path.write_bytes(data)


DAMAGES = ["truncated", "empty", "one bit changed", "header changed", "foreign"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_tensor_file_is_named(how, tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(12.0).view(3, 4)}, {"kind": "test"})
    assert torch.equal(TensorFile(path).read("a", 1), torch.arange(4.0, 8.0))
    damage(path, how)
    with pytest.raises(BadFile, match=r"x\.safetensors"):
        TensorFile(path).read_all()


def test_a_row_is_verified_by_itself(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(12.0).view(3, 4)}, {"kind": "test"})
    damage(path, "one bit changed")  # in the last row
    assert torch.equal(TensorFile(path).read("a", 0), torch.arange(4.0))
    with pytest.raises(BadFile, match="tensor a has changed"):
        TensorFile(path).read("a", 2)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_state_is_named_and_the_older_one_continued_to_the_same_bits(how, run):
    expected = (run.path / "history.safetensors").read_bytes(), (run.path / "models.csv").read_bytes()
    parameters = run.parameters(1)
    newest = max(run.directory.checkpoints.glob("state-*"))
    damage(newest, how)
    with pytest.warns(UserWarning, match=newest.name):
        again = train(run.path)
    assert ((run.path / "history.safetensors").read_bytes(), (run.path / "models.csv").read_bytes()) == expected
    assert all(torch.equal(parameters[name], again.parameters(1)[name]) for name in parameters)
    log = (run.path / "events.jsonl").read_text()
    assert "from step 32" in log  # the older state, not the beginning


def test_when_every_state_is_damaged_the_models_are_trained_anew(run):
    expected = (run.path / "models.csv").read_bytes()
    for path in run.directory.checkpoints.glob("state-*"):
        damage(path, "truncated")
    with pytest.warns(UserWarning, match="truncated"):
        train(run.path)
    assert (run.path / "models.csv").read_bytes() == expected


def vanishing(module, monkeypatch):
    """Have the newest state deleted at the moment when `module` opens it, as a worker does that has a newer one."""
    real = module.TensorFile

    def opened(path):
        if path.name.endswith("-000000000040.safetensors") and path.name.startswith("state-"):
            path.unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(module, "TensorFile", opened)


@pytest.mark.parametrize("module", [store, tables])
def test_a_state_that_is_replaced_while_it_is_read_is_not_taken_for_damaged(module, run, monkeypatch):
    vanishing(module, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = tables.write_tables(run.directory, run.grid, run._hashes, dict.fromkeys(run._hashes, "running"))
    assert [row["eval_loss"] for row in rows] == run.metrics["eval_loss"][:, -2].tolist()  # of the state at step 32


def test_parameters_of_a_run_in_training_are_those_of_a_newer_state_when_the_listed_one_has_gone(tmp_path):
    train(tmp_path, checkpoints="none")
    loaded = fm.load_run(tmp_path)
    assert loaded.kept_steps(0) == [32, 40]
    max(loaded.directory.checkpoints.glob("state-*")).unlink()
    assert torch.equal(loaded.parameters(0)["b"], loaded.parameters(0, step=32)["b"])
    with pytest.raises(ValueError, match="has steps 32"):
        loaded.parameters(0, step=40)


def test_without_its_damaged_grid_file_a_run_goes_on_from_its_states(run):
    expected = (run.path / "models.csv").read_bytes()
    damage(run.path / "grid.json", "truncated")
    with pytest.raises(
        ValueError, match=r"grid\.json: is truncated or corrupted: remove it, and the same command goes"
    ):
        train(run.path)
    (run.path / "grid.json").unlink()
    train(run.path)
    assert (run.path / "models.csv").read_bytes() == expected
    plans = [line for line in (run.path / "events.jsonl").read_text().splitlines() if '"kind": "plan"' in line]
    assert "2 finished" in plans[-1]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_when_its_parameters_are_asked_for(how, run):
    path = next(run.directory.checkpoints.glob("step-000000000004-*"))
    damage(path, how)
    loaded = fm.load_run(run.path)
    if how == "one bit changed":
        with pytest.raises(BadFile, match=path.name):
            loaded.parameters(1, step=4)
    else:
        with pytest.warns(UserWarning, match=path.name), pytest.raises(ValueError, match="has steps"):
            loaded.parameters(1, step=4)


@pytest.mark.parametrize("name", ["grid.json", "models.csv", "history.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "empty", "foreign"])
def test_loading_a_run_with_a_damaged_file_names_it(name, how, run):
    damage(run.path / name, how)
    with pytest.raises(ValueError, match=name):
        fm.load_run(run.path)


@pytest.mark.parametrize("name", ["models.csv", "history.safetensors", "telemetry.csv"])
def test_a_damaged_derived_file_is_made_anew_by_the_next_run(name, run):
    expected = (run.path / name).read_bytes()
    damage(run.path / name, "truncated")
    train(run.path)
    if name != "telemetry.csv":
        assert (run.path / name).read_bytes() == expected


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"schema": 99, "models": []}', '{"schema": 1, "models": [{"lr": "x"}], "engine": "cpu"}',
             "[" * 100_000]
)  # fmt: skip
def test_a_grid_file_that_is_not_ours_is_refused_by_name(text, run):
    (run.path / "grid.json").write_text(text)
    for read in (fm.load_run, train):
        with pytest.raises(ValueError, match=r"grid\.json"):
            read(run.path)


def test_a_field_that_an_older_grid_file_lacks_takes_its_default(run):
    values = json.loads((run.path / "grid.json").read_text())
    for spec in values["models"]:
        del spec["l1"], spec["seed"]
    (run.path / "grid.json").write_text(json.dumps(values))
    assert fm.load_run(run.path).grid == GRID


def test_loading_what_is_not_a_run_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"grid\.json: there is no such file"):
        fm.load_run(tmp_path)


def test_a_file_where_the_directory_should_be_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        train(tmp_path / "run")


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_what_a_killed_writer_left_behind_is_removed(run):
    run.directory.figures.mkdir()
    left = [run.directory.checkpoints / ".state-x.safetensors.1234.writing"]
    left.append(run.directory.figures / ".training_curves.png.1234.writing")
    for path in left:
        path.write_bytes(b"half")
    train(run.path)
    assert not any(path.exists() for path in left)


HOLD = """
import sys, time, pathlib
from fastmono.files import DirectoryLock
lock = DirectoryLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_who_holds_the_directory(holder, tmp_path):
    started = time.monotonic()
    for _ in range(2):  # who is refused leaves the holder's name there
        with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid}"):
            train(tmp_path)
    assert time.monotonic() - started < 5
    assert not (tmp_path / "grid.json").exists()


def test_the_lock_of_a_process_that_was_killed_is_taken_over(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    DirectoryLock(tmp_path).release()


def test_the_lock_is_free_after_an_error(run):
    with pytest.raises(ValueError, match="lacks"):
        fm.train(GRID.override(steps=[41]), run.path, workers=1, quiet=True)
    DirectoryLock(run.path).release()
