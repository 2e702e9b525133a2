"""The Triton kernels, compiled for GPUs that are not here, in a process of its own that does not interpret."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.compile_only, pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")]


def test_no_half_precision_kernel_spills_and_the_table_of_resources_is_current():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 0 < int(done.stdout.split()[0]) <= 90 and "variants compiled" in done.stdout


@pytest.mark.skipif(INTERPRETING, reason="kernels are something else in the interpreter")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "backward", "narrow", "project", "resident"])
def test_the_memory_of_a_programs_descriptors_is_what_the_compiled_kernel_asks_for(kernel, architecture):
    from benchmarks import kernel_resources as table
    from fastmono.engines.device_memory import DESCRIPTOR_BYTES, descriptors_of

    shape = {"narrow": "narrow 64", "resident": "demo"}.get(kernel, "published")
    variants = [table.Variant(kernel, shape, "bf16")]
    if architecture == 90 and kernel in ("forward", "backward"):
        variants += [table.Variant(kernel, shape, "bf16", **other) for other in ({"activation": "gelu"}, {"linear": 1})]
    for variant in variants:
        expected = descriptors_of(table.launch_of(variant, architecture), variant.activation).get(kernel, 0)
        found = table.compile_variant(variant, architecture).metadata.global_scratch_size
        assert found == DESCRIPTOR_BYTES * expected, variant


@pytest.mark.skipif(INTERPRETING, reason="kernels are something else in the interpreter")
@pytest.mark.parametrize("file", ["project", "survey", "forward", "backward", "narrow", "update", "resident"])
def test_no_number_that_a_kernel_is_given_makes_another_binary(file):
    """Triton compiles anew for 1 and for multiples of 16: which models stand beside one must not show in its code."""
    module = importlib.import_module(f"fastmono.kernels.{file}")
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    assert kernels
    for name, kernel in kernels.items():
        numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.startswith("p_") and p.name != "unit"]
        assert [p.name for p in numbers if not p.do_not_specialize] == [], name
