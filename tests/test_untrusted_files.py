"""What lies in a run directory in place of a file; what a claim of gigabytes costs; and that nothing is executed."""

import ast
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from loaders import GRID, Sample, complaints, decisions, load, resume, telemetry

import fastmono as fm
from fastmono.files import BadFile, DirectoryLock, write_bytes

TESTS = Path(__file__).parent


def take_lock(path):
    DirectoryLock(path).release()


READERS = {
    "grid.json": load, "models.csv": load, "history.safetensors": load, "checkpoints/state-*": resume,
    "checkpoints/step-000000000004-*": load, "telemetry.csv": telemetry, "lock": take_lock,
    "halving.json": decisions,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Sample(tmp_path_factory.mktemp("untrusted") / "run")


@pytest.fixture
def sample(made):
    yield made
    made.restore()


def replaced(path, how, outside):
    """Put something else where a file was, and the file outside. Returns its content."""
    target = outside / path.name
    path.rename(target)
    if how == "a link":
        path.symlink_to(target)
    elif how == "a link to a device":
        path.symlink_to("/dev/zero")
    elif how == "a FIFO":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    return target.read_bytes()


@pytest.mark.parametrize("how", ["a link", "a link to a device", "a FIFO", "a folder"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_not_a_file_is_not_read_in_its_place(name, how, sample, tmp_path):
    path = sample.file(name)
    before = replaced(path, how, tmp_path)
    signal.setitimer(signal.ITIMER_REAL, 60)  # opening a FIFO blocks for ever: then the alarm ends the tests
    try:
        said = complaints(sample, READERS[name])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    # Telemetry is no result: it is begun anew, in the link's place and not through it.
    assert path.name in said or name == "telemetry.csv"
    assert (tmp_path / path.name).read_bytes() == before


@pytest.mark.parametrize("name", ["lock", "events.jsonl"])
def test_a_file_that_is_written_in_place_is_not_written_through_a_link(name, sample, tmp_path):
    before = replaced(sample.path / name, "a link", tmp_path)
    with pytest.raises(BadFile, match=f"{name}: is a symbolic link"):
        fm.train(GRID, sample.path, engine="reference", workers=1, quiet=True)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoints", "figures"])
def test_a_folder_that_is_a_link_is_neither_read_nor_emptied(name, sample, tmp_path):
    folder = sample.path / name
    folder.mkdir(exist_ok=True)
    (folder / "holiday.png").write_bytes(b"precious")
    folder.rename(tmp_path / name)
    folder.symlink_to(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    try:
        for again in (True, False):
            with pytest.raises(BadFile, match=f"{name}: is a symbolic link"):
                fm.train(GRID, sample.path, engine="reference", workers=1, quiet=True, resume=again)
        with pytest.raises(BadFile, match=f"{name}: is a symbolic link"):
            fm.load_run(sample.path)
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        folder.unlink()
        (tmp_path / name).rename(folder)


def test_a_link_under_the_name_of_a_temporary_file_is_not_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0a1b2c3d")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / ".x.0a1b2c3d.writing").symlink_to(tmp_path / "precious")
    write_bytes(tmp_path / "x", b"new")
    assert ((tmp_path / "precious").read_bytes(), (tmp_path / "x").read_bytes()) == (b"precious", b"new")
    assert sorted(os.listdir(tmp_path)) == ["precious", "x"]


def test_what_claims_gigabytes_costs_neither_memory_nor_time(tmp_path):
    command = [sys.executable, str(TESTS / "bombs.py"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 11
    for name, said, mebibytes, seconds in found:
        assert str(tmp_path) in said or name == "a lock of 10 GB", (name, said)
        assert mebibytes < 800 and seconds < 20, (name, mebibytes, seconds)  # the processor's: others may be at work


AUDIT = """
import sys
from loaders import Sample, load, resume, telemetry
sample, heard = Sample(sys.argv[1]), []
for read in (load, resume, telemetry):  # now what they import is imported
    read(sample.path)
watched = ("open", "exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen", "import", "socket.connect")
sys.addaudithook(lambda event, arguments: heard.append((event, str(arguments[0]))) if event in watched else None)
for read in (load, resume, telemetry):
    read(sample.path)
# A number is a file that is open already.
print("\\n".join(sorted({f"{event} {what}" for event, what in heard if not what.isdecimal()})))
"""


def test_reading_a_run_opens_its_files_alone_and_executes_nothing(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", AUDIT, str(run)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    heard = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(heard) > 5
    for event, what in heard:
        assert event == "open" and Path(what).resolve().is_relative_to(run.resolve()), (event, what)


FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
CALLS = {"torch.load", "np.load", "numpy.load", "eval", "exec", "yaml.load", "pd.read_pickle"}


@pytest.mark.parametrize("folder", ["fastmono", "scripts", "benchmarks"])
def test_no_code_unpickles_or_evaluates_what_it_reads(folder):
    for path in (TESTS.parent / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {str(getattr(node, "module", ""))}
                assert not names & FORBIDDEN, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CALLS, path
