"""The main job, `python scripts/grid.py`, called as `main(argv)`."""

import importlib.util
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import fastmono as fm
from fastmono.engines.cpu import CpuEngine
from fastmono.spec import ACTIVATIONS, BIAS_DECAY_MODES, FREQUENCIES, OPTIMIZERS, SCHEDULES, TASKS

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("grid_script", ROOT / "scripts" / "grid.py")
grid_script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(grid_script)
main = grid_script.main

TINY = [
    "--n-features",
    "8",
    "--d-embed",
    "3",
    "--n-neurons",
    "6",
    "--batch-size",
    "8",
    "--feature-prob",
    "1/4",
    "--steps",
    "20",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_flags_make_the_product_and_every_model_is_trained(capsys):
    assert main([*TINY, "--lr", "1e-3", "3e-3", "--seed", "0", "1", "--out", "run", "--no-plots"]) == 0
    run = fm.load_run("run")
    found = [(s.lr, s.init_bias, s.bias_decay, s.seed) for s in run.specs]
    # the demo's two halves, and within each the product in the order of the fields
    assert sorted(found) == sorted(
        (lr, bias, decay, seed) for lr in (1e-3, 3e-3) for bias, decay in ((0, 0), (-1, 0.03)) for seed in (0, 1)
    )
    assert {row["status"] for row in run.table} == {"done"}
    said = capsys.readouterr().out
    assert "8, of which 0 are finished" in said and 'fm.load_run("run")' in said
    assert "final_loss" in said and "mono/N" in said and "GFLOP/s" in (Path("run/events.jsonl")).read_text()


def test_without_flags_of_models_the_preset_itself_is_planned_on_a_cpu(capsys):
    assert main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "98,304 model-steps" in said and str(Path("runs/demo")) in said
    assert not Path("runs").exists()


def test_a_preset_is_planned_by_name(capsys):
    assert main(["--preset", "published", "--dry-run"]) == 0
    assert f"{12 * 2**17:,} model-steps" in capsys.readouterr().out


def test_directories_of_commands_from_before_there_were_all_fields_keep_their_names():
    arguments = grid_script.make_parser().parse_args(["--preset", "demo", "--lr", "1e-3", "--seed", "0", "1"])
    assert grid_script.chosen_grid(arguments)[1] == "demo-f8b4f792"


def test_the_plan_shows_how_many_models_stop_where_and_what_that_spares(capsys):
    assert main(["--keep", "1/2", "--every", "1024", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    spec = fm.preset("demo")[0]
    stops = {1024: 6, 2048: 3, 3072: 1, 4096: 1}  # of twelve rivals
    spared = sum(n * (spec.steps - step) for step, n in stops.items())
    assert f"work {12 * spec.steps - spared:,} model-steps" in said
    assert "stopping 6 at step 1,024, 3 at step 2,048, 1 at step 3,072, 1 at step 4,096; " in said
    assert f"{spared * spec.flops_per_step / 1e12:,.2f} TFLOP less" in said


def test_the_same_command_continues_and_trains_nothing_twice(capsys):
    command = [*TINY, "--out", "run", "--no-plots"]
    assert main(command) == 0
    before = Path("run/models.csv").read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert "12, of which 12 are finished" in capsys.readouterr().out
    assert Path("run/models.csv").read_bytes() == before


def test_figures_are_drawn(capsys):
    assert main([*TINY, "--lr", "0.01", "0.03", "--out", "run"]) == 0
    figures = list(Path("run/figures").glob("*.png"))
    assert len(figures) >= 4 and f"{len(figures)} figures in" in capsys.readouterr().out


def test_a_diverged_model_is_a_result(capsys):
    flags = ["--optimizer", "sgd", "--lr", "1e-3", "1e6", "--init-bias", "0", "--bias-decay", "0"]
    assert main([*TINY, *flags, "--out", "run", "--no-plots"]) == 0
    said = capsys.readouterr().out
    assert "diverged at step" in said and [row["status"] for row in fm.load_run("run").table] == ["done", "diverged"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "0"], "lr=0.0"), (["--lr", "fast"], "--lr: 'fast': must be a finite float32 above 0"),
        (["--lr", "1/0"], "--lr"), (["--lr"], "--lr"),
        (["--lr", "1e-3", "1e-3"], "twice"), (["--rate", "1"], "--rate"), (["--preset", "none"], "preset='none'"),
        (["--n-neurons", "8.5"], "--n-neurons: '8.5': must be a whole number from 1 to"),
        (["--d-embed", "999"], "d_embed=999"), (["--task", "x"], "task='x'"),
        (["--linear-path", "33"], "linear_path=33: must be at most d_embed"),
        (["--bias-decay-mode", "local"], "bias_decay_mode='local': must be one of global, per_neuron, rate"),
        (["--seed", "-1"], "seed=-1"), (["--workers", "many"], "workers='many'"), (["--workers", "0"], "workers=0"),
        (["--engine", "quantum"], "engine='quantum'"), (["--precision", "fp8"], "precision='fp8'"),
        (["--out", ""], "out=''"), (["--out", "/dev/null"], "out='/dev/null': is a file"),
        (["--save-every", "nan"], "save_every=nan"), (["stray"], "stray"),
        (["--n-neurons", "2000000000"], "GiB"), (["--checkpoints", "odd"], "checkpoints='odd'"),
        (["--part", "3/3"], "part=3/3: must be I/N"), (["--part", "x"], "--part: 'x': must be I/N"),
        (["--part", "0/2", "--no-resume"], "discard what others have trained"),
        (["--status", "nowhere"], "nowhere/grid.json: there is no such file"),
        (["--keep", "0.5"], "keep=0.5: needs every"), (["--every", "64"], "need keep"), (["--by", "mono"], "need keep"),
        (["--keep", "2", "--every", "64"], "keep=2.0: must be a number between 0 and 1"),
        (["--keep", "half", "--every", "64"], "--keep: 'half': must be a number between 0 and 1"),
        (["--keep", "nan", "--every", "64"], "keep=nan: must be"),
        (["--keep", "0", "--every", "64"], "keep=0.0: must be"),
        (["--keep", "0.5", "--every", "15"], "every=15: must be a whole number of steps from 16"),
        (["--keep", "0.5", "--every", "1.5"], "--every: '1.5': must be a whole number of steps"),
        (["--keep", "0.5", "--every", "8192"], "would stop nothing"),
        (["--keep", "0.5", "--every", "64", "--by", "luck"], "by='luck': must be one of loss, mono"),
        (["--keep", "0.5", "--every", "64", "--part", "0/2"], "a part sees only its own"),
    ],
)  # fmt: skip
def test_bad_arguments_end_in_exit_code_2_and_one_line(flags, said, capsys):
    assert main(flags) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and said in errors and errors.count("\n") == 1
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_table_in_a_terminal_of_any_width_cuts_no_value(width, capsys):
    flags = ["--optimizer", "sgd", "--lr", "1e-3", "1e6", "--seed", "0", "4000000000"]
    main([*TINY, *flags, "--out", "run", "--no-plots"])
    run, text = fm.load_run("run"), io.StringIO()
    grid_script.print_table(
        Console(file=text, force_terminal=True, width=width, color_system=None, soft_wrap=True), run
    )
    head, *lines = text.getvalue().splitlines()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text.getvalue()
    assert width < 80 or max(map(len, (head, *lines[:8]))) <= width
    for line, row in zip(lines, run.table, strict=False):
        shown = dict(zip(head.split(), line.split(), strict=True))
        assert {name: shown[name] for name in ("lr", "init_bias", "bias_decay", "seed", "status", "final_loss")} == {
            name: grid_script.cell(row[name])
            for name in ("lr", "init_bias", "bias_decay", "seed", "status", "final_loss")
        }
        assert shown["mono/N"] == grid_script.cell(row["mono_per_feature"])
    named = {"mono/k": "mono_per_neuron", "dead": "dead_neurons", "mean_bias": "mean_bias", "eval_loss": "eval_loss"}
    left_out = [name for head_name, name in named.items() if head_name not in head.split()]
    note = next((line for line in text.getvalue().splitlines() if "not shown" in line), "")
    assert bool(note) == bool(left_out) and all(name in note for name in left_out)


def test_a_failed_model_is_told_on_standard_error_and_ends_in_exit_code_1(capsys, monkeypatch):
    def fails(self, block, n_steps):
        raise MemoryError("nothing left")

    monkeypatch.setattr(CpuEngine, "advance", fails)
    assert main([*TINY, "--lr", "0.01", "--init-bias", "0", "--bias-decay", "0", "--out", "run", "--no-plots"]) == 1
    said = capsys.readouterr()
    assert said.err == "error: model 0 failed: MemoryError: nothing left\n"
    assert "1 model failed: MemoryError" in said.out  # when it happened


def test_the_line_that_loads_the_run_is_python_whatever_the_directory_is_called(capsys):
    assert main([*TINY, "--lr", "0.01", "--out", 'of "mine" [bold]', "--no-plots"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("load it with: "))
    names = {}
    exec(line.removeprefix("load it with: "), names)
    assert len(names["run"]) == 2


def test_a_directory_that_cannot_be_made_ends_in_exit_code_1_and_one_line(capsys):
    Path("file").write_text("x")
    assert main([*TINY, "--out", "file/run"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_state_is_warned_of_once_and_repaired(capsys):
    command = [*TINY, "--out", "run", "--no-plots"]
    main(command)
    newest = max(Path("run/checkpoints").glob("state-*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("truncated or corrupted") == 1


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all("--" + field.replace("_", "-") in said for field in fm.ModelSpec().to_dict())


numbers = st.one_of(
    st.integers(-3, 40).map(str), st.floats().map(str), st.sampled_from(["1e-3", "1/8", "0", "-1", "nan", "inf", ""])
)
small = st.integers(1, 12).map(str)
FLAGS = {
    "--task": st.sampled_from([*TASKS, "x"]),
    "--n-features": st.one_of(small, numbers),
    "--d-embed": st.one_of(small, numbers),
    "--n-neurons": st.one_of(small, numbers),
    "--activation": st.sampled_from([*ACTIVATIONS, ""]),
    "--feature-prob": st.one_of(st.sampled_from(["0.3", "1", "1/5"]), numbers),
    "--frequency": st.sampled_from(FREQUENCIES),
    "--optimizer": st.sampled_from(OPTIMIZERS),
    "--lr": numbers,
    "--schedule": st.sampled_from(SCHEDULES),
    "--init-bias": numbers,
    "--bias-decay": numbers,
    "--bias-decay-mode": st.sampled_from(BIAS_DECAY_MODES),
    "--linear-path": numbers,
    "--l1": numbers,
    "--batch-size": st.one_of(small, numbers),
    "--steps": st.one_of(small, numbers),
    "--seed": numbers,
    "--precision": st.sampled_from(["auto", "fp32", "bf16", "tf32"]),
    "--engine": st.sampled_from(["auto", "cpu", "reference"]),
    "--checkpoints": st.sampled_from(["all", "last", "none"]),
}
flag = st.sampled_from(sorted(FLAGS)).flatmap(
    lambda name: st.lists(FLAGS[name], min_size=1, max_size=1 if name in ("--precision", "--engine") else 2).map(
        lambda values: [name, *values]
    )
)
BOUND = ["--n-features", "6", "--d-embed", "3", "--n-neurons", "5", "--batch-size", "7", "--steps", "9"]


def check(flags, capsys):
    """Train or refuse: exit code 0 with a whole table, or 2 with one line; nothing else."""
    given_flags = {name for name, *_ in flags}
    bounds = zip(BOUND[::2], BOUND[1::2], strict=True)
    argv = [word for words in flags for word in words]
    argv += [word for name, value in bounds if name not in given_flags for word in (name, value)]
    code = main([*argv, "--no-plots", "--no-resume", "--workers", "1", "--out", "run"])
    errors = capsys.readouterr().err
    assert code in (0, 2), (argv, errors)
    assert code == 0 or (errors.startswith("error: ") and errors.count("\n") == 1), (argv, errors)
    if code == 0:
        assert {row["status"] for row in fm.load_run("run").table} <= {"done", "diverged"}


suppress = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=100, deadline=None, suppress_health_check=suppress, derandomize=True)
@given(flags=st.lists(flag, max_size=5))
@example(flags=[["--frequency", "power_law"], ["--n-features", "1"], ["--d-embed", "1"], ["--feature-prob", "1"]])
@example(flags=[["--lr", "1e38"], ["--optimizer", "adamw"]])
@example(flags=[["--init-bias", "3e38"], ["--activation", "solu", "gelu"]])
@example(flags=[["--l1", "3e38"], ["--bias-decay", "3e38"]])
@example(flags=[["--linear-path", "0", "2"], ["--bias-decay", "1"], ["--bias-decay-mode", *BIAS_DECAY_MODES]])
def test_random_argument_lists_train_or_are_refused_in_one_line(flags, capsys):
    check(flags, capsys)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=suppress)
@given(flags=st.lists(flag, max_size=5))
def test_a_thousand_random_argument_lists_train_or_are_refused_in_one_line(flags, capsys):
    check(flags, capsys)


def test_ctrl_c_while_the_script_is_loading_ends_in_one_line():
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "grid.py"), *TINY]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:  # a line for each module that is loaded
            if "rich.table" in line:
                break
        time.sleep(0.05)  # within the second that PyTorch takes
        process.send_signal(signal.SIGINT)
        said = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
        assert process.wait(20) == 1 and said == ["stopped before it began"]


def test_the_script_runs_from_the_command_line_too(tmp_path):

    command = [sys.executable, str(ROOT / "scripts" / "grid.py"), "--lr", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
