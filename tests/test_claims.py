"""Claims are decided by their stated rule, on made-up tables whose answers are known: both outcomes, and none."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import spearmanr

from fastmono import claims
from fastmono.claims import FAILS, HOLDS, OPEN, Claim, Number, rank_correlation
from fastmono.presets import SWEEPS
from fastmono.store import logged_steps

NAN = math.nan


def made_up(sweeps, mono, loss=lambda spec: 0.3, bias=lambda spec: -0.1, statuses=None, slopes=None):
    """A run of small-scale sweeps with results that are functions of the spec; `slopes`: loss over its end."""
    specs = tuple(dict.fromkeys(spec for name in sweeps for spec in SWEEPS[name].grid("small")))
    steps = logged_steps(specs[0].steps)
    table, losses = [], []
    for spec in specs:
        row = spec.to_dict() | {"status": (statuses or {}).get(spec, "done"), "mono_per_feature": mono(spec)}
        table.append(row | {"final_loss": loss(spec), "mean_bias": bias(spec)})
        falls = (slopes or {}).get(spec, 0.0)  # over the last quarter, relative to the end
        losses.append(loss(spec) * (1 + falls * 4 * (1 - steps.double() / spec.steps)))

    def parameters(i):
        # neurons 0 and 1 fire for one feature alone, neuron 2 for all: monosemantic biases are those of the first two
        b = torch.tensor([bias(specs[i]), bias(specs[i]), 1.0])
        return {"W_in": torch.eye(3, 4) * 5, "b": b, "P": torch.eye(4)}

    return SimpleNamespace(
        specs=specs, table=table, losses=torch.stack(losses), logged_steps=steps, parameters=parameters
    )


def verdicts(claim):
    return [number.verdict for number in claim.numbers]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.5, 0.7, 0.6), HOLDS), ((0.4, 0.4, 0.1), FAILS), ((0.4, 0.6, 0.7), OPEN), ((0.5, NAN, 0.9), HOLDS),
        ((0.9, NAN, NAN), OPEN), ((NAN, NAN, NAN), OPEN), ((), OPEN), ((0.1, NAN, 0.2), FAILS),
    ],
)  # fmt: skip
def test_a_number_is_decided_when_at_least_two_seeds_agree(values, verdict):
    by_seed = dict(enumerate(values))
    assert Number("", by_seed, 0.5).verdict == verdict
    mirrored = {seed: -value for seed, value in by_seed.items()}
    assert Number("", mirrored, -0.5, at_least=False).verdict == verdict


def test_a_claim_needs_all_its_numbers_and_fails_with_one():
    good, bad, none = (Number("", {0: v, 1: v}, 0.5) for v in (1.0, 0.0, NAN))
    assert Claim("", "", (good, good)).verdict == HOLDS
    assert Claim("", "", (good, none)).verdict == OPEN
    assert Claim("", "", (good, none, bad)).verdict == FAILS
    assert Claim("", "", ()).verdict == OPEN
    assert Claim("", "", (good,), decides=False).verdict == OPEN


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_spearmans_also_with_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 6, (9,), generator=generator).tolist() for _ in range(2))
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_rank_correlation_is_not_a_number_where_there_is_nothing_to_rank():
    assert math.isnan(rank_correlation([1, 2], [1, 2])) and math.isnan(rank_correlation([1, 2, 3], [4, 4, 4]))
    assert math.isnan(rank_correlation([], []))


# claim 1


def test_claim_1_holds_where_monosemanticity_rises_and_the_loss_falls_with_the_learning_rate():
    claim = claims.learning_rate_rises(made_up(["lr-zero-bias"], lambda s: 10 * s.lr, lambda s: 0.3 - s.lr), "small")
    assert claim.verdict == HOLDS and verdicts(claim) == [HOLDS] * 3
    rank, gain, loss = claim.numbers
    assert rank.by_seed == pytest.approx({0: 1, 1: 1, 2: 1})
    assert gain.by_seed[0] == pytest.approx(0.29)
    lower, upper = 0.3 - (0.001 + 0.003 + 0.005) / 3, 0.3 - (0.007 + 0.01 + 0.03) / 3
    assert loss.by_seed[2] == pytest.approx(1 - upper / lower)


@pytest.mark.parametrize(
    ("mono", "loss", "found"),
    [
        (lambda s: 0.3, lambda s: 0.3 - s.lr, [OPEN, FAILS, HOLDS]),
        (lambda s: 1 - 10 * s.lr, lambda s: 0.3 - s.lr, [FAILS, FAILS, HOLDS]),
        (lambda s: 10 * s.lr, lambda s: 0.3 + s.lr, [HOLDS, HOLDS, FAILS]),
        (lambda s: 10 * s.lr * (s.seed != 1), lambda s: 0.3 - s.lr, [HOLDS, OPEN, HOLDS]),
    ],
)
def test_claim_1_fails_number_by_number(mono, loss, found):
    claim = claims.learning_rate_rises(made_up(["lr-zero-bias"], mono, loss), "small")
    assert verdicts(claim) == found and claim.verdict == (FAILS if FAILS in found else OPEN)


def test_claim_1_is_measured_on_its_own_frequencies():
    run = made_up(["lr-zero-bias", "lr-zero-bias-power-law"], lambda s: 10 * s.lr * (s.frequency == "uniform"))
    assert claims.learning_rate_rises(run, "small").numbers[1].verdict == HOLDS
    assert claims.learning_rate_rises(run, "small", "power_law").numbers[1].verdict == FAILS


# who counts


def test_models_that_diverged_or_still_learn_are_left_out_and_named():
    grid = SWEEPS["lr-zero-bias"].grid("small")
    slow, lost = grid[0], grid[-1]
    assert (slow.lr, lost.lr) == (0.001, 0.03)
    run = made_up(["lr-zero-bias"], lambda s: 10 * s.lr, statuses={lost: "diverged"}, slopes={slow: 0.06})
    found, notes = claims.settled(run, grid)
    assert len(found) == 16 and not {slow, lost} & {result.spec for result in found}
    assert any("still learning: decoder k 256 lr 0.001 init_bias 0 (1 seed)" in note for note in notes)
    assert any("diverged: decoder k 256 lr 0.03" in note for note in notes)
    gains = claims.learning_rate_rises(run, "small").numbers[1].by_seed
    assert (slow.seed, lost.seed) == (0, 2) and gains == pytest.approx({0: 0.27, 1: 0.29, 2: 0.09})


@pytest.mark.parametrize(("fall", "learns"), [(0.07, True), (0.03, False), (-0.5, False), (0.0, False)])
def test_a_model_still_learns_when_its_loss_fell_by_5_percent_over_the_last_quarter(fall, learns):
    spec = SWEEPS["lr-zero-bias"].grid("small")[0]
    run = made_up(["lr-zero-bias"], lambda s: 0, slopes={spec: fall})
    assert claims.still_learning(run, 0) == learns


def test_without_its_sweep_every_claim_is_not_decided_and_says_so():
    run = made_up(["l1"], lambda s: 0.5)
    for claim in claims.claims_of(run, "small"):
        assert claim.verdict == OPEN, claim.name
        assert any("not trained" in note for note in claim.notes)


def test_quick_models_decide_nothing():
    specs = tuple(SWEEPS["lr-zero-bias"].grid("quick"))
    rows = [s.to_dict() | {"status": "done", "mono_per_feature": s.lr, "final_loss": 1, "mean_bias": 0} for s in specs]
    steps = logged_steps(specs[0].steps)
    run = SimpleNamespace(specs=specs, table=rows, losses=torch.ones(len(specs), len(steps)), logged_steps=steps)
    claim = claims.learning_rate_rises(run, "quick")
    assert FAILS in verdicts(claim) and claim.verdict == OPEN


# claim 2


@pytest.mark.parametrize(
    ("mono", "negative_loss", "found"),
    [
        (0.7, 0.29, [HOLDS, HOLDS]), (0.4, 0.29, [FAILS, HOLDS]), (0.7, 0.31, [HOLDS, FAILS]),
    ],
)  # fmt: skip
def test_claim_2_wants_every_rate_monosemantic_and_a_lower_loss_in_pairs(mono, negative_loss, found):
    # The losses of different rates differ by far more than those of a pair.
    run = made_up(
        ["lr-zero-bias", "lr-negative-bias"],
        lambda s: (mono if s.lr == 0.005 else 0.9) if s.init_bias else 0.0,
        lambda s: (negative_loss if s.init_bias else 0.3) * 100 * s.lr,
    )
    claim = claims.negative_bias_is_monosemantic(run, "small")
    assert verdicts(claim) == found and claim.numbers[1].by_seed[0] == pytest.approx(1 - negative_loss / 0.3)


# claim 3


def test_claim_3_compares_models_of_one_seed_with_losses_within_2_percent():
    def loss(s):  # each seed's two closest losses are 1 % apart: lr .003 with either bias
        return {0.003: 0.3}.get(s.lr, 1 + 100 * s.lr + s.seed) * (1.01 if s.init_bias else 1.0) * (1.2**s.seed)

    def mono(s):
        return 0.5 if s.init_bias and s.lr == 0.003 else 0.1 if s.lr == 0.003 else s.lr

    run = made_up(["lr-zero-bias", "lr-negative-bias"], mono, loss)
    claim = claims.equal_loss_differs(run, "small")
    assert claim.numbers[0].by_seed == pytest.approx({0: 0.4, 1: 0.4, 2: 0.4}) and claim.verdict == HOLDS
    found, _ = claims.settled(run, run.specs)
    less, more = claims.equal_loss_pair(found)
    assert (less.mono, more.mono, less.spec.seed) == (0.1, 0.5, more.spec.seed)


def test_claim_3_fails_where_models_of_equal_loss_are_alike_and_is_open_where_no_losses_are_equal():
    names = ["lr-zero-bias", "lr-negative-bias"]
    assert claims.equal_loss_differs(made_up(names, lambda s: 0.5 + s.lr), "small").verdict == FAILS
    apart = made_up(names, lambda s: s.lr, lambda s: 3 ** (1e3 * s.lr) * (2 if s.init_bias else 1))
    assert claims.equal_loss_differs(apart, "small").verdict == OPEN


def test_a_pair_of_equal_loss_is_of_one_seed():
    spec = SWEEPS["lr-zero-bias"].grid("small")[0]
    kinds = ((0, 0.0, 0.3), (1, 0.9, 0.3), (1, 0.5, 0.301), (1, 0.1, 0.4))
    results = [claims.Result(i, spec.replace(seed=seed), mono, loss, 0.0) for i, (seed, mono, loss) in enumerate(kinds)]
    assert [result.mono for result in claims.equal_loss_pair(results)] == [0.5, 0.9]


# claim 4


@pytest.mark.parametrize(
    ("bias", "found"),
    [
        (lambda s: -10 * s.lr, [HOLDS, HOLDS, HOLDS]),
        (lambda s: 10 * s.lr - 0.4 if s.init_bias else -10 * s.lr, [HOLDS, HOLDS, HOLDS]),  # zero bias alone is ranked
        (lambda s: -0.3 * s.lr, [HOLDS, FAILS, HOLDS]),
        (lambda s: 10 * s.lr, [FAILS, OPEN, OPEN]),  # on for every feature: no neuron is monosemantic
        (lambda s: -100 * s.lr, [HOLDS, HOLDS, FAILS]),
        (lambda s: (-2 if s.task == "abs" else -10) * s.lr + 0.03, [HOLDS, FAILS, HOLDS]),
        (lambda s: s.lr - 0.2 if s.task == "abs" else -10 * s.lr, [FAILS, HOLDS, HOLDS]),
        (lambda s: -100 * s.lr if s.task == "reprojector" else -10 * s.lr, [HOLDS, HOLDS, FAILS]),
    ],
)
def test_claim_4_is_measured_where_it_is_worst_of_the_three_tasks(bias, found):
    run = made_up(["task"], lambda s: s.lr * 20, bias=bias)
    claim = claims.moderate_negative_bias(run, "small")
    assert verdicts(claim) == found and claim.verdict == (FAILS if FAILS in found else HOLDS), claim


def test_bias_of_the_monosemantic_leaves_the_other_neurons_out():
    run = made_up(["task"], lambda s: 0.5, bias=lambda s: -0.25)
    assert claims.bias_of_monosemantic(run, 0) == -0.25  # and not (-.25 - .25 + 1) / 3


# claim 5


def test_claim_5_looks_beyond_as_many_neurons_as_features():
    # with zero bias, which does not count here, the other way round
    grows = made_up(["width"], lambda s: math.log2(s.n_neurons) / 10 if s.init_bias else 1 / s.n_neurons)
    claim = claims.wider_is_more_monosemantic(grows, "small")
    assert claim.verdict == HOLDS and claim.numbers[1].by_seed[1] == pytest.approx(math.log2(1024 / 128) / 10)
    bounded = made_up(["width"], lambda s: min(s.n_neurons, 128) / 128 + s.n_neurons / 1e6)
    assert verdicts(claims.wider_is_more_monosemantic(bounded, "small")) == [HOLDS, FAILS]
    falls = made_up(["width"], lambda s: 1 / s.n_neurons if s.init_bias else s.n_neurons / 1024)
    assert verdicts(claims.wider_is_more_monosemantic(falls, "small")) == [FAILS, FAILS]
