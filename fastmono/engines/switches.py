"""Switches of the Triton engine: each takes one suspect out of a run, so that a wrong or slow result has one cause.

    regime   resident | streamed: that regime, whatever the model's size; auto: by its size
    bulk     False: tiles by addresses, not by the copy engine
    graphs   False: every kernel launched by itself, not replayed from a CUDA graph
    launch   fields of `Launch` replaced by name, from a dict or a JSON file, for every model

A run with a switch set may have other bits than one without: tiles order the sums.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmono.engines.launch import Launch

REGIMES = ("auto", "resident", "streamed")
FIXED = ("regime", "M", "linear", "decay")
"""Fields of `Launch` that follow from the model, or have a switch of their own."""
ONE_WARP_GROUP: dict[str, Any] = {"num_warps": 4, "forward_warps": 4, "backward_warps": 4, "narrow_warps": 4}
NOT_CARRIED: dict[str, Any] = {"forward_carried": False, "backward_carried": False, "project_across": False}
SAFER: dict[str, dict[str, Any]] = {
    "copy engine off": {"bulk": False},
    "one warp group": {"launch": ONE_WARP_GROUP},
    # Without the copy engine, forward of two warp groups has a write that no barrier guards (Triton 3.6 needs one).
    "copy engine off, one warp group": {"bulk": False, "launch": ONE_WARP_GROUP},
    "forms of other chips": {"launch": NOT_CARRIED},
    "narrow layers by the streamed kernels": {"launch": {"fused": False}},
}
"""Switches that each leave out what compilers are known to get wrong, by name, those that cost least first."""
WARPS = (1, 2, 4, 8, 16)
MOST_STAGES, LARGEST_TILE, LEAST_ROWS = 8, 1024, 32


@dataclass(frozen=True)
class Switches:
    """The switches, checked.

    Raises:
        ValueError: an unknown regime; a field of `Launch` that does not exist, follows from the model, or has a value
            that no kernel can have.
        OSError: a file that cannot be read.
    """

    regime: str = "auto"
    bulk: bool = True
    graphs: bool = True
    launch: tuple[tuple[str, int], ...] = ()
    """Replaced fields and their values, by name."""

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise ValueError(f"regime={self.regime!r}: must be one of {', '.join(REGIMES)}")
        for name, value in self.launch:
            check_field(name, value)

    @classmethod
    def of(cls, regime: str, bulk: bool, graphs: bool, launch: Mapping[str, int] | str | Path | None) -> Switches:
        """From the engine's arguments; `launch` may be the path of a JSON file that holds one object."""
        fields: Any = launch or {}
        if isinstance(launch, (str, Path)):
            try:
                fields = json.loads(Path(launch).read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{launch}: is not JSON ({error})") from None
        if not isinstance(fields, Mapping):
            raise ValueError(f"launch={launch!r}: must be an object of fields and values")
        return cls(regime, bulk, graphs, tuple(sorted(fields.items())))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Switches:
        """From what `to_dict` gives, or a part of it."""
        return cls.of(**{"regime": "auto", "bulk": True, "graphs": True, "launch": None, **fields})

    def apply(self, launch: Launch) -> Launch:
        """The settings chosen for a model, with those that are replaced."""
        if not self.bulk:
            launch = dataclasses.replace(launch, bulk=False)
        return dataclasses.replace(launch, **dict(self.launch))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Those that are set, as JSON holds them; empty for an engine as users have it."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return found | ({"launch": dict(self.launch)} if self.launch else {})


def check_field(name: str, value: object) -> None:
    """Raise `ValueError` where a field of `Launch` cannot be replaced by this value."""
    types = {field.name: field.type for field in dataclasses.fields(Launch) if field.name not in FIXED}
    if name not in types:
        raise ValueError(f"launch: {name!r} is no setting; there are {', '.join(types)}")
    if types[name] == "bool":
        allowed, fits = "true or false", isinstance(value, bool)
    elif isinstance(value, bool) or not isinstance(value, int):
        allowed, fits = "a whole number", False
    elif name.endswith("warps"):
        allowed, fits = f"one of {WARPS}", value in WARPS
    elif name.endswith("stages"):
        allowed, fits = f"1 to {MOST_STAGES}", 1 <= value <= MOST_STAGES
    elif name.endswith("registers"):
        allowed, fits = "32 to 255", 32 <= value <= 255
    elif name == "rows":
        allowed, fits = f"a multiple of {LEAST_ROWS}", value > 0 and value % LEAST_ROWS == 0
    else:
        allowed, fits = (
            f"a power of two, 16 to {LARGEST_TILE}",
            16 <= value <= LARGEST_TILE and value & (value - 1) == 0,
        )
    if not fits:
        raise ValueError(f"launch: {name}={value!r}: must be {allowed}")
