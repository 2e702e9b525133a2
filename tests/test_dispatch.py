"""How models are cut into shards, and what the dispatcher does with shards that crash: in a pool that is made up."""

import random
from collections import Counter

import pytest

import fastmono as fm
from fastmono.executor import CRASHES_IN_A_ROW, TRIES, Dispatcher, Stop
from fastmono.plan import SHARD_SECONDS, Machine, make_plan
from fastmono.shards import array_part, cut
from fastmono.store import RunDirectory
from fastmono.trainer import Options

SPEC = fm.ModelSpec(n_features=32, d_embed=8, n_neurons=32, feature_prob=0.1, batch_size=64, steps=1000)
MACHINE = Machine(2, None, 1e11)


class MadeUp:
    """A pool that trains nothing: `fate(shard)` says what its end is, one event at a time."""

    def __init__(self, fate, slots=2):
        self.fate, self.slots, self.shards, self.begun = fate, slots, {}, []
        self.stopped = self.closed = False

    def start(self, slot, shard):
        assert slot not in self.shards and slot < self.slots
        self.shards[slot] = shard
        self.begun.append(shard)

    def wait(self, hear, seconds):
        for slot, shard in list(self.shards.items()):
            del self.shards[slot]
            for event in self.fate(shard):
                hear(slot, event)

    def ask_to_stop(self):
        self.stopped = True

    def close(self):
        self.closed = True


def dispatch(fate, tmp_path, grid, workers=2, stop=None):
    """Run a grid's plan in a made-up pool. Returns the pool and the events that the listener heard."""
    plan = make_plan(grid, Options("cpu", "fp32"), "", {}, workers, MACHINE)
    heard, pool = [], MadeUp(fate)
    listen = lambda worker, event: heard.append(event)  # noqa: E731
    Dispatcher(RunDirectory(tmp_path), plan.shards, pool, listen, stop or Stop()).run()
    assert pool.closed
    return pool, heard


def of_kind(heard, kind):
    return [event for event in heard if event["kind"] == kind]


def test_every_shard_is_trained_once_the_longest_first_and_in_no_more_slots_than_there_are(tmp_path):
    grid = fm.Grid(SPEC.replace(steps=10**6), lr=[0.001, 0.002, 0.003], seed=range(20), n_neurons=[16, 64])
    pool, heard = dispatch(lambda shard: [{"kind": "finished"}], tmp_path, grid)
    names = Counter(name for shard in pool.begun for name in shard.hashes)
    assert len(names) == len(grid) and set(names.values()) == {1}
    assert [s.seconds for s in pool.begun] == sorted((s.seconds for s in pool.begun), reverse=True)
    assert len(of_kind(heard, "finished")) == len(pool.begun) > 2


def test_a_model_that_always_crashes_is_given_up_and_all_others_are_trained(tmp_path):
    grid = fm.Grid(SPEC, lr=[0.001, 0.002, 0.003, 0.004], seed=range(6))
    plan = make_plan(grid, Options("cpu", "fp32"), "", {}, 2, MACHINE)
    poison, trained = plan.hashes[7], set()

    def fate(shard):
        if poison in shard.hashes:
            return [{"kind": "crashed", "text": "segmentation fault"}]
        trained.update(shard.hashes)
        return [{"kind": "finished"}]

    pool, heard = dispatch(fate, tmp_path, grid)
    assert trained == set(plan.hashes) - {poison}
    (given_up,) = of_kind(heard, "block failed")
    assert given_up["models"] == [poison] and given_up["tries"] == TRIES
    assert given_up["text"] == f"given up after {TRIES} tries: segmentation fault"
    tries = Counter(shard.name for shard in pool.begun if poison in shard.hashes)
    assert set(tries.values()) == {TRIES}  # each half as often as the whole


def test_a_shard_that_crashes_and_then_does_not_is_whole_and_nothing_fails(tmp_path):
    crashed = Counter()

    def fate(shard):
        crashed[shard.name] += 1
        ends = crashed[shard.name] < TRIES
        return [{"kind": "crashed", "text": "killed"} if ends else {"kind": "finished"}]

    pool, heard = dispatch(fate, tmp_path, fm.Grid(SPEC, lr=[0.001, 0.002], seed=[0, 1]))
    assert not of_kind(heard, "block failed") and len(of_kind(heard, "retry")) == 2 * (TRIES - 1)
    assert {len(shard.hashes) for shard in pool.begun} == {2}


def test_where_everything_crashes_the_run_ends_with_what_was_said_last(tmp_path):
    grid = fm.Grid(SPEC, seed=range(200))
    with pytest.raises(ChildProcessError, match=f"{CRASHES_IN_A_ROW} crashes in a row .* no such library"):
        dispatch(lambda shard: [{"kind": "crashed", "text": "no such library"}], tmp_path, grid)


def test_an_exception_in_training_is_not_tried_again_but_a_damaged_file_is(tmp_path):
    for again, tries in ((False, 1), (True, TRIES)):

        def fate(shard, again=again):
            failed = {"kind": "block failed", "models": list(shard.hashes), "text": "no", "again": again}
            return [failed, {"kind": "finished"}]

        pool, heard = dispatch(fate, tmp_path, fm.Grid(SPEC, lr=[0.001, 0.002]), workers=1)
        assert len(pool.begun) == tries and len(of_kind(heard, "block failed")) == 1


def test_work_that_was_lost_is_to_be_done_again(tmp_path):
    grid = fm.Grid(SPEC, lr=[0.001])
    progress = {"kind": "progress", "model_steps": 300, "flops": 300 * SPEC.flops_per_step}
    ends = iter([{"kind": "crashed", "text": "killed"}, {"kind": "finished"}])
    _, heard = dispatch(lambda shard: [progress, next(ends)], tmp_path, grid, workers=1)
    (retry,) = of_kind(heard, "retry")
    assert (retry["model_steps"], retry["flops"]) == (300, 300 * SPEC.flops_per_step)  # nothing had been saved


def test_nothing_is_begun_after_a_stop_and_what_runs_is_asked_to_save(tmp_path):
    stop = Stop()

    def fate(shard):
        stop.requested = True
        return [{"kind": "finished"}]

    pool, _ = dispatch(fate, tmp_path, fm.Grid(SPEC.replace(steps=10**7), seed=range(50)), stop=stop)
    assert len(pool.begun) == 2


def seconds_of(parts, costs):
    return [sum(costs[i] for i in part) for part in parts]


@pytest.mark.parametrize("seed", range(5))
def test_shards_hold_every_model_once_in_order_and_take_about_the_time_asked_for(seed):
    draw = random.Random(seed)
    kinds = sorted(draw.randrange(40) for _ in range(500))
    widths = [draw.choice([1.0, 4.0, 16.0]) for _ in range(40)]
    costs = [widths[kind] for kind in kinds]
    parts = cut(costs, kinds, [1] * 500, workers=4, seconds=50.0)
    assert [i for part in parts for i in part] == list(range(500))
    assert max(seconds_of(parts, costs)) <= 2 * 50 and len(parts) >= sum(costs) / 100


def test_models_that_share_a_stream_stay_together_where_that_saves_sampling():
    costs, kinds = [1.0] * 60, [i // 6 for i in range(60)]
    together = cut(costs, kinds, [6] * 60, workers=2, seconds=2.0)
    assert together == [list(range(i, i + 6)) for i in range(0, 60, 6)]
    assert {len(part) for part in cut(costs, kinds, [2] * 60, workers=2, seconds=2.0)} == {2}
    # but no worker is left without a shard for it
    assert len(cut([10.0] * 6, [0] * 6, [6] * 6, workers=3, seconds=5.0)) == 3


def test_a_short_run_has_a_shard_for_each_worker_and_a_long_one_many_of_minutes():
    short = make_plan(fm.Grid(SPEC, seed=range(64)), Options("cpu", "fp32"), "", {}, 4, MACHINE)
    assert len(short.shards) == 4
    long = make_plan(fm.Grid(SPEC.replace(steps=10**7), seed=range(64)), Options("cpu", "fp32"), "", {}, 4, MACHINE)
    assert len(long.shards) == 64  # a model is longer than a shard should be, and cannot be cut
    middle = fm.Grid(SPEC.replace(steps=10**5), seed=range(512), n_neurons=[8, 64, 256])
    plan = make_plan(middle, Options("cpu", "fp32"), "", {}, 4, MACHINE)
    assert len(plan.shards) > 3 * plan.workers
    assert max(shard.seconds for shard in plan.shards) <= 2 * SHARD_SECONDS


def test_on_several_gpus_a_worker_has_one_and_tiny_models_fill_it():
    tiny = SPEC.replace(steps=2**23)
    machine = Machine(16, None, 1e11, 2**36, 90, devices=4)
    plan = make_plan(fm.Grid(tiny, seed=range(1024)), Options("triton", "bf16"), "", {}, "auto", machine)
    assert plan.workers == 4 and len(plan.shards) >= 4
    shared = fm.Grid(tiny, lr=[0.001 * (i + 1) for i in range(1024)])
    plan = make_plan(shared, Options("triton", "bf16"), "", {}, "auto", machine)
    assert min(len(shard.hashes) for shard in plan.shards) >= 128


def test_the_parts_of_array_tasks_are_disjoint_complete_balanced_and_follow_from_the_models_alone():
    grid = fm.Grid(SPEC, seed=range(10), n_neurons=[8, 32, 128], lr=[0.001, 0.002, 0.003])
    parts = [array_part(grid, False, (i, 7)) for i in range(7)]
    assert sorted(i for part in parts for i in part) == list(range(len(grid)))
    costs = [spec.steps * spec.flops_per_step for spec in grid]
    assert max(seconds_of(parts, costs)) - min(seconds_of(parts, costs)) <= 2 * max(costs)
    shuffled = list(range(len(grid)))
    random.Random(0).shuffle(shuffled)
    other = fm.Grid.of(grid[i] for i in shuffled)
    assert [{grid[i].content_hash("cpu", "fp32", 1) for i in part} for part in parts] == [
        {other[i].content_hash("cpu", "fp32", 1) for i in array_part(other, False, (k, 7))} for k in range(7)
    ]
