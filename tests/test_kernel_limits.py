"""The table of what the streamed kernels can reach, against numbers by hand."""

import pytest

import fastmono as fm
from fastmono.engines.launch import choose_launch

pytest.importorskip("triton", reason="the launch settings are Triton's")
limits = pytest.importorskip("benchmarks.kernel_limits")


def test_limits_of_the_papers_shape():
    """By hand: tiles of 128 rows, 64 neurons and 128 outputs, so z is computed four times in each of both passes."""
    spec = fm.ModelSpec()
    launch = choose_launch(90, 512, 64, 1024, 512, 8192, "bf16")
    assert (launch.BR, launch.BK, launch.BO, launch.BP, launch.rows) == (128, 64, 128, 128, 4096)
    found = {work.kernel: work for work in limits.works(spec, launch)}
    assert sum(work.useful for work in found.values()) == spec.flops_per_step
    assert found["forward"].done == 2 * 8192 * 1024 * (4 * 64 + 512)
    assert found["backward"].done == 4 * 8192 * 1024 * (4 * 64 + 512)
    assert found["backward"].cache == 2 * 16 * 8192 * (4 * 64 + 512) + 4 * 2 * (1024 * 512 + 4 * 1024 * 65)
    assert found["apply"].memory == 16 * 1024 * 577 + 2 * 1024 * 576
    useful = spec.flops_per_step / 798e12
    assert limits.share(list(found.values()), ("product",)) == pytest.approx(
        useful / (sum(work.done for work in found.values()) / 798e12)
    )
