"""The simulated executor against closed forms: list scheduling without faults, restarts at exponential failures."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fastmono.simulate import NO_FAULTS, Faults, expected, ideal_seconds, simulate


def faults(**changes):
    return Faults(**{**NO_FAULTS.__dict__, **changes})


def mean_and_error(run, runs):
    values = np.array([run(seed) for seed in range(runs)])
    return values.mean(), values.std(ddof=1) / math.sqrt(runs)


@pytest.mark.parametrize(("shards", "devices"), [(1, 1), (7, 3), (100, 8), (8, 100), (4096, 512)])
def test_equal_shards_take_whole_rounds(shards, devices):
    outcome = simulate([90.0] * shards, [1.0] * devices, NO_FAULTS, seed=0)
    assert outcome.seconds == 90 * math.ceil(shards / devices)
    assert (outcome.busy, outcome.lost, outcome.failures) == (90 * shards, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_without_faults_the_time_lies_within_the_bounds_of_list_scheduling(seed):
    rng = np.random.default_rng(seed)
    work, devices = rng.pareto(1.5, 300) * 60, int(rng.integers(2, 60))
    seconds = simulate(list(work), [1.0] * devices, NO_FAULTS, seed).seconds
    least = max(work.sum() / devices, work.max())
    # Graham, "Bounds on multiprocessing timing anomalies" (1969): never more than 2 - 1/m times the optimum.
    assert least <= seconds * (1 + 1e-12)
    assert seconds <= work.sum() / devices + (1 - 1 / devices) * work.max() + 1e-9


def test_devices_of_other_speeds_share_the_work_by_their_speeds():
    outcome = simulate([1.0] * 6000, [1.0, 2.0, 3.0], NO_FAULTS, seed=0)
    assert ideal_seconds([1.0] * 6000, [1.0, 2.0, 3.0]) == 1000
    assert 1000 <= outcome.seconds < 1001


@pytest.mark.parametrize("work", [20.0, 100.0, 250.0])
def test_a_shard_without_saved_states_takes_what_restarts_at_exponential_failures_take(work):
    mean_gap, restart = 100.0, 7.0
    wrong = faults(failures_per_hour=3600 / mean_gap, restart_seconds=restart, save_every=math.inf)
    found, error = mean_and_error(lambda seed: simulate([work], [1.0], wrong, seed).seconds, 4000)
    exact = (math.exp(work / mean_gap) - 1) * (mean_gap + restart)  # failures are geometric, and memoryless
    assert abs(found - exact) < 4.5 * error


@pytest.mark.parametrize("lost", [0.0, 0.3, 1.0])
def test_a_shard_with_saved_states_takes_what_its_markov_chain_takes(lost):
    gap, restart, every, saves = 100.0, 7.0, 40.0, 5
    wrong = faults(failures_per_hour=3600 / gap, restart_seconds=restart, save_every=every, state_lost=lost)
    outcomes = [simulate([every * saves], [1.0], wrong, seed) for seed in range(4000)]
    times = np.array([outcome.seconds for outcome in outcomes])
    # Expected time from i saved states: a stretch of `every` passes with probability p, else back to i or to i - 1.
    p = math.exp(-every / gap)
    stretch = gap * (1 - p) + (1 - p) * restart  # mean of min(failure, every), and the restart where it fails
    chain, right = np.eye(saves + 1), np.full(saves + 1, stretch)
    right[saves] = 0
    for i in range(saves):
        chain[i, i + 1] -= p
        chain[i, i] -= (1 - p) * (1 - lost)
        chain[i, max(i - 1, 0)] -= (1 - p) * lost
    exact = np.linalg.solve(chain, right)[0]
    assert abs(times.mean() - exact) < 4.5 * times.std(ddof=1) / math.sqrt(len(times))
    for outcome in outcomes[:50]:  # nothing is done twice but what was lost
        assert outcome.busy - outcome.lost == pytest.approx(every * saves)


def test_failures_come_at_their_rate():
    wrong = faults(failures_per_hour=0.5, save_every=60.0, restart_seconds=60.0)
    outcome = simulate([180.0] * 20_000, [1.0] * 64, wrong, seed=1)
    assert abs(outcome.failures - outcome.busy / 7200) < 4.5 * math.sqrt(outcome.busy / 7200)
    lost = 60 / 2 - 60**2 / (12 * 7200)  # mean since the newest state, of an exponential within 60 s
    assert outcome.lost / outcome.failures == pytest.approx(lost, abs=4.5 * 60 / math.sqrt(12 * outcome.failures))


def test_the_times_of_shards_vary_around_their_mean_and_stragglers_are_slow():
    varied = simulate([100.0] * 50_000, [1.0], faults(spread=0.5), seed=0)
    deviation = math.sqrt(math.exp(0.25) - 1)
    assert varied.busy / 50_000 == pytest.approx(100, abs=4.5 * 100 * deviation / math.sqrt(50_000))
    assert simulate([100.0], [1.0], faults(stragglers=1.0, slowdown=1.5), seed=0).seconds == 150


def test_runs_grow_with_what_goes_wrong_and_repeat_with_their_seed():
    shards, devices = [180.0] * 600, [1.0] * 64
    rising = [expected(shards, devices, faults(failures_per_hour=rate))[0] for rate in (0.0, 0.5, 5.0, 50.0)]
    assert all(a < b for a, b in pairwise(rising))
    assert simulate(shards, devices, Faults(), 3) == simulate(shards, devices, Faults(), 3)
    assert simulate(shards, devices, Faults(), 3) != simulate(shards, devices, Faults(), 4)


def test_nothing_to_do_takes_no_time_and_what_cannot_be_is_refused():
    assert simulate([], [1.0], Faults(), 0).seconds == 0
    with pytest.raises(ValueError, match="devices"):
        simulate([1.0], [], Faults(), 0)
    with pytest.raises(ValueError, match="devices"):
        simulate([1.0], [0.0], Faults(), 0)
    with pytest.raises(ValueError, match="work"):
        simulate([math.nan], [1.0], Faults(), 0)
