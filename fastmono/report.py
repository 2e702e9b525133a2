"""The report of a run of the paper: the claims as a table, and every sweep with its figures and results.

report.md   what this module writes, with the figures of figures/ in the order of the paper
claims.csv  every number of every claim, a row for each seed
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmono.claims import FAILS, HOLDS, OPEN, Claim, Number
from fastmono.claims_inside import Inside, Section5
from fastmono.files import write_bytes
from fastmono.paper_figures import Drawing
from fastmono.plot_style import group_models, mean_low_high, value_text, values_of, varying_fields
from fastmono.presets import SWEEPS, Sweep, sizes
from fastmono.rows import write_csv

if TYPE_CHECKING:
    from fastmono.run import Run

COLUMNS = {
    "mono_per_feature": "mono/N", "mono_per_neuron": "mono/k", "final_loss": "final loss", "mean_bias": "mean bias",
    "dead_neurons": "dead neurons",
}  # fmt: skip
INSIDE = {
    "probes_1": "features with 1 neuron", "probes_2": "with 2", "probes_more": "with more",
    "single_beside_threshold": "1: threshold", "single_optimal_beside_threshold": "1: best threshold",
    "single_beside_gain": "1: gain", "single_optimal_beside_gain": "1: best gain",
    "pair_auc_single": "2: AUC of the better", "pair_auc": "2: AUC of both",
    "pair_slope_between": "2: slope between", "pair_slope_beyond": "2: slope beyond",
    "tangent_identity_distance": "others: distance, at rest", "fit_identity_distance": "others: distance, fitted",
    "low_poly": "others: low slope", "low_mono": "monosemantic: low slope",
    "linear_share_served": "others: linear share", "kinks_poly_visible": "others: visible kinks",
    "loss": "loss", "loss_fit": "loss, others as a map", "loss_removed": "loss without others",
}  # fmt: skip
INSIDE_ABOUT = (
    "Models with a negative initial bias; of each model the median over features, and of those the mean [lowest, "
    "highest] over seeds. 1: features with one monosemantic neuron, beside the rest of the model. 2: features with two."
    " Others: the polysemantic neurons. `python scripts/interpret.py RUN --model I` takes any model apart; "
    "`fastmono/interpret.py` and the modules it names define every number."
)
CLAIM_COLUMNS = ("claim", "number", "seed", "value", "passes_when", "threshold", "number_verdict", "claim_verdict")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def spread(values: Iterable[float]) -> str:
    """The mean, and the lowest and highest where they differ; a dash where nothing is known."""
    mean, low, high = mean_low_high(np.array(list(values), float)).tolist()
    if math.isnan(mean):
        return "-"
    text = value_text(float(f"{mean:.3g}"))
    return text if low == high else f"{text} [{', '.join(value_text(float(f'{end:.3g}')) for end in (low, high))}]"


def groups_in_order(run: Run, fields: Sequence[str]) -> list[tuple[tuple[Any, ...], list[int]]]:
    """The models for each combination of values of some fields, in the order of these values."""
    order = {name: {value: i for i, value in enumerate(values_of(run, name))} for name in fields}
    groups = group_models(run, fields).items()
    return sorted(groups, key=lambda item: [order[name][value] for name, value in zip(fields, item[0], strict=True)])


def results_table(run: Run, field: str) -> str:
    """Results of the models that are done, a row for each combination of the swept fields: mean [lowest, highest]."""
    fields = varying_fields(run, field)
    rows: list[list[object]] = []
    for key, group in groups_in_order(run, fields):
        models = [run.table[i] for i in group]
        done = [row for row in models if row["status"] == "done"]
        count = str(len(done)) if len(done) == len(models) else f"{len(done)} of {len(models)}"
        rows.append([*map(value_text, key), count, *(spread(row[column] for row in done) for column in COLUMNS)])
    return table([*fields, "models", *COLUMNS.values()], rows)


def claims_table(claims: Iterable[Claim]) -> str:
    """Every number of every claim with its spread over seeds, its threshold and its verdict."""
    rows: list[list[object]] = []
    for claim in claims:
        for i, number in enumerate(claim.numbers or (None,)):
            verdict = f"**{claim.verdict}**" + (", of what is not left out" if claim.notes else "")
            first = [claim.name, claim.text, verdict] if i == 0 else ["", "", ""]
            measured = [""] * 4
            if number is not None:
                measured = [number.what, spread(number.by_seed.values()), _wanted(number), number.verdict]
            rows.append([*first, *measured])
    head = ["claim", "the paper says", "verdict", "measured, once a seed", "mean [lowest, highest]", "wanted", "number"]
    return table(head, rows)


def _wanted(number: Number) -> str:
    return f"{'≥' if number.at_least else '≤'} {value_text(float(number.threshold))}"


def write_claims(path: Path, claims: Iterable[Claim]) -> None:
    """claims.csv: one row for each number and seed, values as Python writes them."""
    rows: list[Mapping[str, Any]] = [
        {
            "claim": claim.name, "number": number.what, "seed": seed, "value": value,
            "passes_when": "at least" if number.at_least else "at most", "threshold": number.threshold,
            "number_verdict": number.verdict, "claim_verdict": claim.verdict,
        }
        for claim in claims
        for number in claim.numbers
        for seed, value in number.by_seed.items()
    ]  # fmt: skip
    write_csv(path, CLAIM_COLUMNS, rows)


def _about(run: Run, scale: str) -> str:
    of = sizes(scale)
    base, versions = of.base, run.about.get("versions", {})
    states = [row["status"] for row in run.table]
    lines = [
        f"Scale `{scale}`, where a sweep does not vary it: N {base.n_features}, m {base.d_embed}, k {base.n_neurons}, "
        f"ε 1/{round(1 / base.feature_prob)}, B {base.batch_size}, {base.steps:,} steps, lr {base.lr:g}, seeds "
        f"{', '.join(map(str, of.seeds))}. Negative bias is an initial bias of {of.starts('negative')[0].init_bias:g} "
        f"with decay {of.starts('negative')[0].bias_decay:g}. `fastmono/presets.py` says how the scales differ.",
        f"Models: {', '.join(f'{states.count(state)} {state}' for state in dict.fromkeys(states))}. "
        + f"Engine {run.engine}, {run.precision}, on {run.about.get('device', 'an unknown device')}; "
        + ", ".join(f"{name} {versions[name]}" for name in ("fastmono", "torch") if name in versions) + ".",
    ]  # fmt: skip
    if not of.decides:
        lines.append("**This scale tries the code. Its models are too small to decide anything about the paper.**")
    return "\n\n".join(lines)


def inside_table(found: Section5) -> str:
    """What is found inside the models, a row for each learning rate and width: mean [lowest, highest] over seeds."""
    groups: dict[tuple[float, int], list[Inside]] = {}
    for spec, inside in (found.inside | found.further).items():
        groups.setdefault((spec.lr, spec.n_neurons), []).append(inside)
    rows: list[list[object]] = []
    for (lr, k), insides in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        numbers = ([math.nan if (x := inside.numbers[name]) is None else x for inside in insides] for name in INSIDE)
        rows.append([value_text(lr), k, len(insides), *map(spread, numbers)])
    return table(["lr", "k", "models", *INSIDE.values()], rows)


def write_report(
    folder: Path,
    scale: str,
    run: Run,
    claims: Sequence[Claim],
    drawings: Mapping[str, Sequence[Drawing]],
    inside: Section5 | None = None,
) -> Path:
    """Write report.md and claims.csv into a folder, and return the path of the report.

    Args:
        drawings: the figures of each sweep by its name, drawn before or now, under "claims" those of the claims, and
            under "inside" those of section 5. A sweep without figures has no section.
        inside: what was found inside the models.
    """
    decided = [claim.verdict for claim in claims]
    parts = [
        f"# Engineering monosemanticity in toy models, at scale {scale}",
        f"Written by `python scripts/paper.py --scale {scale}`." if sizes(scale).decides
        else "Written by `python scripts/paper.py --quick`.",
        _about(run, scale),
        "## The claims",
        f"Of {len(decided)} claims {decided.count(HOLDS)} hold, {decided.count(FAILS)} do not, and "
        f"{decided.count(OPEN)} are not decided. A number holds when it passes its threshold in every seed, does not "
        "hold when it does in none, and is not decided when seeds disagree or fewer than two of them can be measured; "
        "a claim holds when all of its numbers do, and does not hold when one does not. Losses are means over the last "
        "whole period of the schedule. `fastmono/claims.py` has the definitions, `claims.csv` every seed; "
        "`docs/science.md` says at which scale those begin to hold that do not at scale small.",
        claims_table(claims),
    ]  # fmt: skip
    if notes := [f"- Claim {claim.name}: {note}." for claim in claims for note in claim.notes]:
        parts += ["Left out of what was measured:", "\n".join(notes)]
    parts += _figures(drawings.get("claims", ()))
    for sweep in SWEEPS.values():
        if drawings.get(sweep.name):
            parts += [f"## {sweep.title}", *_figures(drawings[sweep.name]), *_results(sweep, scale, run)]
    if inside is not None and inside.inside:
        parts += ["## Inside the models (section 5)", *_figures(drawings.get("inside", ())), INSIDE_ABOUT]
        parts.append(inside_table(inside))
    path = folder / "report.md"
    write_bytes(path, ("\n\n".join(part.strip() for part in parts) + "\n").encode())
    write_claims(folder / "claims.csv", claims)
    return path


def _figures(drawings: Iterable[Drawing]) -> list[str]:
    return [f"![{drawing.caption}](figures/{drawing.name}.png)\n\n*{drawing.caption}*" for drawing in drawings]


def _results(sweep: Sweep, scale: str, run: Run) -> list[str]:
    grid = sweep.grid(scale)
    if not set(grid) <= set(run.specs):
        return []
    return [
        f"Preset `{sweep.name}-{scale}`; mean [lowest, highest] over seeds.",
        results_table(run.subset(grid), sweep.field),
    ]
