"""Claims 6 and 7 by their stated rule, on made-up insides; what is looked into, and that it is looked into once."""

from __future__ import annotations

import json
import math

import pytest
import torch
from made_up_run import fake_run

from fastmono import claims_inside, interpret
from fastmono.claims import FAILS, HOLDS, OPEN
from fastmono.claims_inside import Inside, Insides, balances_and_classifies, low_rank_identity, section_5
from fastmono.presets import SWEEPS
from fastmono.spec import Grid

NUMBERS = {
    "tangent_identity_distance": 0.3, "fit_identity_distance": 0.2, "low_poly": 0.3, "low_mono": 0.0,
    "linear_share_served": 0.6, "loss_constant": 1.0, "loss_fit": 0.4, "loss": 0.2,
}  # fmt: skip
SINGLE, PAIR = (0.105, 0.1, 0.3, 0.2), (0.9, 0.8, 1.5, 1.0)


def insides(numbers=(), single=SINGLE, pair=PAIR, pairs=2, of=lambda spec: True):
    """Three models a seed, with two features of either kind each; where `of` is false, those that pass."""
    grid = list(SWEEPS["lr-negative-bias"].grid("small"))[:9]
    assert {spec.seed for spec in grid} == {0, 1, 2}
    standard = Inside(dict(NUMBERS), [SINGLE] * 2, [PAIR] * 2)
    other = Inside(dict(NUMBERS) | dict(numbers), [single] * 2, [pair] * pairs)
    return {spec: other if of(spec) else standard for spec in grid}


def verdicts(claim):
    return [number.verdict for number in claim.numbers]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, [HOLDS] * 4),
        ({"single": (0.12, 0.1, 0.3, 0.2)}, [FAILS, HOLDS, HOLDS, HOLDS]),  # 20 % more than the best threshold's loss
        ({"single": (0.105, 0.1, 0.1, 0.2)}, [HOLDS, FAILS, HOLDS, HOLDS]),
        ({"pair": (0.9, 0.9, 1.5, 1.0)}, [HOLDS, HOLDS, FAILS, HOLDS]),
        ({"pair": (0.9, 0.8, 0.5, 1.0)}, [HOLDS, HOLDS, HOLDS, FAILS]),
        ({"pairs": 1}, [HOLDS, HOLDS, OPEN, OPEN]),  # three in a seed's models together are too few
    ],
)
def test_claim_6_fails_number_by_number(changed, found):
    claim = balances_and_classifies(insides(**changed), "small", ())
    assert verdicts(claim) == found and claim.verdict == (FAILS if FAILS in found else OPEN if OPEN in found else HOLDS)


def test_claim_6_is_the_median_over_the_features_of_a_seeds_models():
    claim = balances_and_classifies(insides(single=(0.2, 0.1, 0.3, 0.2), of=lambda s: s.lr == 0.001), "small", ())
    assert claim.numbers[0].by_seed == pytest.approx({0: 0.05, 1: 0.05, 2: 0.05})  # two of a seed's six features
    one = balances_and_classifies(insides(single=(0.2, 0.1, 0.3, 0.2), of=lambda s: s.seed == 1), "small", ())
    assert one.numbers[0].by_seed == pytest.approx({0: 0.05, 1: 1.0, 2: 0.05}) and one.verdict == OPEN


@pytest.mark.parametrize(
    ("numbers", "failing"),
    [
        ({}, None), ({"tangent_identity_distance": 0.6}, 0), ({"fit_identity_distance": 0.6}, 0),
        ({"low_poly": 0.05}, 1), ({"low_mono": 0.4}, 2), ({"linear_share_served": 0.4}, 3), ({"loss_fit": 0.7}, 4),
    ],
)  # fmt: skip
def test_claim_7_fails_number_by_number(numbers, failing):
    claim = low_rank_identity(insides(numbers), "small", ())
    assert verdicts(claim) == [FAILS if place == failing else HOLDS for place in range(5)]
    assert claim.verdict == (HOLDS if failing is None else FAILS)


def test_claim_7_is_the_median_over_models_and_open_where_a_notion_does_not_apply():
    rare = insides({"linear_share_served": 0.1}, of=lambda spec: spec.lr == 0.005)
    assert low_rank_identity(rare, "small", ()).numbers[3].by_seed == {0: 0.6, 1: 0.6, 2: 0.6}
    assert low_rank_identity(insides({"tangent_identity_distance": None}), "small", ()).numbers[0].verdict == OPEN
    kept = low_rank_identity(insides(), "small", ()).numbers[4].by_seed[0]
    assert kept == pytest.approx((1.0 - 0.4) / (1.0 - 0.2))


def test_nothing_to_look_into_is_not_decided():
    for claim in (balances_and_classifies({}, "small", ()), low_rank_identity({}, "small", ())):
        assert claim.verdict == OPEN and all(math.isnan(x) for number in claim.numbers for x in number.by_seed.values())


# what is looked into


@pytest.fixture(scope="module")
def run():
    names = ("lr-negative-bias", "width")
    return fake_run(Grid.of(dict.fromkeys(spec for name in names for spec in SWEEPS[name].grid("quick"))))


def test_the_models_of_either_claim(run):
    narrow, wider, notes, more = claims_inside.models_to_look_into(run, "quick")
    assert {result.spec for result in narrow} == set(SWEEPS["lr-negative-bias"].grid("quick"))
    assert {(result.spec.n_neurons, result.spec.init_bias) for result in wider} == {(64, -1.0)}
    assert notes == more == ()


def test_only_single_neurons_that_recover_their_feature_count(run):
    index = next(i for i, spec in enumerate(run.specs) if spec.init_bias == -1)
    params, spec = run.parameters(index), run.specs[index]
    found = interpret.findings(params, spec)
    # all of the made-up ones write nothing: now each writes its own feature, some with the wrong sign
    W_out = torch.zeros_like(params["W_out"])
    for place, one in enumerate(found.singles):
        W_out[one.probe, one.neuron] = -1.0 if place % 3 == 0 else 1.0
    inside = claims_inside.look_inside(params | {"W_out": W_out}, spec)
    assert len(found.singles) > 3 and len(inside.singles) == len(found.singles) - -(-len(found.singles) // 3)
    assert inside.numbers["singles_recovering"] == len(inside.singles)


def test_a_model_is_looked_into_once_and_again_when_its_parameters_change(run, tmp_path, monkeypatch):
    looked, look = [], claims_inside.look_inside

    def counted(params, spec, held_out=None):
        looked.append(spec)
        return look(params, spec, held_out)

    monkeypatch.setattr(claims_inside, "look_inside", counted)
    path = tmp_path / "insides.json"
    first = section_5(run, "quick", path)
    assert len(looked) == len(first.inside) + len(first.further) == 8
    second = section_5(run, "quick", path)
    assert len(looked) == 8
    for spec, inside in first.inside.items():
        again = second.inside[spec]
        assert json.dumps(again.numbers) == json.dumps(inside.numbers)  # bit by bit, with None and NaN
        assert [tuple(one) for one in again.singles] == inside.singles
    narrow, *_ = claims_inside.models_to_look_into(run, "quick")
    run.parameters(narrow[0].model)["b"][0] += 1  # a made-up run gives its own tensors
    Insides(run, path).of(narrow[:2])
    assert looked[8:] == [narrow[0].spec]
    path.write_text(json.dumps({"schema": 0, "models": {}}))
    assert not Insides(run, path).known
    path.write_text("[not json")
    assert not Insides(run, path).known


def test_the_model_shown_is_the_most_monosemantic_of_the_lowest_seed(run, tmp_path):
    found = section_5(run, "quick", tmp_path / "insides.json")
    rows = [row for spec, row in zip(run.specs, run.table, strict=True) if spec in found.inside and spec.seed == 0]
    assert run.table[run.specs.index(found.typical)]["mono_per_feature"] == max(row["mono_per_feature"] for row in rows)
    assert found.typical.seed == 0 and found.paired in found.inside | found.further
