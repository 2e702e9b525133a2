"""Compile the Triton kernels for GPUs that are not here, and read what each takes.

    python -m benchmarks.kernel_resources                    all variants, into benchmarks/results/kernel_resources.csv
    python -m benchmarks.kernel_resources --check            some of them again, compared with that file
    ... --triton 3.6.0                                       by another Triton, which is installed beside for it

One row for each kernel, variant, architecture and Triton (the newest, and 3.6.0, which PyTorch 2.11 brings): registers,
bytes of stack (spills), shared memory, the instruction expected to multiply, how often each such instruction occurs,
how many loads take 16 bytes, how many the copy engine makes, the barriers between the phases of the resident kernel,
and on sm_90 what machine_code.py finds in kernels with asynchronous products. No GPU is needed; not for a process in
interpreter mode.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from fastmono.kernels import backward, forward, narrow, project, resident, survey, update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import machine_code
from benchmarks.other_triton import run_with
from benchmarks.tables import RESULTS, write_csv
from fastmono.engines.assembler import assembler, assembler_version
from fastmono.engines.launch import Launch, choose_launch

ARCHITECTURES = (80, 90, 100)
TABLE = RESULTS / "kernel_resources.csv"
LARGEST_SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448}
"""Bytes of shared memory one program may have. sm_86 and sm_89 have less than sm_80, and its settings."""
SHAPES = {  # N, m, k, o, B
    "tiny": (64, 16, 128, 64, 256),
    "demo": (128, 32, 256, 128, 512),
    "published": (512, 64, 1024, 512, 8192),
    "embedding 128": (512, 128, 1024, 512, 8192),
    "narrow 64": (512, 64, 64, 512, 2**17),
    "narrow 32": (512, 64, 32, 512, 2**18),
    "narrow 16": (512, 64, 16, 512, 2**19),
}
PRECISIONS = ("bf16", "tf32", "fp32")
OPERAND = {"bf16": "*bf16", "tf32": "*fp32", "fp32": "*fp32"}
KEY = ("kernel", "shape", "precision", "task", "activation", "optimizer", "decay", "linear", "architecture")
UNITS = ("HGMMA", "HMMA", "tcgen05")
FOUND = tuple(machine_code.Findings.__dataclass_fields__)
COLUMNS = (
    *KEY, "num_warps", "registers", "stack", "shared", "expected", *UNITS, "FFMA", "LDG128", "UTMALDG", "barriers",
    *FOUND, "triton", "ptxas",
)  # fmt: skip
TEXTS = ("serialised", "triton", "ptxas")
KEPT = ("3.6.0",)
"""Tritons whose rows stay in the file beside those of the newest. With them, chips but sm_90 may spill a little."""
KNOWN_SPILLS = {("3.8.0", "backward published bf16 decoder relu lamb global 0 sm_90"): 112}
"""Bytes that a Triton spills at tiles which spill nothing on 3.6 and 3.9 and read a quarter less from the cache than
those at which 3.8 spills nothing either (docs/LOG.md, 2026-11-27)."""
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
    decay: str = "global"
    linear: int = 0
    """1 for models with a linear path."""


KERNELS = {
    "project": project.project_kernel,
    "survey": survey.survey_kernel,
    "gather": survey.gather_kernel,
    "forward": forward.forward_kernel,
    "backward": backward.backward_kernel,
    "narrow": narrow.narrow_kernel,
    "moments": update.moments_kernel,
    "apply": update.apply_kernel,
    "resident": resident.resident_kernel,
}


def launch_of(variant: Variant, architecture: int) -> Launch:
    """The settings that the engine would choose."""
    return choose_launch(
        architecture, *SHAPES[variant.shape], variant.precision, variant.activation, variant.linear == 1, variant.decay
    )


TASKS = ({"task": "reprojector"}, {"task": "abs"})
ACTIVATIONS = ({"activation": "gelu"}, {"activation": "solu"})
OPTIMIZERS = ({"optimizer": "adamw"}, {"optimizer": "sgd"})
DECAYS = ({"decay": "per_neuron"}, {"decay": "rate"})
LINEAR = ({"linear": 1},)
OTHERS: dict[str, tuple[dict[str, Any], ...]] = {  # what else than the default changes a kernel's code
    "project": TASKS, "survey": (), "gather": (), "narrow": ACTIVATIONS,
    "forward": (*ACTIVATIONS, *LINEAR), "backward": (*ACTIVATIONS, *LINEAR), "moments": LINEAR,
    "apply": (*OPTIMIZERS, *DECAYS, *LINEAR), "resident": (*TASKS, *ACTIVATIONS, *OPTIMIZERS, *DECAYS, *LINEAR),
}  # fmt: skip


def kernels_of(shape: str, precision: str) -> list[str]:
    """The kernels to compile for a shape: of a narrow layer the one that others have not, and only where it is used."""
    launch = choose_launch(90, *SHAPES[shape], precision)
    if launch.regime == "resident":
        return ["resident"]
    if shape.startswith("narrow"):
        return ["narrow"] if launch.fused else []
    return [name for name in KERNELS if name not in ("resident", "narrow")]


def variants(
    shapes: tuple[str, ...] = tuple(SHAPES), precisions: tuple[str, ...] = PRECISIONS, others: bool = True
) -> Iterator[Variant]:
    """Every kernel that can be chosen for these shapes; in bf16 and tf32 for each task, nonlinearity, optimizer, mode
    of bias decay and with a linear path too, but for the tiny shape, whose tiles are those of the demo, and the longer
    embedding."""
    for shape in shapes:
        for precision in precisions:
            for name in kernels_of(shape, precision):
                yield Variant(name, shape, precision)
                if others and precision != "fp32" and shape not in ("tiny", "embedding 128"):
                    every = (Variant(name, shape, precision, **other) for other in OTHERS[name])
                    yield from (v for v in every if name != "narrow" or launch_of(v, 90).fused)


def checked() -> list[Variant]:
    """The subset that the tests compile: each kernel, and one of every task, nonlinearity and optimizer."""
    return [
        *variants(tuple(shape for shape in SHAPES if shape != "embedding 128"), ("bf16",), others=False),
        Variant("survey", "embedding 128", "tf32"),
        *(Variant(name, "published", "tf32") for name in ("project", "survey", "forward", "backward")),
        Variant("resident", "demo", "tf32"),
        Variant("forward", "published", "fp32"),
        Variant("resident", "demo", "bf16", task="abs"),
        Variant("resident", "demo", "bf16", optimizer="sgd"),
        Variant("project", "published", "bf16", task="reprojector"),
        Variant("backward", "published", "bf16", activation="gelu"),
        Variant("apply", "published", "bf16", optimizer="adamw"),
        Variant("forward", "published", "bf16", linear=1),
        Variant("resident", "demo", "bf16", linear=1),
        Variant("resident", "demo", "bf16", decay="rate"),
    ]


def expected_instruction(variant: Variant, architecture: int) -> str:
    """What should multiply; nothing does where rows are copied, or in the update."""
    if variant.kernel in ("gather", "moments", "apply"):
        return ""
    if variant.precision == "fp32":
        return "FFMA"
    if variant.kernel == "resident":  # tiles of 32 x 32, see fastmono/engines/launch.py
        return "HMMA"
    return {9: "HGMMA", 10: "tcgen05"}.get(architecture // 10, "HMMA")


def phase_barriers(code: str) -> int:
    """Barriers in the machine code of the resident kernel itself: before the first function that it calls."""
    return len(re.findall(r"BAR\.SYNC", re.split(r"\bRET\b", code)[0]))


def pointer_type(name: str, precision: str) -> str:
    """The type of a kernel's pointer argument."""
    if name in INT64:
        return "*i64"
    if name in ("p_bad", "p_place", "p_used"):
        return "*i32"
    if name == "p_flags":
        return "*i8"
    if name in ("p_P", "p_P2", "p_x", "p_h", "p_e", "p_q_in", "p_q_out"):
        return OPERAND[precision]
    if name in ("p_W_in", "p_W_out"):
        return OPERAND[precision]
    return "*fp32"


def signature(kernel: Any, variant: Variant, launch: Launch) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of the arguments, and values of the constants."""
    constants = {
        "TASK": variant.task, "ACTIVATION": variant.activation, "OPTIMIZER": variant.optimizer,
        "DECAY": variant.decay, "LINEAR": variant.linear == 1,
        "PRECISION": variant.precision, "M": launch.M, "BN": launch.BN, "BR": launch.BR, "BK": launch.BK,
        "BO": launch.BO, "BB": launch.BB, "BP": launch.BP, "BA": launch.BA, "BULK": launch.bulk,
    }  # fmt: skip
    if variant.kernel in ("forward", "backward"):
        constants |= {"CARRIED": getattr(launch, f"{variant.kernel}_carried")}
    constants["ACROSS"] = launch.project_across
    if variant.kernel == "project":
        constants |= {"BR": launch.BS}
    elif variant.kernel in ("backward", "narrow"):
        constants |= {"BR": launch.BB, "BK": launch.BL, "BO": launch.BP}
    elif variant.kernel == "survey":
        constants |= {"BR": launch.BV, "BK": launch.BV}
    elif variant.kernel in ("gather", "moments", "apply"):
        constants |= {"BG": launch.BA, "BO": launch.BU}
    masters = variant.kernel in ("survey", "gather", "moments", "apply", "resident")
    types, values = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            types[name], values[name] = "constexpr", constants[name]
        elif name == "unit":
            types[name] = "fp32"
        elif name.startswith("p_"):
            master = masters and name in ("p_W_in", "p_W_out")
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
    options = launch.options(variant.kernel)
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

    found_in_code = machine_code.Findings()
    if architecture // 10 == 9:
        ptxas = assembler(architecture)
        found_in_code = machine_code.inspect(compiled, code, compiled.metadata.num_warps, ptxas)
    return {
        "kernel": variant.kernel, "shape": variant.shape, "precision": variant.precision, "task": variant.task,
        "activation": variant.activation, "optimizer": variant.optimizer,
        "decay": variant.decay, "linear": variant.linear, "architecture": f"sm_{architecture}",
        "num_warps": compiled.metadata.num_warps, "registers": registers, "stack": stack,
        "shared": compiled.metadata.shared, "expected": expected_instruction(variant, architecture),
        "HGMMA": count(r"\bHGMMA\b"), "HMMA": count(r"\bHMMA\."), "tcgen05": count(r"\bUTC[A-Z]*MMA"),
        "FFMA": count(r"\bFFMA2?\b"), "LDG128": count(r"\bLDG(?:STS)?\.[A-Z.]*128"),
        "UTMALDG": count(r"\bUTMALDG\b"),
        "barriers": phase_barriers(code) if variant.kernel == "resident" else 0, **vars(found_in_code),
        "triton": triton.__version__, "ptxas": assembler_version(assembler(architecture)),
    }  # fmt: skip


def rows_of(chosen: Iterable[Variant]) -> Iterator[dict[str, Any]]:
    """The rows of these variants for each architecture, in order, compiled on all cores."""
    pairs = [(variant, architecture) for variant in chosen for architecture in ARCHITECTURES]
    with ProcessPoolExecutor() as pool:
        yield from pool.map(resources, *zip(*pairs, strict=True))


def differences(row: dict[str, Any], table: list[dict[str, str]]) -> list[str]:
    """What is wrong with a fresh row: spills, shared memory, instructions, barriers, or other figures than kept."""
    name = " ".join(str(row[column]) for column in KEY)
    found = []
    if row["precision"] != "fp32":
        tolerated = row["triton"] in KEPT and row["architecture"] != "sm_90"
        if row["stack"] != KNOWN_SPILLS.get((row["triton"], name), 0) and not tolerated:
            found.append(f"{name}: spills {row['stack']} bytes")
    elif sum(row[unit] for unit in UNITS):
        found.append(f"{name}: rounds its operands")
    if row["expected"] and not row[row["expected"]]:
        found.append(f"{name}: has no {row['expected']}")
    bulk = row["kernel"] in ("backward", "narrow") and row["architecture"] != "sm_80"
    large = row["shape"] not in ("tiny", "demo")
    if large and row["kernel"] != "project" and not row["UTMALDG" if bulk else "LDG128"]:  # rows of W_out, e, dW_out
        found.append(f"{name}: reads nothing 16 bytes at a time")
    phases = 4 if row["optimizer"] == "sgd" else 5  # one barrier after each, and one after the loss is written
    phases += 2 if row["activation"] == "relu" and not row["linear"] else 0  # survey and gather
    # With a linear path all but the first two run for neurons and path, and the compiler keeps the two calls apart.
    between = phases - 2 if row["linear"] else 0
    if row["kernel"] == "resident" and row["barriers"] != phases + 1 + between:
        found.append(f"{name}: has {row['barriers']} barriers for {phases} phases")
    if row["shared"] > LARGEST_SHARED[row["architecture"]]:
        found.append(f"{name}: takes {row['shared']} bytes of shared memory")
    found += [f"{name}: {said}" for said in machine_code.faults(findings_of(row))]
    every = [old for old in table if all(old[column] == str(row[column]) for column in KEY)]
    kept = [old for old in every if old["triton"] == row["triton"]]
    if not every:
        found.append(f"{name}: is not in the table")
    elif kept and any(kept[0][column] != str(row[column]) for column in COLUMNS):
        rest = COLUMNS[len(KEY) :]
        found.append(f"{name}: was {[kept[0][column] for column in rest]}, is {[str(row[column]) for column in rest]}")
    return found


def findings_of(row: dict[str, Any]) -> machine_code.Findings:
    """The part of a row that machine_code.py found."""
    return machine_code.Findings(**{name: row[name] for name in FOUND})


def check(table_path: Path) -> int:
    """Compile a subset and compare it with the table, and the whole table with what is asked of every variant."""
    table = read(table_path)
    subset = checked()
    found = [text for row in rows_of(subset) for text in differences(row, table)]
    for row in table:
        numbers = {name: int(text) if text.isdecimal() and name not in TEXTS else text for name, text in row.items()}
        found += differences(numbers, [])[:-1]  # the last says that it is in no table
    print(f"{len(subset) * len(ARCHITECTURES)} variants compiled with Triton {triton.__version__}")
    print("\n".join(found))
    return 1 if found else 0


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merged(rows: list[dict[str, Any]], table: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Fresh rows of one Triton beside those of the others: of the Tritons that are kept, and of the newest."""
    fresh = rows[0]["triton"]
    others = [old for old in table if old["triton"] != fresh and (fresh in KEPT or old["triton"] in KEPT)]
    return sorted([*rows, *others], key=lambda row: str(row["triton"]))


def main(argv: list[str] | None = None) -> int:
    """Write the table, or check it. Exit codes: 0, 1 for what is wrong, 2 for a Triton that cannot be installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--triton", metavar="VERSION", help="by another Triton than the one that is installed")
    arguments = parser.parse_args(argv)
    if arguments.triton and arguments.triton != triton.__version__:
        own = ["-m", "benchmarks.kernel_resources", "--out", str(arguments.out), *["--check"] * arguments.check]
        try:
            return run_with(arguments.triton, own)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if arguments.check:
        return check(arguments.out)
    chosen, rows, started = list(variants()), [], time.monotonic()
    total = len(chosen) * len(ARCHITECTURES)
    for row in rows_of(chosen):
        rows.append(row)
        left = (time.monotonic() - started) / len(rows) * (total - len(rows))
        what = " ".join(str(row[name]) for name in (*KEY, "registers", "stack", "shared"))
        print(f"{len(rows)} of {total}, {left:.0f} s left  {what}", file=sys.stderr, flush=True)
    write_csv(arguments.out, COLUMNS, merged(rows, read(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
