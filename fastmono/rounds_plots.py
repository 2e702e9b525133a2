"""The figure of successive rounds: what they did to loss, monosemanticity, neurons and the parts of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastmono.plot_style import (
    CAPTION,
    LABELS,
    MOST_ENTRIES,
    OKABE_ITO,
    model_name,
    new_figure,
    save_png,
    styled,
    titled_figure,
    varying_fields,
)
from fastmono.rounds_move import NUMBERS
from fastmono.run import Run

PARTS: dict[str, tuple[str, Any]] = {
    "share_path": ("linear path", "-"),
    "share_mono": ("monosemantic", "--"),
    "share_poly": ("polysemantic", ":"),
}


@styled
def rounds_figure(run: Run, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Each model against the round, 0 being the run: loss with the jump of each move, monosemantic neurons over
    features, polysemantic and dead neurons over neurons, and the parts' shares of the output.

    Args:
        run: what `fastmono.rounds.successive_rounds` was given; rows: what it returned.

    Raises:
        ValueError: there are no rows.
    """
    models = {row["model"]: [each for each in rows if each["model"] == row["model"]] for row in rows}
    if not models:
        raise ValueError("rows=[]: there is no round to draw")
    specs = [run.specs[i] for i in models]
    figure, (axes,) = new_figure(13.5, 4.4, 1, 4, sharex=True)
    part = run.subset(specs)
    swept = [*varying_fields(part), *(["seed"] if len({spec.seed for spec in specs}) > 1 else [])]
    many = len(models) > len(OKABE_ITO)
    handles: list[Any] = []
    for place, (i, own) in enumerate(models.items()):
        color = colormaps["viridis"](0.9 * place / len(models)) if many else OKABE_ITO[place]
        look: dict[str, Any] = {"color": color, "linewidth": 1.3, "marker": "o", "markersize": 3}
        at = [own[0]["round"] - 1, *(row["round"] for row in own)]
        values = {name: [own[0][f"before_{name}"], *(row[f"after_{name}"] for row in own)] for name in NUMBERS}
        axes[0].plot(at, values["eval_loss"], **look)
        for row in own:
            begun = row["round"] - 1
            axes[0].plot([begun] * 2, [row["before_eval_loss"], row["moved_loss"]], ":", color=color, linewidth=1)
            axes[0].plot(begun, row["moved_loss"], "x", color=color, markersize=5)
        axes[1].plot(at, values["mono_per_feature"], **look)
        k = run.specs[i].n_neurons
        axes[2].plot(at, [n / k for n in values["neurons_poly"]], **look)
        axes[2].plot(at, [n / k for n in values["neurons_dead"]], **{**look, "linestyle": ":"})
        for name, (_, style) in PARTS.items():
            axes[3].plot(at, values[name], **{**look, "linestyle": style})
        handles.append(Line2D([], [], color=color, label=f"model {i}: {model_name(specs[place], swept)}".rstrip(": ")))
    axes[0].set(ylabel="loss on the evaluation stream")
    axes[1].set(ylabel=LABELS["mono_per_feature"], ylim=(0, None))
    axes[2].set(ylabel="neurons / neurons (count / k)", ylim=(0, None))
    axes[3].set(ylabel="share of the output's power")
    for ax in axes:
        ax.set_xlabel("rounds")
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes[0].legend(handles=[Line2D([], [], color="0.3", marker="x", linestyle=":", label="after the move")])
    neurons: tuple[tuple[str, Any], ...] = (("polysemantic", "-"), ("dead", ":"))
    for ax, shown in ((axes[2], neurons), (axes[3], tuple(PARTS.values()))):
        ax.legend(handles=[Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in shown])
    shared = model_name(specs[0], [field for field in CAPTION if field not in part.grid.axes])
    each = [", ".join(map(str, sorted({row[name] for row in rows}))) for name in ("steps", "rank")]
    title = f"Successive rounds of {each[0]} steps with a linear path of rank {each[1]}; the models before: {shared}"
    return titled_figure(figure, title, handles[:: -(-len(handles) // MOST_ENTRIES)])


def save(run: Run, rows: Sequence[Mapping[str, Any]], folder: str | Path) -> Path:
    """Draw into folder/rounds.png (the folder is made if need be), whole or not at all; returns the path."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return save_png(rounds_figure(run, rows), Path(folder) / "rounds.png")
