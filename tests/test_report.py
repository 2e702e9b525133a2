"""The report holds every claim, sweep and figure that there is, with the numbers of the run."""

from __future__ import annotations

import csv
import io
import re

import pytest
from made_up_run import fake_run, texts

from fastmono import paper_figures, report
from fastmono.claims import Claim, Number, claims_of
from fastmono.presets import SWEEPS
from fastmono.spec import Grid

NAMES = ("lr-zero-bias", "lr-negative-bias", "width", "activation", "task")


def run_of(names, **states):
    return fake_run(Grid.of(dict.fromkeys(spec for name in names for spec in SWEEPS[name].grid("quick"))), **states)


@pytest.fixture(scope="module")
def run():
    return run_of(NAMES)


def rows_of(text):
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]


def test_results_table_is_the_mean_lowest_and_highest_of_each_value_in_order(run):
    sweep = run.subset(SWEEPS["lr-zero-bias"].grid("quick"))
    head, _, *rows = rows_of(report.results_table(sweep, "lr"))
    assert [row[:2] for row in rows] == [["0.01", "2"], ["0.02", "2"], ["0.03", "2"]]
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        for column, name in report.COLUMNS.items():
            found = [r[column] for r in sweep.table if r["lr"] == float(row[0])]
            shown = [float(x) for x in re.findall(r"-?[\d.]+(?:e-?\d+)?", cells[name].replace("\N{MINUS SIGN}", "-"))]
            wanted = [sum(found) / 2, *((min(found), max(found)) if len(shown) == 3 else ())]
            assert shown == pytest.approx(wanted, rel=6e-3), (column, cells)


def test_a_model_that_is_not_done_is_counted_and_not_averaged():
    (spec, *_), other = SWEEPS["lr-zero-bias"].grid("quick"), 0
    run = run_of(["lr-zero-bias"], diverged=[0])
    head, _, *rows = rows_of(report.results_table(run, "lr"))
    (row,) = (row for row in rows if float(row[0]) == spec.lr)
    cells = dict(zip(head, row, strict=True))
    (other,) = (r for i, r in enumerate(run.table) if r["lr"] == spec.lr and i != 0)
    assert cells["models"] == "1 of 2" and float(cells["final loss"]) == pytest.approx(other["final_loss"], rel=6e-3)


def test_widths_stand_in_numerical_order(run):
    _, _, *rows = rows_of(report.results_table(run.subset(SWEEPS["width"].grid("quick")), "n_neurons"))
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows) and len(rows) == 6


def test_claims_table_gives_each_number_with_its_spread_threshold_and_verdict():
    one = Number("a | b", {0: 0.25, 1: 0.75}, 0.5)
    claims = [
        Claim("1", "One.", (one, Number("c", {0: -1.0, 1: -1.0}, -0.5, at_least=False))),
        Claim("2", "Two.", (one,), ("left out, diverged: lr 1",)),
    ]
    rows = rows_of(report.claims_table(claims).replace("a \\| b", "a/b"))[2:]
    assert rows[0] == ["1", "One.", "**not decided**", "a/b", "0.5 [0.25, 0.75]", "≥ 0.5", "not decided"]
    assert rows[1][3:] == ["c", "\N{MINUS SIGN}1", "≤ \N{MINUS SIGN}0.5", "holds"]
    assert rows[2][:3] == ["2", "Two.", "**not decided**, of what is not left out"] and all(
        len(row) == 7 for row in rows
    )


def test_the_report_shows_each_sweep_in_the_order_of_the_paper_with_figures_that_exist(run, tmp_path):
    drawings = {"claims": list(paper_figures.claim_figures("quick", run))}
    for name in ("width", "lr-zero-bias", "task"):
        drawings[name] = list(paper_figures.sweep_figures(SWEEPS[name], "quick", run))
        for drawing in drawings[name]:
            drawing.save(tmp_path / "figures")
    (equal_loss,) = drawings["claims"]
    equal_loss.save(tmp_path / "figures")
    assert "essentially equal losses" in equal_loss.caption
    path = report.write_report(tmp_path, "quick", run, claims_of(run, "quick"), drawings)
    text = path.read_text()
    titles = [SWEEPS[name].title for name in ("lr-zero-bias", "width", "task")]
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == ["The claims", *titles]
    shown = re.findall(r"\]\((\S+)\)", text)
    assert len(shown) == 10 and all((tmp_path / figure).stat().st_size > 10_000 for figure in shown)
    assert "too small to decide" in text and "--quick" in text


def test_claims_csv_holds_every_seed_of_every_number_bit_by_bit(run, tmp_path):
    claims = claims_of(run, "quick")
    report.write_claims(tmp_path / "claims.csv", claims)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "claims.csv").read_text(encoding="utf-8"))))
    assert [(row["claim"], row["number"], int(row["seed"]), repr(float(row["value"]))) for row in rows] == [
        (claim.name, number.what, seed, repr(float(value)))
        for claim in claims for number in claim.numbers for seed, value in number.by_seed.items()
    ]  # fmt: skip


# figures


def test_models_shown_are_the_extremes_and_the_median_of_the_lowest_seed(run):
    sweep = run.subset(SWEEPS["task"].grid("quick"))
    least, median, most = paper_figures.models_to_show(sweep)
    mono = sorted(row["mono_per_feature"] for row in sweep.table if row["seed"] == 0)
    shown = [sweep.table[i] for i in (least, median, most)]
    assert [row["mono_per_feature"] for row in shown] == [mono[0], mono[len(mono) // 2], mono[-1]]
    assert {row["seed"] for row in shown} == {0}


def test_a_sweep_of_which_nothing_is_done_has_no_tables_and_raises_nothing():
    run = run_of(["l1"], pending=range(4))
    drawings = list(paper_figures.sweep_figures(SWEEPS["l1"], "quick", run))
    assert [drawing.name for drawing in drawings] == ["l1-curves", "l1-results"]
    assert all(drawing.make().axes for drawing in drawings)


def test_results_of_negative_biases_stand_beside_those_of_zero_bias(run):
    drawings = {d.name: d for d in paper_figures.sweep_figures(SWEEPS["lr-negative-bias"], "quick", run)}
    drawing = drawings["lr-negative-bias-results"]
    assert drawing.caption.endswith("with those of lr-zero-bias beside.")
    assert {"init_bias 0", "init_bias \N{MINUS SIGN}1"} <= set(texts(drawing.make()))
