"""What the figures share: style, labels, colours and line styles, axes, and how models are grouped by their fields."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fastmono.files import write_bytes
from fastmono.spec import FIELDS, ModelSpec
from fastmono.store import FINAL_STEPS

if TYPE_CHECKING:
    from fastmono.run import Run

Array = NDArray[Any]
PERIOD = FINAL_STEPS  # steps of the published schedule, lr (1 + cos(pi t / 512)) / 2 (recipe fact 6)
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "text.usetex": False,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "hatch.linewidth": 0.5,
}  # fmt: skip
styled = matplotlib.rc_context(STYLE)
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
MOST_ENTRIES = 8  # values told apart in a legend; more numbers get a colour bar
ORDER = tuple(dict.fromkeys(("lr", "init_bias", "n_neurons", "l1", "bias_decay", *FIELDS)))
CAPTION = ("task", "activation", "n_features", "d_embed", "n_neurons", "feature_prob", "batch_size", "steps")
LABELS = {
    "bias_decay": "bias decay (bias_decay)", "feature_prob": "probability of a feature (feature_prob)",
    "l1": "L1 penalty (l1)", "linear_path": "rank of the linear path (linear_path)",
    "lr": "learning rate (lr)", "init_bias": "offset of the initial bias (init_bias)", "n_neurons": "neurons k",
    "mono_per_feature": "monosemantic neurons / features (count / N)", "mean_bias": "mean bias over neurons",
    "mono_per_neuron": "monosemantic neurons / neurons (count / k)", "n_features": "features N",
    "loss": "loss (squared error a sample)", "final_loss": "final loss (squared error a sample)",
}  # fmt: skip


def value_text(value: object) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}") if isinstance(value, float) else str(value)


def model_name(spec: ModelSpec, fields: Iterable[str]) -> str:
    return ", ".join(f"{field}\N{NO-BREAK SPACE}{value_text(getattr(spec, field))}" for field in fields)


def is_numeric(values: Iterable[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def values_of(run: Run, field: str, argument: str = "field") -> list[Any]:
    """A field's values in the run: numbers ascending, names in order of appearance."""
    if field not in FIELDS:
        raise ValueError(f"{argument}={field!r}: must be a field of a model, one of {', '.join(FIELDS)}")
    found = list(dict.fromkeys(getattr(spec, field) for spec in run.specs))
    return sorted(found) if is_numeric(found) else found


def group_models(run: Run, fields: Sequence[str]) -> dict[tuple[Any, ...], list[int]]:
    """The models for each combination of values of some fields."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, spec in enumerate(run.specs):
        found.setdefault(tuple(getattr(spec, field) for field in fields), []).append(i)
    return found


def varying_fields(run: Run, *first: str) -> list[str]:
    """The swept fields, `first` ones before others, without the seed and those that the earlier ones determine.

    The presets change init_bias and bias_decay together: that is one axis, not two.
    """
    kept: list[str] = []
    for field in dict.fromkeys((*first, *(field for field in ORDER if field != "seed"))):
        if len(group_models(run, [*kept, field])) > len(group_models(run, kept)):
            kept.append(field)
    return kept


def mean_low_high(values: Array) -> Array:
    """Mean, lowest and highest over the first axis of what is finite, [3, ...]; NaN where nothing is."""
    finite = np.isfinite(values)
    mean = np.where(finite, values, 0.0).sum(0) / np.maximum(finite.sum(0), 1)
    low, high = (np.where(finite, values, far) for far in (np.inf, -np.inf))
    ends = low.min(0, initial=np.inf), high.max(0, initial=-np.inf)
    return np.where(finite.any(0), np.stack((mean, *ends)), np.nan)


def color_norm(values: Iterable[Any]) -> Normalize:
    """From lowest to highest, logarithmic for positive numbers that span more than a decade."""
    finite = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    return LogNorm(low, high) if 0 < low < high / 10 else Normalize(low, high)


def new_figure(width: float, height: float, rows: int, columns: int, **layout: Any) -> tuple[Figure, Array]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure, whole or not at all."""
    figure.savefig(png := io.BytesIO(), format="png")
    write_bytes(path, png.getvalue())
    return path


def wrapped(text: str, inches: float) -> str:
    # Constrained layout keeps room for a title's height, not for its width. A letter is about 0.085 inches wide.
    return "\n".join(fill(line, max(10, int(inches / 0.085)), break_long_words=False) for line in text.split("\n"))


def finished_figure(figure: Figure, run: Run, title: str = "", handles: Sequence[Any] = ()) -> Figure:
    """Title, how many models are in which state and the settings they share; and the legend."""
    states = [row["status"] for row in run.table]
    about = "models: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    about += "; " + model_name(run.specs[0], (field for field in CAPTION if field not in run.grid.axes))
    return titled_figure(figure, title + about, handles)


def titled_figure(figure: Figure, title: str, handles: Sequence[Any] = ()) -> Figure:
    """The title, broken into lines that fit, and the legend."""
    figure.suptitle(wrapped(title, figure.get_figwidth() - 0.3))
    if handles:
        fit = max(1, int(figure.get_figwidth() / (0.075 * max(len(h.get_label()) for h in handles) + 0.6)))
        columns = -(-len(handles) // -(-len(handles) // fit))  # as few rows, and then as equal ones, as can be
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def set_x_axis(
    ax: Axes, ticks: Sequence[float], labels: Sequence[str], shown: Sequence[float], base: int | None
) -> None:
    """An x axis, logarithmic if it has a base, that holds all of `shown`, with the ticks for which there is room."""
    if not any(np.size(line.get_xdata()) for line in ax.lines):
        ax.text(0.5, 0.5, "nothing to show yet", transform=ax.transAxes, ha="center", va="center", color="0.4")
    if base:
        ax.set_xscale("log", base=base)
    to, back = (np.log2, np.exp2) if base else (np.asarray, np.asarray)
    at, ends = to(np.array(ticks, float)), to(np.array(shown, float))
    span = np.ptp(ends) or 1.0
    ax.set_xlim(*back(np.array([ends.min() - 0.05 * span, ends.max() + 0.05 * span])).tolist())
    kept: list[int] = []
    for i, label in enumerate(labels):
        if not kept or at[i] - at[kept[-1]] >= 0.02 * span * (1 + len(label.replace("$", ""))):
            kept.append(i)
    ax.set_xticks([ticks[i] for i in kept], [labels[i] for i in kept])
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def line_looks(run: Run, figure: Figure, fields: Sequence[str]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Colour by the first field, line style by the others: each model's style, and legend entries or a colour bar."""
    values, handles = values_of(run, fields[0]) if fields else [None], []
    colors: Any = OKABE_ITO[: len(values)]
    if len(values) > MOST_ENTRIES and is_numeric(values):
        bar = ScalarMappable(color_norm(values), "viridis")
        figure.colorbar(bar, ax=figure.axes, label=LABELS.get(fields[0], fields[0]), pad=0.01)
        colors = bar.to_rgba(np.array(values))
    elif len(values) > 1:
        if is_numeric(values):  # the light end of the scale is hard to see as a line
            colors = colormaps["viridis"](np.linspace(0, 0.88, len(values)))
        names = [f"{fields[0]} {value_text(value)}" for value in values]
        handles = [Line2D([], [], color=c, label=name) for c, name in zip(colors, names, strict=True)]
    by_style = list(fields[1:])
    while len(group_models(run, by_style)) > len(DASHES):
        by_style.pop()
    styles = dict(zip(group_models(run, by_style), DASHES, strict=False))
    for models, style in zip(group_models(run, by_style).values() if by_style else (), DASHES, strict=False):
        handles.append(Line2D([], [], color="0.3", linestyle=style, label=model_name(run.specs[models[0]], by_style)))
    if alike := fields[1 + len(by_style) :]:
        handles.append(Line2D([], [], linestyle="", label=f"drawn alike: {', '.join(alike)}"))
    place = [values.index(getattr(spec, fields[0])) if fields else 0 for spec in run.specs]
    dashes = [styles[tuple(getattr(spec, field) for field in by_style)] for spec in run.specs]
    return [{"color": colors[i], "linestyle": dash} for i, dash in zip(place, dashes, strict=True)], handles
