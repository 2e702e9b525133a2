"""Two commits in turns: the order, the ratios of pairs, and what they say."""

import json

import pytest

from benchmarks import compare


class Side:
    def __init__(self, label, times, calls):
        self.label, self.times, self.calls = label, iter(times), calls

    def turn(self):
        self.calls.append(self.label)
        return next(self.times)


def test_comparison_alternates_and_takes_ratios_of_pairs():
    calls = []
    found = compare.pairs(Side("a", [1, 2, 4, 8], calls), Side("b", [2, 4, 8, 16], calls), 4)
    assert "".join(calls) == "abbaabba" and found == [(1, 2), (2, 4), (4, 8), (8, 16)]
    result = compare.summary(found * 2)
    assert result["b_over_a"] == 2 and result["verdict"] == "B is slower"
    assert compare.summary(found)["verdict"].startswith("too few")
    mixed = [(1, 1.1), (1, 0.9), (1, 1.2), (1, 0.8)] * 2
    assert compare.summary(mixed)["verdict"].startswith("no difference")
    assert compare.summary([(b, a) for a, b in found * 2])["verdict"] == "B is faster"


@pytest.mark.parametrize("count", [3, 5, 6, 8, 15, 40])
def test_interval_of_the_median_is_that_of_the_binomial_distribution(count):
    stats = pytest.importorskip("scipy.stats")
    k = compare.rank_of_interval(count)
    # The median lies outside when fewer than k values lie on one side of it.
    if k is not None:
        assert 2 * stats.binom.cdf(k - 1, count, 0.5) <= 0.05 < 2 * stats.binom.cdf(k, count, 0.5)
    else:
        assert 2 * stats.binom.cdf(0, count, 0.5) > 0.05


def test_a_revision_that_there_is_not_is_an_error_in_a_line(capsys):
    assert compare.main(["no-such-revision", "HEAD"]) == 2
    assert "is not a commit" in capsys.readouterr().err


@pytest.mark.slow
def test_comparison_of_a_commit_with_itself_runs_in_two_worktrees(tmp_path):
    out = tmp_path / "compare.json"
    assert compare.main(["HEAD", "HEAD", "--smoke", "--device", "cpu", "--pairs", "3", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["pairs"] == 3
