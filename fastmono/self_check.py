"""When a run is checked before its first result, what follows from it, and what is remembered.

The check itself is `engines/self_check.py`. Settings that fail give way to safer ones, in the order of `SAFER`; a run
trains with the first that pass, and never with some that failed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastmono.files import write_bytes
from fastmono.spec import ModelSpec

if TYPE_CHECKING:
    from fastmono.engines.self_check import Problem

MODES = ("once", "always", "never")
AS_CHOSEN = "settings of this device"


@dataclass(frozen=True)
class Outcome:
    """What the self-check of a run came to.

    Attributes:
        result: passed, failed, not checked.
        settings: by which name the engine's settings passed.
        switches: of the engine, those that it has to train with.
        failed: what was wrong, by the name of settings that failed.
        why: why there was no check; empty where there was one.
        remembered: whether an earlier run on this device passed, and this one relies on it.
    """

    result: str
    settings: str = AS_CHOSEN
    switches: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    problems: int = 0
    seconds: float = 0.0
    why: str = ""
    remembered: bool = False

    def line(self) -> str:
        """In a line."""
        if self.result == "not checked":
            return f"self-check: none ({self.why})"
        reasons = "; ".join(f"{name}: {wrong}" for name, wrong in self.failed.items())
        if self.result == "failed":
            return f"self-check: failed with all settings ({reasons})"
        count = f"{self.problems} problem{'s' * (self.problems != 1)}"
        how = "passed before on this device" if self.remembered else f"{count} passed"
        with_settings = f" with {self.settings}, since others failed ({reasons})" if self.failed else ""
        return f"self-check: {how}{with_settings}"


def memory_of(key: dict[str, Any]) -> Path:
    """Where an outcome is remembered: in the user's cache folder, one file for each key."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmono" / "self_check"
    return folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"


def kernels_digest() -> str:
    """Of the kernels' source: what was checked is known again only as long as they are the same."""
    found = importlib.util.find_spec("fastmono.kernels")
    digest = hashlib.sha256()
    for folder in (found and found.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def driver_version() -> str:
    """The device's driver; empty where NVML does not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # not installed, or no driver
        return ""


def recall(path: Path) -> Outcome | None:
    """What was remembered, or None where it cannot be read."""
    try:
        return dataclasses.replace(Outcome(**json.loads(path.read_text())), remembered=True, seconds=0.0)
    except (OSError, ValueError, TypeError):
        return None


def remember(path: Path, outcome: Outcome) -> None:
    """Write it down for later runs; where that cannot be done, they check again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(dataclasses.asdict(outcome)).encode())
    except OSError:
        return


def check(
    specs: Sequence[ModelSpec], precision: str, mode: str = "once", say: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Judge the kernels that these models will be trained with, on this machine's device.

    Args:
        mode: once (a device that passed with the same software, kernels and settings is not checked again) | always |
            never. In the interpreter, where there is no compiler, only with always.
        say: is told what is being done.
    """
    if mode == "never":
        return Outcome("not checked", why="as asked")
    from fastmono.engines import self_check as engine_check
    from fastmono.engines.assembler import compiler_versions
    from fastmono.engines.switches import SAFER, Switches

    architecture = engine_check.this_architecture()
    if architecture == 0 and mode == "once":
        return Outcome("not checked", why="the interpreter does not compile")
    own = engine_check.problems(specs, precision, architecture, Switches())
    key = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter",
        "architecture": architecture, "driver": driver_version(), "torch": torch.__version__,
        **compiler_versions(), "kernels": kernels_digest(), "precision": precision,
        "problems": sorted(map(repr, own)),
    }  # fmt: skip
    path = memory_of(key)
    if mode == "once" and (before := recall(path)):
        return before
    kinds = f"{len(own)} kind{'s' * (len(own) != 1)} of models"
    say(f"self-check: compiles the kernels of {kinds} in {precision}, and compares their first steps with float64")
    started, failed = time.monotonic(), dict[str, str]()
    tried: list[set[Problem]] = []
    kinds_of_models = list(own.values())  # models with equal settings have equal ones whatever is switched
    for name, arguments in {AS_CHOSEN: {}, **SAFER}.items():
        switches = Switches.from_dict(arguments)
        found = set(engine_check.problems(kinds_of_models, precision, architecture, switches))
        if found in tried:
            continue  # nothing that these models use is changed
        tried.append(found)
        verdict = engine_check.attempt(kinds_of_models, precision, switches)
        if verdict.unable:
            return Outcome("not checked", why=verdict.unable, failed=failed)
        if not verdict.wrong:
            seconds = round(time.monotonic() - started, 1)
            outcome = Outcome("passed", name, arguments, failed, verdict.passed, seconds)
            remember(path, outcome)
            return outcome
        failed[name] = verdict.wrong
        say(f"self-check: {name} failed: {verdict.wrong}")
    return Outcome("failed", failed=failed, seconds=round(time.monotonic() - started, 1))
