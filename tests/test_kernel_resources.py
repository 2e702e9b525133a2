"""The table of resources: what is kept of it when another Triton is added, and what it must not hold."""

import os

import pytest

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.compile_only,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are something else in the interpreter"
    ),
]
kernel_resources = pytest.importorskip("benchmarks.kernel_resources")


def row(triton, stack=0):
    return {"triton": triton, "stack": stack}


def versions(rows, table):
    return [(found["triton"], found["stack"]) for found in kernel_resources.merged(rows, table)]


def test_rows_of_a_newer_triton_replace_those_of_the_newest_and_leave_those_that_are_kept():
    table = [row("3.6.0"), row("3.8.1")]
    assert versions([row("3.9.0", 1)], table) == [("3.6.0", 0), ("3.9.0", 1)]
    assert versions([row("3.6.0", 1)], table) == [("3.6.0", 1), ("3.8.1", 0)]
    assert versions([row("3.9.0")], []) == [("3.9.0", 0)]


@pytest.mark.parametrize(("changes", "said"), [
    ({"stack": 8}, "spills 8 bytes"), ({"races": 1}, "1 races"), ({"serialised": "C7515"}, "serialised (C7515)"),
    ({"waits": 22}, "all 22 products are waited for"), ({"shared": 240_000}, "bytes of shared memory"),
    ({"HGMMA": 0}, "has no HGMMA"), ({}, None),
])  # fmt: skip
@pytest.mark.parametrize("triton", ["3.6.0", "3.9.0"])
def test_what_a_kernel_of_sm_90_must_not_have_is_said(changes, said, triton):
    wanted = {
        "kernel": "backward", "shape": "published", "precision": "bf16", "architecture": "sm_90",
        "activation": "relu", "linear": "0", "triton": triton,
    }  # fmt: skip
    table = [r for r in kernel_resources.read(kernel_resources.TABLE) if wanted.items() <= r.items()]
    (kept,) = table
    fresh = {n: int(t) if t.isdecimal() and n not in kernel_resources.TEXTS else t for n, t in kept.items()} | changes
    found = kernel_resources.differences(fresh, table)
    assert any(said in text for text in found) if said else found == []
