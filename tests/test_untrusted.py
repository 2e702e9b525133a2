"""A run directory that somebody else has made: each trick is an error that names the file, or harmless."""

import csv
import io
import json

import pytest
import torch
from loaders import GRID, HASHES, Sample, complaints, load, lock, resume, telemetry

from benchmarks import markdown
from fastmono.files import BadFile, TensorFile, printable, read_json, write_tensors
from fastmono.rows import read_csv, write_csv
from fastmono.store import RunDirectory
from fastmono.tables import Telemetry

READERS = {
    "grid.json": load, "models.csv": load, "history.safetensors": load, "checkpoints/state-*": resume,
    "checkpoints/step-000000000004-*": load, "telemetry.csv": telemetry, "lock": lock,
}  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return Sample(tmp_path_factory.mktemp("untrusted") / "run")


@pytest.fixture(autouse=True)
def sound(sample):
    yield
    sample.restore()


def test_a_sound_run_is_read_without_complaint(sample):
    for reader in READERS.values():
        assert not complaints(sample, reader)


GRIDS = {
    "a deep list": lambda text: b"[" * 1_000_000,
    "a deep object": lambda text: b'{"a":' * 1_000_000,
    "NaN for a learning rate": lambda text: text.replace(b'"lr": 0.003', b'"lr": NaN'),
    "infinity": lambda text: text.replace(b'"lr": 0.003', b'"lr": 1e999'),
    "an integer of a million digits": lambda text: text.replace(b'"steps": 18', b'"steps": 1' + b"0" * 1_000_000),
    "an integer of four thousand digits": lambda text: text.replace(b'"steps": 18', b'"steps": 1' + b"0" * 4000),
    "a name twice": lambda text: text.replace(b'"lr": 0.003', b'"lr": 0.003, "lr": 0.003'),
    "a field of ours that is not one": lambda text: text.replace(b'"lr"', b'"' + b"\\u001b[2J" * 100_000 + b'"', 1),
    "not UTF-8": lambda text: text.replace(b"decoder", b"decoder").replace(b"relu", b"re\xff\xfelu"),
    "half a character": lambda text: text.replace(b"relu", b"\\ud800"),
    "an engine with an escape sequence": lambda text: text.replace(b'"reference"', b'"\\u001b]0;pwned\\u0007"'),
    "an engine that is a list": lambda text: text.replace(b'"reference"', b"[[]]"),
    "a schema that is an object": lambda text: text.replace(b'"schema": 1', b'"schema": {"a": [1]}'),
    "no models": lambda text: b'{"schema": 1, "engine": "cpu", "precision": "fp32", "models": []}',
    "a path for a model": lambda text: b'{"schema": 1, "engine": "cpu", "precision": "fp32", "models": ["../../x"]}',
    "nine million lists": lambda text: b"[" + b"[]," * 9_000_000 + b"0]",
}


@pytest.mark.parametrize("trick", GRIDS)
def test_a_grid_file_with_a_trick_is_refused_by_name_in_one_printable_line(trick, sample):
    text = sample.files[sample.path / "grid.json"]
    assert GRIDS[trick](text) != text
    for reader in (load, resume):
        assert "grid.json: " in sample.read(("grid.json", reader, "whole"), GRIDS[trick](text))


@pytest.mark.parametrize("text", ['{"a": NaN}', "[Infinity]", "[-Infinity]", '{"b": {"c": 1, "c": 2}}', "\ufeff{}"])
def test_json_that_is_more_than_json_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadFile, match=r"x\.json: is not valid JSON"):
        read_json(tmp_path / "x.json")


HEADERS = {
    "a step that is a text": {"step": "../../x"},
    "a step that is not whole": {"step": 4.5},
    "a step of its own": {"step": 10**15},
    "a step below 0": {"step": -1},
    "models that are paths": {"models": ["../../../etc/passwd", "/etc/passwd"]},
    "a model twice": {"models": [HASHES[0], HASHES[0]]},
    "a row too many": {"models": [*HASHES, "0" * 32]},
    "a projection that is not there": {"projection": [0, 7]},
    "a projection from behind": {"projection": [0, -1]},
    "a truth for a projection": {"projection": [True, 0]},
    "a divergence at NaN": {"diverged_step": [float("nan"), None]},
    "a divergence that is an object": {"diverged_step": [{"step": 3}, None]},
    "checksums that are a list": {"crc32": [1, 2]},
    "checksums of a tensor that are a number": {"crc32": {"W_in": 5}},
    "another kind": {"kind": "history"},
    "a newer schema": {"schema": 2},
}


@pytest.mark.parametrize("file", [name for name in READERS if "checkpoints" in name])
@pytest.mark.parametrize("trick", HEADERS)
def test_a_tensor_file_whose_header_claims_what_is_not_so_is_named(trick, file, sample):
    kind = (file, READERS[file], "header")
    text = json.dumps({**json.loads(sample.part(kind)), **HEADERS[trick]})
    assert file.split("/")[1].rstrip("*") in (sample.read(kind, text.encode()) or "")


LACKS = ["schema", "kind", "step", "models", "projection", "diverged_step", "crc32"]


@pytest.mark.parametrize("file", [name for name in READERS if "checkpoints" in name])
@pytest.mark.parametrize("name", LACKS)
def test_a_tensor_file_whose_header_lacks_a_name_is_named(name, file, sample):
    kind = (file, READERS[file], "header")
    header = json.loads(sample.part(kind))
    del header[name]
    assert file.split("/")[1].rstrip("*") in (sample.read(kind, json.dumps(header).encode()) or "")


@pytest.mark.parametrize(
    "text", ["", "5", "[]", "{", '{"crc32": 5}', '{"crc32": {}, "measures": 5}', "{} {}", "[" * 10_000]
)
@pytest.mark.parametrize("file", [name for name in READERS if name.endswith(("*", "tensors"))])
def test_a_tensor_file_whose_header_is_no_header_is_named(text, file, sample):
    kind = (file, READERS[file], "header")
    assert file.split("/")[-1].rstrip("*") in (sample.read(kind, text.encode()) or "")


def test_a_state_that_has_not_logged_what_its_step_has_is_named(sample):
    kind = ("checkpoints/state-*", resume, "header")
    header = json.loads(sample.part(kind))
    assert header["step"] == 18  # whose losses are those after 1, 17 and 18 steps
    assert "does not fit its models: losses is [2, 3]" in sample.read(kind, json.dumps({**header, "step": 16}).encode())


def test_a_tensor_file_of_another_shape_is_refused_before_it_is_read(sample, monkeypatch):
    path = sample.file("checkpoints/state-*")
    tensors, header = TensorFile(path).read_all(), TensorFile(path).header
    directory = RunDirectory(sample.path)
    directory.expected = dict(zip(HASHES, GRID, strict=True))
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("was read"))
    for name, tensor in tensors.items():
        wider = torch.cat([tensor, tensor], 1 if tensor.dim() > 1 else 0)
        write_tensors(path, tensors | {name: wider}, header)
        with pytest.warns(UserWarning, match=f"does not fit its models: {name} is"):
            assert directory.newest_states(HASHES, verify=False)[HASHES[0]].step < header["step"]


TABLES = {
    "NaN for a count": ("mono_neurons", "inf"),
    "more monosemantic neurons than neurons": ("mono_neurons", "5"),
    "a negative count": ("dead_neurons", "-1"),
    "a divergence after the end": ("diverged_step", "19"),
    "an integer of five thousand digits": ("diverged_step", "9" * 5000),
    "a status that is none": ("status", "=cmd|' /C calc'!A0"),
    "an escape sequence": ("final_loss", "\x1b[2J"),
    "a text for a loss": ("final_loss", "much"),
}


@pytest.mark.parametrize("trick", TABLES)
def test_a_table_with_a_cell_that_is_no_value_of_its_column_is_refused_by_name(trick, sample):
    column, value = TABLES[trick]
    head, first, *rest = sample.files[sample.path / "models.csv"].decode().splitlines()
    cells = first.split(",")
    cells[head.split(",").index(column)] = value
    text = "\n".join([head, ",".join(cells), *rest])
    said = sample.read(("models.csv", load, "whole"), text.encode())
    assert "models.csv: " in said and column in said


@pytest.mark.parametrize(
    "text",
    [b"lr,lr\n1,2\n", b'lr\n"1\n2"\n', b"lr\n\xff\n", b"lr\n1,2\n", b"", b"lr\n" + b"1" * 70_000, b"lr\n" * 300_000],
)
def test_what_is_no_table_is_refused_by_name(text, tmp_path):
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(BadFile, match=r"t\.csv: "):
        read_csv(tmp_path / "t.csv", ["lr"])


RESULTS = {
    "a list": "[]",
    "no cases": '{"cases": []}',
    "a deep list": "[" * 100_000,
    "NaN": '{"cases": [{"machine": {"fp32": {"median": NaN}}}]}',
    "texts for numbers": '{"cases": [{"machine": {"fp32": {"median": "\\u001b[2J"}}}], "command": 1}',
}


@pytest.mark.parametrize("trick", RESULTS)
def test_what_is_not_the_result_of_a_benchmark_is_refused_by_name(trick, tmp_path, capsys):
    (tmp_path / "result.json").write_text(RESULTS[trick])
    with pytest.raises(SystemExit) as ended:
        markdown.main([str(tmp_path / "result.json")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "result.json" in said and said.isprintable()


# What a terminal and a spreadsheet would do


def test_an_escape_sequence_in_the_name_of_a_file_does_not_reach_the_terminal(sample):
    (sample.path / "checkpoints" / "state-\x1b]0;owned\x07\x1b[2J-1.safetensors").write_bytes(b"no tensors")
    with pytest.warns(UserWarning, match="corrupted") as caught:
        resume(sample.path)
    assert all(str(warning.message).isprintable() for warning in caught)
    assert r"state-\x1b]0;owned" in str(caught[0].message)


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb", "\x9b2J", "\u202eexe", "\ud800", "\x00", "\u2028"])
def test_what_is_printable_has_no_control_characters_and_is_itself_otherwise(text):
    assert printable(text).isprintable() and printable(text) != text
    assert printable("ü ε 日本 -1") == "ü ε 日本 -1"


FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", "\n=1+1", "\uff1d1+1", "=\x1b[2J"]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_text_that_a_spreadsheet_would_execute_is_written_as_a_text(formula, tmp_path):
    path = tmp_path / "t.csv"
    write_csv(path, ["device", "bias"], [{"device": formula, "bias": -0.25}])
    cells = read_csv(path, ["device", "bias"])[0]
    assert cells["device"][0] not in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"  # OWASP's list, "CSV injection"
    assert float(cells["bias"]) == -0.25  # a number stays one
    write_csv(path, ["device", "bias"], [cells])
    assert read_csv(path, ["device"])[0]["device"] == cells["device"]  # and once is enough


def test_a_formula_in_earlier_telemetry_is_not_handed_on_as_one(sample):
    path = sample.path / "telemetry.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "device": '=HYPERLINK("http://x","y")', "worker": "@1"} for row in rows)
    Telemetry(RunDirectory(sample.path), dict.fromkeys(HASHES, 1)).write()
    row = next(csv.DictReader(io.StringIO(path.read_text())))
    assert row["device"].startswith("'=HYPERLINK") and row["worker"] == "'@1"


@pytest.mark.parametrize(
    ("column", "value"),
    [("seconds", "nan"), ("seconds", "inf"), ("joules", "-1"), ("sessions", "9" * 4300), ("model_steps", "-4")],
)
def test_a_count_in_earlier_telemetry_that_is_none_is_begun_anew(column, value, sample):
    path = sample.path / "telemetry.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, column: value} for row in rows)
    told = Telemetry(RunDirectory(sample.path), dict.fromkeys(HASHES, 1))
    assert all((row["sessions"], row["seconds"], row["model_steps"]) == (0, 0.0, 0) for row in told.rows.values())
