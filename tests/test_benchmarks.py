"""The peer benchmarks: do the contestants train the recipe, does the gate see one that does not, is the sum right."""

import functools
import json
import math

import pytest
import torch

from benchmarks import figures, markdown, throughput
from benchmarks.contestants import ENTRIES, make
from benchmarks.contestants.base import Unavailable, factor_table, rate_table, stream_seed
from benchmarks.contestants.bmm import Bmm
from benchmarks.contestants.ours import Ours
from benchmarks.contestants.pool import decode, encode, shares
from benchmarks.gate import Gate, student_quantile
from benchmarks.machine import ROOT, slug
from benchmarks.measure import CaseResult, Row, most_telling, names_for, prepare_states, steps_of_turn
from benchmarks.report import case_as_json, overall, rate_shares, ratios, rounded
from benchmarks.state import State
from benchmarks.suites import SMOKE, SUITES, Case, pair, suite
from fastmono.engines.reference import ReferenceEngine
from fastmono.optim import bias_factor, learning_rates
from fastmono.philox import FeatureSampler

CPU = torch.device("cpu")
PARTS = ("parameters", "first_moment", "second_moment")


@pytest.fixture(autouse=True)
def one_thread():
    """Of so little work, several threads only make more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def contestant(name):
    try:
        return make(name, CPU)
    except Unavailable as error:
        pytest.skip(str(error))


@functools.cache
def trained(seeds=(0,), steps=96, spec=SMOKE):
    """A state whose moments have a history: before, LAMB divides rounding errors by each other."""
    block = State.initial(pair(spec, (0.003, 0.03), (0.0, -0.3))).on_streams(seeds).to_block()
    ReferenceEngine().advance(block, steps)
    return State.of_block(block)


def same(a, b):
    return a.step == b.step and all(
        torch.equal(getattr(a, part)[name], getattr(b, part)[name]) for part in PARTS for name in a.parameters
    )


@pytest.mark.parametrize(
    "name,steps",
    # With the bias decay, and across its end.
    [(name, 254) for name in ("published", "cleaned", "bmm", "compiled", "vmap", "jax")] + [("bmm", 96)],
)
def test_steps_on_common_batches_are_as_close_to_float64_as_the_reference_is(name, steps):
    start, n = trained((3, 4), steps), 4
    batches = torch.stack(
        [
            torch.stack([FeatureSampler(start.specs[s * start.group]).batch(start.step + t, 0, SMOKE.batch_size)
                         for s in range(2)]) for t in range(n)
        ]
    )  # fmt: skip
    exact, plain = start.to_block(torch.float64), start.to_block()
    exact_losses, _ = ReferenceEngine().advance(exact, n), ReferenceEngine().advance(plain, n)
    truth, reference = State.of_block(exact), State.of_block(plain)
    peer = contestant(name)
    peer.load(start)
    losses, found = peer.advance_on(batches), peer.read()
    for part in PARTS:
        for tensor, true in getattr(truth, part).items():
            error = (getattr(found, part)[tensor] - true).norm()
            # Another order of summation: as far from the truth as the reference, give or take a factor of two.
            allowed = 2 * (getattr(reference, part)[tensor] - true).norm() + 2.0**-22 * true.norm()
            assert error <= allowed, (part, tensor, float(error), float(allowed))
    logged = ~losses.isnan()
    assert torch.allclose(losses[logged].float(), exact_losses[logged], rtol=1e-5)
    assert found.step == start.step + n
    assert bool(logged.any()) or name == "published"


@pytest.fixture(scope="module")
def gate():
    grid = pair(SMOKE, (0.03,))
    trainer = Ours("reference", "fp32", CPU)
    states, _ = prepare_states(grid, (0.0, 0.25), trainer, lambda text: None)
    return Gate([states[0.0], states[0.25]], trainer, streams=16, steps=64)


@pytest.mark.parametrize("name", ["bmm", "jax"])
def test_gate_lets_a_peer_pass(gate, name):
    verdict = gate.check(contestant(name))
    assert verdict.passed, verdict


def test_gate_of_16_steps_compares_the_one_loss_that_the_published_loop_logs():
    short = Gate([State.initial(pair(SMOKE, (0.03,)))], Ours("reference", "fp32", CPU), streams=4, steps=16)
    verdict = short.check(contestant("published"))
    assert verdict.passed and verdict.worst > 0


def test_gate_lets_our_engine_pass(gate):
    assert gate.check(Ours("cpu", "fp32", CPU)).passed


class Wrong(Bmm):
    """bmm with one thing changed: `change` is called when a state has been loaded."""

    def __init__(self, change):
        super().__init__(CPU)
        self.change = change

    def load(self, state):
        super().load(state)
        self.change(self)


WRONG = {
    "learning rate 1.1 times too high": lambda peer: peer.lr.mul_(1.1),
    "schedule begins again": lambda peer: setattr(peer, "step", 512),
    "features half as probable": lambda peer: setattr(peer, "probability", peer.probability / 2),
    "embedding 1.3 times too long": lambda peer: peer.PT.mul_(1.3),
}


@pytest.mark.parametrize("fault", WRONG)
def test_gate_refuses_a_contestant_that_is_wrong(gate, fault):
    verdict = gate.check(Wrong(WRONG[fault]))
    assert not verdict.passed and verdict.worst > 1, verdict


def test_gate_refuses_a_contestant_without_bias_decay():
    # No neuron is active, as with bias -1 at the suites' shapes: the bias then follows its decay without noise.
    dead = Gate([State.initial(pair(SMOKE, (0.03,), (0.0, -3.0)))], Ours("reference", "fp32", CPU), streams=4, steps=64)

    class NoDecay(Bmm):
        def train_step(self, f, lr, factor):
            return super().train_step(f, lr, torch.ones_like(factor))

    assert dead.check(Bmm(CPU)).passed
    verdict = dead.check(NoDecay(CPU))
    assert not verdict.passed and verdict.where.startswith("mean bias"), verdict


def test_gate_refuses_numbers_that_are_not_finite(gate):
    verdict = gate.check(Wrong(lambda peer: peer.p["b"].fill_(math.nan)))
    assert not verdict.passed and verdict.where == "not finite"


@pytest.mark.parametrize("dof", [2, 6, 10, 14])
@pytest.mark.parametrize("tail", [1e-2, 1e-5, 1e-7])
def test_student_quantile_is_that_of_scipy(dof, tail):
    stats = pytest.importorskip("scipy.stats")
    assert student_quantile(tail, dof) == pytest.approx(stats.t.isf(tail, dof), rel=1e-4)


def test_rate_and_factor_tables_are_those_of_the_library():
    grid = pair(SMOKE, (0.003, 0.03))
    state, first, n = State.initial(grid), 200, 1200
    lr = torch.tensor([spec.lr for spec in grid], dtype=torch.float64)
    wanted = torch.tensor([learning_rates(spec, first, n) for spec in grid]).T
    assert torch.allclose(rate_table(lr, first, n), wanted, rtol=1e-6, atol=1e-10)
    factors = torch.tensor([[bias_factor(spec, t) for spec in grid] for t in range(first, first + n)])
    assert torch.equal(factor_table(state, first, n), factors)


@pytest.mark.parametrize("step", [0, 100, 511, 512, 513, 1023, 1024])
def test_published_schedule_taken_up_at_any_step_is_the_published_one(step):
    peer = contestant("published")
    state = State.initial(pair(SMOKE.replace(steps=4096), (0.03,), (0.0,)))
    peer.step = step
    lamb, schedule = peer.optimizer(state.specs[0], [torch.nn.Parameter(torch.zeros(2))], [(torch.zeros(2),) * 2])
    for t, rate in enumerate(learning_rates(state.specs[0], step, 600)):
        assert lamb.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-5, abs=1e-8), t
        with pytest.warns(UserWarning, match="optimizer.step") if t == 0 else pytest.MonkeyPatch.context():
            schedule.step()


def test_state_survives_a_block_a_pipe_and_a_split():
    state = trained((1, 2))
    assert same(State.of_block(state.to_block()), state)
    assert same(decode(encode(state)), state)
    half = state.select([1, 3, 5, 7])
    assert half.n_streams == 2 and half.group == 2 and half.specs[2].seed == 2
    assert torch.equal(half.parameters["b"][2], state.parameters["b"][5])


def test_state_refuses_other_recipes_and_uneven_streams():
    state = trained((1, 2))
    with pytest.raises(ValueError, match="relu"):
        State.initial([SMOKE.replace(activation="gelu")])
    with pytest.raises(ValueError, match="only lr"):
        State.initial([SMOKE, SMOKE.replace(batch_size=32)])
    with pytest.raises(ValueError, match="stand together"):
        state.select([0, 1, 2, 4])


def test_streams_of_different_seeds_and_steps_draw_different_numbers():
    draws = {
        float(torch.rand((), generator=torch.Generator().manual_seed(stream_seed(2**20 + seed, step))))
        for seed in range(20)
        for step in (0, 1, 2048)
    }
    assert len(draws) == 60


@pytest.mark.parametrize(
    "streams,group,workers",
    [(1, 12, 2), (8, 12, 2), (64, 16, 16), (1, 1, 16), (3, 5, 2), (1, 3, 2), (4, 2, 3), (2, 3, 16)],
)
def test_shares_of_workers_cover_every_model_once_and_almost_equally(streams, group, workers):
    grid = pair(SMOKE, tuple(0.001 * (i + 1) for i in range(group)), (0.0,))
    state = State.initial(grid).on_streams(range(streams))
    found = shares(state, workers)
    assert sorted(model for models in found for model in models) == list(range(streams * group))
    assert len(found) == min(workers, max(streams, group))
    sizes = {len(models) for models in found}
    assert len(sizes) == 1 if streams % workers == 0 or group % workers == 0 else max(sizes) - min(sizes) <= streams
    for models in found:
        state.select(models)  # equally many of each stream that it has


def result_of(rows, rounds=3):
    case = Case("12 models", pair(SMOKE, (0.01,)))
    machine = [{"fp32": 1e9, "copy": 1e9}] * rounds
    return CaseResult(case, {"beginning": 0, "end": 512}, {"beginning": 0.5, "end": 0.1}, 1.0, rows, machine)


def test_ratios_are_medians_of_the_ratios_within_each_round():
    ours = Row("cpu-fp32", ours=True, models=12, steps=64, ms={"beginning": [1, 2, 4], "end": [3, 2, 4]})
    slower = Row("reference-fp32", ours=True, models=12, steps=64, ms={"beginning": [9, 9, 9], "end": [9, 9, 9]})
    peer = Row("bmm", models=12, steps=64, ms={"beginning": [4, 6, 4], "end": [4, 6, 4]})
    gone = Row("jax", status="gate failed: loss 1/4")
    broken = Row("vmap", status="failed: out of memory", models=12, ms={"beginning": [1]})
    assert overall(ours) == [2, 2, 4]
    assert ratios([ours, slower, peer, gone, broken], ours) == {"reference-fp32": 4.5, "bmm": 2.0}  # of 2, 3, 1
    result = result_of([ours, slower, peer, gone, broken])
    flops = SMOKE.flops_per_step
    assert rate_shares(result, ours) == pytest.approx([flops / 2e-3 / 1e9] * 2 + [flops / 4e-3 / 1e9])
    found = case_as_json(result)
    assert found["best_of_ours"] == "cpu-fp32" and found["ratios"]["bmm"] == 2.0
    assert "ms_per_model_step" not in found["contestants"]["jax"]
    assert found["contestants"]["bmm"]["model_steps_per_s"] == 250
    json.dumps(found)


def test_rounding_keeps_four_digits_and_settings_whole_and_what_was_not_measured_is_null():
    assert rounded({"a": [123456.0, 0.00123456], "grid": {"lr": 0.123456}, "n": 5, "loss": math.nan}) == {
        "a": [123500.0, 0.001235], "grid": {"lr": 0.123456}, "n": 5, "loss": None,
    }  # fmt: skip


def test_a_turn_has_as_many_steps_as_its_time_allows_and_never_fewer_than_the_least():
    demo = suite("demo", False)
    assert steps_of_turn(demo, 100.0) == demo.least
    assert steps_of_turn(demo, 0.6) == 2 * demo.least
    assert steps_of_turn(demo, 1e-3) == demo.steps


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_suites_have_the_models_that_they_state(name, on_gpu):
    found = suite(name, on_gpu)
    counts = {"tiny": [12, 96, 1024], "demo": [12], "published": [12], "width": [3] * 6}
    counts["scale"] = [1, 4, 16, 64, 256, 1024, 4096]
    assert [case.n_models for case in found.cases] == counts[name]
    assert all(
        len(set(case.grid)) == len(case.grid) and {spec.seed for spec in case.grid} == {0} for case in found.cases
    )
    device = torch.device("cuda" if on_gpu else "cpu")
    assert {"bmm", "compiled", "jax"} <= set(names_for(found, device, []))
    smoke = suite(name, on_gpu, smoke=True)
    assert all(case.n_models <= 16 for case in smoke.cases) and smoke.rounds == 1


def kept_results():
    return sorted((ROOT / "benchmarks" / "results").glob("*/*/result.json"))


@pytest.mark.parametrize("path", kept_results(), ids=lambda path: path.parent.name)
def test_a_kept_result_is_drawn_again(path, tmp_path, capsys):
    (tmp_path / "result.json").write_bytes(path.read_bytes())
    assert figures.main([str(tmp_path / "result.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'figure.png'}\n"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{}", "[]", '{"suite": "demo", "cases": []}', "no JSON"])
def test_a_file_that_is_no_result_is_refused_in_a_line(text, tmp_path, capsys):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SystemExit):
        figures.main([str(tmp_path / "result.json")])
    assert "result.json" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smoke_run_writes_table_json_and_figure(tmp_path, capsys):
    argv = ["--suite", "scale", "--device", "cpu", "--smoke", "--out", str(tmp_path)]
    assert throughput.main([*argv, "--only", "published", "bmm", "cpu-fp32", "triton-bf16"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "result.json").read_text())
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [case["name"] for case in found["cases"]] == ["8 models", "16 models"] and "16 models" in printed
    assert "--suite scale" in found["command"] and found["versions"]["torch"] == torch.__version__
    for case in found["cases"]:
        rows = case["contestants"]
        assert list(rows) == ["published", "bmm", "cpu-fp32", "triton-bf16"]
        assert rows["triton-bf16"]["status"].startswith("not available") and rows["bmm"]["gate"]["passed"]
        ratio = (
            rows["bmm"]["ms_per_model_step"]["overall"]["median"]
            / rows["cpu-fp32"]["ms_per_model_step"]["overall"]["median"]
        )
        assert case["ratios"]["bmm"] == pytest.approx(ratio, rel=2e-3)  # one round, four digits
        assert found["ratios"][case["name"]]["useful_over_product_rate"] == case["useful_over_product_rate"] > 0
    assert markdown.main([str(tmp_path / "result.json")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 + 1 and len({line.count("|") for line in lines}) == 1  # head, contestants, our share
    ms = rows["bmm"]["ms_per_model_step"]["overall"]["median"]
    assert any(line.startswith("| stacked bmm |") and f"{ms:.3g} (" in line for line in lines)


def test_a_contestant_that_fails_its_gate_is_shown_as_failed_and_not_timed(tmp_path, monkeypatch, capsys):
    load = Bmm.load

    def with_wrong_rates(self, state):
        load(self, state)
        self.lr *= 2

    monkeypatch.setattr(Bmm, "load", with_wrong_rates)
    argv = ["--suite", "demo", "--device", "cpu", "--smoke", "--out", str(tmp_path), "--only", "bmm", "cleaned"]
    assert throughput.main(argv) == 1
    rows = json.loads((tmp_path / "result.json").read_text())["cases"][0]["contestants"]
    assert rows["bmm"]["status"].startswith("gate failed") and "ms_per_model_step" not in rows["bmm"]
    assert rows["cleaned"]["status"] == "ok"
    assert "gate failed" in capsys.readouterr().out


def test_bad_arguments_are_an_error_in_a_line(capsys):
    assert throughput.main(["--suite", "demo", "--device", "cpu", "--only", "nobody"]) == 2
    assert "must be one of published" in capsys.readouterr().err


def test_devices_have_folder_names():
    assert slug("2 cores Intel(R) Xeon(R) Processor") == "2-cores-intel-xeon-processor"
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert all(entry.devices and entry.title for entry in ENTRIES.values())


def test_gate_takes_the_highest_rate_of_each_bias():
    grid = suite("demo", False).cases[0].grid
    assert [(grid[i].lr, grid[i].init_bias) for i in most_telling(grid, 2)] == [(0.03, 0.0), (0.03, -1.0)]
    assert most_telling(grid[:1], 2) == [0]
