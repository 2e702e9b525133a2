"""Grids by name: `demo`, `published`, and every sweep of the paper at three scales (`width-small`, `l1-full`, ...).

    full   the paper's sizes: N 512, m 64, k 1024, B 8192, 2**17 steps
    small  for two CPU cores: N 128, m 32, k 256, B 1024, 2**14 steps
    quick  a size at which the code is tried, and nothing is learned about the paper

What small keeps of full: k = 2 N; as many features present for each dimension of the embedding, N eps / m = 1/8, so
that the interference of a feature, about N eps / (3 m), is the same; every learning rate; and what the decay of the
biases comes to in the first half of training, exp(-bias_decay lr steps / 2): with an eighth of the steps it is eight
times as strong. What it does not keep: N / m is 4 and not 8; a batch holds a feature 32 times and not 128 times, so
that high learning rates lose more to noise; and training is eight times shorter, in which the lowest learning rates may
not end.

From the paper: sizes, learning rates, widths and their batches, bias -1 with decay .03, the frequencies, tasks and
nonlinearities (recipe facts 1, 3, 7, 10, 12). Not on record, and chosen here: the values of the sweeps over init_bias,
bias_decay, feature_prob and l1, the learning rate .003 of every sweep over something else, and three seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastmono.spec import ACTIVATIONS, BIAS_DECAY_MODES, TASKS, Grid, ModelSpec

PUBLISHED_LEARNING_RATES = (0.001, 0.003, 0.005, 0.007, 0.01, 0.03)
NEGATIVE_BIAS, NEGATIVE_BIAS_DECAY = -1.0, 0.03


@dataclass(frozen=True)
class Scale:
    """Sizes and swept values. The batch of a width is such that it takes as much memory as every other."""

    base: ModelSpec
    """With zero bias, at the learning rate of the sweeps over other fields."""
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    task_learning_rates: tuple[float, ...]
    init_biases: tuple[float, ...]
    bias_decays: tuple[float, ...]
    bias_decay: float
    """The one that goes with the negative bias."""
    feature_probs: tuple[float, ...]
    l1s: tuple[float, ...]
    widths: tuple[int, ...]
    decides: bool = True
    """Whether a claim of the paper can be decided at these sizes at all."""

    def starts(self, *which: str) -> tuple[ModelSpec, ...]:
        """The base with the initial biases named: zero, negative, or both where none is."""
        bias = {"init_bias": NEGATIVE_BIAS, "bias_decay": self.bias_decay}
        both = {"zero": self.base, "negative": self.base.replace(**bias)}
        return tuple(both[name] for name in which or both)

    def ranks(self) -> tuple[int, ...]:
        """Of the linear path: none, a quarter, half and all of the embedding's dimensions."""
        return 0, self.base.d_embed // 4, self.base.d_embed // 2, self.base.d_embed

    def batch_of(self, n_neurons: int) -> int:
        """B of a layer of k neurons: log2 B = log2(k B of the base) - ceil(log2 k) (recipe fact 1)."""
        return self.base.batch_size * self.base.n_neurons >> (n_neurons - 1).bit_length()


SCALES = {
    "full": Scale(
        base=ModelSpec(),
        seeds=(0, 1, 2),
        learning_rates=PUBLISHED_LEARNING_RATES,
        task_learning_rates=(0.003, 0.01, 0.03),
        init_biases=(0.0, -0.1, -0.3, -1.0, -3.0),
        bias_decays=(0.0, 0.01, NEGATIVE_BIAS_DECAY, 0.1, 0.3),
        bias_decay=NEGATIVE_BIAS_DECAY,
        feature_probs=(1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16),
        l1s=(0.0, 0.001, 0.003, 0.01, 0.03),
        widths=(16, 32, 64, 128, 256, 512, 1024, 2048),
    ),
    "small": Scale(
        base=ModelSpec(
            n_features=128, d_embed=32, n_neurons=256, feature_prob=1 / 32, batch_size=1024, steps=2**14
        ),
        seeds=(0, 1, 2),
        learning_rates=PUBLISHED_LEARNING_RATES,
        task_learning_rates=(0.003, 0.01, 0.03),
        init_biases=(0.0, -0.1, -0.3, -1.0, -3.0),
        bias_decays=(0.0, 0.08, 8 * NEGATIVE_BIAS_DECAY, 0.8, 2.4),
        bias_decay=8 * NEGATIVE_BIAS_DECAY,
        feature_probs=(1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8),
        l1s=(0.0, 0.003, 0.01, 0.03),
        widths=(32, 64, 128, 256, 512, 1024),
    ),
    "quick": Scale(
        base=ModelSpec(
            n_features=16, d_embed=12, n_neurons=32, feature_prob=1 / 8, batch_size=128, steps=2**12, lr=0.01
        ),
        seeds=(0, 1),
        learning_rates=(0.01, 0.02, 0.03),
        task_learning_rates=(0.01, 0.02, 0.03),
        init_biases=(0.0, -1.0),
        bias_decays=(0.0, 0.1),
        bias_decay=0.1,
        feature_probs=(1 / 8, 1 / 4),
        l1s=(0.0, 0.01),
        widths=(16, 32, 64),
        decides=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One sweep of the paper: what is varied, and where the paper speaks of it."""

    name: str
    field: str
    """The field that is swept, by which curves are coloured."""
    title: str
    make: Callable[[Scale], Grid]
    """The models of the base's seed."""
    beside: str = ""
    """Another sweep, whose models the figures against the swept value show as well."""

    def grid(self, scale: str) -> Grid:
        """The models at a scale, every seed. `ValueError` for an unknown scale."""
        return self.make(sizes(scale)).override(seed=sizes(scale).seeds)


def sizes(scale: str) -> Scale:
    """A scale by name. `ValueError` for an unknown one."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(SCALES)}")
    return SCALES[scale]


def _union(grids: Iterable[Grid]) -> Grid:
    first, *others = grids
    for grid in others:
        first = first + grid
    return first


def _learning_rates(scale: Scale, start: str, frequency: str) -> Grid:
    (base,) = scale.starts(start)
    return Grid(base.replace(frequency=frequency), lr=scale.learning_rates)


def _widths(scale: Scale) -> Grid:
    return Grid.of(
        base.replace(n_neurons=k, batch_size=scale.batch_of(k)) for base in scale.starts() for k in scale.widths
    )


SWEEPS: dict[str, Sweep] = {
    sweep.name: sweep
    for sweep in (
        Sweep("lr-zero-bias", "lr", "Learning rate, zero initial bias (section 4.1.1)",
              lambda s: _learning_rates(s, "zero", "uniform")),
        Sweep("lr-negative-bias", "lr", "Learning rate, negative initial bias (section 4.1.2)",
              lambda s: _learning_rates(s, "negative", "uniform"), beside="lr-zero-bias"),
        Sweep("lr-zero-bias-power-law", "lr", "Learning rate, zero initial bias, frequencies by a power law",
              lambda s: _learning_rates(s, "zero", "power_law")),
        Sweep("lr-negative-bias-power-law", "lr", "Learning rate, negative initial bias, frequencies by a power law",
              lambda s: _learning_rates(s, "negative", "power_law"), beside="lr-zero-bias-power-law"),
        Sweep("init-bias", "init_bias", "Initial bias, with bias decay (section 4.1.2)",
              lambda s: Grid(s.starts("negative")[0], init_bias=s.init_biases)),
        Sweep("bias-decay", "bias_decay", "Bias decay, negative initial bias (section 4.1.2)",
              lambda s: Grid(s.starts("negative")[0], bias_decay=s.bias_decays)),
        Sweep("feature-prob", "feature_prob", "How sparse the features are, zero and negative initial bias",
              lambda s: _union(Grid(base, feature_prob=s.feature_probs) for base in s.starts())),
        Sweep("l1", "l1", "L1 penalty on activations, zero initial bias",
              lambda s: Grid(s.base, l1=s.l1s)),
        Sweep("width", "n_neurons", "Number of neurons, zero and negative initial bias (section 4.1.4)", _widths),
        Sweep("activation", "activation", "Nonlinearity, zero and negative initial bias",
              lambda s: _union(Grid(base, activation=ACTIVATIONS) for base in s.starts())),
        Sweep("task", "task", "The three tasks, zero and negative initial bias",
              lambda s: _union(Grid(base, task=TASKS, lr=s.task_learning_rates) for base in s.starts())),
        Sweep("linear-path", "linear_path", "A linear path of rank r beside the neurons, either initial bias (ours)",
              lambda s: _union(Grid(base, linear_path=s.ranks()) for base in s.starts())),
        Sweep("bias-decay-mode", "bias_decay_mode", "What the decay of a bias follows, negative initial bias (ours)",
              lambda s: Grid(s.starts("negative")[0], bias_decay_mode=BIAS_DECAY_MODES, lr=s.task_learning_rates)),
    )
}  # fmt: skip
"""In the order of the paper, and then what it left open."""


def _published(base: ModelSpec) -> Grid:
    negative = base.replace(init_bias=NEGATIVE_BIAS, bias_decay=NEGATIVE_BIAS_DECAY)
    return Grid(base, lr=PUBLISHED_LEARNING_RATES) + Grid(negative, lr=PUBLISHED_LEARNING_RATES)


def _sweep_at(sweep: Sweep, scale: str) -> Callable[[], Grid]:
    return lambda: sweep.grid(scale)


PRESETS: dict[str, tuple[str, Callable[[], Grid]]] = {
    "demo": (
        "six published learning rates x {zero bias, bias -1 with decay .03}, at a size for a laptop",
        lambda: _published(
            ModelSpec(n_features=128, d_embed=32, n_neurons=256, feature_prob=1 / 32, batch_size=512, steps=8192)
        ),
    ),
    "published": ("the same twelve models at the paper's size", lambda: _published(ModelSpec())),
    **{
        f"{sweep.name}-{scale}": (f"{sweep.title}, {scale}", _sweep_at(sweep, scale))
        for sweep in SWEEPS.values()
        for scale in SCALES
    },
}
PRESET_NAMES = f"demo, published, or SWEEP-SCALE: {'|'.join(SWEEPS)} at {'|'.join(SCALES)}"


def preset(name: str) -> Grid:
    """A grid by name; `PRESETS` lists them. `ValueError` for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: must be {PRESET_NAMES}")
    return PRESETS[name][1]()
