"""The suites: which shapes, learning rates, biases and seeds are trained, from which states, and for how long.

| suite | models | states | draws |
|---|---|---|---|
| tiny | N 64, m 16, k 128, B 256: 12, 96 and 1024 models | all four | time a model-step, contestant by contestant |
| demo | the preset `demo`: 12 models, N 128, m 32, k 256, B 512 | all four | the same |
| published | the preset `published`: 12 models, N 512, m 64, k 1024, B 8192 | the first; on a GPU all four | the same |
| scale | the tiny shape, 1 to 4096 models | the half | model-steps/s against the number of models |
| width | N 128, m 32, B 512, k from N to 32 N, 3 models at a negative bias | all four | time a model-step against k |

Rates: 12 models of a seed are the six published learning rates with zero bias, and with bias -1 and its decay of 0.03.
Larger grids have more seeds, each with batches of its own that its models share: 96 models are 8 seeds of 12. 1024 is
no multiple of 12: there, and in the suite scale from 16 models on, a seed has 16 models, with 0.002 and 0.02 as a
seventh and eighth rate, so that every seed has equally many and a stacked contestant can broadcast its batch.

States: one seed's models are trained by fastmono for the whole run; the states at its beginning, a quarter, a half and
its end are what every contestant is timed from. Models of further seeds start as copies of those of the first: what a
step costs depends on the state, and not on how it was come by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastmono.presets import PUBLISHED_LEARNING_RATES, preset
from fastmono.spec import Grid, ModelSpec

SUITES = ("tiny", "demo", "published", "scale", "width")
ALL_STATES = (0.0, 0.25, 0.5, 1.0)
STATE_NAMES = {0.0: "beginning", 0.25: "quarter", 0.5: "half", 1.0: "end"}
EIGHT_LEARNING_RATES = (0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.02, 0.03)
SEQUENTIAL = ("published", "published-pool", "cleaned", "cleaned-pool")


@dataclass(frozen=True)
class Case:
    """One grid of a suite.

    `grid` holds the models of one seed; `streams` says how many seeds, each with a copy of them.
    """

    name: str
    grid: tuple[ModelSpec, ...]
    streams: int = 1

    @property
    def n_models(self) -> int:
        """Models of all seeds together."""
        return len(self.grid) * self.streams


@dataclass(frozen=True)
class Suite:
    """What is measured and how long; the numbers of steps apply to every contestant alike.

    Attributes:
        fractions: states that turns start from, as fractions of the run.
        rounds: turns of each contestant from each state.
        steps: most steps of a turn; `turn_seconds` may make it fewer for a slow contestant, but never below `least`.
        least: steps of the shortest turn.
        gate_streams, gate_models, gate_steps: see gate.py.
        left_out: contestants that are not asked unless named.
    """

    name: str
    cases: tuple[Case, ...]
    fractions: tuple[float, ...] = ALL_STATES
    rounds: int = 5
    steps: int = 512
    least: int = 64
    turn_seconds: float = 1.5
    gate_streams: int = 16
    gate_models: int = 2
    gate_steps: int = 64
    left_out: tuple[str, ...] = ()


def pair(base: ModelSpec, lrs: tuple[float, ...], biases: tuple[float, ...] = (0.0, -1.0)) -> tuple[ModelSpec, ...]:
    """The models of one seed: every rate with zero bias, then with bias -1 and its decay."""
    specs = []
    for bias in biases:
        specs.extend(Grid(base.replace(init_bias=bias, bias_decay=0.03 if bias else 0.0), lr=lrs))
    return tuple(specs)


TINY = ModelSpec(n_features=64, d_embed=16, n_neurons=128, feature_prob=1 / 16, batch_size=256, steps=8192)
SMOKE = ModelSpec(n_features=24, d_embed=8, n_neurons=32, feature_prob=1 / 8, batch_size=64, steps=512)


def tiny(on_gpu: bool) -> Suite:
    twelve, sixteen = pair(TINY, PUBLISHED_LEARNING_RATES), pair(TINY, EIGHT_LEARNING_RATES)
    cases = Case("12 models", twelve), Case("96 models", twelve, 8), Case("1024 models", sixteen, 64)
    return Suite("tiny", cases, steps=2048 if on_gpu else 512)


def demo(on_gpu: bool) -> Suite:
    return Suite("demo", (Case("12 models", tuple(preset("demo"))),), steps=1024 if on_gpu else 256)


def published(on_gpu: bool) -> Suite:
    case = Case("12 models", tuple(preset("published")))
    if on_gpu:
        return Suite("published", (case,), gate_streams=6)
    # A step of the grid is 336 GFLOP: seconds on a CPU.
    return Suite(
        "published", (case,), fractions=(0.0,), rounds=3, steps=4, least=4, gate_streams=4,
        gate_steps=16,
        left_out=("vmap", "reference-fp32", "reference-tf32", "reference-bf16"),
    )  # fmt: skip


def scale(on_gpu: bool) -> Suite:
    sixteen = pair(TINY, EIGHT_LEARNING_RATES)
    cases = [Case("1 model", pair(TINY, (0.005,), (0.0,))), Case("4 models", pair(TINY, (0.003, 0.01)))]
    cases += [Case(f"{16 * s} models", sixteen, s) for s in (1, 4, 16, 64, 256)]
    return Suite(
        "scale", tuple(cases), fractions=(0.5,), rounds=3, steps=2048 if on_gpu else 256,
        left_out=("reference-fp32", "reference-tf32", "reference-bf16"),
    )  # fmt: skip


def width(on_gpu: bool) -> Suite:
    base = ModelSpec(n_features=128, d_embed=32, feature_prob=1 / 32, batch_size=512, steps=2048)
    cases = tuple(
        Case(f"k = {k // 128} N", pair(base.replace(n_neurons=k), (0.003, 0.01, 0.03), (-1.0,)))
        for k in (128, 256, 512, 1024, 2048, 4096)
    )  # fmt: skip
    return Suite(
        "width", cases, rounds=3, steps=512 if on_gpu else 128, gate_streams=8,
        left_out=(*SEQUENTIAL, "vmap", "reference-fp32", "reference-tf32", "reference-bf16"),
    )  # fmt: skip


MAKERS: dict[str, Callable[[bool], Suite]] = {
    "tiny": tiny, "demo": demo, "published": published, "scale": scale, "width": width,
}  # fmt: skip


def suite(name: str, on_gpu: bool, smoke: bool = False) -> Suite:
    """A suite by name; `smoke` keeps its form and takes a tiny shape, two cases at most, and few steps."""
    found = MAKERS[name](on_gpu)
    if not smoke:
        return found
    # Two models on four streams, the gate's own stack: torch.compile then compiles one shape for all suites.
    grid = pair(SMOKE, (0.03,))
    cases = [Case("8 models", grid, 4)]
    if found.name == "scale":
        cases.append(Case("16 models", grid, 8))
    return replace(
        found, cases=tuple(cases), rounds=1, steps=16, least=16, turn_seconds=0.01,
        fractions=(0.0, 0.5) if len(found.fractions) > 1 else found.fractions,
        gate_streams=4, gate_models=2, gate_steps=64, left_out=(),
    )  # fmt: skip
