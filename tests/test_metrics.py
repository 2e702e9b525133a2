"""The measures against plain loops, a model made by hand, and a dense float64 computation over the held-out samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmono as fm
from fastmono.block import initial_values, projection
from fastmono.metrics import (
    EVALUATION_SAMPLES,
    NAMES,
    HeldOut,
    counts,
    features_by_neurons,
    measure,
    monosemantic_neurons,
    monosemanticity,
    single_feature_activations,
)
from fastmono.philox import FeatureSampler, Purpose
from fastmono.spec import ModelSpec

TASKS = ("decoder", "reprojector", "abs")


def phi(z: float, activation: str) -> float:
    if activation == "relu":
        return max(z, 0.0)
    return z * math.exp(z) if activation == "solu" else z * 0.5 * (1 + math.erf(z / math.sqrt(2)))


def spec_of(**fields: object) -> ModelSpec:
    shape = {"n_features": 13, "d_embed": 5, "n_neurons": 9, "feature_prob": 0.2, "seed": 3}
    return ModelSpec(**{**shape, **fields})  # type: ignore[arg-type]


def params_of(spec: ModelSpec) -> dict[str, Tensor]:
    """Initial values and projections, as `run.parameters(i)` gives them."""
    start = initial_values(spec)
    params = {"W_in": start["W_in"], "b": start["b"], "W_out": start["W_outT"].T.contiguous()}
    params["P"] = projection(spec.seed, Purpose.PROJECTION, spec.n_features, spec.d_embed)
    if spec.task == "reprojector":
        params["P2"] = projection(spec.seed, Purpose.SECOND_PROJECTION, spec.n_features, spec.d_embed)
    return params


# Single-feature activations and monosemanticity.


@pytest.mark.parametrize("amplitude", [1.0, -1.0, 0.25])
@pytest.mark.parametrize("activation", ["relu", "gelu", "solu"])
def test_single_feature_activations_equal_a_plain_loop(activation: str, amplitude: float) -> None:
    params = params_of(spec_of(init_bias=-0.2))
    found = single_feature_activations(params, activation, amplitude)
    assert found.shape == (9, 13) and found.dtype == torch.float32
    W_in, b, P = (params[name].double().tolist() for name in ("W_in", "b", "P"))
    for j in range(9):
        for i in range(13):
            z = b[j] + sum(W_in[j][d] * amplitude * P[d][i] for d in range(5))
            # five products and a bias, of size below 1, in float32
            assert float(found[j, i]) == pytest.approx(phi(z, activation), abs=8 * 2.0**-24, rel=8 * 2.0**-24)


def test_single_feature_activations_default_to_relu_at_amplitude_one() -> None:
    params = params_of(spec_of())
    assert torch.equal(single_feature_activations(params), single_feature_activations(params, "relu", 1.0))
    assert fm.metrics.single_feature_activations is single_feature_activations


def test_monosemanticity_is_the_largest_over_the_sum() -> None:
    S = torch.rand(20, 7, generator=torch.Generator().manual_seed(0)).relu() ** 4
    S[3] = 0
    S[4] = torch.tensor([0, 0, 5.0, 0, 0, 0, 0])
    found = monosemanticity(S)
    for j, row in enumerate(S.double().tolist()):
        assert float(found[j]) == pytest.approx(max(row) / (1e-10 + sum(row)), rel=8 * 2.0**-24)  # a sum of 7
    assert found[3] == 0.0 and found[4] == 1.0


def test_monosemanticity_keeps_the_published_1e_10_in_the_denominator() -> None:
    # A neuron whose one activation is 1e-10 is worth a half: nearly dead neurons are not monosemantic.
    assert float(monosemanticity(torch.tensor([[1e-10, 0.0]]))[0]) == pytest.approx(0.5, rel=1e-6)
    assert not monosemantic_neurons(torch.tensor([[5e-8, 0.0]])).item()  # 0.998
    assert monosemantic_neurons(torch.tensor([[2e-7, 0.0]])).item()  # 0.9995


def test_neuron_is_monosemantic_above_the_threshold_and_not_at_it() -> None:
    S = torch.tensor([[9991.0, 9.0], [9989.0, 11.0], [3.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert monosemantic_neurons(S).tolist() == [True, False, False, False, False]  # 0.999
    assert monosemantic_neurons(S, 0.75).tolist() == [True, True, False, False, False]  # 3/4 is exact, and not above
    assert monosemantic_neurons(S, 0.4).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(2, 3, 4)], ids=lambda t: str(t.shape))
def test_monosemanticity_of_no_table_is_a_value_error(bad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[k, N\]"):
        monosemanticity(bad)


def test_bad_arguments_of_the_probes_are_value_errors() -> None:
    params = params_of(spec_of())
    with pytest.raises(ValueError, match=r"activation='tanh': must be one of relu, gelu, solu"):
        single_feature_activations(params, "tanh")
    for name, wrong in [
        ("W_in", torch.zeros(9, 4)),
        ("b", torch.zeros(8)),
        ("b", torch.zeros(9, 1)),
        ("P", torch.zeros(5)),
    ]:
        with pytest.raises(ValueError, match=r"must be \[k, m\], \[k\], \[m, N\]"):
            single_feature_activations({**params, name: wrong})


# A model made by hand: five features in five dimensions, P the identity, so that S is W_in plus the bias.

HAND_MADE = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0],  # feature 0 alone
        [2.0, -3.0, 0.0, -1.0, 0.0],  # feature 0 alone, as relu cuts what is negative
        [0.0, 0.7, 0.0, 0.0, 0.0],  # feature 1 alone
        [1.0, 0.0, 1.0, 0.0, 0.0],  # features 0 and 2
        [-1.0, -1.0, -1.0, -1.0, -1.0],  # none
        [0.0, 0.0, 0.0, 4.0, 0.0],  # feature 3 alone, by three neurons
        [0.0, 0.0, 0.0, 5.0, 0.0],
        [0.0, 0.0, 0.0, 6.0, 0.0],
    ]
)


def hand_made(task: str = "decoder", activation: str = "relu") -> tuple[dict[str, Tensor], ModelSpec]:
    spec = spec_of(n_features=5, n_neurons=8, task=task, activation=activation, feature_prob=1.0)
    params = {"W_in": HAND_MADE, "b": torch.zeros(8), "W_out": torch.zeros(5, 8), "P": torch.eye(5)}
    return params, spec


def test_counts_of_a_model_made_by_hand() -> None:
    params, spec = hand_made()
    sfa = single_feature_activations(params)
    assert monosemantic_neurons(sfa).tolist() == [True, True, True, False, False, True, True, True]
    per_feature = features_by_neurons(sfa)
    assert per_feature.tolist() == [2, 1, 0, 3, 0] and per_feature.dtype == torch.int64
    assert counts(params, spec) == {
        "mono_neurons": 6.0,
        "mono_per_feature": 6 / 5,
        "mono_per_neuron": 6 / 8,
        "features_0": 2.0,
        "features_1": 1.0,
        "features_2": 1.0,
        "features_more": 1.0,
        "mean_bias": 0.0,
    }


def test_counts_take_their_threshold() -> None:
    params, spec = hand_made()
    assert counts(params, spec, threshold=0.4)["mono_neurons"] == 7.0  # features 0 and 2: a half each
    assert features_by_neurons(single_feature_activations(params), 0.4).sum() == 7


def test_mean_bias_is_the_mean_of_b() -> None:
    params, spec = hand_made()
    b = torch.linspace(-2, 1, 8)
    assert counts({**params, "b": b}, spec)["mean_bias"] == pytest.approx(float(b.double().mean()), rel=1e-12)


def test_abs_also_counts_on_the_negative_probes() -> None:
    params, spec = hand_made("abs")
    found = counts(params, spec)
    # Neuron 1 fires for -e_1 and -e_3, too; neuron 4, silent on the positive probes, for all five negative ones.
    assert found["mono_neurons"] == 6.0 and found["mono_neurons_signed"] == 5.0
    alone = {**params, "W_in": torch.diag(torch.tensor([-1.0, 2.0, 3.0, 0.0, 1.0])), "b": torch.zeros(5)}
    found = counts(alone, spec.replace(n_neurons=5))
    # Neuron 0 answers to -e_0 alone: one of the signed probes.
    assert found["mono_neurons"] == 3.0 and found["mono_neurons_signed"] == 4.0
    assert "mono_neurons_abs" not in found


@pytest.mark.parametrize("activation", ["gelu", "solu"])
def test_gelu_and_solu_also_count_on_absolute_values(activation: str) -> None:
    # Two probes of opposite activations nearly cancel in the sum: max / sum says monosemantic, max|S| / sum|S| not.
    params, spec = hand_made(activation=activation)
    found = counts(params, spec)
    table = [[phi(z, activation) for z in row] for row in HAND_MADE.tolist()]
    plain = sum(max(row) / (1e-10 + sum(row)) > 0.999 for row in table)
    absolute = sum(max(map(abs, row)) / (1e-10 + sum(map(abs, row))) > 0.999 for row in table)
    assert found["mono_neurons"] == plain and found["mono_neurons_abs"] == absolute
    assert plain > absolute > 0  # neuron 1 differs
    assert "mono_neurons_signed" not in found


def test_abs_with_gelu_has_both_variants() -> None:
    found = counts(*hand_made("abs", "gelu"))
    table = [[phi(z, "gelu") for z in (*row, *(-z for z in row))] for row in HAND_MADE.tolist()]
    assert found["mono_neurons_signed"] == sum(max(row) / (1e-10 + sum(row)) > 0.999 for row in table)
    assert "mono_neurons_abs" in found


# The held-out samples.


def dense(params: dict[str, Tensor], spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Activations [S, k] and the mean loss over all held-out samples at once, in float64."""
    f = FeatureSampler(spec).evaluation(0, 8192).double()
    p = {name: value.double() for name, value in params.items()}
    z = (f @ p["P"].T) @ p["W_in"].T + p["b"]
    h = {
        "relu": lambda: z.clamp(min=0),
        "gelu": lambda: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
        "solu": lambda: z * z.exp(),
    }[spec.activation]()
    tau = f @ p["P2"].T if spec.task == "reprojector" else f.abs() if spec.task == "abs" else f
    return h, (h @ p["W_out"].T - tau).square().sum(1).mean()


@pytest.mark.parametrize("activation", ["relu", "gelu", "solu"])
@pytest.mark.parametrize("task", TASKS)
def test_eval_loss_density_and_dead_neurons_equal_a_dense_float64_computation(task: str, activation: str) -> None:
    # 150 features and 130 neurons: several tiles
    spec = spec_of(
        task=task, activation=activation, n_features=150, n_neurons=130, d_embed=20, feature_prob=0.05, init_bias=-0.3
    )
    params = params_of(spec)
    params["b"] = params["b"].clone()
    params["b"][5] = -200.0  # dead with relu; with gelu and solu it underflows to -0.0
    h, loss = dense(params, spec)
    found = HeldOut().measure(params, spec)
    # squares of float32 numbers good to a few 2**-24 of their size, and float32 sums of 8192 x 150 of them
    assert found["eval_loss"] == pytest.approx(float(loss), rel=64 * 2.0**-24)
    active = h != 0
    if activation == "relu":
        # where |z| is within float32 rounding of 0 the two may disagree: fewer than one in a million
        assert found["density"] == pytest.approx(float(active.double().mean()), abs=1e-6)
        assert 0.01 < found["density"] < 0.9
        assert found["dead_neurons"] == int((~active).all(0).sum()) >= 1
    else:
        assert found["density"] == pytest.approx(129 / 130, rel=1e-6) and found["dead_neurons"] == 1.0


def test_dead_neurons_and_density_of_a_model_made_by_hand() -> None:
    params, spec = hand_made()
    # At feature_prob 1 every feature is positive in every sample. Neuron 4 is dead, neuron 1 fires at times.
    f = FeatureSampler(spec).evaluation(0, EVALUATION_SAMPLES).double()
    second = float((2 * f[:, 0] - 3 * f[:, 1] - f[:, 3] > 0).double().mean())
    found = HeldOut().measure(params, spec)
    assert found["dead_neurons"] == 1.0
    assert found["density"] == pytest.approx((6 + second) / 8, abs=1e-6)  # 65,536 activations; a tie would be 1.5e-5
    assert found["eval_loss"] == pytest.approx(float(f.square().sum(1).mean()), rel=64 * 2.0**-24)  # W_out = 0


def test_neuron_that_fires_for_one_sample_alone_is_not_dead() -> None:
    params, spec = hand_made()
    largest = FeatureSampler(spec).evaluation(0, EVALUATION_SAMPLES)[:, 0].topk(2).values
    assert largest[0] > largest[1]
    W_in = torch.zeros(8, 5)
    W_in[:, 0] = 1.0
    b = torch.full((8,), -float(largest.mean()))
    b[0] = -2.0
    found = HeldOut().measure({**params, "W_in": W_in, "b": b}, spec)
    assert found["dead_neurons"] == 1.0
    assert found["density"] == 7 / (8 * EVALUATION_SAMPLES)


def test_held_out_samples_are_those_of_the_models_own_stream_in_any_order_of_measuring() -> None:
    specs = [
        spec_of(),
        spec_of(seed=4),
        spec_of(feature_prob=0.5),
        spec_of(n_features=12),
        spec_of(task="abs"),
        spec_of(frequency="power_law"),
        spec_of(n_neurons=90),
        spec_of(),
        spec_of(task="reprojector"),
    ]
    shared = HeldOut()
    for spec in specs + specs[::-1]:
        params = params_of(spec)
        found = shared.measure(params, spec)
        assert found == HeldOut().measure(params, spec)
        assert found["eval_loss"] == pytest.approx(float(dense(params, spec)[1]), rel=64 * 2.0**-24)


def test_more_features_than_are_kept_in_memory_are_sampled_each_time() -> None:
    spec = spec_of(n_features=2049, d_embed=2, n_neurons=3, feature_prob=0.01)
    assert 4 * EVALUATION_SAMPLES * spec.n_features > 2**26
    params, held_out = params_of(spec), HeldOut()
    first = held_out.measure(params, spec)
    assert first["eval_loss"] == pytest.approx(float(dense(params, spec)[1]), rel=64 * 2.0**-24)
    small = spec_of()
    assert held_out.measure(params_of(small), small) == HeldOut().measure(params_of(small), small)


def test_measures_do_not_depend_on_the_number_of_threads() -> None:
    spec = spec_of(n_features=150, n_neurons=130, d_embed=20)
    params, threads, found = params_of(spec), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(HeldOut().measure(params, spec) | counts(params, spec))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("task", "activation", "missing"),
    [
        ("decoder", "relu", {"mono_neurons_abs", "mono_neurons_signed"}),
        ("abs", "relu", {"mono_neurons_abs"}),
        ("reprojector", "gelu", {"mono_neurons_signed"}),
        ("abs", "solu", set()),
    ],
)
def test_measure_gives_every_name_in_order_and_nan_for_what_a_model_has_not(
    task: str, activation: str, missing: set[str]
) -> None:
    spec = spec_of(task=task, activation=activation)
    params = params_of(spec)
    values = dict(zip(NAMES, measure(params, spec, HeldOut()), strict=True))
    assert {name for name, value in values.items() if math.isnan(value)} == missing
    expected = counts(params, spec) | HeldOut().measure(params, spec)
    assert {name: value for name, value in values.items() if name not in missing} == expected
    assert all(type(value) is float for value in values.values())


def test_measures_of_a_model_that_is_not_finite_do_not_raise() -> None:
    spec = spec_of()
    params = {
        name: torch.full_like(value, math.nan) if name != "P" else value for name, value in params_of(spec).items()
    }
    values = dict(zip(NAMES, measure(params, spec, HeldOut()), strict=True))
    assert math.isnan(values["eval_loss"]) and math.isnan(values["mean_bias"])
    assert values["mono_neurons"] == 0 and values["features_0"] == spec.n_features
