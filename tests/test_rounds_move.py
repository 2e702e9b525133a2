"""The move between two rounds: what it keeps, what it loses, what begins anew."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from made_up_model import ACTIVATIONS, TASKS, random_model, spec_of
from torch import Tensor

from fastmono.block import Model, views
from fastmono.interpret import Parts, split
from fastmono.metrics import HeldOut
from fastmono.philox import FeatureSampler, philox4x32
from fastmono.rounds import round_seed, round_spec
from fastmono.rounds_move import begin_round, move, parts_of, state_numbers, truncated
from fastmono.run import ToyModel
from fastmono.spec import ModelSpec
from fastmono.store import MOMENTS, contract_tensors, load_flat
from fastmono.tasks import target


def always_on_model(spec: ModelSpec, rank: int = 0, constant: bool = False) -> dict[str, Tensor]:
    """Neurons 0 to 3 monosemantic, 4 dead, and 5 to 14 in pairs that no input turns off: of two neurons, with opposite
    outputs, the biases cancel; with `constant` neuron 15 adds what no input changes, else it is dead."""
    params = random_model(spec, rank)
    W_in, b, W_out = params["W_in"], params["b"], params["W_out"]
    W_in[5:] *= 0.5
    for j in range(5, 15, 2):
        b[j] = b[j + 1] = float(1 + torch.maximum(*(W_in[j : j + 2] @ params["P"]).abs()).sum())  # features below 1
        W_out[:, j + 1] = -W_out[:, j]
    W_in[15], b[15] = 0.0, 1.0 if constant else -1.0
    return params


def model_of(params: dict[str, Tensor], spec: ModelSpec) -> Model:
    """As if trained: with moments, which no two entries share."""
    rank = len(params.get("L_in", ()))
    own = spec.replace(linear_path=rank)
    model = Model(own, projections=(params["P"], params.get("P2")))
    load_flat(own, model.parameters, params)
    for part, scale in zip(MOMENTS, (1e-3, 1e-6), strict=True):
        for tensor in views(own, getattr(model, part)).values():
            tensor.copy_(scale * torch.arange(1, tensor.numel() + 1).view(tensor.shape))
    return model


def params_of(model: Model) -> dict[str, Tensor]:
    params = contract_tensors(model.spec, model.parameters) | {"P": model.P}
    return params if model.P2 is None else params | {"P2": model.P2}


def begun(params: dict[str, Tensor], spec: ModelSpec, number: int = 1, rank: int | None = None):
    model = model_of(params, spec)
    return begin_round(model, parts_of(model, spec, HeldOut()), round_spec(spec, number, None, rank))


def without(params: dict[str, Tensor], neurons: Tensor) -> dict[str, Tensor]:
    return {**params, "W_out": params["W_out"].masked_fill(neurons, 0.0)}


def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return ToyModel(params, "relu")(x).detach()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("task", TASKS)
def test_move_of_neurons_that_are_linear_on_the_distribution_changes_no_output_beyond_rounding(task, rank):
    spec = spec_of(task=task)
    params = always_on_model(spec, rank)
    groups = split(params, spec)
    assert groups.polysemantic.nonzero().flatten().tolist() == list(range(5, 15))
    # Five pairs and a rank of the path before: six in all, which is m.
    start, numbers = begun(params, spec, rank=5 + rank)
    f = FeatureSampler(spec.replace(seed=99)).batch(0, 0, 2000)
    x = f @ params["P"].T
    before = output(params, x)
    after = output(without(params_of(start), ~groups.monosemantic), x)
    # float32 sums of a dozen terms whose biases, up to 8, cancel: a few units in the last place of 10.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)
    assert float((output(without(params, groups.polysemantic), x) - before).abs().max()) > 0.1
    assert numbers["left"] < 1e-10
    loss = HeldOut().measure(params, spec)["eval_loss"]
    assert numbers["moved_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_of_a_constant_only_what_the_mean_of_the_input_gives_is_moved(task):
    spec = spec_of(task=task)
    params = always_on_model(spec, constant=True)
    parts = Parts(params, spec)
    moved = move(parts, 6)
    # The map nearest to a constant c is c mu^T C^-1, and leaves |c|^2 (1 - mu^T C^-1 mu).
    P, p = params["P"].double(), spec.feature_prob
    mean = P.sum(1) * (0.0 if task == "abs" else p / 2)
    C = P @ P.T * (2 * (p / 6 - p * p / 16) if task == "abs" else p / 3 - p * p / 4) + torch.outer(mean, mean)
    c = params["W_out"][:, 15].double()
    lost = float(c.square().sum()) * (1 - float(mean @ torch.linalg.solve(C, mean)))
    x = FeatureSampler(spec).evaluation(0, 8192).double() @ P.T
    W_in, b = (params[name][5:].double() for name in ("W_in", "b"))
    power = float((torch.relu(x @ W_in.T + b) @ params["W_out"][:, 5:].double().T).square().sum(1).mean())
    # The mean of 8192 samples, of a quantity about as large as its own spread.
    assert moved.left == pytest.approx(lost / power, rel=0.1)
    assert (lost == pytest.approx(float(c.square().sum()))) == (task == "abs")


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_best_of_its_rank_under_the_second_moments(rank):
    generator = np.random.default_rng(rank)
    T, root = generator.normal(size=(9, 5)), generator.normal(size=(5, 7)) * [3, 2, 1, 1, 0.3, 0.2, 0.1]
    L_in, L_out = (L.numpy() for L in truncated(torch.tensor(T), torch.tensor(root), rank))
    C = root @ root.T

    def distance(B):
        return float(np.sqrt(np.trace((T - B) @ C @ (T - B).T)))

    # The textbook's way: truncate T C^1/2, and divide by the root.
    half = scipy.linalg.sqrtm(C)
    U, s, Vh = scipy.linalg.svd(T @ half, full_matrices=False)
    best = (U[:, :rank] * s[:rank]) @ Vh[:rank] @ np.linalg.inv(half)
    np.testing.assert_allclose(L_out @ L_in, best, atol=1e-10)
    assert distance(L_out @ L_in) == pytest.approx(np.sqrt((s[rank:] ** 2).sum()), rel=1e-9)
    # It is a minimum, and the truncation of T itself is not.
    for _ in range(50):
        nearby = (L_out + 1e-3 * generator.normal(size=L_out.shape)) @ (L_in + 1e-3 * generator.normal(size=L_in.shape))
        assert distance(nearby) > distance(L_out @ L_in)
    U, s, Vh = np.linalg.svd(T, full_matrices=False)
    assert distance((U[:, :rank] * s[:rank]) @ Vh[:rank]) > 1.01 * distance(best)
    np.testing.assert_allclose(L_in @ L_in.T, L_out.T @ L_out, atol=1e-12)


def test_least_squares_and_truncation_after_one_another_are_the_best_path_for_both_together():
    # Reduced-rank regression of y_poly + L x on x in one step, on the samples of the fit: all moments are measured.
    spec = spec_of(n_features=13, feature_prob=0.3)
    params = random_model(spec, rank=2)
    parts = Parts(params, spec)
    moved = move(parts, 3)
    f = FeatureSampler(spec).evaluation(8192, 2**14).double()
    x, poly = f @ parts.params["P"].T, parts.split.polysemantic
    h = torch.relu(x @ parts.params["W_in"].T + parts.params["b"])[:, poly]
    y = h @ parts.params["W_out"][:, poly].T + x @ parts.params["L_in"].T @ parts.params["L_out"].T

    def error(B):
        return float((y - x @ B.T).square().sum(1).mean())

    T = torch.linalg.lstsq(x, y).solution.T
    C = (x.T @ x / len(x)).numpy()
    U, s, Vh = np.linalg.svd(T.numpy() @ scipy.linalg.sqrtm(C), full_matrices=False)
    best = torch.tensor((U[:, :3] * s[:3]) @ Vh[:3] @ np.linalg.inv(scipy.linalg.sqrtm(C)))
    # The second moments that are exact and those measured on 16,384 samples differ by a percent or so, and the error
    # has its minimum there: by the square of that.
    assert error(best) <= error(moved.L_out @ moved.L_in) * (1 + 1e-12)
    assert error(moved.L_out @ moved.L_in) == pytest.approx(error(best), rel=1e-3)
    assert error(torch.zeros_like(T)) > 1.5 * error(best)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_monosemantic_neurons_stay_bit_by_bit_and_all_others_begin_anew(task, activation):
    spec = spec_of(task=task, activation=activation, init_bias=-0.5)
    params = random_model(spec, rank=2)
    model = model_of(params, spec)
    untouched = [getattr(model, part).clone() for part in ("parameters", *MOMENTS)]
    kept = split(params, spec).monosemantic
    start, _ = begun(params, spec, rank=4)
    fresh = Model(round_spec(spec, 1, None, 4))
    if activation == "relu":  # smooth ones have no such neurons here
        assert kept.sum() >= 3
    for name in ("W_in", "b", "W_outT"):
        assert torch.equal(start.tensors[name][kept], model.tensors[name][kept])
        assert torch.equal(start.tensors[name][~kept], fresh.tensors[name][~kept])
        assert not torch.isclose(start.tensors[name][~kept], model.tensors[name][~kept]).all(-1).any()
        for part in MOMENTS:
            new, old = (views(each.spec, getattr(each, part)) for each in (start, model))
            assert torch.equal(new[name][kept], old[name][kept]) and not new[name][~kept].any()
    for part in MOMENTS:
        assert not any(views(start.spec, getattr(start, part))[name].any() for name in ("L_in", "L_outT"))
    assert torch.equal(start.P, model.P) and (start.P2 is None or torch.equal(start.P2, model.P2))
    assert torch.equal(start.snapshot, start.parameters) and start.spec.seed != spec.seed
    for part, before in zip(("parameters", *MOMENTS), untouched, strict=True):
        assert torch.equal(getattr(model, part), before)


def test_fresh_neurons_are_the_same_again_and_others_in_another_round_or_for_another_seed():
    spec = spec_of()
    drawn = [begun(random_model(spec), spec.replace(seed=seed), number)[0] for seed, number in
             ((3, 1), (3, 1), (3, 2), (4, 1))]  # fmt: skip
    assert torch.equal(drawn[0].parameters, drawn[1].parameters)
    for other in drawn[2:]:
        for name in ("W_in", "b", "W_outT"):
            assert not torch.isclose(drawn[0].tensors[name][5:], other.tensors[name][5:]).all(-1).any()


def test_a_rounds_seed_is_a_word_of_philox():
    assert round_seed(5, 3) == int(philox4x32((0, 3, 0, 0), (5, 7))[0])
    assert len({round_seed(seed, number) for seed in range(20) for number in range(1, 20)}) == 20 * 19


def test_directions_that_the_path_does_not_need_can_be_trained_and_give_nothing():
    spec = spec_of()
    start, numbers = begun(always_on_model(spec), spec)  # rank m = 6 for five pairs
    used = start.tensors["L_outT"].any(1)
    assert used.tolist() == [True] * 5 + [False]
    assert torch.equal(start.tensors["L_in"][5], Model(start.spec).tensors["L_in"][5])
    assert start.tensors["L_in"][5].any() and numbers["map_rank"] <= 5


def test_numbers_of_the_move_are_losses_of_the_models_that_they_name():
    spec = spec_of(task="reprojector")
    params = random_model(spec, rank=2)
    start, numbers = begun(params, spec, rank=3)
    kept = split(params, spec).monosemantic
    f = FeatureSampler(spec).evaluation(0, 8192)

    def loss(params):
        x = f @ params["P"].T
        return float((output(params, x) - target(spec.task, f, params["P2"])).square().sum(1).mean())

    # float32 sums over 8192 x 6 numbers either way
    assert numbers["reset_loss"] == pytest.approx(loss(params_of(start)), rel=1e-5)
    assert numbers["moved_loss"] == pytest.approx(loss(without(params_of(start), ~kept)), rel=1e-5)
    assert abs(numbers["reset_loss"] - numbers["moved_loss"]) > 1e-3


@pytest.mark.parametrize("rank", [0, 2])
def test_shares_are_inner_products_with_the_output_and_add_up_to_1(rank):
    spec = spec_of()
    params = random_model(spec, rank)
    found = state_numbers(Parts(params, spec))
    groups = split(params, spec)
    x = FeatureSampler(spec).evaluation(0, 8192) @ params["P"].T
    y = output(params, x)
    for name, neurons in (("mono", groups.monosemantic), ("poly", groups.polysemantic)):
        part = output({**without(params, ~neurons), "L_in": torch.zeros(1, 6), "L_out": torch.zeros(13, 1)}, x)
        assert found[f"share_{name}"] == pytest.approx(float((part * y).sum() / y.square().sum()), rel=1e-5)
        assert found[f"neurons_{name}"] == int(neurons.sum())
    assert found["share_mono"] + found["share_poly"] + found["share_path"] == pytest.approx(1)
    assert (found["share_path"] == 0) == (rank == 0) and (found["path_rank"] > 1) == (rank > 0)
    assert found["eval_loss"] == HeldOut().measure(params, spec)["eval_loss"]
