"""Successive halving: who goes on, that nobody's bits notice, and that decisions outlast kills."""

import dataclasses
import json
import math
import signal
import subprocess

import pytest
import torch
from fault_cases import command, grid, job, results, wait_for

import fastmono as fm
from fastmono import halving
from fastmono.engines.cpu import CpuEngine
from fastmono.files import BadFile
from fastmono.halving import Halving, Rungs, rivals
from fastmono.metrics import NAMES, HeldOut, measure
from fastmono.plan import Machine, make_plan
from fastmono.shards import decode_shard, encode_shard
from fastmono.status import status_lines
from fastmono.store import RunDirectory, Saved
from fastmono.trainer import Options

STEPS, EVERY = 96, 24
"""Rungs at 24, 48 and 72, none of them a checkpoint; of the four rivals of a seed two, one and one go on."""
FILES = ("models.csv", "history.safetensors", "halving.json")


def halved(out, **changes):
    settings = {"workers": 1, "keep": 0.5, "every": EVERY, "quiet": True} | changes
    return fm.train(settings.pop("grid", grid(STEPS)), out, **settings)


def files(run):
    return {name: (run.path / name).read_bytes() for name in FILES}


def stops(run):
    """The step at which each model that fell behind did."""
    rungs = json.loads((run.path / "halving.json").read_text())["rungs"]
    return {
        run._hashes.index(name): int(rung)
        for rung, models in rungs.items()
        for name, (_, on) in models.items()
        if not on
    }


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The grid without halving."""
    return fm.train(grid(STEPS), tmp_path_factory.mktemp("calm"), workers=1, quiet=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The grid halved."""
    return halved(tmp_path_factory.mktemp("halved"))


@pytest.mark.parametrize(
    ("keep", "by", "values", "on"),
    [
        (0.5, "loss", [0.3, 0.1, 0.2, 0.4], {1, 2}),
        (0.5, "mono", [0.3, 0.1, 0.2, 0.4], {0, 3}),
        (0.5, "loss", [0.3, 0.1, 0.2], {1, 2}),  # 1.5, rounded up
        (0.5, "loss", [0.2, 0.1, 0.1, 0.1], {1, 2}),  # a tie: the grid's order
        (0.5, "mono", [0.0, 0.0, 0.0, 0.0], {0, 1}),
        (0.5, "loss", [None, 0.9, None, 0.8], {1, 3}),  # diverged ones are last
        (0.5, "mono", [None, 0.0, 0.0, None], {1, 2}),
        (0.75, "loss", [None, None, 0.1, 0.2], {0, 2, 3}),
        (1e-9, "loss", [0.2, 0.1, 0.3], {1}),  # one at least
        (0.7, "loss", [float(i) for i in range(10)], set(range(7))),  # 0.7 * 10 is above 7 in floats
        (5 / 6, "loss", [float(i) for i in range(6)], set(range(5))),
        (0.9, "loss", [0.1, 0.2], {0, 1}),
        (0.5, "loss", [None], {0}),
    ],
)
def test_of_rivals_the_best_share_goes_on(keep, by, values, on):
    assert Halving(keep, 16, by).best(values) == on


def by_hand(run, keep, every, measured):
    """Who stops where, from a run in which nobody does: `measured(i, rung)`, the smaller the better."""
    alive, found = {i: rivals(spec) for i, spec in enumerate(run.specs)}, {}
    for rung in range(every, STEPS, every):
        for group in set(alive.values()):
            ranked = sorted((i for i in alive if alive[i] == group), key=lambda i: measured(i, rung))
            for i in ranked[math.ceil(keep * len(ranked)) :]:
                found[i] = rung
                del alive[i]
    return found


def test_by_loss_those_stop_whose_mean_logged_loss_since_the_last_rung_is_larger(calm, undisturbed):
    def mean_loss(i, rung):
        window = (calm.logged_steps > rung - EVERY) & (calm.logged_steps <= rung)
        return calm.losses[i, window].double().mean()

    found = by_hand(calm, 0.5, EVERY, mean_loss)
    assert found == stops(undisturbed)
    assert sorted(found.values()) == [24] * 4 + [48] * 2


def test_by_mono_those_stop_that_have_fewer_monosemantic_neurons_at_the_rung(calm, tmp_path):
    run = halved(tmp_path, by="mono", every=32)
    mono = calm.metrics["mono_per_feature"]
    steps = calm.checkpoint_steps.tolist()
    assert len(set(mono[:, steps.index(32)].tolist())) > 1, "a test of ties alone"
    assert stops(run) == by_hand(calm, 0.5, 32, lambda i, rung: -mono[i, steps.index(rung)])


def test_losses_are_compared_over_whole_periods_where_a_rung_has_one(tmp_path):
    long = fm.Grid(grid()[0].replace(steps=2500), lr=[0.003, 0.03])
    run = halved(tmp_path, grid=long, every=2000)
    (measured,) = json.loads((tmp_path / "halving.json").read_text())["rungs"].values()
    window = (run.logged_steps > 2000 - 1024) & (run.logged_steps <= 2000)
    assert [value for value, _ in measured.values()] == run.losses[:, window].double().mean(1).tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_survivors_and_those_that_stopped_are_bitwise_those_of_a_run_in_which_nobody_stops(
    workers, calm, undisturbed, tmp_path
):
    run = undisturbed if workers == 1 else halved(tmp_path, workers=workers)
    assert files(run) == files(undisturbed)
    stopped = stops(run)
    for i, row in enumerate(run.table):
        until = stopped.get(i, STEPS)
        assert row["status"] == ("stopped" if i in stopped else "done")
        seen, checked = run.logged_steps <= until, run.checkpoint_steps <= until
        assert torch.equal(run.losses[i, seen], calm.losses[i, seen]) and run.losses[i, ~seen].isnan().all()
        for name in NAMES:
            ours, theirs = run.metrics[name][i], calm.metrics[name][i]
            assert torch.equal(ours[checked].nan_to_num(-1), theirs[checked].nan_to_num(-1)), name
            assert ours[~checked].isnan().all()
        if i not in stopped:
            assert repr(row) == repr(calm.table[i])
            ours, theirs = run.parameters(i), calm.parameters(i)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_measures_of_a_model_that_stopped_are_those_of_the_step_where_it_did(undisturbed):
    for i, step in stops(undisturbed).items():
        measured = measure(undisturbed.parameters(i, step), undisturbed.specs[i], HeldOut())
        found = dict(zip(NAMES, measured, strict=True))
        row = undisturbed.table[i]
        for name in ("eval_loss", "mono_per_feature", "dead_neurons", "mean_bias", "density"):
            assert row[name] == found[name], name
        assert math.isnan(row["final_loss"])


@pytest.mark.parametrize(("rung", "moment"), [(0, "before"), (1, "after")])
def test_a_run_that_ends_where_a_decision_is_taken_goes_on_with_the_same_decisions(
    rung, moment, undisturbed, tmp_path, monkeypatch
):
    real, written = halving.write_record, []

    def cut(*arguments):
        written.append(arguments)
        if moment == "after" or len(written) <= rung:
            real(*arguments)
        if len(written) > rung:
            raise OSError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the machine is gone"):
        patch.setattr(halving, "write_record", cut)
        halved(tmp_path)
    assert files(halved(tmp_path)) == files(undisturbed)


@pytest.mark.parametrize("step", [16, 64])
def test_a_run_that_ends_between_two_rungs_goes_on_with_the_same_decisions(step, undisturbed, tmp_path):
    def interrupt(run, reached):
        if reached == step:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        halved(tmp_path, on_checkpoint=interrupt)
    assert files(halved(tmp_path)) == files(undisturbed)


@pytest.mark.slow
def test_a_driver_that_is_killed_and_started_again_takes_the_same_decisions(tmp_path):
    steps, flags = 6000, ("--workers", "2", "--keep", "0.5", "--every", "1500")
    assert job(tmp_path / "calm", *flags, steps=steps).returncode == 0
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out, *flags, "--save-every", "0.2", steps=steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (out / "halving.json").exists())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert job(out, *flags, steps=steps).returncode == 0
    assert results(out) == results(tmp_path / "calm")
    assert (out / "halving.json").read_bytes() == (tmp_path / "calm" / "halving.json").read_bytes()


def test_without_keep_those_that_stopped_are_trained_to_their_end_bitwise_as_if_they_never_had(calm, tmp_path):
    halved(tmp_path)
    fm.train(grid(STEPS), tmp_path, workers=1, quiet=True)
    assert results(tmp_path) == results(calm.path)


def test_a_decision_that_was_taken_stands_also_for_models_that_have_gone_on_since(undisturbed, tmp_path):
    def interrupt(run, step):
        raise InterruptedError

    halved(tmp_path)
    with pytest.raises(InterruptedError):  # when the last of them has come to step 32
        fm.train(grid(STEPS), tmp_path, workers=1, quiet=True, on_checkpoint=interrupt)
    run = halved(tmp_path)
    assert (tmp_path / "halving.json").read_bytes() == files(undisturbed)["halving.json"]
    stopped_at_24 = [i for i, step in stops(run).items() if step == 24]
    newest = {i: run.kept_steps(i)[-1] for i in stopped_at_24}
    assert set(newest.values()) == {32, STEPS}
    assert all(run.table[i]["status"] == ("done" if newest[i] == STEPS else "stopped") for i in stopped_at_24)


@pytest.mark.parametrize("moment", ["decided", "done"])
def test_models_that_are_added_are_ranked_among_those_compared_before_whose_decisions_stand(
    moment, undisturbed, tmp_path, monkeypatch
):
    if moment == "done":
        halved(tmp_path)
    else:
        real = halving.write_record

        def cut(*arguments):
            real(*arguments)
            raise InterruptedError

        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(halving, "write_record", cut)
            halved(tmp_path)
    more = grid(STEPS) + grid(STEPS).override(lr=[1e-5, 0.05, 0.1])  # bad ones and good ones
    run = halved(tmp_path, grid=more)
    first = {i for i, step in stops(run).items() if step == EVERY}
    assert first & set(range(8)) == {i for i, step in stops(undisturbed).items() if step == EVERY}
    assert first - set(range(8)) and set(range(8, 20)) - first
    record = json.loads((tmp_path / "halving.json").read_text())["rungs"][str(EVERY)]
    for group in {rivals(spec) for spec in more}:
        names = [name for name, spec in zip(run._hashes, run.specs, strict=True) if rivals(spec) == group]
        best = Halving(0.5, EVERY).best([record[name][0] for name in names])
        added = [i for i, name in enumerate(names) if run._hashes.index(name) >= 8]
        assert added and all(record[names[i]][1] == (i in best) for i in added)


def test_models_of_other_problems_batches_or_lengths_are_not_compared(tmp_path):
    base = grid()[0]
    others = [
        ("seed", 7), ("steps", 80), ("batch_size", 32), ("d_embed", 5), ("feature_prob", 0.25),
        ("frequency", "power_law"), ("task", "abs"), ("task", "reprojector"), ("n_features", 17),
    ]  # fmt: skip
    alike = [
        ("lr", 0.5), ("n_neurons", 3), ("activation", "gelu"), ("optimizer", "sgd"), ("schedule", "cosine"),
        ("init_bias", -1.0), ("bias_decay", 0.1), ("l1", 0.1),
    ]  # fmt: skip
    assert all(rivals(base.replace(**{field: value})) != rivals(base) for field, value in others)
    assert all(rivals(base.replace(**{field: value})) == rivals(base) for field, value in alike)
    with pytest.raises(ValueError, match="would stop nothing") as error:
        halved(tmp_path / "run", grid=fm.Grid(base.replace(steps=STEPS), seed=[0, 1]))
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "grid.json").exists()


def test_a_diverged_model_is_the_last_of_its_rivals_and_stays_diverged(tmp_path):
    models = fm.Grid(grid()[0].replace(optimizer="sgd", steps=STEPS), lr=[1e6, 1e-3, 1e-2, 1e5])
    run = halved(tmp_path, grid=models)
    assert [row["status"] for row in run.table[::3]] == ["diverged", "diverged"]
    assert {stops(run)[0], stops(run)[3]} == {24} and sorted(row["status"] for row in run.table[1:3]) == [
        "done",
        "stopped",
    ]


def test_where_memory_does_not_hold_a_block_its_halves_stop_at_the_rung_too(undisturbed, tmp_path, monkeypatch):
    real = CpuEngine.advance

    def short_of_memory(self, block, n_steps):
        if len(block.models) > 1:
            raise MemoryError
        return real(self, block, n_steps)

    monkeypatch.setattr(CpuEngine, "advance", short_of_memory)
    run = halved(tmp_path)
    assert "out of memory with" in (tmp_path / "events.jsonl").read_text()
    assert files(run) == files(undisturbed)


def test_a_shard_that_is_tried_again_or_sent_to_a_worker_still_ends_at_its_rung(tmp_path):
    options = Options("cpu", "fp32")
    (shard,) = make_plan(grid(STEPS), options, "", {}, 1, Machine(1, None, 1e11), until=EVERY).shards
    assert shard.model_steps == 8 * EVERY
    names = shard.hashes
    at = dict(zip(names, [0, 10, EVERY, 30, EVERY, 0, 0, 0], strict=True))
    saved = {name: Saved("state-x.safetensors", 0, step, None) for name, step in at.items() if step}
    again = shard.only(names, saved)
    assert set(again.hashes) == {name for name in names if at[name] < EVERY}
    assert again.model_steps == sum(EVERY - step for step in at.values() if step < EVERY)
    _, jobs, _ = decode_shard(encode_shard(RunDirectory(tmp_path), again, options))
    assert tuple(jobs) == again.jobs and {job.until for job in jobs} == {EVERY}


def test_a_model_that_fails_holds_up_nobody_and_is_judged_when_it_comes(tmp_path, monkeypatch):
    real = CpuEngine.advance
    poison = grid(STEPS)[0]

    def fails(self, block, n_steps):
        if poison in block.specs:
            raise MemoryError
        return real(self, block, n_steps)

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="model 0 failed"):
        patch.setattr(CpuEngine, "advance", fails)
        run = halved(tmp_path)
    assert run.table[0]["status"] == "failed"
    before = stops(run)
    assert sum(row["status"] == "done" for row in run.table) == 2
    again = stops(halved(tmp_path))
    assert {i: step for i, step in again.items() if i} == before


def test_the_forecast_is_what_a_run_of_equal_widths_comes_to(tmp_path):
    models = fm.Grid(grid()[0].replace(steps=STEPS), lr=[0.001, 0.003, 0.01, 0.03, 0.1], seed=[0, 1])
    plan = fm.plan_run(models, tmp_path, keep=0.5, every=EVERY)
    assert plan.forecast.stops == ((24, 4), (48, 2), (72, 2))  # 5, 3, 2, 1 of each seed
    run = halved(tmp_path, grid=models)
    ends = [stops(run).get(i, STEPS) for i in range(len(run))]
    assert plan.forecast.model_steps == sum(ends)
    assert plan.forecast.flops == sum(ends) * models[0].flops_per_step < plan.flops


def test_status_tells_those_that_stopped(undisturbed):
    assert "8 models, 2 done, 6 stopped" in next(status_lines(undisturbed.path))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"keep": 0.5, "every": 24, "by": "loss", "rungs": {"24": {"x": [NaN, true]}}}',
        '{"keep": 2, "every": 24, "by": "loss", "rungs": {}}', '{"keep": 0.5, "every": 24, "by": "loss", "rungs": 3}',
        '{"keep": 0.5, "every": 24, "by": "loss", "rungs": {"x": {}}}',
        '{"keep": 0.5, "every": 24, "by": "loss", "rungs": {"24": {"x": [1.0]}}}',
        '{"keep": 0.5, "every": 24, "by": ["loss"], "rungs": {}}',
    ],
)  # fmt: skip
def test_a_record_that_is_damaged_is_named_and_no_decision_is_taken_from_it(text, tmp_path):
    (tmp_path / "halving.json").write_text(text)
    with pytest.raises(BadFile, match=r"halving\.json"):
        halved(tmp_path)


def test_other_rules_than_those_a_directory_was_halved_by_are_refused_and_discarding_it_is_not(undisturbed):
    specs = dict(zip(undisturbed._hashes, undisturbed.specs, strict=True))
    for changes in ({"keep": 0.25}, {"every": 32}, {"by": "mono"}):
        other = dataclasses.replace(Halving(0.5, EVERY), **changes)
        with pytest.raises(ValueError, match=r"json: decided with keep=0\.5, every=24, by='loss': ask for the same"):
            Rungs(undisturbed.directory, specs, other)
        assert not Rungs(undisturbed.directory, specs, other, fresh=True).stopped
