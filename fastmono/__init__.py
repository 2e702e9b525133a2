"""fastmono: train a whole grid of toy models at once, and see how monosemantic each one came out.

`train` a `Grid` of `ModelSpec`s into a run directory, `load_run` it again; `metrics` measures, `plots` draws;
`interpret` takes one trained model apart, `interpret_plots` draws that; `rounds` moves what its polysemantic neurons do
into a linear path and trains on, `rounds_plots` draws that.
"""

from __future__ import annotations

from typing import Any

from fastmono import interpret, metrics, rounds
from fastmono.presets import PRESETS, preset
from fastmono.run import Run, ToyModel, load_run
from fastmono.runner import plan_run, train
from fastmono.spec import Grid, ModelSpec

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Grid",
    "ModelSpec",
    "Run",
    "ToyModel",
    "interpret",
    "interpret_plots",
    "load_run",
    "metrics",
    "plan_run",
    "plots",
    "preset",
    "rounds",
    "rounds_plots",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("plots", "interpret_plots", "rounds_plots"):  # load matplotlib, which a training script may do without
        import importlib

        return importlib.import_module(f"fastmono.{name}")
    raise AttributeError(f"module 'fastmono' has no attribute {name!r}")
