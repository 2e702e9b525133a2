"""Tests for a rehearsal of call 1: one that trains in Triton's interpreter, and one for each kind of fault."""

import pytest
import torch

from benchmarks.gpu.cases import TINY
from benchmarks.gpu.planted import go_wrong
from fastmono.block import Block
from fastmono.engines.reference import ReferenceEngine
from fastmono.engines.triton import TritonEngine

GROUPS = {name: rf"test_{name}\b" for name in ("right", "wrong")}
GROUPS["device"] = r"test_device_\w+"
GROUPS |= {fault: rf"test_fault\[{fault}\]" for fault in ("crash", "hang", "kill", "memory")}


@pytest.fixture
def switches(request):
    return request.config.getoption("switches")


def losses(engine):
    spec = TINY.replace(n_features=12, d_embed=4, n_neurons=16, batch_size=32)
    return engine.advance(Block.new([spec]), 3)


def test_right(switches):
    assert torch.allclose(losses(TritonEngine("fp32", **switches)), losses(ReferenceEngine()), rtol=1e-4)


def test_wrong(switches):
    """As if the copy engine brought something else."""
    ours = losses(TritonEngine("fp32", **switches)) * (1.01 if switches.get("bulk", True) else 1.0)
    assert torch.allclose(ours, losses(ReferenceEngine()), rtol=1e-4)


def test_device_refuses():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_device_is_there_for_another_process():
    """It would fail after the test before, in the same process."""


@pytest.mark.parametrize("fault", ["crash", "hang", "kill", "memory"])
def test_fault(fault):
    go_wrong(fault)
