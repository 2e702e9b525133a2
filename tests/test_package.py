"""What installing and importing promise."""

import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_trains_where_triton_does_not_exist():
    code = """
import sys, tempfile
sys.modules["triton"] = None
import fastmono as fm
spec = fm.ModelSpec(n_features=8, d_embed=3, n_neurons=4, batch_size=4, steps=3, feature_prob=.5)
print(fm.train(spec, tempfile.mkdtemp(), quiet=True).table[0]["status"])
"""
    assert run(code) == "done\n"


def test_importing_loads_no_drawing_and_changes_no_setting():
    code = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
import sys, fastmono
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
print("matplotlib" in sys.modules, "triton" in sys.modules and not torch.cuda.is_available())
"""
    assert run(code).startswith("False")


def test_importing_takes_less_than_two_seconds_more_than_torch():
    code = """
import torch, time
started = time.perf_counter()
import fastmono
print(time.perf_counter() - started)
"""
    assert min(float(run(code)) for _ in range(2)) < 2.0


def test_kernels_are_installed_inside_the_package():
    assert run("import fastmono.kernels; print(fastmono.kernels.__name__)") == "fastmono.kernels\n"


def test_public_names_are_those_of_the_contract():
    code = """
import fastmono as fm
for name in ("ModelSpec", "Grid", "train", "load_run", "metrics", "plots", "preset"):
    getattr(fm, name)
for name in ("single_feature_activations", "monosemanticity"):
    getattr(fm.metrics, name)
for name in fm.__all__:
    getattr(fm, name)
"""
    run(code)
