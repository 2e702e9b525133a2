"""Compile every kernel that a call launches, as its launch would: in many processes, into Triton's cache.

    python -m benchmarks.gpu.compiling --call 1 --worker 3 --workers 14

Each worker finds out by itself which kernels there are (engines pack their models in the host's memory, and their
launches are written down instead of made), and compiles its share of them through `JITFunction.warmup`, which looks up
and fills the same cache as a launch. What a worker does not get to is compiled where it is needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.cases import Case, to_compile
from benchmarks.gpu.jobs import report
from fastmono.block import Block

SECONDS = {"resident": 3.4, "forward": 1.3, "narrow": 1.2, "backward": 0.9, "project": 0.9, "apply": 0.8}
"""What a kernel takes to compile with Triton 3.6.0 on one core of a Xeon (Emerald Rapids), to share them out."""
OTHERS_SECONDS = 0.4


@dataclass
class Launched:
    """One launch: a kernel, its arguments and its settings."""

    kernel: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, without `_kernel`."""
        return str(self.kernel.fn.__name__).removesuffix("_kernel")

    def key(self) -> str:
        """What makes another binary of a kernel: types and settings."""
        types = [str(a.dtype) if isinstance(a, torch.Tensor) else type(a).__name__ for a in self.arguments]
        return repr((self.name, types, sorted(self.settings.items())))

    def build(self) -> dict[str, Any]:
        """Compile, and load it on the device as the first launch would: its launcher is built, and what does not fit
        is refused. Seconds, registers, bytes spilled and shared memory."""
        started = time.perf_counter()
        compiled = self.kernel.warmup(*self.arguments, grid=(1,), **self.settings)
        if torch.cuda.is_available() and hasattr(compiled, "_init_handles"):
            compiled._init_handles()
        found = {"compiled_in": round(time.perf_counter() - started, 2)}
        for name in ("n_regs", "n_spills"):
            if isinstance(getattr(compiled, name, None), int):
                found[name] = getattr(compiled, name)
        return found | {"shared": getattr(getattr(compiled, "metadata", None), "shared", 0)}


class Recorder:
    """Stands for a kernel: writes down how it would be launched."""

    def __init__(self, kernel: Any, found: dict[str, Launched]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: Any, **settings: Any) -> None:
            launched = Launched(self.kernel, arguments, settings)
            self.found.setdefault(launched.key(), launched)

        return launch


@contextmanager
def recorded() -> Iterator[dict[str, Launched]]:
    """Within it the engine's launches are written down, each kind once, and none is made."""
    from fastmono.engines import triton_launch

    kernels = {name: value for name, value in vars(triton_launch).items() if name.endswith("_kernel")}
    found: dict[str, Launched] = {}
    try:
        for name, kernel in kernels.items():
            setattr(triton_launch, name, Recorder(kernel, found))
        yield found
    finally:
        for name, kernel in kernels.items():
            setattr(triton_launch, name, kernel)


def launches(cases: list[Case], architecture: int) -> list[Launched]:
    """Every kernel that these blocks launch, each once, those that take longest first."""
    from fastmono.engines.switches import Switches
    from fastmono.engines.triton import Packed
    from fastmono.engines.triton_launch import launch_resident, launch_step

    with recorded() as found:
        for specs, precision, switches in cases:
            chosen = Switches.of(**{"regime": "auto", "bulk": True, "graphs": True, "launch": None, **switches})
            packed = Packed(Block.new(specs), precision, torch.device("cpu"), architecture, chosen)
            for launch, first, count in packed.groups:
                if launch.regime == "resident":
                    launch_resident(packed, launch, first, count, 1)
            streamed = [group for group in packed.groups if group[0].regime == "streamed"]
            if streamed:
                launch_step(packed, streamed, True)
    return sorted(found.values(), key=lambda launched: -SECONDS.get(launched.name, OTHERS_SECONDS))


def share(every: list[Launched], worker: int, workers: int) -> list[Launched]:
    """What a worker compiles: each kernel, the longest first, goes to the one that has least to do."""
    busy, own = [0.0] * workers, []
    for launched in every:
        least = busy.index(min(busy))
        busy[least] += SECONDS.get(launched.name, OTHERS_SECONDS)
        if least == worker:
            own.append(launched)
    return own


def main(argv: list[str] | None = None) -> int:
    """Compile a worker's share; every kernel is reported with its seconds, or with what the compiler said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, required=True)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args(argv)
    major, minor = torch.cuda.get_device_capability()
    every = launches(to_compile(arguments.call), 10 * major + minor)
    own, failed = share(every, arguments.worker, arguments.workers), 0
    report(kernels=len(own), of=len(every))
    for launched in own:
        precision = launched.settings.get("PRECISION", "")
        try:
            report(kernel=launched.name, precision=precision, **launched.build())
        except Exception as error:  # the others are needed all the same
            failed += 1
            said = str(error)
            said = said if len(said) < 1200 else f"{said[:600]} [...] {said[-600:]}"  # the reason comes first, or last
            report(kernel=launched.name, precision=precision, compiler=said, key=launched.key())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
