"""The reference engine against autograd, against the published recipe written with nn.Linear, and what it rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torch_optimizer
from torch import Tensor, nn

from fastmono.block import Block, Model, initial_values, projection, round_to_bf16, round_to_tf32
from fastmono.engines.reference import ReferenceEngine, loss_and_gradients
from fastmono.philox import FeatureSampler, Purpose, normals
from fastmono.spec import ModelSpec

TASKS = ("decoder", "reprojector", "abs")
ACTIVATIONS = ("relu", "gelu", "solu")
FLOAT32, FLOAT64 = torch.float32, torch.float64

NONLINEARITY = {"relu": F.relu, "gelu": F.gelu, "solu": lambda z: z * z.exp()}


def spec_of(**fields: object) -> ModelSpec:
    shape = {"n_features": 13, "d_embed": 5, "n_neurons": 11, "batch_size": 17, "feature_prob": 0.3, "steps": 64}
    return ModelSpec(**{**shape, **fields})  # type: ignore[arg-type]


def distance(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of the expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def targets(spec: ModelSpec, f: Tensor, P2: Tensor | None) -> Tensor:
    if spec.task == "reprojector":
        assert P2 is not None
        return F.linear(f, P2)
    return f.abs() if spec.task == "abs" else f


# Gradients.

SHAPES = [
    {},
    {"batch_size": 1},
    {"n_features": 1, "d_embed": 1, "n_neurons": 1, "batch_size": 1, "feature_prob": 1.0},
    {"n_features": 1, "d_embed": 1, "n_neurons": 6, "batch_size": 3, "feature_prob": 1.0},
    {"n_features": 9, "d_embed": 9, "n_neurons": 1, "batch_size": 8},
    {"n_features": 40, "d_embed": 3, "n_neurons": 70, "batch_size": 33},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("l1", [0.0, 0.1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradients_equal_autograd(task: str, activation: str, l1: float, shape: dict[str, object]) -> None:
    spec = spec_of(task=task, activation=activation, l1=l1, seed=4, **shape)
    model = Model(spec, FLOAT64)
    f = FeatureSampler(spec).batch(0, 0, spec.batch_size).double()
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.tensors.items()}
    x = F.linear(f, model.P)
    h = NONLINEARITY[activation](F.linear(x, leaves["W_in"], leaves["b"]))
    squared_error = (F.linear(h, leaves["W_outT"].T) - targets(spec, f, model.P2)).pow(2).sum(1).mean()
    (squared_error + l1 * h.abs().sum(1).mean()).backward()

    loss, gradients = loss_and_gradients(model, f)
    # Sums of at most a few thousand float64 products; 1e-12 is 4,500 units of rounding.
    assert float(loss) == pytest.approx(squared_error.item(), rel=1e-12)  # without the l1 term
    assert set(gradients) == set(leaves)
    for name, leaf in leaves.items():
        assert leaf.grad is not None and gradients[name].shape == leaf.shape
        assert torch.allclose(gradients[name], leaf.grad, rtol=1e-12, atol=1e-12 * float(leaf.grad.abs().max())), name


def test_relu_has_gradient_zero_where_its_argument_is_zero() -> None:
    spec = spec_of(l1=0.1)
    model = Model(spec, FLOAT64)
    model.tensors["W_in"].zero_()
    model.tensors["b"].zero_()
    f = FeatureSampler(spec).batch(0, 0, spec.batch_size).double()
    _, gradients = loss_and_gradients(model, f)
    assert not any(gradient.any() for gradient in gradients.values())


# Precisions: the rounding functions.


def rounded_by_definition(x: np.ndarray, mantissa: int) -> np.ndarray:
    """float32 to `mantissa` stored bits, ties to even, through float64: exact, since a float32 has 24 bits."""
    wide = x.astype(np.float64)
    _, exponent = np.frexp(wide)  # |x| in [2**(e - 1), 2**e)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, -126) - mantissa)  # subnormals share the grid of 2**-126
    with np.errstate(invalid="ignore", over="ignore"):
        return (np.rint(wide / unit) * unit).astype(np.float32)


def interesting_floats(mantissa: int) -> np.ndarray:
    rng = np.random.default_rng(mantissa)
    dropped = 23 - mantissa
    heads = np.concatenate([rng.integers(0, 2**mantissa, 6), [0, 1, 2**mantissa - 1, 2**mantissa - 2]])
    half = 2 ** (dropped - 1)
    tails = np.array([0, 1, half - 1, half, half + 1, 2**dropped - 1])
    exponents = np.array([0, 1, 2, 100, 127, 128, 253, 254])
    sign = np.array([0, 1])
    parts = np.meshgrid(sign, exponents, heads, tails, indexing="ij")
    grid = (parts[0] << 31) | (parts[1] << 23) | (parts[2] << dropped) | parts[3]
    bits = np.concatenate([grid.ravel(), rng.integers(0, 2**32, 200_000), [0x7F7FFFFF, 0xFF7FFFFF, 0, 0x80000000, 1]])
    x = bits.astype(np.uint32).view(np.float32)
    return x[np.isfinite(x)]


@pytest.mark.parametrize(("rounding", "mantissa"), [(round_to_tf32, 10), (round_to_bf16, 7)])
def test_rounding_is_to_nearest_even_bit_by_bit(rounding: object, mantissa: int) -> None:
    assert callable(rounding)
    x = interesting_floats(mantissa)
    expected = rounded_by_definition(x, mantissa)
    found = rounding(torch.from_numpy(x))
    assert found.dtype == FLOAT32
    wrong = found.numpy().view(np.uint32) != expected.view(np.uint32)
    assert not wrong.any(), x[wrong][:5]
    # what the definition above must be: idempotent, at most half a unit away, to even at a tie, infinite beyond
    assert torch.equal(rounding(found), found)
    ties = torch.tensor([1 + 2.0 ** -(mantissa + 1), 1 + 3 * 2.0 ** -(mantissa + 1), -1 - 2.0 ** -(mantissa + 1)])
    assert rounding(ties).tolist() == [1.0, 1 + 2.0 ** (1 - mantissa), -1.0]
    assert rounding(torch.tensor([3.4028234663852886e38, -3.4028234663852886e38])).tolist() == [math.inf, -math.inf]
    assert rounding(torch.tensor([2.0**-149, 2.0 ** (-126 - mantissa)])).tolist() == [0.0, 2.0 ** (-126 - mantissa)]


@pytest.mark.parametrize("rounding", [round_to_tf32, round_to_bf16])
def test_rounding_keeps_nan_infinities_and_layout(rounding: object) -> None:
    assert callable(rounding)
    # NaN with the payload in the bits that are dropped, too: cutting them would make an infinity
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -0x7FFFFF, -1], dtype=torch.int32).view(FLOAT32)
    assert nans.isnan().all() and rounding(nans).isnan().all()
    assert rounding(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]
    table = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    before = table.clone()
    assert torch.equal(rounding(table.T), rounding(table).T)
    assert torch.equal(rounding(table[:, 1:3]), rounding(table)[:, 1:3])
    assert torch.equal(table, before)  # its argument is left alone


# Precisions: which operands are rounded.

OPERANDS = {
    "decoder": ("f", "P", "x", "W_in", "h", "W_out", "e", "dz"),
    "reprojector": ("f", "P", "f (target)", "P2", "x", "W_in", "h", "W_out", "e", "dz"),
    "abs": ("f", "P", "x", "W_in", "h", "W_out", "e", "dz"),
}


def rounded_pass(model: Model, f: Tensor, mantissa: int, operands: set[str]) -> dict[str, Tensor]:
    """Loss and gradients in numpy, products summed in float64, everything stored in float32, the named operands
    rounded."""
    spec = model.spec

    def r(name: str, value: np.ndarray) -> np.ndarray:
        stored = value.astype(np.float32)
        return (rounded_by_definition(stored, mantissa) if name in operands else stored).astype(np.float64)

    features = f.numpy()
    W_in, b, W_out = (model.tensors[n].double().numpy() for n in ("W_in", "b", "W_outT"))
    x = r("f", features) @ r("P", model.P.numpy()).T
    if spec.task == "reprojector":
        assert model.P2 is not None
        tau = r("f (target)", features) @ r("P2", model.P2.numpy()).T
    else:
        tau = np.abs(features) if spec.task == "abs" else features
    z = (r("x", x) @ r("W_in", W_in).T + b).astype(np.float32)
    h = NONLINEARITY[spec.activation](torch.from_numpy(z)).numpy()
    e = r("h", h) @ r("W_out", W_out) - tau
    dh = r("e", e) @ r("W_out", W_out).T + spec.l1 / 2 * np.sign(h)
    wide = torch.from_numpy(z.astype(np.float64)).requires_grad_()
    NONLINEARITY[spec.activation](wide).sum().backward()
    assert wide.grad is not None
    dz = dh * wide.grad.numpy()
    unit = 2 / spec.batch_size
    found = {
        "loss": np.square(r("loss", e)).sum() / spec.batch_size,
        "W_in": unit * r("dz", dz).T @ r("x", x),
        "b": unit * r("db", dz).sum(0),
        "W_outT": unit * r("h", h).T @ r("e", e),
    }
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("rounding", "mantissa"), [(round_to_tf32, 10), (round_to_bf16, 7)])
def test_precision_rounds_exactly_the_listed_operands(
    rounding: object, mantissa: int, task: str, activation: str
) -> None:
    spec = spec_of(
        task=task, activation=activation, l1=0.1, init_bias=0.1, seed=6, n_features=9, d_embed=4, n_neurons=7
    )
    model = Model(spec)
    f = FeatureSampler(spec).batch(0, 0, spec.batch_size)
    loss, gradients = loss_and_gradients(model, f, rounding)  # type: ignore[arg-type]
    found = {"loss": loss, **gradients}

    def worst(operands: set[str]) -> float:
        expected = rounded_pass(model, f, mantissa, operands)
        return max(distance(found[name], expected[name]) for name in found)

    # float32 sums of at most 17 products: a few units of 2**-24. (An intermediate within such a rounding of a tie could
    # go the other way; at this seed none does.) An operand more or less moves a result by about 2**-(mantissa + 1)
    # over the root of the number of terms: that it shows is what makes the first assertion mean something.
    listed, agreement = set(OPERANDS[task]), 16 * 2.0**-24
    assert worst(listed) < agreement
    for operand in listed:
        assert worst(listed - {operand}) > 4 * agreement, f"whether {operand} is rounded does not show"
    for operand in ("loss", "db"):
        assert worst(listed | {operand}) > 4 * agreement, f"whether {operand} is rounded does not show"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("precision", "mantissa"), [("tf32", 10), ("bf16", 7), ("fp32", 23)])
def test_engine_trains_in_its_precision(precision: str, mantissa: int, task: str) -> None:
    spec = spec_of(task=task, seed=6, optimizer="sgd", schedule="constant", lr=0.125)
    block = Block.new([spec])
    before = Model(spec)
    loss = ReferenceEngine(precision).advance(block, 1)
    expected = rounded_pass(before, FeatureSampler(spec).batch(0, 0, 17), mantissa, set(OPERANDS[task]))
    # as in the test above; the update p - lr g is rounded once more, to 2**-24 of p
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=32 * 2.0**-24)
    for name, p in block.models[0].tensors.items():
        updated = before.tensors[name].double() - 0.125 * expected[name]
        allowed = 32 * 2.0**-24 * 0.125 * expected[name].norm() + 2.0**-24 * updated.norm()
        assert float((p.double() - updated).norm()) <= float(allowed), name


def test_float64_models_are_never_rounded() -> None:
    blocks = [Block.new([spec_of()], FLOAT64) for _ in range(2)]
    for block, precision in zip(blocks, ("fp32", "bf16"), strict=True):
        ReferenceEngine(precision).advance(block, 3)
    assert torch.equal(blocks[0].models[0].parameters, blocks[1].models[0].parameters)


# Projections and initial values.

PROJECTIONS = [(1, 1), (7, 1), (7, 3), (9, 9), (128, 32), (200, 17)]


@pytest.mark.parametrize(("n", "m"), PROJECTIONS)
@pytest.mark.parametrize("purpose", [Purpose.PROJECTION, Purpose.SECOND_PROJECTION])
def test_projection_is_the_u_of_a_gaussian_with_unit_rows(n: int, m: int, purpose: Purpose) -> None:
    P = projection(3, purpose, n, m).double()
    assert P.shape == (m, n) and projection(3, purpose, n, m).dtype == FLOAT32
    # columns of unit length, to a float32 rounding of each entry
    torch.testing.assert_close(P.norm(dim=0), torch.ones(n, dtype=FLOAT64), rtol=0, atol=2.0**-23)
    # U = G M has orthonormal columns, so U U^T is the projection onto the columns of G, whatever signs the
    # decomposition gives: |u_i|^2 its diagonal, and P^T P its correlations.
    G = normals(3, purpose, 0, n * m).view(n, m).numpy()
    hat = G @ np.linalg.solve(G.T @ G, G.T)
    length = np.sqrt(np.diag(hat))
    rounding = 8 * m**0.5 * 2.0**-24
    np.testing.assert_allclose((P.T @ P).numpy(), hat / np.outer(length, length), atol=rounding)
    # Rows of P, once each column has its length back, are orthonormal: P's rows are orthogonal up to that scaling.
    U = P.numpy().T * length[:, None]
    np.testing.assert_allclose(U.T @ U, np.eye(m), atol=rounding)
    # and they are the principal directions, the largest first: U^T G G^T U = diag(S^2)
    gram = U.T @ G @ G.T @ U
    singular = np.linalg.svd(G, compute_uv=False)
    np.testing.assert_allclose(gram, np.diag(singular**2), atol=rounding * singular[0] ** 2)


def test_projection_is_deterministic_whatever_the_threads_and_second_is_another_draw() -> None:
    # At this size the bits of the decomposition do depend on the threads that it is given (MKL 2024.2).
    n, m = 1000, 256
    first = projection(3, Purpose.PROJECTION, n, m)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            projection.cache_clear()
            assert torch.equal(projection(3, Purpose.PROJECTION, n, m), first)
            assert torch.get_num_threads() == count  # and it is put back
    finally:
        torch.set_num_threads(threads)
    for other in (projection(3, Purpose.SECOND_PROJECTION, n, m), projection(4, Purpose.PROJECTION, n, m)):
        # Unit columns of independent draws: their products have mean 0 and standard deviation 1/sqrt(m), so that the
        # mean of n of them has 1/sqrt(m n); 4.5 of these is 1 in 100,000.
        cosine = (other * first).sum(0)
        assert float(cosine.abs().mean()) < 2 / m**0.5 and abs(float(cosine.mean())) < 4.5 / (m * n) ** 0.5


def test_models_take_the_projections_of_their_seed_and_purpose() -> None:
    model = Model(spec_of(task="reprojector", seed=8))
    assert torch.equal(model.P, projection(8, Purpose.PROJECTION, 13, 5))
    assert model.P2 is not None and torch.equal(model.P2, projection(8, Purpose.SECOND_PROJECTION, 13, 5))
    assert Model(spec_of(seed=8)).P2 is None and torch.equal(Model(spec_of(seed=8)).P, model.P)


@pytest.mark.parametrize("task", TASKS)
def test_initial_values_are_pytorch_linear_defaults_with_init_bias_added(task: str) -> None:
    spec = ModelSpec(task=task, n_features=96, d_embed=48, n_neurons=80, init_bias=-1.5, seed=7)
    found = initial_values(spec)
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "W_in": (80, 48),
        "b": (80,),
        "W_outT": (80, spec.d_output),
    }
    bounds = {"W_in": 48**-0.5, "b": 48**-0.5, "W_outT": 80**-0.5}  # 1/sqrt(fan_in)
    for name, value in found.items():
        assert value.dtype == FLOAT32
        centred = value.double().flatten().numpy() + (1.5 if name == "b" else 0.0)
        rounding = 2.0**-23 if name == "b" else 0.0  # b is rounded at -1.5
        assert np.abs(centred).max() <= bounds[name] * (1 + 2.0**-24) + rounding
        assert scipy.stats.kstest(centred, scipy.stats.uniform(-bounds[name], 2 * bounds[name]).cdf).pvalue > 1e-4 / 3
    linear = nn.Linear(48, 80)
    assert linear.weight.abs().max() <= bounds["W_in"] and linear.weight.abs().max() > 0.99 * bounds["W_in"]


def test_initial_values_depend_on_the_seed_and_shape_alone() -> None:
    spec = spec_of(seed=7)
    found = initial_values(spec)
    same = initial_values(spec.replace(lr=1.0, l1=0.1, activation="gelu", optimizer="sgd", feature_prob=0.9, steps=3))
    assert all(torch.equal(same[name], value) for name, value in found.items())
    shifted = initial_values(spec.replace(init_bias=-1.0))
    assert torch.equal(shifted["W_in"], found["W_in"]) and torch.equal(shifted["W_outT"], found["W_outT"])
    # added to the draw, in float64, then rounded once: both roundings are below 2**-24
    assert float((shifted["b"].double() + 1 - found["b"].double()).abs().max()) < 2.0**-23
    other = initial_values(spec.replace(seed=8))
    flat, others = (torch.cat([v.flatten() for v in values.values()]) for values in (found, other))
    assert not (flat == others).any() and len(flat.unique()) == len(flat)
    model = Model(spec)
    for name, value in found.items():
        assert torch.equal(model.tensors[name], value)


# The whole method.


def published_training(spec: ModelSpec, start: Model, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The recipe as the paper's code has it: modules, autograd, torch_optimizer's LAMB, cosine annealing."""
    dtype = start.parameters.dtype
    encoder = nn.Linear(spec.d_embed, spec.n_neurons, dtype=dtype)
    decoder = nn.Linear(spec.n_neurons, spec.d_output, bias=False, dtype=dtype)
    with torch.no_grad():
        encoder.weight.copy_(start.tensors["W_in"])
        encoder.bias.copy_(start.tensors["b"])
        decoder.weight.copy_(start.tensors["W_outT"].T)
    optimizer = torch_optimizer.Lamb([*encoder.parameters(), *decoder.parameters()], lr=spec.lr)
    clock = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=spec.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(clock, T_max=512)
    sampler, losses = FeatureSampler(spec), []
    for t in range(steps):
        # Rates are float32 in every engine (design, section 7), and so that float64 can be compared here.
        optimizer.param_groups[0]["lr"] = float(np.float32(clock.param_groups[0]["lr"]))
        f = sampler.batch(t, 0, spec.batch_size).to(dtype)
        h = NONLINEARITY[spec.activation](encoder(f @ start.P.T))
        loss = ((decoder(h) - targets(spec, f, start.P2)) ** 2).sum() / spec.batch_size
        optimizer.zero_grad()
        (loss + spec.l1 * h.abs().sum() / spec.batch_size).backward()
        optimizer.step()
        clock.step()
        schedule.step()
        if t < spec.steps / 2:
            with torch.no_grad():
                encoder.bias.mul_(1 - spec.bias_decay * spec.lr)
        losses.append(float(loss.detach()))
    found = {"W_in": encoder.weight, "b": encoder.bias, "W_outT": decoder.weight.T}
    return losses, {name: value.detach() for name, value in found.items()}


RECIPES = [
    {},
    {"init_bias": -0.5, "bias_decay": 0.3, "lr": 0.03},
    {"activation": "gelu", "l1": 0.05},
    {"activation": "solu", "init_bias": 0.1},
    {"frequency": "power_law", "bias_decay": 3.0, "n_neurons": 130},
    {"n_neurons": 700, "d_embed": 13, "bias_decay": 1.0},  # |W_in| passes 10: the clamp binds
]


@pytest.mark.parametrize("fields", RECIPES, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_twenty_steps_equal_the_published_recipe_in_float64(task: str, fields: dict[str, object]) -> None:
    # steps=30: bias decay stops on the way
    spec = spec_of(task=task, seed=9, **{"lr": 0.01, "steps": 30, "batch_size": 64, **fields})
    block = Block.new([spec], FLOAT64)
    if spec.n_neurons == 700:
        assert block.models[0].tensors["W_in"].norm() > 10
    start = Model(spec, FLOAT64)
    losses = ReferenceEngine().advance(block, 20)
    expected_losses, expected = published_training(spec, start, 20)
    # float64 rounds a gradient to about 1e-15 of the largest; LAMB divides by sqrt(v) + 1e-6, which lifts what is
    # noise beside 1e-6 to at most 1e-9 of an update, and the updates change the parameters by a few per cent.
    for name, value in expected.items():
        assert distance(block.models[0].tensors[name], value) < 1e-10, name
    assert losses.dtype == FLOAT32 and losses.shape == (1, 20)
    np.testing.assert_allclose(losses[0].numpy(), expected_losses, rtol=2.0**-24 + 1e-10)  # stored in float32
    assert distance(start.parameters, block.models[0].parameters) > 1e-2  # it did train


@pytest.mark.parametrize("task", TASKS)
def test_twenty_steps_in_float32_are_as_near_to_float64_as_the_published_recipe(task: str) -> None:
    spec = spec_of(task=task, seed=9, lr=0.01, steps=30, batch_size=64, bias_decay=0.3)
    truth, block = Block.new([spec], FLOAT64), Block.new([spec])
    ReferenceEngine().advance(truth, 20)
    ReferenceEngine().advance(block, 20)
    _, published = published_training(spec, Model(spec), 20)
    for name, value in published.items():
        right = truth.models[0].tensors[name]
        # Both are float32 throughout; which of the two is luckier is chance, hence the factor and two roundings more.
        allowed = 3 * distance(value, right) + 2 * 2.0**-24
        assert distance(block.models[0].tensors[name], right) <= allowed, name
