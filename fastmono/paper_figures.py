"""The figures of the paper, by sweep and by claim: what is drawn of which models, and what is said below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from fastmono import interpret, interpret_plots, plots
from fastmono.claims import equal_loss_pair, settled
from fastmono.claims_inside import Section5
from fastmono.plot_style import save_png
from fastmono.presets import SWEEPS, Sweep
from fastmono.spec import ModelSpec

if TYPE_CHECKING:
    from fastmono.run import Run

CHOICE = "of the lowest seed, the least, the median and the most monosemantic model"
TYPICAL_CHOICE = "the most monosemantic model of lr-negative-bias, of the lowest seed"
PAIRED_CHOICE = "the model of lr-negative-bias or of the wider layers that has the most of them"


@dataclass(frozen=True)
class Drawing:
    """A figure: the name of its file, what to say below it, and how it is made."""

    name: str
    caption: str
    make: Callable[[], Figure]

    def path(self, folder: Path) -> Path:
        """Where it lies in a folder of figures."""
        return folder / f"{self.name}.png"

    def save(self, folder: Path) -> None:
        """Draw it, and write it as PNG, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        save_png(self.make(), self.path(folder))


def models_to_show(run: Run) -> list[int]:
    """Of the lowest seed's finished models the least, the median and the most monosemantic; fewer if there are."""
    seed = min(spec.seed for spec in run.specs)
    done = [i for i, row in enumerate(run.table) if row["status"] == "done" and row["seed"] == seed]
    ranked = sorted(done, key=lambda i: float(run.table[i]["mono_per_feature"]))
    return list(dict.fromkeys(ranked[i] for i in (0, len(ranked) // 2, -1))) if ranked else []


def sweep_figures(sweep: Sweep, scale: str, run: Run) -> Iterator[Drawing]:
    """The figures of a sweep, from a run that holds its models (recipe fact 14)."""
    own = run.subset(sweep.grid(scale))
    yield Drawing(
        f"{sweep.name}-curves",
        f"Loss, monosemantic neurons per feature and mean bias against log2(step), coloured by {sweep.field}.",
        lambda: plots.training_curves(own, sweep.field),
    )
    shown, with_ = own, ""
    if sweep.beside and set(other := SWEEPS[sweep.beside].grid(scale)) <= set(run.specs):
        shown, with_ = run.subset(other + own.grid), f", with those of {sweep.beside} beside"
    yield Drawing(
        f"{sweep.name}-results",
        f"Monosemantic neurons over k and over N, and the final loss, against {sweep.field}{with_}.",
        lambda: plots.monosemanticity_against(shown, sweep.field, "final_loss"),
    )
    if models := models_to_show(own):
        yield Drawing(
            f"{sweep.name}-activations",
            f"Activations for single features, and biases in the same order: {CHOICE}.",
            lambda: plots.activations_and_biases(own, models),
        )


def claim_figures(scale: str, run: Run) -> Iterator[Drawing]:
    """The figures that belong to a claim rather than to a sweep: that of claim 3, where two losses are so close."""
    found, _ = settled(run, SWEEPS["lr-zero-bias"].grid(scale) + SWEEPS["lr-negative-bias"].grid(scale))
    pair = equal_loss_pair(found)
    if pair is not None:
        part = run.subset(result.spec for result in pair)
        losses = " and ".join(f"{result.loss:.4g}" for result in pair)
        caption = (
            f"Two models of one seed with essentially equal losses ({losses}), of all such pairs the most different."
        )
        yield Drawing("equal-loss", caption, lambda: plots.activations_and_biases(part, [0, 1]))


def inside_figures(run: Run, found: Section5) -> Iterator[Drawing]:
    """The figures of section 5, of one model and, for features with two neurons, of another (`Section5`)."""
    cache: dict[ModelSpec, interpret.Findings] = {}

    def drawn(name: str, spec: ModelSpec) -> Callable[[], Figure]:
        def make() -> Figure:
            if spec not in cache:
                cache[spec] = interpret.findings(run.parameters(run.specs.index(spec)), spec)
            return interpret_plots.FIGURES[name](cache[spec])

        return make

    captions = {
        "responses": "The output for some features against their amplitude, by part",
        "single_neurons": "Features with one monosemantic neuron: its threshold and gain against the best ones",
        "pairs": "Features with two monosemantic neurons",
        "linear_part": "The polysemantic neurons as a linear map",
        "definition": "How much the count of monosemantic neurons depends on its definition",
    }
    for name, caption in captions.items():
        spec = found.paired if name == "pairs" else found.typical
        if spec is not None:
            rule = PAIRED_CHOICE if name == "pairs" else TYPICAL_CHOICE
            yield Drawing(f"inside-{name}", f"{caption}: {rule}.", drawn(name, spec))
