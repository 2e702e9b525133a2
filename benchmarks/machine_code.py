"""What can go wrong in the machine code of a kernel that uses Hopper's asynchronous products (wgmma): found by reading.

    races        copies into a slot of shared memory that a product in flight may still read          TTGIR
    unguarded    writes to shared memory after a wait for products, with no barrier between           PTX
    products     HGMMA instructions, and how many of them are waited for at once                      SASS
    serialised   ptxas's own warnings that it makes products wait for one another                     ptxas -v

A wait for products holds back only the warp group (four warps) that waits. A kernel of more than four warps may let one
group overwrite what another still reads, unless a barrier stands between: each write that is unguarded has to be looked
at, since it may go to a slot that nobody reads. Products that wait for one another hide races, and cost the time that
asynchrony is for.
"""

from __future__ import annotations

import operator
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

WARP_GROUP = 4
"""Warps that a wait holds back."""
SERIALISED = re.compile(r"C751[0-6]")
"""Codes with which ptxas says that products are serialised. C7517 and C7519 say that waits were added."""
TURNS = 12
"""Iterations of a loop that are followed: more than twice as many as any kernel has buffers."""


@dataclass(frozen=True)
class Findings:
    """What was found in one kernel; nothing but zeros where it uses no asynchronous products."""

    products: int = 0
    waits: int = 0
    serialised: str = ""
    races: int = 0
    unguarded: int = 0


OPERATIONS = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "xori": operator.xor, "andi": operator.and_,
}  # fmt: skip
COMPARISONS = {
    "slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge, "eq": operator.eq,
    "ne": operator.ne,
}  # fmt: skip
NAME = r"(%[\w#-]+)"
COPY = re.compile(rf"async_tma_copy_global_to_local \S+\[[^]]*\] {NAME}|async_copy_global_to_local %\S+, {NAME}")
PRODUCT = re.compile(rf"warp_group_dot {NAME}, {NAME}, ")
WAIT = re.compile(r"warp_group_dot_wait .*pendings = (\d+)")


def indent(line: str) -> int:
    """Blanks before a line's first word."""
    return len(line) - len(line.lstrip())


def innermost_loops(text: str) -> Iterator[tuple[str, list[str]]]:
    """The first line of each `scf.for` that holds no other, and its body."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if "scf.for " in line:
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() and indent(lines[j]) <= indent(line))
            body = lines[i + 1 : end]
            if not any("scf.for " in inside for inside in body):
                yield line, body


class Loop:
    """A loop of TTGIR, followed for some iterations with the integers that choose slots of buffers.

    Values are integers, slots (a buffer and an index), or None where they are not known here.
    """

    def __init__(self, head: str, body: list[str], constants: dict[str, int]) -> None:
        carried = re.search(r"iter_args\((.*?)\) ->", head)
        pairs = re.findall(rf"{NAME} = {NAME}", carried[1]) if carried else []
        self.body, self.arguments = body, [name for name, _ in pairs]
        self.values: dict[str, Any] = dict(constants)
        self.values |= {name: constants.get(initial) for name, initial in pairs}
        self.pending: list[list[tuple[str, Any]]] = []
        """Slots that each product in flight reads."""
        self.found: set[str] = set()

    def follow(self) -> set[str]:
        """The buffers into which a copy goes too early."""
        for _ in range(TURNS):
            for line in self.body:
                self.step(line)
            last = self.body[-1].strip()
            if last.startswith("scf.yield"):
                names = re.findall(NAME, last.split(" : ")[0])
                self.values |= dict(zip(self.arguments, [self.values.get(name) for name in names], strict=False))
        return self.found

    def step(self, line: str) -> None:
        """One operation."""
        if match := PRODUCT.search(line):
            slots = [self.values.get(name) for name in match.groups()]
            read = [slot for slot in slots if isinstance(slot, tuple)]
            self.pending = [*self.pending, read] if "isAsync = true" in line else []
        elif match := WAIT.search(line):
            self.pending = self.pending[max(0, len(self.pending) - int(match[1])) :]
        elif match := COPY.search(line):
            self.write(self.values.get(match[1] or match[2]))
        elif match := re.match(rf"\s*{NAME}(?::\d+)? = (.*)", line):
            self.values[match[1]] = self.value(match[2])

    def write(self, slot: Any) -> None:
        """A copy into a slot: a race where a product in flight may read it."""
        if isinstance(slot, tuple):
            buffer, index = slot
            for read in self.pending:
                if any(buffer == other and (index is None or at is None or index == at) for other, at in read):
                    self.found.add(buffer)

    def value(self, text: str) -> Any:
        """What an operation gives."""
        names = [self.values.get(name) for name in re.findall(NAME, text.split(" : ")[0])]
        if match := re.match(rf"ttg\.memdesc_index {NAME}\[", text):
            return match[1], names[1]
        if re.match(r"ttg\.memdesc_(trans|subslice|reshape|reinterpret)", text):
            return names[0]
        if None in names[:2] and not text.startswith("arith.select"):
            return None
        if (match := re.match(r"arith\.(\w+) ", text)) and match[1] in OPERATIONS and len(names) == 2:
            return OPERATIONS[match[1]](*names)
        if match := re.match(r"arith\.cmpi (\w+), ", text):
            return COMPARISONS[match[1]](*names) if match[1] in COMPARISONS else None
        if text.startswith("arith.select") and names[0] is not None:
            return names[1] if names[0] else names[2]
        return None


def races(ttgir: str) -> list[str]:
    """Buffers of shared memory that a copy may overwrite while a product in flight reads them."""
    text = re.sub(r" loc\(.*$", "", ttgir, flags=re.M)
    constants = {name: int(value) for name, value in re.findall(rf"{NAME} = arith\.constant (-?\d+) : i32", text)}
    found: set[str] = set()
    for head, body in innermost_loops(text):
        if any(PRODUCT.search(line) for line in body):
            found |= Loop(head, body, constants).follow()
    return sorted(found)


EVENTS = re.compile(
    r"(?P<wait>wgmma\.wait_group)|(?P<barrier>\bbar\.sync|\bbarrier\.(?:cta\.)?sync)"
    r"|(?P<write>\bst\.shared|\bstmatrix|\bcp\.async\.c[ga]|\bcp\.async\.bulk\.tensor\S*shared::cluster\.global)"
)


def unguarded(ptx: str) -> int:
    """Writes to shared memory that follow a wait for products, in the order of the text, with no barrier between."""
    found, waited = 0, False
    for match in EVENTS.finditer(ptx):
        if match["wait"]:
            waited = True
        elif match["barrier"]:
            waited = False
        elif waited:
            found, waited = found + 1, False
    return found


def products_and_waits(sass: str) -> tuple[int, int]:
    """HGMMA instructions, and how many of them are followed by a wait before the next: as many where all wait."""
    steps = re.findall(r"\bHGMMA\b|\bWARPGROUP\.DEPBAR\b", sass)
    return steps.count("HGMMA"), sum(a == "HGMMA" != b for a, b in pairwise(steps))


def serialised(ptx: str, ptxas: str) -> str:
    """The codes with which an assembler says that products of a kernel for sm_90 wait for one another; empty for none.

    Raises `ValueError` where it cannot read the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "--gpu-name=sm_90a", "-v", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{ptxas} cannot read the kernel: {done.stderr.strip()[-300:]}")
    return " ".join(sorted(set(SERIALISED.findall(done.stdout + done.stderr))))


def inspect(compiled: Any, sass: str, num_warps: int, ptxas: str) -> Findings:
    """A kernel that Triton compiled for sm_90, its machine code as text, and the assembler to ask."""
    ptx = compiled.asm["ptx"]
    if "wgmma.mma_async" not in ptx:
        return Findings()
    products, waits = products_and_waits(sass)
    lone = num_warps <= WARP_GROUP
    return Findings(
        products, waits, serialised(ptx, ptxas), len(races(compiled.asm["ttgir"])), 0 if lone else unguarded(ptx)
    )


def faults(found: Findings) -> list[str]:
    """What must not be in a kernel that is launched, in words."""
    said = [f"{found.races} races"] if found.races else []
    if found.serialised:
        said.append(f"products are serialised ({found.serialised})")
    elif found.products > 2 and found.waits >= found.products:
        said.append(f"all {found.products} products are waited for")
    return said
