"""What a run takes on devices that fail: the executor, event by event, without the training.

Devices take the next shard off one queue. A shard's time varies (log-normal, mean 1), some devices are slow throughout,
and each fails at random, at the times of a Poisson process: it is back after a while, its shard returns to the front of
the queue and goes on from the newest state that was saved, or from the one before when that is lost too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often. `Faults()` is a machine room of the kind that is known from reports."""

    failures_per_hour: float = 2e-5
    """Of one device, while it works. Default: 419 unexpected interruptions of 16,384 GPUs in 54 days ("The Llama 3 Herd
    of Models", 2024, section 3.3.4)."""
    restart_seconds: float = 60.0
    """Until the device takes a shard again."""
    save_every: float = 60.0
    """Seconds of work between saved states."""
    state_lost: float = 0.01
    """Probability that the newest state is unusable after a failure; assumed."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a shard's time; assumed."""
    stragglers: float = 0.02
    """Share of devices that are slow; assumed."""
    slowdown: float = 1.5
    """How many times as long these take."""


NO_FAULTS = Faults(failures_per_hour=0.0, state_lost=0.0, spread=0.0, stragglers=0.0)


@dataclass(frozen=True)
class Outcome:
    """One simulated run, in seconds."""

    seconds: float
    """From the first start to the last end."""
    busy: float
    """All devices' time at work, work that was lost included."""
    lost: float
    """The part of it that had to be done again."""
    failures: int


def simulate(shards: Sequence[float], speeds: Sequence[float], faults: Faults, seed: int) -> Outcome:
    """One run. The same arguments give the same outcome.

    Args:
        shards: seconds of work each, on a device of speed 1, in the order of the queue.
        speeds: of each device.

    Raises:
        ValueError: no device, a speed that is not above 0, or a shard of negative or infinite work.
    """
    if not speeds or not all(0 < speed < math.inf for speed in speeds):
        raise ValueError("a simulation needs devices, each with a speed above 0")
    if not all(0 <= work < math.inf for work in shards):
        raise ValueError("a shard's work must be a number of seconds, at least 0")
    rng = np.random.default_rng(seed)
    sigma = faults.spread
    work = np.asarray(shards, dtype=float) * np.exp(sigma * rng.standard_normal(len(shards)) - sigma**2 / 2)
    slow = rng.random(len(speeds)) < faults.stragglers
    speed = np.asarray(speeds, dtype=float) / np.where(slow, faults.slowdown, 1.0)
    rate = faults.failures_per_hour / 3600
    queue = [(i, 0.0) for i in range(len(shards) - 1, -1, -1)]  # shard, work that is saved; the next one last
    free = [(0.0, device) for device in range(len(speeds))]
    busy = lost = end = 0.0
    failures = 0
    # In the order of time: whoever takes a shard now ends later, and a shard that comes back does so at its device's
    # failure, which must be known before anybody takes a shard after it.
    returns: list[tuple[float, int, float]] = []
    while queue or returns:
        if not queue and returns[0][0] > free[0][0]:  # devices wait for the shard of one that fails
            then = returns[0][0]
            free = [(max(time, then), device) for time, device in free]
            heapq.heapify(free)
        now, device = heapq.heappop(free)
        while returns and returns[0][0] <= now:
            _, i, saved = heapq.heappop(returns)
            queue.append((i, saved))
        i, saved = queue.pop()
        takes = (work[i] - saved) / speed[device]
        fails = rng.exponential(1 / rate) if rate else math.inf
        if fails >= takes:
            busy += takes
            end = max(end, now + takes)
            heapq.heappush(free, (now + takes, device))
            continue
        failures += 1
        reached = saved + fails * speed[device]
        every = faults.save_every * speed[device]  # states are saved by the clock
        kept = reached - math.fmod(reached - saved, every)
        if rng.random() < faults.state_lost:
            kept = max(kept - every, 0.0)
        busy += fails
        lost += (reached - kept) / speed[device]
        heapq.heappush(returns, (now + fails, i, kept))
        heapq.heappush(free, (now + fails + faults.restart_seconds, device))
    return Outcome(float(end), float(busy), float(lost), failures)


def ideal_seconds(shards: Sequence[float], speeds: Sequence[float]) -> float:
    """Seconds if the work could be cut at will: its sum over the sum of the speeds."""
    return sum(shards) / sum(speeds)


def expected(
    shards: Sequence[float], speeds: Sequence[float], faults: Faults, runs: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Mean seconds of so many simulated runs, and the time within which nine of ten end."""
    seconds = [simulate(shards, speeds, faults, seed + i).seconds for i in range(runs)]
    return float(np.mean(seconds)), float(np.quantile(seconds, 0.9))
