"""The contestants by name, and on which devices each can be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from benchmarks.contestants.base import Contestant


@dataclass(frozen=True)
class Entry:
    """A row of the benchmark."""

    title: str
    make: Callable[[torch.device], Contestant]
    devices: tuple[str, ...]
    in_pool: bool = False
    """One single-threaded process a core, instead of one process with all cores."""


# Imports wait until a contestant is made: jax and torch.compile are slow to load, and may be missing.
def _published(device: torch.device) -> Contestant:
    from benchmarks.contestants.published import Published

    return Published(device)


def _cleaned(device: torch.device) -> Contestant:
    from benchmarks.contestants.cleaned import Cleaned

    return Cleaned(device)


def _bmm(device: torch.device, precision: str = "fp32") -> Contestant:
    from benchmarks.contestants.bmm import Bmm

    return Bmm(device, precision)


def _compiled(device: torch.device, precision: str = "fp32") -> Contestant:
    from benchmarks.contestants.compiled import Compiled

    return Compiled(device, precision)


def _vmap(device: torch.device, precision: str = "fp32") -> Contestant:
    from benchmarks.contestants.vmap import Vmap

    return Vmap(device, precision)


def _jax(device: torch.device, precision: str = "fp32") -> Contestant:
    from benchmarks.contestants.jax_vmap import JaxVmap

    return JaxVmap(device, precision)


def _ours(name: str, precision: str) -> Callable[[torch.device], Contestant]:
    def made(device: torch.device) -> Contestant:
        from benchmarks.contestants.ours import Ours

        return Ours(name, precision, device)

    return made


BOTH, CPU, CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)
ENTRIES: dict[str, Entry] = {
    "published": Entry("published loop", _published, BOTH),
    "published-pool": Entry("published loop, a process a core", _published, CPU, True),
    "cleaned": Entry("cleaned loop", _cleaned, BOTH),
    "cleaned-pool": Entry("cleaned loop, a process a core", _cleaned, CPU, True),
    "bmm": Entry("stacked bmm", _bmm, BOTH),
    "bmm-pool": Entry("stacked bmm, a process a core", _bmm, CPU, True),
    "compiled": Entry("stacked bmm, compiled", _compiled, BOTH),
    "vmap": Entry("torch.func vmap", _vmap, BOTH),
    "jax": Entry("JAX jit(scan(vmap))", _jax, BOTH),
    "reference-fp32": Entry("fastmono reference", _ours("reference", "fp32"), CPU, True),
    "reference-tf32": Entry("fastmono reference, tf32", _ours("reference", "tf32"), CPU, True),
    "reference-bf16": Entry("fastmono reference, bf16", _ours("reference", "bf16"), CPU, True),
    "cpu-fp32": Entry("fastmono cpu", _ours("cpu", "fp32"), CPU, True),
    "cpu-dense": Entry("fastmono cpu, zeros not skipped", _ours("cpu-dense", "fp32"), CPU, True),
}
for _precision in ("tf32", "bf16"):
    for _name, _made in (("bmm", _bmm), ("compiled", _compiled), ("vmap", _vmap), ("jax", _jax)):
        ENTRIES[f"{_name}-{_precision}"] = Entry(
            f"{ENTRIES[_name].title}, {_precision}", lambda d, m=_made, p=_precision: m(d, p), CUDA
        )  # fmt: skip
for _precision in ("fp32", "tf32", "bf16"):
    # Listed on a CPU too, where it is shown as not available.
    ENTRIES[f"triton-{_precision}"] = Entry(f"fastmono triton, {_precision}", _ours("triton", _precision), BOTH)


def make(name: str, device: torch.device, in_pool: bool = True) -> Contestant:
    """A contestant by name. Raises `Unavailable` where it cannot run; `in_pool` False makes a worker's share of one."""
    entry = ENTRIES[name]
    if entry.in_pool and in_pool:
        from benchmarks.contestants.pool import Pool

        return Pool(name)
    return entry.make(device)
