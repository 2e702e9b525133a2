"""How far the engine is from float64 after one step, in every case that the tests compare: to find where an error lies.

    python -m benchmarks.gpu.apart [--small] [--switches JSON]

The first moments of one step are the gradients, but for a factor. A wrong loss is the forward pass's, or that of what
comes before it; with a right loss, wrong W_in, b and W_outT tell the products of the backward pass apart.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from benchmarks.gpu.cases import AGREEMENT, PRECISIONS, agreement_spec
from benchmarks.gpu.jobs import report
from fastmono.block import Block, views
from fastmono.engines.reference import ReferenceEngine
from fastmono.engines.triton import TritonEngine
from fastmono.spec import ModelSpec


def apart(spec: ModelSpec, precision: str, switches: dict[str, object]) -> dict[str, object]:
    """Relative errors, in the Euclidean norm, of the loss and of the gradient of W_in, b and W_outT after one step;
    `plain` that of W_in in PyTorch with operands of the precision; `not_finite` the share of such numbers; and in which
    row and column of which tensor the error is largest."""
    blocks = {"exact": Block.new([spec], torch.float64), "plain": Block.new([spec]), "ours": Block.new([spec])}
    engine = TritonEngine(precision, **switches)  # type: ignore[arg-type]
    engines = {"exact": ReferenceEngine(), "plain": ReferenceEngine(precision), "ours": engine}
    losses = {name: float(engines[name].advance(block, 1)) for name, block in blocks.items()}
    engine.fetch(blocks["ours"])
    moments = {name: views(spec, block.models[0].first_moment.double()) for name, block in blocks.items()}
    found: dict[str, object] = {"loss": abs(losses["ours"] / losses["exact"] - 1)}
    largest: list[tuple[float, str]] = []
    for name, truth in moments["exact"].items():
        error = moments["ours"][name] - truth
        found[name] = float(error.norm() / truth.norm())
        if error.numel():
            at = int(error.abs().nan_to_num(torch.inf).argmax())
            place = f"{name}[{', '.join(str(int(i)) for i in torch.unravel_index(torch.tensor(at), error.shape))}]"
            largest.append((float(error.flatten()[at].abs() / truth.abs().max()), place))
    first = blocks["ours"].models[0].first_moment
    plain, exact = moments["plain"]["W_in"], moments["exact"]["W_in"]
    found["plain"] = float((plain - exact).norm() / exact.norm())
    return found | {"not_finite": float((~first.isfinite()).double().mean()), "largest_at": max(largest)[1]}


def main(argv: list[str] | None = None) -> int:
    """Report every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one small case in fp32")
    parser.add_argument("--switches", type=json.loads, default={})
    arguments = parser.parse_args(argv)
    failed = 0
    for precision in ("fp32",) if arguments.small else PRECISIONS[::-1]:
        for shape, task in AGREEMENT[:1] if arguments.small else AGREEMENT:
            spec = agreement_spec(shape, task)
            if arguments.small:
                spec = spec.replace(n_features=24, d_embed=8, n_neurons=32, batch_size=64)
            case = {"case": f"{shape} {task}", "precision": precision}
            try:
                report(**case, **apart(spec, precision, arguments.switches))
            except Exception as error:  # a device that has refused refuses what follows, which is then soon over
                failed += 1
                report(**case, error=str(error)[-300:])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
