"""The figures of an interpreted model, and `python scripts/interpret.py`, called as `main(argv)`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_model import one_to_one, random_model, spec_of
from made_up_run import assert_readable, texts, xy

import fastmono as fm
from fastmono import interpret_plots
from fastmono.interpret import definition, findings, responses

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("interpret_script", ROOT / "scripts" / "interpret.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


def dead_model():
    params, spec = one_to_one(0.2, 1.0)
    return {**params, "b": torch.full((6,), -9.0)}, spec


def made_up(rank=0, **fields):
    return random_model(spec_of(**fields), rank), spec_of(**fields)


MODELS = {
    "decoder with a linear path": lambda: made_up(rank=2),
    "reprojector": lambda: made_up(task="reprojector"),
    "abs, solu": lambda: made_up(task="abs", activation="solu"),
    "one neuron a feature, no interference": lambda: one_to_one(0.2, 1.0),
    "all dead": dead_model,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_figure_is_drawn_within_its_edges_and_without_a_warning(name):
    found = findings(*MODELS[name]())
    for draw in interpret_plots.FIGURES.values():
        assert_readable(draw(found))


def test_responses_are_drawn_by_part_above_alone_and_below_under_interference():
    found = findings(*made_up(rank=2))
    figure = interpret_plots.feature_responses(found, [2, 7])
    for column, feature in enumerate((2, 7)):
        response = responses(found.parts, feature)
        for row, values in ((0, response.alone), (1, response.mean)):
            lines = {line.get_color(): xy(line) for line in figure.axes[2 * row + column].lines}
            for part, color in interpret_plots.PART_COLORS.items():
                np.testing.assert_array_equal(lines[color], (response.amplitudes.numpy(), values[part].numpy()))
    assert "linear path" in texts(figure) and "feature 7: 0 monosemantic" in " ".join(texts(figure)).replace("\n", " ")


def test_typical_features_are_of_each_number_of_neurons():
    found = findings(*made_up())
    per_probe = found.parts.split.per_probe
    chosen = interpret_plots.typical_features(found)
    assert len(chosen) == len(set(chosen)) == 6
    assert {int(per_probe[i]) for i in chosen} == set(per_probe.tolist()) >= {0, 1, 2}
    assert interpret_plots.typical_features(findings(*one_to_one(0.2, 1.0)), 4) == [0, 2, 3, 5]


def test_neurons_of_negative_gain_are_named_and_not_drawn():
    params, spec = one_to_one(0.2, 1.0)
    params["W_out"] = params["W_out"] * torch.tensor([1.0, 1, -1, 1, 1, 1])
    figure = interpret_plots.single_neurons(findings(params, spec))
    assert "not shown: 1 whose neuron has a negative gain" in " ".join(texts(figure)).replace("\n", " ")
    measured = figure.axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(measured, [1.0] * 5, rtol=1e-6)  # float32 weights


def test_panels_say_why_there_is_nothing_to_show():
    assert "no feature has exactly two" in " ".join(texts(interpret_plots.pairs(findings(*one_to_one(0.2, 1.0)))))
    smooth = findings(*made_up(activation="gelu"))
    assert texts(interpret_plots.single_neurons(smooth)).count("gelu has no thresholds") == 4
    assert "gelu is smooth: no kinks" in texts(interpret_plots.linear_part(smooth))
    assert "abs: the best linear map is 0" in texts(interpret_plots.linear_part(findings(*made_up(task="abs"))))


def test_definition_is_drawn_as_counted():
    found = findings(*made_up())
    counted, figure = definition(found.parts), interpret_plots.definitions(found)
    x, y = xy(figure.axes[0].lines[0])
    np.testing.assert_array_equal(x, 1 - np.array(counted.thresholds))
    np.testing.assert_array_equal(y * 13, counted.by_amplitude[counted.amplitudes.index(1.0)])
    _, y = xy(figure.axes[2].lines[0])
    np.testing.assert_array_equal(y * 13, counted.by_presence[:, counted.thresholds.index(0.9)])


# the script


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    spec = spec_of(n_features=8, d_embed=4, n_neurons=12, batch_size=16, steps=40, lr=0.01)
    out = tmp_path_factory.mktemp("interpret") / "run"
    fm.train(fm.Grid(spec, task=["decoder", "abs"]), out=out, quiet=True)
    return out


def test_script_prints_the_numbers_and_draws_the_figures(run_directory, capsys, tmp_path):
    assert script.main([str(run_directory), "--model", "0", "--out", str(tmp_path / "new" / "figures")]) == 0
    said = capsys.readouterr().out
    run = fm.load_run(run_directory)
    numbers = fm.interpret.summary(run.parameters(0), run.specs[0])
    line = next(line for line in said.splitlines() if line.startswith("effective rank"))
    assert line.split()[2:] == [script.cell(numbers[f"{kind}_effective_rank"]) for kind in ("tangent", "fit")]
    assert sorted(path.stem for path in (tmp_path / "new" / "figures").iterdir()) == sorted(interpret_plots.FIGURES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "new" / "figures").iterdir())


def test_every_number_of_the_summary_is_in_the_tables():
    asked = set()

    class Noted(dict):
        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

    numbers = Noted(findings(*one_to_one(0.2, 1.0)).numbers())
    script.tables(numbers)
    assert asked == set(numbers)


def test_script_takes_a_step_and_says_what_does_not_apply(run_directory, capsys):
    assert script.main([str(run_directory), "--model", "1", "--step", "8"]) == 0
    assert "note: abs: a probe is a feature and a sign" in capsys.readouterr().out
    assert len(list((run_directory / "figures" / "interpret_model_1_step_8").iterdir())) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--model", "0"], "nowhere"),
        (["RUN"], "the following arguments are required: --model"),
        (["RUN", "--model", "two"], "invalid int value: 'two'"),
        (["RUN", "--model", "2"], "model 2: the run has models 0 to 1"),
        (["RUN", "--model", "-1"], "model -1: the run has models 0 to 1"),
        (["RUN", "--model", "0", "--step", "7"], "step=7: model 0 of .* has steps 0, 1, 2, 4, 8, 16, 32, 40"),
        (["RUN", "--model", "0", "--threshold", "2"], "threshold=2.0: must be a number from 0 to 1"),
    ],
)
def test_bad_arguments_end_in_one_line_and_exit_code_2(run_directory, capsys, arguments, message):
    assert script.main([str(run_directory) if word == "RUN" else word for word in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert re.search(message, said.err)
