"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest
import torch

import fastmono as fm

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    library = [text for text in snippets if "fm." in text]
    assert len(library) == 2
    names: dict[str, object] = {}
    for text in library:
        exec(text.replace("steps=2048", "steps=32"), names)
    assert isinstance(names["recovered"], torch.Tensor) and names["recovered"].shape == (4, 128)
    assert isinstance(names["model"], torch.nn.Module)
    assert len(list(Path("runs/example/figures").glob("*.png"))) >= 4
    assert len(fm.load_run("runs/mine")) == 6
    # the measure of the reader's own: a line for each model at each checkpoint
    assert re.findall(r"^(\d+) 5 [\d.]+$", capsys.readouterr().out, re.M) == ["1", "2", "4", "8", "16", "32"]


def test_every_field_of_a_model_has_its_flag_in_the_table():
    table = README[README.index("## Flags") :]
    assert all(f"`--{field.replace('_', '-')}`" in table for field in fm.ModelSpec().to_dict())


@pytest.mark.parametrize("folder", ["fastmono", "fastmono/engines", "kernels", "scripts"])
def test_the_file_tree_lists_every_module_of(folder):
    tree = README[README.index("## Files") :]
    for module in sorted((ROOT / folder).glob("*.py")):
        if module.name != "__init__.py":
            assert re.search(rf"^\s+(?:\S+\.py\s+)*{re.escape(module.name)}\s", tree, re.M), module.name


def test_every_fault_that_is_promised_to_be_survived_names_a_test_that_exists():
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"), re.M)
    assert rows[0] == ("fault", "promise", "test") and len(rows) > 20
    for fault, _, tests in rows[1:]:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named, fault
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
