"""The reader of machine code finds what is planted, and nothing where nothing is. No GPU is needed."""

import importlib.util
import os
import re
import subprocess
import tempfile

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import Findings, faults, products_and_waits, races, unguarded
from fastmono.engines.assembler import assembler, assembler_version, compiler_versions

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
compiled_only = pytest.mark.skipif(not HAS_TRITON or INTERPRETING, reason="needs Triton's compiler")
pytestmark = pytest.mark.compile_only


def compiled(used, waited, num_stages, num_warps=4):
    import triton
    from planted_kernels import sums_and_product
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = sums_and_product.arg_names
    types = {name: "*bf16" if name in ("p_a", "p_b") else "*fp32" if name.startswith("p_") else "i32" for name in names}
    constants = {"USED": used, "WAITED": waited}
    source = ASTSource(
        fn=sums_and_product, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )  # fmt: skip
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def inspected(kernel):
    from benchmarks.kernel_resources import tool

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True).stdout
    return machine_code.inspect(kernel, sass, kernel.metadata.num_warps, assembler(90))


@compiled_only
@pytest.mark.parametrize("num_stages", [3, 4])
def test_a_load_used_in_registers_and_by_a_product_in_flight_is_a_race(num_stages):
    kernel = compiled(True, False, num_stages)
    assert races(kernel.asm["ttgir"]) == ["%a"]
    found = inspected(kernel)
    assert found.races == 1 and found.serialised == "C7515" and found.products == found.waits > 0
    assert len(faults(found)) == 2


@compiled_only
@pytest.mark.parametrize(("used", "waited"), [(True, True), (False, False), (False, True)])
def test_the_same_with_a_wait_before_the_copies_or_without_the_second_use_is_none(used, waited):
    found = inspected(compiled(used, waited, 3))
    assert (found.races, found.serialised, faults(found)) == (0, "", [])
    assert found.products >= 4 and found.waits < found.products


@compiled_only
def test_a_copy_into_the_slot_before_is_a_race():
    """Machine-made text of a kernel without a race, in which the copy goes one slot lower than it should."""
    text = compiled(False, False, 3).asm["ttgir"]
    assert races(text) == []
    copied = re.search(r"(%\S+) = ttg\.memdesc_index %a\[(%\S+)\] .*\n(?:.*\n){0,2}.*async_tma_copy\S* .* \1,",
                       text[text.index("scf.for") :])  # fmt: skip
    read = re.search(r"ttg\.memdesc_index %a\[(%\S+)\]", text[text.index("scf.for") :])
    assert copied[2] != read[1]  # the loop first reads a slot, and later fills another
    lower = text.replace(
        f"{copied[1]} = ttg.memdesc_index %a[{copied[2]}]", f"{copied[1]} = ttg.memdesc_index %a[{read[1]}]"
    )
    assert races(lower) == ["%a"]


LOOP = """
  %c0_i32 = arith.constant 0 : i32
  %c1_i32 = arith.constant 1 : i32
  %c-1_i32 = arith.constant -1 : i32
  %c2_i32 = arith.constant 2 : i32
  %r:2 = scf.for %i = %c0_i32 to %n step %c1_i32 iter_args(%read = %c-1_i32, %write = WRITE) -> (i32, i32)  : i32 {
    %r0 = arith.addi %read, %c1_i32 : i32
    %r1 = arith.cmpi sge, %r0, %c2_i32 : i32
    %r2 = arith.select %r1, %c0_i32, %r0 : i32
    %slot = ttg.memdesc_index %buffer[%r2] : !ttg.memdesc<2x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %turned = ttg.memdesc_trans %slot {order = array<i32: 1, 0>} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %d = ttng.warp_group_dot %other, %turned, %acc {isAsync = ASYNC} : a * b -> c
    WAIT
    %w0 = arith.addi %write, %c1_i32 : i32
    %w1 = arith.cmpi sge, %w0, %c2_i32 : i32
    %w2 = arith.select %w1, %c0_i32, %w0 : i32
    %to = ttg.memdesc_index %buffer[%w2] : !ttg.memdesc<2x64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    COPY
    scf.yield %r2, %w2 : i32, i32
  }
"""
TMA = "ttng.async_tma_copy_global_to_local %w[%i, %c0_i32] %to, %barrier, %p : x"
CP_ASYNC = "%t = ttg.async_copy_global_to_local %ptr, %to mask %m : x"


@pytest.mark.parametrize("copy", [TMA, CP_ASYNC])
@pytest.mark.parametrize(("write", "asynchronous", "wait", "expected"), [
    ("%c-1_i32", "true", "", ["%buffer"]),  # into the slot that is being read
    ("%c-1_i32", "true", "%e = ttng.warp_group_dot_wait %d {pendings = 0 : i32} : x", []),
    ("%c-1_i32", "true", "%e = ttng.warp_group_dot_wait %d {pendings = 1 : i32} : x", ["%buffer"]),
    ("%c0_i32", "true", "%e = ttng.warp_group_dot_wait %d {pendings = 1 : i32} : x", []),  # into the other
    ("%c0_i32", "true", "", ["%buffer"]),  # into the other, which the iteration before still reads
    ("%c-1_i32", "false", "", []),
    ("%unknown", "true", "", ["%buffer"]),  # what is not known is not taken for safe
])  # fmt: skip
def test_races_are_found_by_following_the_slots_through_a_loop(copy, write, asynchronous, wait, expected):
    text = LOOP.replace("WRITE", write).replace("ASYNC", asynchronous).replace("WAIT", wait).replace("COPY", copy)
    assert races(text) == expected


@pytest.mark.parametrize(("ptx", "count"), [
    ("wgmma.wait_group.sync.aligned 1;\n cp.async.cg.shared.global [%r1], [%rd1], 16;", 1),
    ("wgmma.wait_group.sync.aligned 1;\n bar.sync 0;\n cp.async.cg.shared.global [%r1], [%rd1], 16;", 0),
    ("wgmma.wait_group.sync.aligned 0;\n barrier.sync 0;\n st.shared.b32 [%r1], %r2;", 0),
    ("wgmma.wait_group.sync.aligned 0;\n stmatrix.sync.aligned.shared.b16 [%r1], {%r2};\n st.shared [%r1], %r2;", 1),
    ("bar.sync 0;\n st.shared.b32 [%r1], %r2;", 0),
])  # fmt: skip
def test_writes_after_a_wait_without_a_barrier_between_are_counted(ptx, count):
    assert unguarded(ptx) == count


def test_products_that_are_waited_for_at_once_are_counted():
    one_by_one = "HGMMA.64x64x16.F32 R24;\nWARPGROUP.DEPBAR.LE gsb0, 0x0;\n" * 3
    assert products_and_waits(one_by_one) == (3, 3)
    queued = "HGMMA.64x64x16.F32 R24;\n" * 3 + "WARPGROUP.DEPBAR.LE gsb0, 0x0;\n"
    assert products_and_waits(queued) == (3, 1)
    assert faults(Findings(3, 3)) == ["all 3 products are waited for"] and faults(Findings(3, 1)) == []
    assert faults(Findings(2, 2)) == []  # two may well depend on each other
    assert faults(Findings(3, 1, "C7514", 2)) == ["2 races", "products are serialised (C7514)"]


@compiled_only
def test_the_assembler_of_a_record_is_the_one_that_triton_calls(monkeypatch, tmp_path):
    from fastmono.session import about_this_process

    assert re.fullmatch(r"\d+\.\d+\.\d+", compiler_versions()["ptxas"])
    assert about_this_process("triton")["versions"].items() > compiler_versions().items()  # of a run's grid.json
    assert "triton" not in about_this_process("cpu")["versions"]
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1, V99.1.7'\n")
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(other))
    assert compiler_versions()["ptxas"] == "99.1.7"
    assert assembler_version(str(tmp_path / "none")) == "unknown"
