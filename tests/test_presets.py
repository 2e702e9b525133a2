"""The published grids and every sweep of the paper, against the facts on record (recipe facts 1, 3, 7, 10, 12)."""

from __future__ import annotations

import itertools
import math

import pytest

import fastmono as fm
from fastmono.presets import PRESETS, SCALES, SWEEPS
from fastmono.spec import ACTIVATIONS, TASKS

RATES = (0.001, 0.003, 0.005, 0.007, 0.01, 0.03)
SIZES = {
    "demo": {"n_features": 128, "d_embed": 32, "n_neurons": 256, "feature_prob": 1 / 32, "batch_size": 512},
    "published": {"n_features": 512, "d_embed": 64, "n_neurons": 1024, "feature_prob": 1 / 64, "batch_size": 8192},
}


@pytest.mark.parametrize(("name", "steps"), [("demo", 8192), ("published", 131072)])
def test_preset_is_exactly_the_recipe(name: str, steps: int) -> None:
    recipe = {
        "task": "decoder", "activation": "relu", "frequency": "uniform", "optimizer": "lamb", "schedule": "published",
        "linear_path": 0, "bias_decay_mode": "global", "l1": 0.0, "seed": 0, "steps": steps, **SIZES[name],
    }  # fmt: skip
    expected = [
        {**recipe, "lr": lr, "init_bias": bias, "bias_decay": decay}
        for (bias, decay), lr in itertools.product(((0.0, 0.0), (-1.0, 0.03)), (0.001, 0.003, 0.005, 0.007, 0.01, 0.03))
    ]
    assert [spec.to_dict() for spec in fm.preset(name)] == expected


def test_unknown_preset_is_a_value_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match=r"preset='nope'.*demo.*published.*width.*full"):
        fm.preset("nope")


def values(name, field):
    return sorted({getattr(spec, field) for spec in fm.preset(name)})


PAPER_SIZE = {
    "n_features": 512, "d_embed": 64, "optimizer": "lamb", "schedule": "published", "steps": 131072,
}  # fmt: skip


@pytest.mark.parametrize("sweep", SWEEPS)
def test_full_scale_has_the_sizes_of_the_paper_and_three_seeds(sweep):
    grid = SWEEPS[sweep].grid("full")
    assert grid == fm.preset(f"{sweep}-full")
    for spec in grid:
        assert PAPER_SIZE.items() <= spec.to_dict().items()
        # 2**23 numbers of hidden activations whatever the width: log2 B = 23 - ceil(log2 k)
        assert math.log2(spec.batch_size) == 23 - math.ceil(math.log2(spec.n_neurons))
        assert (spec.init_bias, spec.bias_decay) in ((0, 0), (-1, 0.03)) or sweep in ("init-bias", "bias-decay")
        assert spec.n_neurons == 1024 or sweep == "width"
        assert spec.feature_prob == 1 / 64 or sweep == "feature-prob"
    assert values(f"{sweep}-full", "seed") == [0, 1, 2]


@pytest.mark.parametrize("bias", [0.0, -1.0])
@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
def test_learning_rates_are_swept_at_either_bias_and_frequency(bias, frequency):
    name = ("lr-zero-bias" if bias == 0 else "lr-negative-bias") + ("" if frequency == "uniform" else "-power-law")
    for scale in ("full", "small"):
        assert values(f"{name}-{scale}", "lr") == list(RATES)
        assert values(f"{name}-{scale}", "init_bias") == [bias] and len(fm.preset(f"{name}-{scale}")) == 18
        assert values(f"{name}-{scale}", "frequency") == [frequency]
        assert (values(f"{name}-{scale}", "bias_decay") == [0.0]) == (bias == 0)


def test_widths_run_from_16_to_2048_and_tasks_and_nonlinearities_are_all_there():
    assert values("width-full", "n_neurons") == [2**e for e in range(4, 12)]
    for scale in SCALES:
        assert values(f"activation-{scale}", "activation") == sorted(ACTIVATIONS)
        assert values(f"task-{scale}", "task") == sorted(TASKS)


@pytest.mark.parametrize("scale", SCALES)
def test_the_linear_path_goes_from_none_to_all_of_the_embedding_and_every_mode_of_decay_is_there(scale):
    m = SCALES[scale].base.d_embed
    assert values(f"linear-path-{scale}", "linear_path") == [0, m // 4, m // 2, m]
    assert values(f"bias-decay-mode-{scale}", "bias_decay_mode") == ["global", "per_neuron", "rate"]
    assert values(f"bias-decay-mode-{scale}", "init_bias") == [-1.0]


@pytest.mark.parametrize("scale", SCALES)
def test_every_sweep_varies_its_field_and_holds_a_standard_model_of_every_seed(scale):
    standard = {spec.replace(seed=seed) for spec in SCALES[scale].starts() for seed in SCALES[scale].seeds}
    for sweep in SWEEPS.values():
        grid = sweep.grid(scale)
        assert len({getattr(spec, sweep.field) for spec in grid}) > 1
        assert "power-law" in sweep.name or standard & set(grid), "models are shared between sweeps"
        assert all(sum(spec.replace(seed=0) == other.replace(seed=0) for other in grid) == len(SCALES[scale].seeds)
                   for spec in grid)  # fmt: skip


def test_small_scale_keeps_what_it_says_it_keeps():
    (zero, negative), (small, small_negative) = (SCALES[scale].starts() for scale in ("full", "small"))
    for spec in (zero, small):
        assert spec.n_neurons == 2 * spec.n_features
        assert spec.n_features * spec.feature_prob / spec.d_embed == 1 / 8
    assert small_negative.bias_decay * small.steps == pytest.approx(negative.bias_decay * zero.steps)
    small_decays, decays = (SCALES[scale].bias_decays for scale in ("small", "full"))
    assert small_decays == pytest.approx([8 * decay for decay in decays])


def test_presets_are_made_only_when_asked_for_and_an_unknown_scale_is_refused():
    assert all(callable(make) for _, make in PRESETS.values()) and len(PRESETS) == 2 + 3 * len(SWEEPS)
    with pytest.raises(ValueError, match=r"scale='huge'.*full, small, quick"):
        SWEEPS["width"].grid("huge")
