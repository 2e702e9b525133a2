"""The figures of a run, in matplotlib's object API: each function takes a run and returns a `Figure`.

Nothing is written but by `save_all`. Only models that are done count as results; one that diverged is drawn up to there
and counted apart. Lines and bars over seeds: the mean, and the range from the lowest to the highest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import ScaledTranslation

from fastmono.block import single_thread
from fastmono.files import BadFile
from fastmono.layout import LOG_EVERY
from fastmono.metrics import monosemantic_neurons, monosemanticity, single_feature_activations
from fastmono.plot_style import (
    LABELS,
    OKABE_ITO,
    PERIOD,
    Array,
    color_norm,
    finished_figure,
    group_models,
    is_numeric,
    line_looks,
    mean_low_high,
    model_name,
    new_figure,
    save_png,
    set_x_axis,
    styled,
    value_text,
    values_of,
    varying_fields,
    wrapped,
)

if TYPE_CHECKING:
    from fastmono.run import Run


def _curves(run: Run, models: Sequence[int], name: str, as_logged: bool = False) -> tuple[Array, Array]:
    """Steps [n] and values [n_models, n] of the loss or a measure, NaN where there is none, for one schedule.

    Losses of the published schedule swing with its period: after the first, the mean over each whole one, at its end.
    """
    diverged = np.array([run.table[i]["diverged_step"] or math.inf for i in models])[:, None]
    if name != "loss":
        steps = run.checkpoint_steps.numpy()
        return steps, np.where(steps < diverged, run.metrics[name][list(models)].numpy(), np.nan)
    steps, losses = run.logged_steps.numpy(), run.losses[list(models)].double().numpy()
    losses = np.where(np.isfinite(losses) & (losses > 0), losses, np.nan)
    if as_logged or run.specs[models[0]].schedule != "published":
        return steps, losses
    # A model has trained at least up to the next step that it would have logged.
    last = np.where(np.isfinite(losses), steps + LOG_EVERY - 1, 0).max(1, initial=0, keepdims=True)
    trained = np.minimum(np.minimum(last, run.specs[models[0]].steps), diverged - 1)
    ends = np.arange(2 * PERIOD, trained.max() + 1, PERIOD)
    means = [mean_low_high(losses[:, (steps > end - PERIOD) & (steps <= end)].T)[0] for end in ends]
    whole = np.where(ends <= trained, np.reshape(means, (len(ends), len(models))).T, np.nan)
    return np.append(steps[steps <= PERIOD], ends), np.append(losses[:, steps <= PERIOD], whole, 1)


def _limits_of_the_calm(run: Run, name: str) -> Array | None:
    """The range of a measure over the models that did not diverge, with a margin; None where all models fit an axis.

    A model on its way to infinity would press all others to one line. It is drawn to the edge of this range.
    """
    calm = [i for i, row in enumerate(run.table) if row["status"] != "diverged"]
    (low, high), (least, most) = (
        mean_low_high(_curves(run, models, name)[1].ravel())[1:] for models in (calm, range(len(run.table)))
    )
    span = (high - low) or abs(high) or 1.0
    stretched = math.isfinite(span) and most - least > 10 * span
    return np.array([low - 0.2 * span, high + 0.2 * span]) if stretched else None


@styled
def training_curves(run: Run, color: str | None = None) -> Figure:
    """Loss, monosemantic neurons per feature and mean bias against log2(step), one line for models equal but for seed.

    Lines are coloured by the field `color` (seed: then a line each), or else by the first that varies of lr, init_bias,
    n_neurons, ...; line styles tell the others apart. `ValueError` when it is not a field of `ModelSpec`.
    """
    fields = varying_fields(run, *([color] if color is not None and values_of(run, color, "color") else []))
    figure, (axes,) = new_figure(12.5, 4.6, 1, 3)
    (looks, handles), groups = line_looks(run, figure, fields), group_models(run, fields).values()
    diverged, last_step = [row["status"] == "diverged" for row in run.table], int(run.logged_steps.max())
    powers = range(max(2, last_step.bit_length()))
    first = mean_low_high(_curves(run, range(len(diverged)), "loss", as_logged=True)[1][:, 0])[2]
    ceiling = 100 * np.nan_to_num(first, nan=1.0)  # a loss may reach 1e38 before it is not a number
    shown: list[Array] = []  # losses that the axis must hold
    cut = ""
    for ax, name in zip(axes, ("loss", "mono_per_feature", "mean_bias"), strict=True):
        calm = _limits_of_the_calm(run, name) if name != "loss" else None
        for models in groups:
            steps, values = _curves(run, models, name)
            mean, low, high = mean_low_high(values if calm is None else values.clip(*calm))
            known, look = np.isfinite(mean), looks[models[0]]
            shown += [low[known], high[known]] if name == "loss" else []
            ax.plot(steps[known], mean[known], marker="o" if known.sum() < 3 else "", markersize=4, **look)
            if len(models) > 1:
                ax.fill_between(steps[known], low[known], high[known], color=look["color"], alpha=0.18, linewidth=0)
            for i, row in zip(models, values, strict=True):
                logged, (last,) = _curves(run, [i], name, as_logged=True)
                if diverged[i] and (ended := np.isfinite(last)).any():  # from the last mean to the last value
                    x = np.append(steps[np.isfinite(row)][-1:], logged[ended][-1:])
                    y = np.append(row[np.isfinite(row)][-1:], last[ended][-1:])
                    y = y.clip(max=ceiling) if calm is None else y.clip(*calm)
                    ax.plot(x, y, **look, marker="X", markevery=[len(x) - 1], markersize=8, markeredgecolor="white")
        set_x_axis(ax, [2.0**e for e in powers], [f"$2^{{{e}}}$" for e in powers], [1, max(2, last_step)], 2)
        ax.set(xlabel="step", ylabel=LABELS[name])
        if calm is not None:
            cut = ", cut off at the edge of the axis"
            ax.set_ylim(calm + 0.05 * np.ptp(calm) * np.array([-1, 1]))
    loss = axes[0]
    shown += [np.asarray(line.get_ydata()) for line in loss.lines]
    low, high = mean_low_high(np.concatenate([[ceiling / 100], *shown]))[1:]
    high = min(high, ceiling)
    few = ticker.MaxNLocator(5) if high < 5 * low else ticker.LogLocator(10, (1, 2, 5) if high < 1e3 * low else (1,))
    loss.set(yscale="log", ylim=(low / 1.1, high * 1.1))
    loss.yaxis.set(major_locator=few, minor_locator=ticker.NullLocator(), major_formatter="{x:g}")
    if any(spec.schedule == "published" and spec.steps > PERIOD for spec in run.specs):
        loss.set_title(wrapped(f"after step {PERIOD}, means over whole periods of the published schedule", 3.8))
    if max(map(len, groups)) > 1:
        label = f"mean, lowest and highest of up to {max(map(len, groups))} seeds"
        handles.append(Patch(color="0.5", alpha=0.3, label=label))
    if any(diverged):
        handles.append(Line2D([], [], color="0.3", linestyle="", marker="X", label=f"diverged ({sum(diverged)}){cut}"))
    return finished_figure(figure, run, handles=handles)


def _sorted(run: Run, model: int) -> tuple[Array, Array, Array, str]:
    """Activations [k, N], biases [k] and which are monosemantic [k], in the order of recipe fact 14; and a title."""
    if model not in range(len(run.specs)):
        raise ValueError(f"model={model!r}: must be a whole number from 0 to {len(run.specs) - 1}")
    spec, params = run.specs[model], run.parameters(model)
    with single_thread():  # as the counts are measured
        sfa = single_feature_activations(params, spec.activation)
    # Ties keep their order, so that equal models give equal figures; what is not a number comes last.
    neurons = monosemanticity(sfa).nan_to_num(-math.inf).argsort(descending=True, stable=True)
    features = sfa[neurons].nan_to_num(-math.inf).argmax(0).argsort(stable=True)
    flags, name = monosemantic_neurons(sfa)[neurons].numpy(), model_name(spec, run.grid.axes)
    title = f"model {model}{': ' * bool(name)}{name}\n{flags.sum()} of {spec.n_neurons} neurons monosemantic"
    title += f" ({flags.sum() / spec.n_features:.2f} per feature), {int((sfa == 0).all(1).sum())} silent"
    return sfa[neurons][:, features].numpy(), params["b"][neurons].numpy(), flags, title


def _sheet(run: Run, models: Sequence[int], heights: dict[str, float]) -> Figure:
    """Activation tables, biases or both, of models side by side, on common scales; heights in inches."""
    found = [_sorted(run, model) for model in models]
    each = 6.5 if len(found) == 1 else float(np.clip(24 / len(found), 2.4, 3.6))  # inches
    size, ratios = (each * len(found) + 1.2, sum(heights.values()) + 1.0), list(heights.values())
    figure, axes = new_figure(*size, len(heights), len(found), height_ratios=ratios)
    norm = color_norm([0.0, *(end for sfa, *_ in found for end in mean_low_high(sfa.ravel())[1:])])
    low, high = mean_low_high(np.concatenate([[0.0], *(b for _, b, *_ in found)]))[1:]
    margin, handles = 0.05 * (high - low) or 1.0, []
    for (sfa, b, flags, title), panels in zip(found, axes.T, strict=True):
        (k, n), ax = sfa.shape, panels[-1]
        if "table" in heights:
            image = panels[0].imshow(sfa.T, norm=norm, aspect="auto", extent=(0, k, n, 0), cmap="viridis")
            image.set_cmap(colormaps["viridis"].with_extremes(bad="0.7"))
        if "biases" in heights:
            handles = [
                ax.axvline(min(n, k), color="black", ls="--", lw=1, clip_on=False, label="at N, or at k if less")
            ]
            for these, marker, color, name in ((flags, "o", 0, "monosemantic"), (~flags, "x", 1, "other neurons")):
                place, look = np.flatnonzero(these) + 0.5, {"color": OKABE_ITO[color], "markersize": 3.5}
                handles += ax.plot(place, b[these], marker, label=name, **look)
            ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
            ax.set(xlim=(0, k), ylim=(low - margin, high + margin))
        panels[0].set_title(wrapped(title, each - 0.5))
        ax.set_xlabel(wrapped(f"neuron (of {k}), by monosemanticity", each - 0.6))
    for ax, part in zip(axes[:, 0], heights, strict=True):
        ax.set_ylabel("feature, by its strongest neuron" if part == "table" else "bias")
    if "table" in heights:
        label, width = "activation h for a feature alone, at value 1", figure.get_figwidth()
        figure.colorbar(image, ax=axes[0].tolist(), label=label, fraction=0.6 / width, pad=0.15 / width)
    return finished_figure(figure, run, handles=handles)


@styled
def activation_table(run: Run, model: int) -> Figure:
    """h of every neuron for every single feature, sorted so that a monosemantic model shows a diagonal.

    Raises `ValueError` for a model that is not in the run, or that has no parameters yet.
    """
    return _sheet(run, [model], {"table": 4.6})


@styled
def sorted_biases(run: Run, model: int) -> Figure:
    """The biases in the order of `activation_table`, with a line at N neurons; raises as it does."""
    return _sheet(run, [model], {"biases": 2.8})


@styled
def activations_and_biases(run: Run, models: Sequence[int]) -> Figure:
    """`activation_table` above `sorted_biases`, models side by side; raises as they do, and for no models."""
    if not len(models):
        raise ValueError("models=[]: must name at least one model")
    return _sheet(run, models, {"table": 3.6, "biases": 1.6})


def _finished(run: Run, column: str) -> Array:
    """A column of the table, float64 [n_models]; NaN for a model that is not done or has no finite value."""
    found = np.array([math.nan if r["status"] != "done" or r[column] is None else r[column] for r in run.table], float)
    return np.where(np.isfinite(found), found, np.nan)


@styled
def monosemanticity_against(run: Run, field: str, *more: str) -> Figure:
    """Monosemantic neurons over k, and over N, of the finished models against a field, a line for each of the others.

    Args:
        more: other results, to be drawn beside these two: final_loss, mean_bias, ...

    Raises `ValueError` for what is not a field of `ModelSpec`.
    """
    values, wide = values_of(run, field), field == "n_neurons"
    fields = [other for other in varying_fields(run, field) if other != field]
    fields.sort(key=lambda other: -len(values_of(run, other)))  # there are more colours than line styles
    columns = ("mono_per_neuron", "mono_per_feature", *more)
    figure, axes = new_figure(1.7 + 3.9 * len(columns), 4.4, 1, len(columns))
    looks, handles = line_looks(run, figure, fields)
    numeric, several = is_numeric(values), False
    x = np.array(values if numeric else range(len(values)), float)
    base = 2 if wide else 10 if numeric and isinstance(color_norm(values), LogNorm) else None
    marks = values_of(run, "n_features") if wide else []
    for ax, column in zip(axes[0], columns, strict=True):
        found = _finished(run, column)
        lines_of = list(group_models(run, fields).values())
        for number, models in enumerate(lines_of):
            at = [found[[i for i in models if getattr(run.specs[i], field) == value]] for value in values]
            known = [np.isfinite(these).any() for these in at]
            mean, low, high = np.array([mean_low_high(these) for these in at])[known].T
            look = looks[models[0]]
            ax.plot(x[known], mean, marker="o", markersize=4, **look)
            if (high > low).any():
                bars = np.stack((mean - low, high - mean)).clip(0)  # a mean may round to beyond its ends
                # Side by side, some points apart: those of the last line would cover the others.
                aside = (number - (len(lines_of) - 1) / 2) * min(4, 24 / len(lines_of)) / 72
                place = ax.transData + ScaledTranslation(aside, 0, figure.dpi_scale_trans)
                ax.errorbar(x[known], mean, bars, fmt="none", color=look["color"], capsize=2, transform=place)
                ax.update_datalim([(x[known][0], low.min()), (x[known][0], high.max())])  # which that one does not
                ax.autoscale_view()
                several = True
        ends = [*x, *marks] if numeric else [-0.5, len(x) - 0.5]
        set_x_axis(ax, x.tolist(), [value_text(value) for value in values], ends, base)
        lines = [ax.axvline(n, color="0.4", linewidth=1, linestyle=(0, (5, 3)), zorder=0, label="k = N") for n in marks]
        ax.set(xlabel=LABELS.get(field, field), ylabel=LABELS.get(column, column))
        if column.startswith("mono"):
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    handles += lines[:1]
    if several:
        handles.append(Line2D([], [], color="0.3", marker="|", markersize=9, label="mean, lowest and highest seed"))
    return finished_figure(figure, run, handles=handles)


@styled
def heatmap(run: Run, x: str, y: str, value: str) -> Figure:
    """Mean of a numeric column of the table over the finished models, for each pair of values of two fields.

    A cell of several models also gives their standard deviation; one of none is hatched and says why. Raises
    `ValueError` for what is not a field of `ModelSpec`, one field twice, or a column that is not numeric.
    """
    columns, rows = values_of(run, x, "x"), values_of(run, y, "y")
    if x == y:
        raise ValueError(f"y={y!r}: must be another field than x")
    numeric = [name for name in run.table[0] if is_numeric(row[name] for row in run.table if row[name] is not None)]
    if value not in numeric:
        raise ValueError(f"value={value!r}: must be a numeric column of the table, one of {', '.join(numeric)}")
    found, groups = _finished(run, value), group_models(run, (x, y))
    means = np.array([[mean_low_high(found[groups.get((c, r), [])])[0] for c in columns] for r in rows])
    width, height = np.clip((0.85 * len(columns) + 2.4, 0.62 * len(rows) + 1.9), (6.0, 3.6), (18, 14)).tolist()
    figure, ((ax,),) = new_figure(width, height, 1, 1)
    image = ax.imshow(means, origin="lower", aspect="auto", norm=color_norm(means.flat), cmap="cividis")
    size = min(8.5, 14 * (width - 2.2) / len(columns), 18 * (height - 1.7) / len(rows))
    for j, i in np.ndindex(means.shape):
        models = groups.get((columns[i], rows[j]), [])
        good, states = found[models][np.isfinite(found[models])], [run.table[model]["status"] for model in models]
        if len(good):
            text = value_text(float(f"{means[j, i]:.3g}")) + (f"\n± {good.std(ddof=1):.2g}" if len(good) > 1 else "")
            text += f"\n({len(good)} of {len(states)})" if len(good) < len(states) else ""
        else:
            text = "no value" if "done" in states else max(states, key=states.count, default="no model")
            hatched: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.7", "hatch": "///", "linewidth": 0}
            ax.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, **hatched))
        if size >= 3.5:  # points; nobody reads less
            color = "white" if len(good) and image.norm(means[j, i]) < 0.55 else "black"
            ax.text(i, j, text, ha="center", va="center", fontsize=size, color=color)
    ax.set_xticks(range(len(columns)), [value_text(v) for v in columns], rotation=90 if len(columns) > 12 else 0)
    ax.set_yticks(range(len(rows)), [value_text(v) for v in rows])
    ax.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    figure.colorbar(image, ax=ax, fraction=0.6 / width, pad=0.15 / width)
    over = ", ".join(
        field for field in run.grid.axes
        if any(len({getattr(run.specs[i], field) for i in models}) > 1 for models in groups.values())
    )  # fmt: skip
    most = max(map(len, groups.values()))
    note = f": mean ± standard deviation over {over}, up to {most} models a cell" if most > 1 else ""
    return finished_figure(figure, run, f"{LABELS.get(value, value)}{note}\n")


def save_all(run: Run, folder: str | Path) -> list[Path]:
    """Draw what applies to this run into `folder` (made if need be), each file whole or not there; returns the paths.

    Tables and biases are those of the least, the median and the most monosemantic of the finished models.
    """
    saved: list[Path] = []
    Path(folder).mkdir(parents=True, exist_ok=True)

    def save(name: str, figure: Figure) -> None:
        saved.append(save_png(figure, Path(folder) / f"{name}.png"))

    save("training_curves", training_curves(run))
    measure = _finished(run, "mono_per_feature")
    ranked = [i for i in measure.argsort(kind="stable").tolist() if math.isfinite(measure[i])]
    chosen = {ranked[0]: "least", ranked[len(ranked) // 2]: "median", ranked[-1]: "most"} if ranked else {}
    for model, name in list(chosen.items()):
        try:
            run.parameters(model)
        except BadFile:  # damaged, not missing: that must be seen
            raise
        except ValueError:
            del chosen[model]
            continue
        save(f"activations_{name}_monosemantic", activation_table(run, model))
        save(f"biases_{name}_monosemantic", sorted_biases(run, model))
    if chosen:
        save("activations_and_biases", activations_and_biases(run, list(chosen)))
    for field in run.grid.axes if np.isfinite(measure).any() else ():
        if field != "seed" and is_numeric(values_of(run, field)):
            save(f"monosemanticity_against_{field}", monosemanticity_against(run, field))
    if len(fields := sorted(varying_fields(run), key=lambda field: -len(values_of(run, field)))) > 1:
        for value in ("mono_per_feature", "final_loss"):
            save(f"heatmap_{value}", heatmap(run, fields[0], fields[1], value))
    return saved
