"""The split and the responses, against the measures of a run, closed forms, and plain NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_up_model import ACTIVATIONS, TASKS, one_to_one, random_model, spec_of

from fastmono.interpret import Parts, responses, split
from fastmono.metrics import HeldOut, counts
from fastmono.philox import FeatureSampler

PHI = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
    "solu": lambda z: z * np.exp(z),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_split_counts_what_the_measures_of_a_run_count(task, activation):
    spec = spec_of(task=task, activation=activation)
    params = random_model(spec)
    found, measured = split(params, spec), counts(params, spec)
    groups = torch.stack((found.monosemantic, found.dead, found.polysemantic))
    assert (groups.sum(0) == 1).all()
    if task != "abs" or activation == "relu":
        name = {"abs": "mono_neurons_signed"}.get(task, "mono_neurons" if activation == "relu" else "mono_neurons_abs")
        assert int(found.monosemantic.sum()) == measured[name]
    dead = HeldOut().measure(params, spec)["dead_neurons"]
    assert int(found.dead.sum()) == dead - int((found.monosemantic & groups[1]).sum()) >= (activation == "relu")
    assert int(found.per_probe.sum()) == int(found.monosemantic.sum())
    assert len(found.per_probe) == (26 if task == "abs" else 13)


def test_neurons_made_for_a_feature_are_found_with_it():
    spec = spec_of()
    found = split(random_model(spec), spec)
    assert found.monosemantic[:4].all() and found.dead[4] and found.probe[:5].tolist() == [0, 1, 2, 2, -1]
    assert found.neurons_of(2) == [2, 3] and 2 in found.probes_with(2) and {0, 1} <= set(found.probes_with(1))


def test_abs_tells_neurons_for_positive_and_negative_values_apart():
    params, spec = one_to_one(0.2, 1.0)
    params["W_in"] = params["W_in"] * torch.tensor([1.0, -1, 1, -1, 1, 1])[:, None]
    parts = Parts(params, spec.replace(task="abs"))
    assert parts.split.probe.tolist() == [0, 7, 2, 9, 4, 5]
    assert parts.feature_and_sign(7) == (1, -1.0) and parts.feature_and_sign(5) == (5, 1.0)
    with pytest.raises(ValueError, match="probe=12: must be a whole number from 0 to 11"):
        parts.feature_and_sign(12)


def test_response_of_one_neuron_a_feature_is_its_closed_form_with_and_without_other_features():
    params, spec = one_to_one(threshold=0.25, gain=1.5)
    found = responses(Parts(params, spec), 3)
    expected = 1.5 * (found.amplitudes - 0.25).clamp(min=0)
    assert len(found.amplitudes) == 51
    for values in (found.alone, found.mean):
        # 1.5 and 0.25 are exact in float32, and all sums have one term
        torch.testing.assert_close(values["whole"], expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(values["monosemantic"], expected, rtol=0, atol=1e-14)
        assert not values["polysemantic"].any()
    torch.testing.assert_close(found.quantiles["whole"], expected.expand(5, -1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_responses_equal_numpy_computing_each_sample_anew(task, activation, rank):
    spec = spec_of(task=task, activation=activation)
    params = random_model(spec, rank)
    parts = Parts(params, spec, threshold=0.9)
    p = {name: value.double().numpy() for name, value in params.items()}
    amplitudes = torch.tensor([0.0, 0.3, 1.0])
    found = responses(parts, 2, amplitudes, levels=(0.1, 0.5))
    read = p["P2"][:, 2] if task == "reprojector" else np.eye(13)[2]
    f = FeatureSampler(spec).evaluation(0, 4096).double().numpy()
    for at, a in enumerate(amplitudes.tolist()):
        f[:, 2] = a
        for features, values in ((a * np.eye(13)[2:3], found.alone), (f, None)):
            x = features @ p["P"].T
            h = PHI[activation](x @ p["W_in"].T + p["b"])
            masks = {"monosemantic": parts.split.monosemantic, "polysemantic": parts.split.polysemantic}
            expected = {name: (h * mask.numpy()) @ p["W_out"].T @ read for name, mask in masks.items()}
            expected["whole"] = h @ p["W_out"].T @ read
            if rank:
                expected["linear path"] = x @ p["L_in"].T @ p["L_out"].T @ read
                expected["whole"] = expected["whole"] + expected["linear path"]
            assert set(expected) == set(parts.names()) == set(found.alone)
            for name, y in expected.items():
                if values is not None:
                    assert float(values[name][at]) == pytest.approx(y[0], abs=1e-12)
                else:
                    assert float(found.mean[name][at]) == pytest.approx(y.mean(), abs=1e-12)
                    assert found.quantiles[name][:, at].numpy() == pytest.approx(np.quantile(y, [0.1, 0.5]), abs=1e-12)


def test_abs_responses_run_from_minus_one_to_one():
    spec = spec_of(task="abs")
    found = responses(Parts(random_model(spec), spec), 0)
    assert found.amplitudes[0] == -1 and found.amplitudes[-1] == 1 and len(found.amplitudes) == 101


def test_what_cannot_be_interpreted_is_refused_in_one_line():
    spec = spec_of()
    params = random_model(spec)
    with pytest.raises(ValueError, match=r"W_out is not finite: .* diverged"):
        Parts({**params, "W_out": params["W_out"] * math.nan}, spec)
    with pytest.raises(ValueError, match=r"b is \[16\]: the model's spec asks for \[17\]|W_in is \[16, 6\]"):
        Parts(params, spec.replace(n_neurons=17))
    with pytest.raises(ValueError, match="P2 is missing"):
        Parts({**params, "W_out": torch.zeros(6, 16)}, spec.replace(task="reprojector"))
    for feature in (-1, 13):
        with pytest.raises(ValueError, match=f"feature={feature}: must be a whole number from 0 to 12"):
            responses(Parts(params, spec), feature)
