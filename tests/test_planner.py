"""The planner: what it says of devices that are here and of such as are described, and from which figures."""

import csv
import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest

import fastmono as fm
from benchmarks import simulation, suites
from fastmono import plan as planning
from fastmono import planner
from fastmono.files import read_json
from fastmono.plan import Machine, block_bytes, model_seconds
from fastmono.rows import TELEMETRY, write_csv
from fastmono.simulate import NO_FAULTS
from fastmono.trainer import Options

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "2-cores-intel-xeon-processor"
TINY = fm.ModelSpec(n_features=12, d_embed=5, n_neurons=9, feature_prob=0.25, batch_size=24, steps=40, lr=0.01)
PAPER = fm.preset("published")


def text_of(rows):
    return "\n".join(f"{title}: {text}" for title, text in rows)


def test_the_rate_of_a_core_is_that_of_the_kept_measurement():
    machine = read_json(RESULTS / "demo" / "result.json")["cases"][0]["machine"]
    assert planner.rates()["cpu"]["product"]["fp32"]["value"] == machine["fp32"]["median"] / 2


@pytest.mark.parametrize("suite", ["demo", "tiny", "width"])
def test_the_time_on_cores_is_that_of_the_kept_measurements_within_a_factor_of_two(suite):
    core = Machine(1, None, planner.rates()["cpu"]["product"]["fp32"]["value"])
    cases = {case.name: case.grid for case in suites.suite(suite, on_gpu=False).cases}
    for case in read_json(RESULTS / suite / "result.json")["cases"]:
        grid = cases[case["name"]]
        expected = 1e3 * sum(model_seconds(spec, "cpu", core, len(grid)) for spec in grid) / len(grid) / 2
        measured = case["contestants"]["cpu-fp32"]["ms_per_model_step"]["overall"]["median"]
        assert 0.5 < expected / measured < 2, (case["name"], expected, measured)


def test_every_figure_has_a_basis_and_an_origin_and_no_gpu_has_a_measured_rate():
    for name, device in planner.rates().items():
        figures = [*device["product"].values(), device["memory"], device["watts"]]
        for figure in figures + [device[key] for key in ("target",) if key in device]:
            assert figure["value"] > 0 and len(figure["origin"]) > 10
            assert figure["basis"] in ("measured", "reported", "data sheet", "target", "assumed")
            assert name == "cpu" or figure["basis"] != "measured"


@pytest.mark.parametrize(
    ("text", "cluster"),
    [
        ("h100:64", {"h100": 64}),
        ("cpu:32", {"cpu": 32}),
        ("h100:8,a100:4", {"h100": 8, "a100": 4}),
        (" H100:1 ", {"h100": 1}),
    ],
)
def test_a_cluster_is_described_by_names_and_numbers(text, cluster):
    assert planner.parse_cluster(text) == cluster


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h100",
        "h100:",
        "h100:0",
        "h100:-1",
        "tpu:4",
        "h100:4,h100:4",
        "h100:4,cpu:2",
        "h100:99999",
        "cpu:²",
        "cpu:1.5",
    ],
)
def test_what_describes_no_cluster_is_refused_with_what_was_said(text):
    with pytest.raises(ValueError, match="plan="):
        planner.parse_cluster(text)


def test_time_on_gpus_is_a_bound_and_a_target_and_says_so(tmp_path):
    made = planner.estimate(PAPER, tmp_path, {"h100": 12})
    assert made.flops == 12 * 2**17 * PAPER[0].flops_per_step
    assert made.shards == (2**17 * PAPER[0].flops_per_step / 798e12,) * 12  # a model each
    assert made.target == 0.6
    said = text_of(planner.describe(made, NO_FAULTS))
    assert "time at best: 5 s: not measured" in said and "time at target: 8 s: not measured" in said
    assert "reported: products of 8192 on an H100, measured by others" in said
    assert "with faults: 8 s (at the target)" in said
    joules = 700 * 12 * 2**17 * PAPER[0].flops_per_step / 798e12 / 0.6
    assert f"energy: {joules / 1e3:,.1f} kJ (at the target): nominal" in said


def test_a_device_without_a_target_has_a_bound_alone(tmp_path):
    made = planner.estimate(PAPER, tmp_path, {"h100": 8, "a100": 4})
    assert made.speeds == (1.0,) * 8 + (312 / 798,) * 4
    said = text_of(planner.describe(made))
    assert "target" not in said.replace("target: share", "") and "(at best)" in said


def test_time_on_cores_is_expected_and_never_below_its_longest_shard(tmp_path):
    one, many = (planner.estimate(PAPER, tmp_path, {"cpu": n}) for n in (1, 4096))
    assert len(many.shards) == 12
    assert sum(one.shards) == pytest.approx(sum(many.shards))
    assert many.measured and many.target == 1.0 and many.precision == "fp32"
    assert f"without faults: {planner.duration(max(many.shards))}" in text_of(planner.describe(many))


def test_what_is_done_in_the_directory_is_not_planned_again(tmp_path):
    grid = fm.Grid(TINY, lr=[0.003, 0.01])
    fm.train(grid, tmp_path, engine="cpu", workers=1, quiet=True)
    larger = fm.Grid(TINY, lr=[0.003, 0.01, 0.02])
    made = planner.estimate(larger, tmp_path, {"cpu": 2})
    assert (made.models, made.model_steps, len(made.shards)) == (1, 40, 1)
    assert planner.estimate(larger, tmp_path, {"h100": 2}).models == 3  # another engine's models are not these
    assert planner.estimate(grid, tmp_path, {"cpu": 2}, resume=False).models == 2
    done = planner.estimate(grid, tmp_path, {"cpu": 2})
    assert "0 with steps left" in text_of(planner.describe(done))


def test_a_block_is_halved_until_a_device_holds_it_and_a_model_that_none_holds_is_refused(tmp_path):
    wide = PAPER[0].replace(n_neurons=2**17, steps=40)
    one, many = (planner.estimate(fm.Grid(wide, seed=range(n)), tmp_path, {"h100": 1}) for n in (1, 200))
    assert one.memory < planning.MEMORY_SHARE * 80e9 / 4  # several fit, but not all
    assert len(many.shards) == 1 and planning.MEMORY_SHARE * 80e9 / 2 - one.memory < many.memory < 80e9
    with pytest.raises(ValueError, match="one such model takes"):
        planner.estimate(fm.Grid(wide.replace(n_neurons=2**24)), tmp_path, {"h100": 1})


def test_a_precision_without_a_figure_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precision='bf16': cpu has figures for fp32"):
        planner.estimate(PAPER, tmp_path, {"cpu": 2}, "bf16")


def telemetry_of(path, plan, joules):
    row = {"device": "d", "worker": 0, "sessions": 1, "seconds": 2.0, "model_steps": 10, "joules": joules}
    rows = [{"model": i, "hash": name, **row} for i, name in enumerate(plan.hashes)]
    write_csv(path / "telemetry.csv", TELEMETRY, rows)


def test_energy_at_hand_is_that_counted_in_the_run_before_a_nominal_one(tmp_path):
    plan = fm.plan_run(fm.Grid(TINY, lr=[0.003, 0.01]), tmp_path, engine="reference")
    assert "nominal, 7.3 W a core" in text_of(planner.describe_here(plan, tmp_path))
    telemetry_of(tmp_path, plan, joules=50.0)
    each = 2 * 50 / (2 * 10 * TINY.flops_per_step)
    expected = f"energy: {planner.energy(plan.flops * each)}: at {each:.3g} J/FLOP, measured in this run"
    assert expected in text_of(planner.describe_here(plan, tmp_path))
    telemetry_of(tmp_path, plan, joules=None)
    assert "nominal" in text_of(planner.describe_here(plan, tmp_path))


def test_time_on_a_gpu_at_hand_comes_from_the_runs_own_telemetry_alone(tmp_path):
    plan = fm.plan_run(fm.Grid(TINY, lr=[0.003, 0.01]), tmp_path, engine="reference")
    plan = dataclasses.replace(plan, options=Options("triton", "bf16"), seconds=math.nan)  # as where there is a GPU
    assert "from its start" not in text_of(planner.describe_here(plan, tmp_path))
    assert "not known" in text_of(planner.describe_here(plan, tmp_path))
    telemetry_of(tmp_path, plan, joules=None)
    # 10 of a model's 40 steps took 2 s of a device.
    assert "from its start: 16 s: at" in text_of(planner.describe_here(plan, tmp_path))


def test_a_block_is_planned_by_the_largest_workspace_of_its_models():
    rare = TINY.replace(n_features=4096, batch_size=8192, feature_prob=2**-10)
    often = rare.replace(feature_prob=1.0)
    rest = block_bytes([rare, rare.replace(seed=1)], "cpu")
    assert block_bytes([rare, often.replace(seed=1)], "cpu") == block_bytes([often.replace(seed=1), rare], "cpu")
    assert block_bytes([rare, often.replace(seed=1)], "cpu") > rest + 2**20


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The main job's `main`, in an empty folder."""
    specification = importlib.util.spec_from_file_location("grid_script", ROOT / "scripts" / "grid.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    return script.main


def test_the_command_line_plans_for_a_described_cluster_and_writes_nothing(command, tmp_path, capsys):
    assert command(["--plan", "h100:64", "--preset", "published"]) == 0
    said = capsys.readouterr().out
    assert "64 x H100, bf16" in said and "not measured" in said and not list(tmp_path.iterdir())
    assert command(["--plan", "abacus:3"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "names: cpu, h100, a100" in said


def test_a_dry_run_says_what_energy_it_expects_and_whence(command, capsys):
    assert command(["--dry-run"]) == 0
    assert "nominal, 7.3 W a core (350 W" in capsys.readouterr().out


def test_the_kept_simulation_is_what_the_code_gives():
    with simulation.TABLE.open(newline="") as file:
        kept = {(row["scenario"], row["devices"]): row for row in csv.DictReader(file)}
    for scenario in ("equal shards, no faults", "and 1 failure/h (assumed)"):
        row = simulation.measure(scenario, 512, simulation.SCENARIOS[scenario], simulation.RUNS)
        assert {name: str(value) for name, value in row.items()} == kept[scenario, "512"]


def test_the_figure_of_the_simulation_shows_every_scenario(tmp_path):
    table = list(simulation.rows((8, 64), (0.1, 1.0), runs=1))
    assert len(table) == 2 * len(simulation.SCENARIOS) + 2 * len(simulation.SAVING)
    simulation.draw(tmp_path / "scale.png", table)
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
