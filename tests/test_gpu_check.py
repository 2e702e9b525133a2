"""The check of a CUDA machine, as far as it goes where there is none."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import fastmono as fm
from fastmono.engines import has_gpu
from fastmono.engines.launch import choose_launch

PATH = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check.py"
specification = importlib.util.spec_from_file_location("gpu_check_script", PATH)
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_the_exit_code_is_2(tmp_path, capsys):
    assert script.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: there is no CUDA GPU with Triton here\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_section_that_fails_or_is_cut_off_leaves_what_it_saved_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "has_gpu", lambda: True)
    assert script.main(["--out", str(tmp_path), "--only", "device", "published", "--minutes", "1"]) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(report) == ["device", "published"] and "failed" in report["device"]
    assert "published" in capsys.readouterr().out
    (tmp_path / "device.json").write_text("{}")
    assert "cut_off" in script.run_section("device", tmp_path, 0.01)


def test_floors_of_the_papers_shape():
    """By hand, bf16: 28 GFLOP a model-step in all, each array passed once."""
    spec = fm.ModelSpec()
    launch = choose_launch(90, 512, 64, 1024, 512, 8192, "bf16")
    specs = [spec, spec.replace(lr=0.01)]
    found = script.traffic(specs, launch, 2, [1024, 1024], [False, False])
    assert found["survey_kernel"] == found["gather_kernel"] == (0, 0)
    forward, backward = found["forward_kernel"], found["backward_kernel"]
    assert forward[1] == 2 * 2 * 8192 * 1024 * 576 and forward[1] + backward[1] == 2 * spec.flops_per_step
    x, tau = 2 * 8192 * 64, 4 * 8192 * 512  # one stream for both
    assert found["project_kernel"] == (x + 2 * 512 * 64 + tau, 2 * 8192 * 512 * 64)
    assert forward[0] == x + tau + 2 * 2 * (8192 * (512 + 1024) + 1024 * 576)
    parts = 2 * (1024 * 512 + 2 * 1024 * 65)
    assert backward[0] == x + 2 * (2 * (8192 * (512 + 1024) + 1024 * 576) + 4 * parts)
    assert found["moments_kernel"][0] == 2 * 4 * (parts + 5 * 1024 * 577)
    # A quarter of the second model's neurons found by a survey: z of all of its neurons, and the rest of a quarter.
    sparse = script.traffic(specs, launch, 2, [1024, 256], [False, True])
    assert sparse["survey_kernel"] == (x + 4 * 1024 * 65, 2 * 8192 * 1024 * 64)
    assert sparse["gather_kernel"] == (256 * (6 * 576 + 8), 0)
    for name in ("forward_kernel", "backward_kernel"):
        assert sparse[name][1] == found[name][1] * 5 / 8
    assert sparse["moments_kernel"][0] == found["moments_kernel"][0] - 4 * parts * 3 / 4
    assert sparse["apply_kernel"] == found["apply_kernel"]
    dead = script.traffic(specs, launch, 2, [1024, 0], [False, True])
    assert dead["backward_kernel"][0] - x == (backward[0] - x) / 2
