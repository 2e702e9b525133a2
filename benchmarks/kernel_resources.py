"""Compile the Triton kernels for GPUs that are not here, and read what each takes.

    python -m benchmarks.kernel_resources                    all variants, into benchmarks/results/kernel_resources.csv
    python -m benchmarks.kernel_resources --check            some of them again, compared with that file

One row for each kernel, variant and architecture: registers, bytes of stack (spills), shared memory, and how often each
kind of matrix instruction occurs. No GPU is needed; not for a process in interpreter mode.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastmono.kernels import backward, forward, project, resident, update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmono.engines.launch import Launch, choose_launch

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).resolve().parent / "results" / "kernel_resources.csv"
LARGEST_SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
"""Bytes of shared memory one program may have."""
SHAPES = {  # N, m, k, o, B
    "tiny": (64, 16, 128, 64, 256),
    "demo": (128, 32, 256, 128, 512),
    "published": (512, 64, 1024, 512, 8192),
}
PRECISIONS = ("bf16", "tf32", "fp32")
OPERAND = {"bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
COLUMNS = (
    "kernel", "shape", "precision", "task", "architecture", "num_warps", "registers", "stack", "shared",
    "HGMMA", "HMMA", "tcgen05", "FFMA", "triton",
)  # fmt: skip
INT64 = {"p_models", "p_diverged", "p_step", "p_seeds", "p_last"}


@dataclass(frozen=True)
class Variant:
    """One kernel as it would be launched for a shape."""

    kernel: str
    shape: str
    precision: str
    task: str = "decoder"
    activation: str = "relu"
    optimizer: str = "lamb"


KERNELS = {
    "project": project.project_kernel,
    "forward": forward.forward_kernel,
    "backward": backward.backward_kernel,
    "moments": update.moments_kernel,
    "apply": update.apply_kernel,
    "resident": resident.resident_kernel,
}


def launch_of(variant: Variant, architecture: int) -> Launch:
    """The settings that the engine would choose."""
    return choose_launch(architecture, *SHAPES[variant.shape], variant.precision)


def variants(shapes: tuple[str, ...] = tuple(SHAPES), precisions: tuple[str, ...] = PRECISIONS) -> Iterator[Variant]:
    """Every kernel that can be chosen for these shapes."""
    for shape in shapes:
        for precision in precisions:
            regime = choose_launch(90, *SHAPES[shape], precision).regime
            names = ["resident"] if regime == "resident" else [name for name in KERNELS if name != "resident"]
            yield from (Variant(name, shape, precision) for name in names)


def pointer_type(name: str, precision: str) -> str:
    """The type of a kernel's pointer argument."""
    if name in INT64:
        return "*i64"
    if name == "p_bad":
        return "*i32"
    if name in ("p_P", "p_P2", "p_x", "p_e", "p_q_in", "p_q_out"):
        return OPERAND[precision]
    if name in ("p_W_in", "p_W_out"):
        return OPERAND[precision]
    return "*fp32"


def signature(kernel: Any, variant: Variant, launch: Launch) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the arguments, and values of the constants."""
    constants = {
        "TASK": variant.task, "ACTIVATION": variant.activation, "OPTIMIZER": variant.optimizer,
        "PRECISION": variant.precision, "M": launch.M, "BN": launch.BN, "BR": launch.BR, "BK": launch.BK,
        "BO": launch.BO, "BB": launch.BB, "BP": launch.BP, "BA": launch.BA,
    }  # fmt: skip
    if variant.kernel == "backward":
        constants |= {"BR": launch.BB, "BO": launch.BP}
    updates = variant.kernel in ("moments", "apply", "resident")
    types, values = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            types[name], values[name] = "constexpr", constants[name]
        elif name == "unit":
            types[name] = "fp32"
        elif name.startswith("p_"):
            master = updates and name in ("p_W_in", "p_W_out")
            types[name] = "*fp32" if master else pointer_type(name, variant.precision)
        else:
            types[name] = "i32"
    return types, values


def compile_variant(variant: Variant, architecture: int) -> Any:
    """The compiled kernel; raises what the compiler raises."""
    kernel, launch = KERNELS[variant.kernel], launch_of(variant, architecture)
    types, values = signature(kernel, variant, launch)
    # torch's allocations, and rows of 128 bytes, are aligned to 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.startswith("p_")}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def tool(name: str) -> str:
    """A program of the CUDA toolkit that Triton brings along."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(variant: Variant, architecture: int) -> dict[str, Any]:
    """One row of the table."""
    compiled = compile_variant(variant, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = (int(x) for x in found.groups()) if found else (-1, -1)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return {
        "kernel": variant.kernel, "shape": variant.shape, "precision": variant.precision, "task": variant.task,
        "architecture": f"sm_{architecture}", "num_warps": compiled.metadata.num_warps, "registers": registers,
        "stack": stack, "shared": compiled.metadata.shared, "HGMMA": count(r"\bHGMMA\b|\bHGMMA\."),
        "HMMA": count(r"\bHMMA\."), "tcgen05": count(r"\bUTC[A-Z]*MMA"), "FFMA": count(r"\bFFMA\b"),
        "triton": triton.__version__,
    }  # fmt: skip


def differences(row: dict[str, Any], table: list[dict[str, str]]) -> list[str]:
    """What is wrong with a fresh row: spills, shared memory, no matrix instruction, or other figures than kept."""
    name = " ".join(str(row[column]) for column in COLUMNS[:5])
    found = []
    if row["precision"] != "fp32":
        units = row["HGMMA"] + row["HMMA"] + row["tcgen05"]
        if row["stack"]:
            found.append(f"{name}: spills {row['stack']} bytes")
        if not units and row["kernel"] in ("project", "forward", "backward", "resident"):
            found.append(f"{name}: uses no matrix unit")
    elif row["HGMMA"] + row["HMMA"] + row["tcgen05"]:
        found.append(f"{name}: rounds its operands")
    if row["shared"] > LARGEST_SHARED[row["architecture"]]:
        found.append(f"{name}: takes {row['shared']} bytes of shared memory")
    kept = [old for old in table if all(old[column] == str(row[column]) for column in COLUMNS[:5])]
    if not kept:
        found.append(f"{name}: is not in the table")
    elif kept[0]["triton"] == row["triton"] and any(kept[0][column] != str(row[column]) for column in COLUMNS):
        found.append(f"{name}: was {list(kept[0].values())[5:]}, is {[str(row[column]) for column in COLUMNS[5:]]}")
    return found


def check(table_path: Path) -> int:
    """Compile the bf16 and tf32 variants of the published shape, and the resident ones, and compare."""
    with table_path.open(newline="") as file:
        table = list(csv.DictReader(file))
    subset = [v for v in variants(precisions=("bf16", "tf32")) if v.shape != "tiny" or v.precision == "bf16"]
    subset.append(Variant("forward", "published", "fp32"))
    found = [text for v in subset for a in ARCHITECTURES for text in differences(resources(v, a), table)]
    print(f"{len(subset) * len(ARCHITECTURES)} variants compiled with Triton {triton.__version__}")
    print("\n".join(found))
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.check:
        return check(arguments.out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for variant in variants():
            for architecture in ARCHITECTURES:
                row = resources(variant, architecture)
                writer.writerow(row)
                print("  ".join(str(row[name]).rjust(9) for name in COLUMNS[:-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
