"""A few steps of a grid and no more, for tools that watch every instruction.

python -m benchmarks.gpu.few published|tiny [--steps 2] [--models 1] [--switches JSON]
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.gpu.cases import published_grid
from benchmarks.gpu.jobs import report
from benchmarks.suites import TINY
from fastmono.block import Block
from fastmono.engines import has_gpu
from fastmono.engines.triton import TritonEngine


def main(argv: list[str] | None = None) -> int:
    """Train, and report the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=("published", "tiny"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--switches", type=json.loads, default={})
    arguments = parser.parse_args(argv)
    specs = published_grid(0.0) if arguments.grid == "published" else [TINY.replace(seed=i) for i in range(16)]
    precision = "bf16" if has_gpu() else "fp32"
    engine = TritonEngine(precision, graphs=False, **arguments.switches)
    losses = engine.advance(Block.new(specs[: arguments.models]), arguments.steps)
    report(losses=losses[0].tolist())
    return 0


if __name__ == "__main__":
    sys.exit(main())
