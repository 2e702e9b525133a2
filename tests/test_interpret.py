"""The convergence of the measure against plain loops, and the summary against its parts."""

from __future__ import annotations

import math
from statistics import median

import pytest
import torch
from made_up_model import ACTIVATIONS, TASKS, one_to_one, random_model, spec_of

import fastmono as fm
from fastmono.interpret import Parts, definition, findings, kinks, linear_part, low_slopes, pair, single_neuron, summary
from fastmono.metrics import counts
from fastmono.philox import FeatureSampler
from fastmono.tasks import ACTIVATION


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_counts_under_other_definitions_equal_plain_loops(task, activation):
    spec = spec_of(task=task, activation=activation)
    params = random_model(spec)
    parts, thresholds = Parts(params, spec), (0.2, 0.5, 0.9)
    found = definition(parts, thresholds, amplitudes=(0.3, 1.0), presence=(0.0, 0.5, 1.0))
    p, phi = {name: value.double() for name, value in params.items()}, ACTIVATION[activation]
    signs = (1, -1) if task == "abs" else (1,)

    def count(table):  # [neuron][probe]
        return [sum(max(row) / (1e-10 + sum(row)) > t for row in table) for t in thresholds]

    def h(j, f):
        return float(phi(p["W_in"][j] @ (p["P"] @ f) + p["b"][j]))

    one = torch.eye(13, dtype=torch.float64)
    for a, row in zip((0.3, 1.0), found.by_amplitude.tolist(), strict=True):
        assert row == count([[abs(h(j, s * a * one[i])) for s in signs for i in range(13)] for j in range(16)])
    for share, row in zip((0.0, 0.5, 1.0), found.by_presence.tolist(), strict=True):
        f = torch.zeros(1, 13, dtype=torch.float64)
        if share:
            f = FeatureSampler(spec.replace(feature_prob=share * spec.feature_prob)).evaluation(0, 512).double()
        table = []
        for s in signs:
            for i in range(13):
                off = f.clone()
                off[:, i] = 0
                on = off + s * one[i]
                means = [phi(x @ p["P"].T @ p["W_in"].T + p["b"]).mean(0) for x in (on, off)]
                table.append((means[0] - means[1]).abs())
        assert row == count(torch.stack(table, 1).tolist())


def test_the_published_definition_is_one_point_of_each_curve():
    spec = spec_of()
    params = random_model(spec)
    params["b"] = params["b"].clamp(max=-0.01)  # no neuron is on by itself
    found = definition(Parts(params, spec))
    at = found.thresholds.index(0.999)
    expected = counts(params, spec)["mono_neurons"]
    assert found.by_amplitude[found.amplitudes.index(1.0), at] == expected > 0
    assert found.by_presence[found.presence.index(0.0), at] == expected
    # A higher threshold lets fewer through.
    assert (found.by_amplitude.diff(dim=1) <= 0).all() and (found.by_presence.diff(dim=1) <= 0).all()


def test_thinned_samples_are_part_of_the_samples():
    spec = spec_of()
    rare, all_ = (FeatureSampler(spec.replace(feature_prob=p)).evaluation(0, 512) for p in (0.05, 0.15))
    assert ((all_ > 0) | (rare == 0)).all() and 0 < (rare > 0).sum() < (all_ > 0).sum()


def test_definitions_that_do_not_exist_are_refused():
    parts = Parts(*one_to_one(0.2, 1.0))
    with pytest.raises(ValueError, match="must be above 0, and at least 0"):
        definition(parts, amplitudes=(0.0,))
    with pytest.raises(ValueError, match="must be above 0, and at least 0"):
        definition(parts, presence=(-1.0,))


def test_low_slopes_of_a_model_with_known_thresholds():
    params, spec = one_to_one(0.05, 1.5)
    # From 0 to 0.1 half the way is above the threshold.
    assert low_slopes(Parts(params, spec)) == {"low_mono": pytest.approx(0.75), "low_poly": 0.0, "low_path": None}
    params |= {"L_in": torch.eye(6), "L_out": 0.2 * torch.eye(6)}
    assert low_slopes(Parts(params, spec))["low_path"] == pytest.approx(0.2)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_summary_has_the_same_names_for_every_model_and_none_where_a_notion_does_not_apply(task, activation, rank):
    spec = spec_of(task=task, activation=activation)
    found = summary(random_model(spec, rank), spec)
    reference = summary(*one_to_one(0.2, 1.0))
    assert list(found) == list(reference)
    assert all(value is None or (type(value) is float and math.isfinite(value)) for value in found.values())
    smooth = {name for name in found if name.startswith(("single_", "pair_", "kinks_"))}
    distances = {name for name in found if "identity_" in name or "target_" in name}
    none = {name for name, value in found.items() if value is None}
    if activation != "relu":
        assert smooth <= none
    if task == "abs":
        assert distances <= none
    if task == "reprojector":
        assert none & distances == {name for name in distances if "identity_" in name}
    if task == "decoder" and activation == "relu":
        assert none == ({"low_path"} if not rank else set())


def test_summary_is_made_of_its_parts():
    spec = spec_of()
    params = random_model(spec)
    parts, found = Parts(params, spec), fm.interpret.summary(params, spec)
    linear, bends = linear_part(parts), kinks(parts)
    singles = [single_neuron(parts, probe) for probe in parts.split.probes_with(1)]
    assert len(singles) >= 2
    assert found["single_threshold"] == median(one.measured.threshold for one in singles)
    assert found["single_optimal_gain"] == median(one.optimal.gain for one in singles)
    assert found["single_beside_loss"] == median(one.measured_beside.loss for one in singles)
    assert found["single_optimal_beside_threshold"] == median(one.optimal_beside.threshold for one in singles)
    two = pair(parts, 2)
    assert found["probes_2"] == 1
    assert (found["pair_kink_low"], found["pair_slope_beyond"]) == (two.thresholds[0], two.slopes[1])
    assert (found["pair_auc"], found["pair_auc_single"]) == (two.auc, two.auc_single)
    assert found["tangent_effective_rank"] == linear.tangent.effective_rank
    assert found["fit_identity_distance"] == linear.fit.identity_distance
    assert found["loss_removed"] == linear.loss_removed and found["linear_share_served"] == linear.linear_share_served
    assert found["kinks_poly"] == float(bends.polysemantic.double().mean())
    assert found["kinks_mono_visible"] == float(bends.monosemantic_visible.double().mean())
    assert found["neurons_dead"] == float(parts.split.dead.sum())


def test_what_does_not_apply_is_said_in_a_note():
    spec = spec_of(task="abs", activation="gelu")
    notes = " ".join(findings(random_model(spec), spec).notes)
    assert "gelu is smooth" in notes and "no linear map approximates |f|" in notes
    assert not findings(*one_to_one(0.2, 1.0)).notes


def test_interpreting_does_not_depend_on_the_number_of_threads():
    spec = spec_of(n_features=40, d_embed=16, n_neurons=64)
    params, threads, found = random_model(spec), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(summary(params, spec))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
