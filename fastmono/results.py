"""Tables of any run: its models over seeds, and what goes with the learning rate. `scripts/results.py` prints them.

**Both ends of the swing.** The published schedule, lr (1 + cos(pi t / 512)) / 2, swings for as long as a model trains,
and with it what the noise of a batch adds to the loss. `loss_peak` and `loss_trough` are mean losses over the last four
periods, of the steps whose rate is above 95 % and below 5 % of lr: of the same model with its noise and without.

**Columns.** Every result in models.csv; every measure of a checkpoint (`metrics.NAMES`), at the last one; `EXTRA`; and
`kept_by_map` and the numbers of `interpret.summary`, for which the models are looked into, once: what is found is
kept in the run's insides.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fastmono.claims import (
    Result,
    bias_of_monosemantic,
    correlation_with,
    loss_gain_of_upper_half,
    mono_gain,
    rank_correlation,
    settled,
    still_learning,
)
from fastmono.claims_inside import Inside, Insides, kept_by_map
from fastmono.metrics import NAMES
from fastmono.optim import learning_rates
from fastmono.plot_style import value_text, varying_fields
from fastmono.report import groups_in_order, spread, table
from fastmono.rows import RESULTS
from fastmono.store import FINAL_STEPS

if TYPE_CHECKING:
    from fastmono.run import Run

PERIODS, END = 4, 0.05
DEFAULT = ("final_loss", "loss_peak", "loss_trough", "mono_per_feature", "mean_bias")
ALONG: dict[str, Callable[[list[Result]], float]] = {
    "rank correlation of mono/N with lr": correlation_with("lr"),
    "with mean bias": lambda found: rank_correlation([r.mean_bias for r in found], [r.mono for r in found]),
    "mono/N, highest less lowest lr": mono_gain("lr"),
    "1 - final loss, higher half of the rates / lower": loss_gain_of_upper_half,
}


def _at_end_of_swing(peak: bool) -> Callable[[Run, int], float]:
    def loss(run: Run, model: int) -> float:
        spec, steps, losses = run.specs[model], run.logged_steps.numpy(), run.losses[model].double().numpy()
        if spec.schedule != "published" or spec.steps < PERIODS * FINAL_STEPS:
            return math.nan
        last = (steps > spec.steps - PERIODS * FINAL_STEPS) & (steps <= spec.steps)
        rate = np.array([learning_rates(spec, step - 1, 1)[0] / spec.lr for step in steps[last].tolist()])
        return float(losses[last][rate > 1 - END if peak else rate < END].mean())

    return loss


EXTRA: dict[str, Callable[[Run, int], float]] = {
    "loss_peak": _at_end_of_swing(True),
    "loss_trough": _at_end_of_swing(False),
    "mono_bias": bias_of_monosemantic,
}
"""loss_peak, loss_trough (module docstring), mean bias of the monosemantic neurons."""


def _inside(inside: Inside, column: str) -> float:
    if column == "kept_by_map":
        return kept_by_map(inside)
    if column not in inside.numbers:
        raise ValueError(
            f"column={column!r}: must be a result in models.csv, a measure, a number of interpret.summary, or "
            f"{', '.join((*EXTRA, 'kept_by_map'))}"
        )
    value = inside.numbers[column]
    return math.nan if value is None else value


def values(run: Run, columns: Sequence[str]) -> list[dict[str, float]]:
    """A dict for each model of the run, of the columns that the module's docstring lists; NaN for one that is not done.

    Raises `ValueError` for an unknown column, and for a model that cannot be looked into.
    """
    insides = Insides(run, run.path / "insides.json")
    found = []
    for i, row in enumerate(run.table):
        own = dict.fromkeys(columns, math.nan)
        for column in columns if row["status"] == "done" else ():
            if column in EXTRA:
                own[column] = EXTRA[column](run, i)
            elif column in RESULTS[1:-1]:
                own[column] = row[column]
            elif column in NAMES:
                at = int((run.checkpoint_steps == run.specs[i].steps).nonzero())
                own[column] = float(run.metrics[column][i, at])
            else:
                result = Result(i, run.specs[i], math.nan, math.nan, math.nan)
                (inside,) = insides.of([result]).values()
                own[column] = _inside(inside, column)
        found.append(own)
    return found


def models_table(run: Run, columns: Sequence[str] = DEFAULT) -> str:
    """A row for each combination of the swept fields, mean [lowest, highest] over seeds, as Markdown.

    All that are done are averaged; how many of them still learn (`fastmono.claims`) stands beside their number.
    """
    fields, found = varying_fields(run), values(run, columns)
    rows: list[list[object]] = []
    for key, models in groups_in_order(run, fields):
        done = [i for i in models if run.table[i]["status"] == "done"]
        learning = sum(still_learning(run, i) for i in done)
        count = f"{len(done)}" + (f" of {len(models)}" if len(done) < len(models) else "")
        count += f", {learning} still learning" if learning else ""
        rows.append([*map(value_text, key), count, *(spread(found[i][column] for i in done) for column in columns)])
    return table([*fields, "models", *columns], rows)


def _by_seed(results: Iterable[Result], measure: Callable[[list[Result]], float]) -> str:
    groups: dict[int, list[Result]] = {}
    for result in results:
        groups.setdefault(result.spec.seed, []).append(result)
    return spread(map(measure, groups.values()))


def rates_table(run: Run) -> str:
    """What goes with the learning rate, measured once a seed on the models that have settled, by the other swept
    fields: the numbers of claims 1 and 4, and that of the loss in the troughs of the schedule. Markdown."""
    fields = [field for field in varying_fields(run, "lr") if field != "lr"]
    head = [*fields, *ALONG, "the same in the troughs"]
    rows: list[list[object]] = []
    for key, models in groups_in_order(run, fields):
        found, _ = settled(run, [run.specs[i] for i in models])
        in_troughs = [replace(result, loss=EXTRA["loss_trough"](run, result.model)) for result in found]
        numbers = [_by_seed(found, measure) for measure in ALONG.values()]
        rows.append([*map(value_text, key), *numbers, _by_seed(in_troughs, loss_gain_of_upper_half)])
    return table(head, rows)
