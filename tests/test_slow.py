"""Claims that take minutes: `python -m pytest -m slow`."""

import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from published_loop import summary, train_published

import fastmono as fm
from fastmono.store import checkpoint_steps

pytestmark = pytest.mark.slow

KILLED = """
import sys, fastmono as fm
spec = fm.ModelSpec(n_features=20, d_embed=6, n_neurons=24, feature_prob=.2, batch_size=48, steps=int(sys.argv[3]))
grid = fm.Grid(spec, lr=[.003, .03], seed=[0, 1]) + fm.Grid(spec.replace(optimizer="sgd"), lr=[.01, 1e6])
fm.train(grid, sys.argv[1], workers=int(sys.argv[2]), save_every=0.05, quiet=True)
"""


def trajectory(run):
    """Everything that must not depend on interruptions."""
    found = {"losses": run.losses.nan_to_num(-1)}
    for i in range(len(run)):
        for step in {0, *checkpoint_steps(run.specs[i].steps)}:  # states lie at moments of the clock as well
            found |= {f"{i} {step} {name}": tensor for name, tensor in run.parameters(i, step).items()}
        saved = run.directory.newest_states([run._hashes[i]])[run._hashes[i]]
        model, losses, measures = run.directory.restore(run.specs[i], saved)
        found |= {f"{i} m": model.first_moment, f"{i} v": model.second_moment, f"{i} snapshot": model.snapshot}
        found |= {f"{i} losses": losses.nan_to_num(-1), f"{i} measures": measures.nan_to_num(-1)}
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_twenty_kills_at_random_moments_leave_every_bit_as_in_an_undisturbed_run(workers, tmp_path):
    steps = 300_000

    def start(out):
        return subprocess.Popen([sys.executable, "-c", KILLED, str(out), str(workers), str(steps)])

    assert start(tmp_path / "calm").wait(300) == 0
    moments = random.Random(workers)
    alive = 0
    for _ in range(20):
        process = start(tmp_path / "killed")
        time.sleep(moments.uniform(1.0, 3.5))  # starting takes one to two of these seconds
        alive += process.poll() is None
        process.kill()
        process.wait()
    assert alive >= 15, "the run ended before it could be killed"
    assert start(tmp_path / "killed").wait(300) == 0
    calm, killed = fm.load_run(tmp_path / "calm"), fm.load_run(tmp_path / "killed")
    assert (calm.path / "models.csv").read_bytes() == (killed.path / "models.csv").read_bytes()
    assert (calm.path / "history.safetensors").read_bytes() == (killed.path / "history.safetensors").read_bytes()
    expected, found = trajectory(calm), trajectory(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("task", "activation", "frequency", "lr", "bias"),
    [
        ("decoder", "relu", "uniform", 0.01, 0.0), ("decoder", "relu", "uniform", 0.02, -1.0),
        ("reprojector", "relu", "power_law", 0.02, 0.0), ("abs", "relu", "uniform", 0.02, 0.0),
        ("decoder", "gelu", "uniform", 0.01, 0.0), ("decoder", "solu", "power_law", 0.01, 0.0),
    ],
)  # fmt: skip
def test_losses_and_monosemantic_counts_agree_with_the_published_loop_over_seeds(
    task, activation, frequency, lr, bias, tmp_path
):
    spec = fm.ModelSpec(
        task=task, activation=activation, frequency=frequency, lr=lr, init_bias=bias, bias_decay=0.03 if bias else 0.0,
        n_features=64, d_embed=16, n_neurons=128, feature_prob=1 / 32, batch_size=128, steps=2048,
    )  # fmt: skip
    seeds = range(8)
    theirs = np.array([summary(s, *train_published(s)) for s in fm.Grid(spec, seed=seeds)])
    run = fm.train(fm.Grid(spec, seed=seeds), tmp_path, quiet=True, checkpoints="none")
    sixteenth = (run.logged_steps - 1) % 16 == 0
    ours = np.array(
        [summary(spec, run.losses[i][sixteenth].double(), run.parameters(i)) for i in range(len(run))]
    )  # [seed, quantity]
    # Two samples of eight seeds from one distribution differ by more than 4 standard errors once in a thousand times
    # (Student's t with 14 degrees of freedom); one monosemantic neuron is the step of that count.
    error = np.sqrt((theirs.var(0, ddof=1) + ours.var(0, ddof=1)) / len(seeds))
    allowed = 4.1 * error + np.array([0.0, 1 / spec.n_features, 0.0])
    difference = np.abs(ours.mean(0) - theirs.mean(0))
    assert (difference <= allowed).all(), (ours.mean(0), theirs.mean(0), allowed)
    # The comparison must have teeth where losses spread most over seeds (negative biases) as well.
    assert allowed[0] < 0.2 * theirs.mean(0)[0]


def test_the_demo_has_the_published_shape_of_monosemanticity_against_learning_rate(tmp_path):
    grid = fm.preset("demo").override(lr=[0.001, 0.03], init_bias=[0.0], bias_decay=[0.0])
    run = fm.train(grid, tmp_path, quiet=True)
    low, high = (row["mono_per_feature"] for row in run.table)
    assert low <= 0.05 and high >= 0.4
    assert all(math.isfinite(row["final_loss"]) and row["final_loss"] < 0.6 for row in run.table)
