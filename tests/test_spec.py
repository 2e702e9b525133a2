"""What may be trained: validation of `ModelSpec`, the order and arithmetic of `Grid`, JSON, hashes, presets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastmono as fm
from fastmono.frequencies import presence_probabilities, thresholds
from fastmono.spec import FIELDS, Grid, ModelSpec

NAN, INF = math.nan, math.inf
WHOLE = ("n_features", "d_embed", "n_neurons", "linear_path", "batch_size", "steps", "seed")
REAL = ("feature_prob", "lr", "init_bias", "bias_decay", "l1")
NAMED = {
    "task": ("decoder", "reprojector", "abs"),
    "activation": ("relu", "gelu", "solu"),
    "frequency": ("uniform", "power_law"),
    "optimizer": ("lamb", "adamw", "sgd"),
    "schedule": ("published", "cosine", "constant"),
    "bias_decay_mode": ("global", "per_neuron", "rate"),
}

NOT_NUMBERS = [None, [], [1], {}, "1", b"1", bytearray(b"1"), True, False, np.True_, NAN, INF, -INF, 1j, object]
BAD = [
    *((field, bad) for field in WHOLE for bad in [*NOT_NUMBERS, -1, -(10**30), 10**30, 1.5, 4.0]),
    *((field, 0) for field in WHOLE if field not in ("seed", "linear_path")),
    *((field, 2**31) for field in ("n_features", "d_embed", "n_neurons", "batch_size")),
    ("steps", 2**63),
    ("seed", 2**32),
    *((field, bad) for field in REAL for bad in [*NOT_NUMBERS, 1e39, -1e39, 10**400, np.float64(NAN)]),
    *((field, bad) for field in ("feature_prob", "lr", "bias_decay", "l1") for bad in [-1, -0.5, np.float32(-1)]),
    *((field, bad) for field in ("feature_prob", "lr") for bad in [0, 0.0, -0.0]),
    ("feature_prob", math.nextafter(1.0, 2.0)),
    ("feature_prob", 2.0**-33),  # T = floor(p 2**32) = 0: the feature would never come
    ("lr", 1e-46),  # 0 in float32
    *((field, bad) for field in NAMED for bad in ["", "Relu", "decoder ", None, 0, 1.0, NAN, ["lamb"], True, ("abs",)]),
]


@pytest.mark.parametrize(("field", "bad"), BAD, ids=lambda value: repr(value)[:24])
def test_bad_value_raises_with_field_value_and_what_is_allowed(field: str, bad: object) -> None:
    with pytest.raises(ValueError) as caught:
        ModelSpec(**{field: bad})
    message = str(caught.value)
    assert message.startswith(f"{field}=")
    assert repr(bad)[:70] in message  # a long value may be cut
    allowed = message.split(": ", 1)[1]
    assert "must be" in allowed
    if field in NAMED:
        assert all(name in allowed for name in NAMED[field])
    elif field in WHOLE:
        assert "whole number from" in allowed


@pytest.mark.parametrize("field", [*WHOLE, *REAL])
def test_number_with_too_many_digits_to_print_still_names_its_field(field: str) -> None:
    # Python refuses to print integers of more than 4,300 digits, with a ValueError of its own.
    with pytest.raises(ValueError, match=rf"^{field}=.*must be"):
        ModelSpec(**{field: 10**5000})


def test_d_embed_above_n_features_raises_and_equal_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"^d_embed=9: must be at most n_features, which is 8"):
        ModelSpec(n_features=8, d_embed=9)
    assert ModelSpec(n_features=8, d_embed=8).d_embed == 8


def test_power_law_that_clips_every_feature_raises() -> None:
    with pytest.raises(ValueError, match=r"^feature_prob=1\.0: clips every feature"):
        ModelSpec(n_features=1, d_embed=1, feature_prob=1.0, frequency="power_law")
    ModelSpec(n_features=1, d_embed=1, feature_prob=0.5, frequency="power_law")
    ModelSpec(n_features=1, d_embed=1, feature_prob=1.0, frequency="uniform")
    # abs draws at half the probability, so nothing is clipped
    ModelSpec(n_features=1, d_embed=1, feature_prob=1.0, frequency="power_law", task="abs")


@pytest.mark.parametrize("task", ["decoder", "abs"])
@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
def test_probability_is_refused_exactly_when_the_rarest_threshold_is_zero(task: str, frequency: str) -> None:
    n = 40
    weights = [(j + 1) ** -1.1 for j in range(n)]
    rarest_share = 1.0 if frequency == "uniform" else n * weights[-1] / math.fsum(weights)
    limit = 2.0**-32 / rarest_share * (2 if task == "abs" else 1)
    settings = {"n_features": n, "d_embed": 2, "task": task, "frequency": frequency}
    accepted = ModelSpec(feature_prob=limit * (1 + 1e-12), **settings)
    share = accepted.feature_prob / (2 if task == "abs" else 1)
    assert thresholds(presence_probabilities(n, share, frequency)).min() == 1
    with pytest.raises(ValueError, match=r"^feature_prob=.*rarest.*2\*\*-32"):
        ModelSpec(feature_prob=limit * (1 - 1e-12), **settings)


def test_limits_of_every_range_are_accepted() -> None:
    ModelSpec(n_features=2**31 - 1, d_embed=2**31 - 1, n_neurons=2**31 - 1, batch_size=2**31 - 1)
    ModelSpec(n_features=1, d_embed=1, n_neurons=1, batch_size=1, steps=1, seed=0, feature_prob=1.0)
    ModelSpec(steps=2**63 - 1, seed=2**32 - 1, feature_prob=2.0**-32)
    ModelSpec(lr=3.4028234663852886e38, init_bias=-3.4028234663852886e38, l1=0, bias_decay=0)
    ModelSpec(lr=2.0**-149)


def test_numpy_scalars_become_python_numbers_and_equal_the_plain_spec() -> None:
    spec = ModelSpec(
        task=np.str_("abs"),
        n_features=np.int64(16),
        d_embed=np.uint8(4),
        n_neurons=np.int32(8),
        linear_path=np.int16(2),
        feature_prob=np.float32(0.25),
        lr=np.float64(0.5),
        init_bias=np.int64(-1),
        l1=np.float16(2),
        batch_size=np.uint16(3),
        steps=np.int8(7),
        seed=np.uint32(2**32 - 1),
    )
    plain = ModelSpec(
        task="abs", n_features=16, d_embed=4, n_neurons=8, linear_path=2, feature_prob=0.25, lr=0.5, init_bias=-1.0,
        l1=2.0, batch_size=3, steps=7, seed=2**32 - 1,
    )  # fmt: skip
    assert spec == plain and hash(spec) == hash(plain) and spec.content_hash() == plain.content_hash()
    for field in FIELDS:
        expected = int if field in WHOLE else float if field in REAL else str
        assert type(getattr(spec, field)) is expected, field
    assert json.loads(json.dumps(spec.to_dict())) == plain.to_dict()


@pytest.mark.parametrize("field", ["init_bias", "bias_decay", "l1"])
def test_negative_zero_is_zero(field: str) -> None:
    minus, plus = ModelSpec(**{field: -0.0}), ModelSpec(**{field: 0.0})
    assert minus == plus
    assert math.copysign(1.0, getattr(minus, field)) == 1.0
    assert minus.content_hash() == plus.content_hash()


@pytest.mark.parametrize("field", REAL)
def test_whole_and_real_spelling_of_a_number_are_one_spec(field: str) -> None:
    whole, real = ModelSpec(**{field: 1}), ModelSpec(**{field: 1.0})
    assert whole == real and whole.content_hash() == real.content_hash()


def test_spec_is_frozen_keyword_only_and_has_the_published_defaults() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelSpec().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelSpec("decoder")  # type: ignore[misc]
    assert ModelSpec().to_dict() == {
        "task": "decoder", "n_features": 512, "d_embed": 64, "n_neurons": 1024, "linear_path": 0, "activation": "relu",
        "feature_prob": 1 / 64, "frequency": "uniform", "optimizer": "lamb", "lr": 0.003, "schedule": "published",
        "init_bias": 0.0, "bias_decay": 0.0, "bias_decay_mode": "global", "l1": 0.0, "batch_size": 8192,
        "steps": 131072, "seed": 0,
    }  # fmt: skip


def test_flops_and_output_width_follow_the_task() -> None:
    spec = ModelSpec(n_features=10, d_embed=3, n_neurons=5, batch_size=7)
    assert (spec.d_output, spec.replace(task="abs").d_output, spec.replace(task="reprojector").d_output) == (10, 10, 3)
    assert spec.flops_per_step == 6 * 7 * (3 * 5 + 5 * 10) - 2 * 7 * 3 * 5
    assert spec.n_parameters == 5 * 3 + 5 + 5 * 10
    assert ModelSpec().flops_per_step == pytest.approx(28e9, rel=0.02)  # design, section 1
    linear = spec.replace(linear_path=2)  # as many operations as two neurons more, and as many numbers but for b
    assert linear.flops_per_step == spec.replace(n_neurons=7).flops_per_step
    assert linear.n_parameters == spec.replace(n_neurons=7).n_parameters - 2


def test_replace_validates_again() -> None:
    with pytest.raises(ValueError, match=r"^d_embed=64"):
        ModelSpec().replace(n_features=32)


def test_from_dict_fills_in_defaults_and_refuses_unknown_fields() -> None:
    assert ModelSpec.from_dict({"lr": 0.5}) == ModelSpec(lr=0.5)
    with pytest.raises(ValueError, match=r"unknown field 'learning_rate'.*lr"):
        ModelSpec.from_dict({"learning_rate": 0.5})
    with pytest.raises(ValueError, match="object of fields, not list"):
        ModelSpec.from_dict([])  # type: ignore[arg-type]


def test_content_hash_changes_with_every_field_and_with_the_context() -> None:
    base = ModelSpec()
    changes = {
        "task": "abs", "n_features": 513, "d_embed": 63, "n_neurons": 1025, "activation": "gelu",
        "feature_prob": 1 / 63, "frequency": "power_law", "optimizer": "sgd", "lr": math.nextafter(3e-3, 1),
        "schedule": "cosine", "linear_path": 1, "bias_decay_mode": "rate",
        "init_bias": 1e-30, "bias_decay": 1e-30, "l1": 1e-30, "batch_size": 8193, "steps": 2**17 + 1, "seed": 1,
    }  # fmt: skip
    assert set(changes) == set(FIELDS)
    hashes = [base.content_hash(), *(base.replace(**{field: v}).content_hash() for field, v in changes.items())]
    hashes += [base.content_hash("cpu"), base.content_hash("cpu", "fp32"), base.content_hash("cpufp32")]
    assert len(set(hashes)) == len(hashes)
    assert all(len(name) == 32 and set(name) <= set("0123456789abcdef") for name in hashes)


def test_content_hash_is_pinned() -> None:
    # Runs on disk are found by this name: it may not change with the version of Python or of this library.
    spec = ModelSpec(lr=0.5, seed=3)
    written = (
        '[{"activation":"relu","batch_size":8192,"bias_decay":0.0,"d_embed":64,"feature_prob":0.015625,'
        '"frequency":"uniform","init_bias":0.0,"l1":0.0,"lr":0.5,"n_features":512,"n_neurons":1024,'
        '"optimizer":"lamb","schedule":"published","seed":3,"steps":131072,"task":"decoder"},"cpu","1"]'
    )
    assert spec.content_hash("cpu", 1) == hashlib.sha256(written.encode()).hexdigest()[:32]


def valid_specs() -> st.SearchStrategy[ModelSpec]:
    finite = {"allow_nan": False, "allow_infinity": False, "width": 32}
    fields = {
        **{field: st.sampled_from(names) for field, names in NAMED.items()},
        "n_features": st.integers(1, 3000),
        "d_embed": st.integers(1, 3000),
        "n_neurons": st.integers(1, 2**31 - 1),
        "linear_path": st.integers(0, 3000),
        "feature_prob": st.floats(2.0**-10, 0.99),
        "lr": st.floats(2.0**-149, **finite),
        "init_bias": st.floats(**finite),
        "bias_decay": st.floats(0.0, **finite),
        "l1": st.floats(0.0, **finite),
        "batch_size": st.integers(1, 2**31 - 1),
        "steps": st.integers(1, 2**63 - 1),
        "seed": st.integers(0, 2**32 - 1),
    }
    assert set(fields) == set(FIELDS)

    def build(values: dict[str, object]) -> ModelSpec:
        values["d_embed"] = min(values["d_embed"], values["n_features"])  # type: ignore[type-var]
        values["linear_path"] = min(values["linear_path"], values["d_embed"])  # type: ignore[type-var]
        if values["task"] == "reprojector" and values["bias_decay_mode"] == "per_neuron":
            values["bias_decay_mode"] = "global"
        return ModelSpec(**values)  # type: ignore[arg-type]

    return st.fixed_dictionaries(fields).map(build)


@given(st.lists(valid_specs(), min_size=1, max_size=5, unique=True))
def test_grid_of_any_valid_specs_survives_json(specs: list[ModelSpec]) -> None:
    grid = Grid.of(specs)
    again = Grid.from_json(grid.to_json())
    assert again == grid and hash(again) == hash(grid)
    assert [spec.to_dict() for spec in again] == [spec.to_dict() for spec in specs]
    assert [spec.content_hash() for spec in again] == [spec.content_hash() for spec in specs]
    assert len({spec.content_hash() for spec in specs}) == len(specs)
    assert json.loads(grid.to_json()) == [spec.to_dict() for spec in specs]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", "not dict"),
        ("nonsense", "JSON list"),
        ("[1]", "object of fields, not int"),
        ("[]", "at least one"),
        ('[{"lr": NaN}]', "^lr=nan"),
        ('[{"lr": "x"}]', "^lr='x'"),
        ('[{"rate": 1}]', "unknown field 'rate'"),
        ("[{}, {}]", "models 0 and 1 of the grid are the same"),
        ("[" * 100_000, "JSON list"),
    ],
)
def test_json_that_is_not_a_grid_is_a_value_error(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Grid.from_json(text)


def test_grid_expands_with_the_last_axis_fastest() -> None:
    base = ModelSpec(n_features=16, d_embed=4)
    grid = Grid(base, lr=[1e-3, 1e-2], init_bias=(0.0, -1.0, -2.0), seed=range(2))
    expected = [
        base.replace(lr=lr, init_bias=bias, seed=seed) for lr in (1e-3, 1e-2) for bias in (0, -1, -2) for seed in (0, 1)
    ]
    assert list(grid) == expected and len(grid) == 12 and grid[7] == expected[7] and grid.specs == tuple(expected)
    swapped = Grid(base, seed=range(2), init_bias=(0.0, -1.0, -2.0), lr=[1e-3, 1e-2])
    assert set(swapped) == set(grid) and swapped != grid


def test_grid_takes_iterators_arrays_and_axes_that_are_valid_only_together() -> None:
    base = ModelSpec()
    assert list(Grid(base, seed=iter([2, 1]))) == [base.replace(seed=2), base.replace(seed=1)]
    assert Grid(base, lr=np.array([0.25, 0.5])) == Grid(base, lr=[0.25, 0.5])
    assert list(Grid(base, n_features=[32], d_embed=[16])) == [base.replace(n_features=32, d_embed=16)]
    assert list(Grid()) == [ModelSpec()] and list(Grid(base.replace(seed=3))) == [base.replace(seed=3)]


def test_any_field_can_be_an_axis() -> None:
    base = ModelSpec()
    for field, names in NAMED.items():
        assert [getattr(spec, field) for spec in Grid(base, **{field: names})] == list(names)
    for field in WHOLE:
        assert [getattr(spec, field) for spec in Grid(base, **{field: [64, 65]}, **_room(field))] == [64, 65]
    for field in REAL:
        assert [getattr(spec, field) for spec in Grid(base, **{field: [0.25, 0.5]})] == [0.25, 0.5]


def _room(field: str) -> dict[str, list[int]]:
    return {"n_features": {"d_embed": [1]}, "linear_path": {"d_embed": [65]}}.get(field, {})


def test_grid_equality_is_by_models_in_order() -> None:
    base = ModelSpec()
    assert Grid(base, seed=[0, 1]) == Grid.of([base, base.replace(seed=1)])
    assert hash(Grid(base, seed=[0, 1])) == hash(Grid.of([base, base.replace(seed=1)]))
    assert Grid(base, seed=[0, 1]) != Grid(base, seed=[1, 0])
    assert Grid(base, seed=[0]) != [base]


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        ({"lr": []}, r"^lr: an axis needs at least one value"),
        ({"seed": range(0)}, r"^seed: an axis needs at least one value"),
        ({"lr": [0.1, 0.2, 0.1]}, r"^lr=0\.1: stands twice"),
        ({"init_bias": [0.0, -0.0]}, r"^init_bias=-0\.0: stands twice"),
        ({"seed": [1, np.int64(1)]}, r"^seed=.*1.*: stands twice"),
        ({"rate": [1]}, r"^unknown field 'rate': must be one of task, .*lr"),
        ({"task": "decoder"}, r"^task='decoder': an axis is a sequence"),
        ({"lr": 0.1}, r"^lr=0\.1: an axis is a sequence"),
        ({"seed": None}, r"^seed=None: an axis is a sequence"),
        ({"seed": b"12"}, r"^seed=b'12': an axis is a sequence"),
        ({"lr": [0.1, math.nan]}, r"^lr=nan: must be"),
        ({"lr": [[0.1], [0.2]]}, r"^lr=\[0\.1\]: must be"),
        ({"n_features": [32]}, r"^d_embed=64: must be at most n_features"),
    ],
    ids=str,
)
def test_bad_axis_is_a_value_error_that_names_it(axes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Grid(ModelSpec(), **axes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=complaint):
        Grid(ModelSpec()).override(**axes)  # type: ignore[arg-type]


def test_grid_refuses_what_is_not_a_spec() -> None:
    with pytest.raises(ValueError, match="ModelSpec, not dict"):
        Grid({"lr": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ModelSpecs, not str"):
        Grid.of(["decoder"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one"):
        Grid.of([])
    with pytest.raises(ValueError, match="models 0 and 2 of the grid are the same"):
        Grid.of([ModelSpec(), ModelSpec(seed=1), ModelSpec()])
    with pytest.raises(TypeError):
        Grid() + [ModelSpec()]  # type: ignore[operator]  # noqa: RUF005


def test_union_keeps_order_and_drops_repeats() -> None:
    base = ModelSpec()
    left, right = Grid(base, seed=[3, 1]), Grid(base, seed=[0, 1, 2, 3])
    assert [spec.seed for spec in left + right] == [3, 1, 0, 2]
    assert [spec.seed for spec in right + left] == [0, 1, 2, 3]
    assert left + left == left


def test_override_replaces_in_every_model_and_drops_repeats() -> None:
    demo = fm.preset("demo")
    narrowed = demo.override(lr=[1e-3])
    assert [(s.lr, s.init_bias, s.bias_decay) for s in narrowed] == [(1e-3, 0.0, 0.0), (1e-3, -1.0, 0.03)]
    widened = demo.override(seed=[5, 6], n_neurons=[32])
    assert list(widened) == [spec.replace(seed=seed, n_neurons=32) for spec in demo for seed in (5, 6)]
    assert demo.override() == demo


def test_axes_lists_the_fields_that_differ() -> None:
    grid = Grid(ModelSpec(), lr=[0.5, 0.25], seed=[1])
    assert grid.axes == {"lr": (0.5, 0.25)}
    assert fm.preset("demo").axes == {
        "lr": (0.001, 0.003, 0.005, 0.007, 0.01, 0.03),
        "init_bias": (0.0, -1.0),
        "bias_decay": (0.0, 0.03),
    }
