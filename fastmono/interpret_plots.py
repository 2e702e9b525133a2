"""The figures of one interpreted model (`fastmono.interpret.findings`): each function returns a `Figure`.

Where a notion does not apply, or no feature has it, a panel says so. Nothing is written but by `save_all`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fastmono.interpret import Findings, definition, responses
from fastmono.interpret_linear import best_linear_map
from fastmono.interpret_neurons import loss_against_threshold
from fastmono.metrics import THRESHOLD
from fastmono.plot_style import (
    CAPTION,
    LABELS,
    OKABE_ITO,
    model_name,
    new_figure,
    save_png,
    styled,
    titled_figure,
    wrapped,
)

PART_COLORS = {
    "whole": "black",
    "monosemantic": OKABE_ITO[0],
    "polysemantic": OKABE_ITO[1],
    "linear path": OKABE_ITO[2],
}
MOST_FEATURES = 6
LOOK: dict[str, Any] = {"color": "0.4", "linewidth": 1, "linestyle": (0, (5, 3)), "zorder": 0}


def _finished(found: Findings, figure: Figure, title: str, handles: Sequence[Any] = ()) -> Figure:
    spec = found.parts.spec
    return titled_figure(figure, f"{title}\n{model_name(spec, [*CAPTION, 'lr', 'init_bias', 'seed'])}", handles)


def _nothing(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, wrapped(text, 2.6), transform=ax.transAxes, ha="center", va="center", color="0.4")
    ax.set(xticks=[], yticks=[])


def typical_features(found: Findings, most: int = MOST_FEATURES) -> list[int]:
    """Up to `most` features, of each number of monosemantic neurons that occurs as equally many as can be, spread over
    the features; those with the most neurons last."""
    per_probe = found.parts.split.per_probe.view(-1, found.parts.spec.n_features)
    per_feature = per_probe.amax(0).clamp(max=3)
    groups = [(per_feature == n).nonzero().flatten().tolist() for n in range(4)]
    taken = [0] * 4
    while sum(taken) < min(most, found.parts.spec.n_features):
        taken[min((n for n in range(4) if taken[n] < len(groups[n])), key=lambda n: taken[n])] += 1
    spread = [[group[len(group) * (2 * i + 1) // (2 * n)] for i in range(n)]
              for group, n in zip(groups, taken, strict=True)]  # fmt: skip
    return [feature for group in spread for feature in group]


@styled
def feature_responses(found: Findings, features: Sequence[int] | None = None) -> Figure:
    """The output for each feature against its amplitude, alone (above) and under interference (below), by part.

    Below: means, and for the whole the quantiles 10 to 90 % and 25 to 75 % over samples. Without features, the
    `typical_features`. Raises `ValueError` for a feature that the model does not have.
    """
    chosen = typical_features(found) if features is None else list(features)
    parts, spec = found.parts, found.parts.spec
    figure, axes = new_figure(2.3 * max(len(chosen), 3) + 0.6, 5.6, 2, len(chosen), sharex=True, sharey=True)
    per_probe = parts.split.per_probe.view(-1, spec.n_features)
    for feature, column in zip(chosen, axes.T, strict=True):
        response = responses(parts, feature)
        a = response.amplitudes.numpy()
        for ax, values in zip(column, (response.alone, response.mean), strict=True):
            ax.plot(a, abs(a), **LOOK)
            ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
            for name in parts.names():  # a part that is the whole lies on it, and both are seen
                width = 2.6 if name == "whole" else 1.3
                ax.plot(a, values[name].numpy(), color=PART_COLORS[name], linewidth=width)
        q = response.quantiles["whole"].numpy()
        for low, high, alpha in ((0, -1, 0.12), (1, -2, 0.2)):
            column[1].fill_between(a, q[low], q[high], color="black", alpha=alpha, linewidth=0)
        counts = " and ".join(str(int(n)) for n in per_probe[:, feature])
        column[0].set_title(wrapped(f"feature {feature}: {counts} monosemantic", 2.1))
        column[1].set_xlabel("its amplitude")
    axes[0, 0].set_ylabel("output for it, alone")
    axes[1, 0].set_ylabel("with other features present")
    handles: list[Any] = [Line2D([], [], color=PART_COLORS[name], label=name) for name in parts.names()]
    handles.append(Line2D([], [], label="target", **{**LOOK, "zorder": 1}))
    handles.append(Patch(color="black", alpha=0.2, label="25 to 75 %, 10 to 90 % of samples"))
    return _finished(found, figure, "Output for a feature, by part of the model", handles)


def _scatter(ax: Axes, x: Sequence[float], y: Sequence[float], color: str, label: str = "") -> None:
    ax.plot(x, y, "o", color=color, markersize=4, alpha=0.7, markeredgewidth=0, label=label)


def _diagonal(ax: Axes) -> None:
    ends = [min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])]
    ax.plot(ends, ends, **LOOK)
    ax.set(xlim=ends, ylim=ends)


@styled
def single_neurons(found: Findings) -> Figure:
    """Thresholds, gains and losses of the features with one monosemantic neuron against the best ones, and the loss
    against the threshold of the neuron with the median threshold."""
    figure, (axes,) = new_figure(13.5, 4.2, 1, 4)
    settings = (("alone", "measured", "optimal"), ("beside the rest of the model", "measured_beside", "optimal_beside"))
    singles = [one for one in found.singles if one.measured.gain > 0]
    if not singles:
        for ax in axes:
            _nothing(ax, _why_not(found, "no feature has exactly one monosemantic neuron, of positive gain"))
        return _finished(found, figure, "Features with one monosemantic neuron")
    for ax, name in zip(axes, ("threshold", "gain", "loss"), strict=False):
        for color, (_, measured, optimal) in zip(OKABE_ITO, settings, strict=False):
            x, y = ([getattr(getattr(one, which), name) for one in singles] for which in (optimal, measured))
            _scatter(ax, x, y, color)
        _diagonal(ax)
        ax.set(xlabel=f"best {name}", ylabel=f"{name} of the model")
    ordered = sorted(singles, key=lambda one: one.measured.threshold)
    one, ax = ordered[len(ordered) // 2], axes[3]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    ax.plot(t.numpy(), loss_against_threshold(found.parts, one.probe, t).numpy(), color="black")
    ax.plot([one.optimal.threshold], [one.optimal.loss], "o", color=OKABE_ITO[0])
    ax.plot([one.measured.threshold], [one.measured.loss], "X", color=OKABE_ITO[3], markersize=8)
    ax.axhline(one.nothing, **LOOK)
    ax.set(xlabel="threshold (amplitude)", ylabel="loss alone", ylim=(0, None))
    ax.set_title(f"probe {one.probe}, with the best gain at each")
    handles = [Line2D([], [], color=color, marker="o", linestyle="", label=name)
               for color, (name, *_) in zip(OKABE_ITO, settings, strict=False)]  # fmt: skip
    handles.append(Line2D([], [], color=OKABE_ITO[3], marker="X", linestyle="", label="of the model (right)"))
    handles.append(Line2D([], [], label="equal; right: without the neuron", **{**LOOK, "zorder": 1}))
    title = f"{len(singles)} features with one monosemantic neuron"
    if len(found.singles) > len(singles):
        title += f" (not shown: {len(found.singles) - len(singles)} whose neuron has a negative gain: a correction)"
    return _finished(found, figure, title, handles)


def _why_not(found: Findings, text: str) -> str:
    activation = found.parts.spec.activation
    return text if activation == "relu" else f"{activation} has no thresholds"


@styled
def pairs(found: Findings) -> Figure:
    """Features with two monosemantic neurons: what the two give together, where the kinks lie, the ROC of the pair with
    the median AUC, and every pair's AUC and loss against those of one neuron."""
    figure, (axes,) = new_figure(13.5, 4.2, 1, 4)
    if not found.pairs:
        for ax in axes:
            _nothing(ax, _why_not(found, "no feature has exactly two monosemantic neurons"))
        return _finished(found, figure, "Features with two monosemantic neurons")
    a = np.linspace(0, 1, 201)
    for two in found.pairs:
        (low, high), (between, beyond) = two.thresholds, two.slopes
        y = between * np.maximum(a - low, 0) + (beyond - between) * np.maximum(a - high, 0)
        axes[0].plot(a, y, color=OKABE_ITO[0], linewidth=1, alpha=0.5)
    axes[0].plot(a, a, **LOOK)
    axes[0].set(xlabel="amplitude of the feature alone", ylabel="output of the pair")
    ordered = sorted(found.pairs, key=lambda two: two.thresholds[0])
    for place, two in enumerate(ordered):
        axes[1].plot(two.thresholds, [place, place], color="0.7", linewidth=1, zorder=0)
    for i, name in enumerate(("lower", "upper")):
        _scatter(axes[1], [two.thresholds[i] for two in ordered], range(len(ordered)), OKABE_ITO[i], name)
    axes[1].legend()
    axes[1].set(xlabel="kinks (amplitude)", ylabel="pair, by its lower kink", xlim=(0, 1))
    axes[1].yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    two = sorted(found.pairs, key=lambda two: two.auc)[len(found.pairs) // 2]
    axes[2].plot(*two.roc.numpy(), color=OKABE_ITO[0], linewidth=3, label=f"pair: AUC {two.auc:.3f}")
    label = f"better neuron: AUC {two.auc_single:.3f}"
    axes[2].plot(*two.roc_single.numpy(), color=OKABE_ITO[1], linewidth=1.2, label=label)
    for at, marker, name in zip(two.at_kinks.tolist(), "os", ("lower", "upper"), strict=True):
        axes[2].plot(*at, marker, color="black", markersize=5, label=f"above the {name} kink")
    axes[2].plot([0, 1], [0, 1], **LOOK)
    axes[2].set(xlabel="interference taken for real", ylabel="real taken for real", xlim=(0, 1), ylim=(0, 1.01))
    axes[2].set_title(f"ROC of probe {two.probe}")
    axes[2].legend(loc="lower right")
    for color, name, label in zip(OKABE_ITO, ("auc", "auc_linear"), ("of outputs", "before thresholds"), strict=False):
        single, both = ([float(getattr(two, which)) for two in found.pairs] for which in (f"{name}_single", name))
        _scatter(axes[3], single, both, color, label)
    _diagonal(axes[3])
    axes[3].set(xlabel="AUC of the better neuron", ylabel="AUC of the pair")
    axes[3].legend()
    return _finished(found, figure, f"{len(found.pairs)} features with two monosemantic neurons")


@styled
def linear_part(found: Findings) -> Figure:
    """The polysemantic neurons' two linear maps beside the best one for the task, their singular values, the losses
    with other things in their place, and kinks."""
    parts, linear = found.parts, found.linear
    figure, axes = new_figure(12.5, 8.0, 2, 3)
    maps = {"tangent at rest": linear.tangent.map, "least-squares fit": linear.fit.map}
    best = None if parts.spec.task == "abs" else best_linear_map(parts)
    largest = max(float(M.abs().max()) for M in maps.values()) or 1.0
    norm = Normalize(-largest, largest)
    shown = {**maps, "best linear map for the task": best}
    for ax, (name, M) in zip(axes[0], shown.items(), strict=True):
        if M is None:
            _nothing(ax, "abs: the best linear map is 0")
            continue
        image = ax.imshow(M.numpy(), norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
        ax.set(title=name, xlabel="feature", ylabel="output")
    figure.colorbar(image, ax=axes[0].tolist(), fraction=0.03, pad=0.01, label="output for one unit of the feature")
    for (name, M), color, mark in zip(shown.items(), (*OKABE_ITO[:2], "0.4"), ("o", "x", ""), strict=True):
        if M is not None:
            values = torch.linalg.svdvals(M).numpy()
            axes[1, 0].plot(np.arange(1, len(values) + 1), values, mark + "-", color=color, markersize=3, label=name)
    axes[1, 0].axvline(parts.spec.d_embed, label="m", **LOOK)
    axes[1, 0].set(xlabel="number", ylabel="singular value", ylim=(0, None))
    axes[1, 0].set_xlim(0, min(1.5 * parts.spec.d_embed, parts.spec.n_features) + 1)
    axes[1, 0].legend()
    losses = {"neurons": linear.loss, "fit": linear.loss_fit, "tangent": linear.loss_tangent,
              "mean output": linear.loss_constant, "nothing": linear.loss_removed}  # fmt: skip
    bars = axes[1, 1].bar(range(len(losses)), list(losses.values()), color=[*OKABE_ITO[:1], *["0.7"] * 4])
    axes[1, 1].bar_label(bars, fmt="{:.3g}")
    axes[1, 1].axhline(linear.loss_linear_model, label="best linear model, no neurons", **LOOK)
    axes[1, 1].set_xticks(range(len(losses)), [name.replace(" ", "\n") for name in losses])
    axes[1, 1].set(xlabel="in the place of the polysemantic neurons", ylabel="loss")
    axes[1, 1].margins(y=0.15)
    axes[1, 1].legend()
    _kinks(axes[1, 2], found)
    return _finished(found, figure, f"{int(parts.split.polysemantic.sum())} polysemantic neurons as a linear map")


def _kinks(ax: Axes, found: Findings) -> None:
    """How many probes have how many kinks, by group of neurons."""
    if found.kinks is None:
        _nothing(ax, f"{found.parts.spec.activation} is smooth: no kinks")
        return
    counted = {"monosemantic": found.kinks.monosemantic, "polysemantic": found.kinks.polysemantic,
               "polysemantic, visible": found.kinks.polysemantic_visible}  # fmt: skip
    top = max(int(counts.max()) for counts in counted.values())
    width = -(-(top + 1) // 24)
    edges = (np.arange(0, top + 1 + width, width) - 0.5).tolist()
    for (name, counts), color in zip(counted.items(), (OKABE_ITO[i] for i in (0, 1, 4)), strict=True):
        label = f"{name}: {float(counts.double().mean()):.1f}"
        ax.hist(counts.numpy(), edges, histtype="step", color=color, label=label, linewidth=1.6)
    ax.set(xlabel="kinks from amplitude 0 to 1", ylabel="probes")
    ax.legend(title="mean of a probe")


@styled
def definitions(found: Findings) -> Figure:
    """Monosemantic neurons over features against the threshold, the amplitude of the probe, and the presence of others:
    how much the count depends on its definition."""
    counted, n = definition(found.parts), found.parts.spec.n_features
    figure, (axes,) = new_figure(12.5, 4.4, 1, 3, sharey=True)
    thresholds = np.array(counted.thresholds)
    at_one, own = counted.amplitudes.index(1.0), counted.presence.index(1.0)
    axes[0].plot(1 - thresholds, counted.by_amplitude[at_one].numpy() / n, "o-", color=OKABE_ITO[0], markersize=3)
    axes[0].plot(1 - thresholds, counted.by_presence[own].numpy() / n, "s--", color=OKABE_ITO[1], markersize=3)
    axes[0].axvline(1 - THRESHOLD, **LOOK)
    axes[0].set(xscale="log", xlabel="1 - threshold (left: stricter)", ylabel=LABELS["mono_per_feature"])
    handles = [
        Line2D([], [], color=OKABE_ITO[0], marker="o", markersize=3, label="left: feature alone, amplitude 1"),
        Line2D([], [], color=OKABE_ITO[1], marker="s", markersize=3, linestyle="--", label="left: others present"),
    ]
    for color, threshold in zip(OKABE_ITO[2:], (0.9, 0.99, THRESHOLD), strict=False):
        column = counted.thresholds.index(threshold)
        axes[1].plot(counted.amplitudes, counted.by_amplitude[:, column].numpy() / n, color=color)
        axes[2].plot(counted.presence, counted.by_presence[:, column].numpy() / n, "o-", color=color, markersize=3)
        handles.append(Line2D([], [], color=color, label=f"threshold {threshold:g}"))
    axes[1].axvline(1.0, **LOOK)
    axes[1].set(xlabel="amplitude of the probe (features: 0 to 1)")
    axes[2].axvline(0.0, **LOOK)
    axes[2].set(xlabel="presence of others (1: as in the data)")
    axes[0].set_ylim(bottom=0)
    handles.append(Line2D([], [], label="as published", **{**LOOK, "zorder": 1}))
    return _finished(found, figure, "How far the count depends on its definition", handles)


FIGURES: dict[str, Callable[[Findings], Figure]] = {
    "responses": feature_responses,
    "single_neurons": single_neurons,
    "pairs": pairs,
    "linear_part": linear_part,
    "definition": definitions,
}


def save_all(found: Findings, folder: str | Path) -> list[Path]:
    """Draw every figure into `folder` (made if need be), each file whole or not there; returns the paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [save_png(draw(found), Path(folder) / f"{name}.png") for name, draw in FIGURES.items()]
