"""The update rules against PyTorch's and torch_optimizer's, step by step; schedules and bias decay."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch_optimizer
from torch import Tensor

from fastmono.optim import (
    adamw_,
    bias_factor,
    decay_strength,
    lamb_,
    learning_rates,
    rate_table,
    relative_change,
    sgd_,
    spread,
)
from fastmono.spec import ModelSpec

STEPS = 50
SHAPES = [(1,), (7,), (5, 3), (1, 1), (33, 17), (130, 70)]


def gradients(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Iterator[Tensor]:
    """Gradients whose size varies over the steps and from entry to entry, some of them zero."""
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    for t in range(STEPS):
        size = scale * 10.0 ** torch.randint(-3, 2, shape, generator=generator)
        g = torch.randn(shape, generator=generator, dtype=torch.float64) * size * (1 + math.sin(t))
        yield torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, g).to(dtype)


def assert_within_rounding(found: Tensor, expected: Tensor, steps: int, largest: float) -> None:
    """Each step rounds an entry a few times (8 at most, counting the norms) to within half a unit of what is largest
    on the way; gradients are given, so that nothing amplifies an earlier rounding."""
    allowed = 8 * steps * torch.finfo(found.dtype).eps * largest
    difference = float((found - expected).abs().max())
    assert difference <= allowed, f"{difference:.3g} above {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6])  # at 1e-6 the eps of the denominator counts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lamb_equals_torch_optimizer_step_by_step(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    p, m, v = start.clone(), torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch_optimizer.Lamb([theirs], lr=1.0)
    largest = float(start.abs().max())
    for t, g in enumerate(gradients(shape, dtype, scale)):
        lr = 0.02 * (1 + math.cos(t / 9))
        optimizer.param_groups[0]["lr"] = lr
        theirs.grad = g.clone()
        optimizer.step()
        before = p.clone()
        lamb_(p, g, m, v, lr)
        state = optimizer.state[theirs]
        largest = max(largest, float(p.abs().max()), float((p - before).abs().max()))
        assert_within_rounding(p, theirs.detach(), t + 1, largest)
        assert_within_rounding(m, state["exp_avg"], t + 1, 10 * scale)
        assert_within_rounding(v, state["exp_avg_sq"], t + 1, (10 * scale) ** 2)
    assert not torch.equal(p, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", [9.99, 10.01, 300.0])
def test_lamb_clamps_the_norm_of_the_parameters_at_ten(norm: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(40, 9, generator=generator, dtype=torch.float64)
    start = (start * norm / start.norm()).to(dtype)
    g = torch.randn(40, 9, generator=generator, dtype=torch.float64).to(dtype)
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    lamb_(p, g, m, v, 0.01)
    # The update has length lr min(|p|, 10), whatever the gradient; it is the difference of numbers up to max|p|.
    rounding = 4 * torch.finfo(dtype).eps * float(start.abs().max()) * 360**0.5
    assert float((p - start).norm()) == pytest.approx(0.01 * min(norm, 10.0), abs=rounding)
    theirs = torch.nn.Parameter(start.clone())
    theirs.grad = g
    torch_optimizer.Lamb([theirs], lr=0.01).step()
    assert_within_rounding(p, theirs.detach(), 1, float(start.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lamb_has_trust_ratio_one_where_a_norm_is_zero(dtype: torch.dtype) -> None:
    g = torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    p, m, v = (torch.zeros(3, dtype=dtype) for _ in range(3))
    lamb_(p, g, m, v, 0.1)
    expected = -0.1 * (0.1 * g) / ((0.001 * g * g).sqrt() + 1e-6)  # |p| = 0
    assert_within_rounding(p, expected, 1, 1.0)
    theirs = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    theirs.grad = g
    torch_optimizer.Lamb([theirs], lr=0.1).step()
    assert_within_rounding(p, theirs.detach(), 1, 1.0)

    p = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)
    lamb_(p, torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype), 0.1)
    assert p.tolist() == [1.0, -2.0, 3.0]  # |u| = 0


@pytest.mark.parametrize("poison", ["p", "g", "m", "v"])
def test_lamb_passes_nan_on_to_the_parameters(poison: str) -> None:
    tensors = {name: torch.ones(5) for name in ("p", "g", "m", "v")}
    tensors[poison][3] = torch.nan
    lamb_(tensors["p"], tensors["g"], tensors["m"], tensors["v"], 0.1)
    assert tensors["p"].isnan().all()  # through the norm it reaches every entry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamw_equals_pytorch_with_its_defaults(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    p, m, v = start.clone(), torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], foreach=False)
    for t, g in enumerate(gradients(shape, dtype, scale)):
        lr = 0.02 * (1 + math.cos(t / 9))
        optimizer.param_groups[0]["lr"] = lr
        theirs.grad = g.clone()
        optimizer.step()
        adamw_(p, g, m, v, lr, t)
        state = optimizer.state[theirs]
        assert_within_rounding(p, theirs.detach(), t + 1, 4.0)  # |p| starts below 4 and moves by at most lr a step
        assert_within_rounding(m, state["exp_avg"], t + 1, 10 * scale)
        assert_within_rounding(v, state["exp_avg_sq"], t + 1, (10 * scale) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sgd_equals_pytorch_with_its_defaults(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.SGD([theirs], foreach=False)
    largest = float(p.abs().max())
    for t, g in enumerate(gradients(shape, dtype, 1.0)):
        lr = optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(t / 9))
        theirs.grad = g.clone()
        optimizer.step()
        sgd_(p, g, lr)
        largest = max(largest, float(p.abs().max()))
        assert_within_rounding(p, theirs.detach(), t + 1, largest)


# Schedules.


def pytorch_cosine(lr: float, half_period: int, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=half_period)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("lr", [0.03, 0.003, 1.0])
def test_published_schedule_equals_cosine_annealing_over_more_than_two_periods(lr: float) -> None:
    spec = ModelSpec(lr=lr, schedule="published", steps=2**17)
    found = np.array(learning_rates(spec, 0, 2100))
    # Half a unit of float32, 2**-24 relative; PyTorch's own recursion is off by 1e-12 of lr where it restarts from 0.
    np.testing.assert_allclose(found, pytorch_cosine(lr, 512, 2100), rtol=2.0**-24, atol=1e-11 * lr)
    assert found[0] == found[1024] == found[2048] == np.float32(lr)
    assert found[512] == found[1536] == 0.0


@pytest.mark.parametrize("steps", [1, 2, 7, 300, 1500])
def test_cosine_schedule_is_one_half_wave_over_all_steps(steps: int) -> None:
    spec = ModelSpec(lr=0.01, schedule="cosine", steps=steps)
    found = learning_rates(spec, 0, steps)
    np.testing.assert_allclose(found, pytorch_cosine(0.01, steps, steps), rtol=2.0**-24, atol=1e-13)
    assert len(found) == steps


def test_constant_schedule_is_the_base_rate_in_float32() -> None:
    assert learning_rates(ModelSpec(lr=0.1, schedule="constant"), 5, 3) == [float(np.float32(0.1))] * 3


@pytest.mark.parametrize("schedule", ["published", "cosine", "constant"])
def test_learning_rates_are_float32_and_the_same_however_they_are_cut(schedule: str) -> None:
    spec = ModelSpec(lr=0.007, schedule=schedule, steps=1111)
    whole = learning_rates(spec, 0, 1111)
    assert all(isinstance(rate, float) and rate == float(np.float32(rate)) for rate in whole)
    assert [rate for t in range(1111) for rate in learning_rates(spec, t, 1)] == whole
    assert learning_rates(spec, 0, 5) + learning_rates(spec, 5, 600) + learning_rates(spec, 605, 506) == whole
    assert learning_rates(spec, 3, 0) == []


@pytest.mark.parametrize("steps", [1, 7, 1111, 2**17, 2**32 + 1])
def test_rates_of_many_models_are_bitwise_those_of_the_formula_one_at_a_time(steps: int) -> None:
    def scalar(spec: ModelSpec, t: int) -> float:
        if spec.schedule == "constant":
            return float(np.float32(spec.lr))
        phase = t / spec.steps if spec.schedule == "cosine" else t % 1024 / 512
        return float(np.float32(spec.lr * 0.5 * (1 + math.cos(math.pi * phase))))

    names, rates = ("published", "cosine", "constant"), (0.1, 1 / 3, 0.003, 1e-38, 3e38)
    specs = [ModelSpec(lr=lr, schedule=name, steps=steps) for lr in rates for name in names]
    specs += [ModelSpec(lr=0.01, schedule="cosine", steps=steps + 5), specs[1].replace(seed=1)]
    for first in (0, 513, max(0, steps - 1500), 2**32 - 700):
        found = rate_table(specs, first, 1500)
        assert found.dtype == np.float32
        for row, spec in zip(found, specs, strict=True):
            assert row.tolist() == learning_rates(spec, first, 1500)
            assert row.tolist() == [scalar(spec, t) for t in range(first, first + 1500)]


def test_published_schedule_keeps_its_period_after_two_to_the_forty_steps() -> None:
    # A spec may name 2**63 - 1 steps; float64 holds pi t / 512 to 1e-16 of itself, which is no small angle there.
    spec = ModelSpec(lr=1.0, steps=2**62)
    first = learning_rates(spec, 0, 1024)
    np.testing.assert_allclose(learning_rates(spec, 2**40, 1024), first, rtol=2.0**-24, atol=1e-9)
    np.testing.assert_allclose(learning_rates(spec, 2**54, 1024), first, rtol=2.0**-24, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 9])
def test_bias_factor_acts_in_the_first_half_alone(steps: int) -> None:
    spec = ModelSpec(bias_decay=0.03, lr=0.01, steps=steps)
    factors = [bias_factor(spec, t) for t in range(steps)]
    half = math.ceil(steps / 2)
    assert factors == [1 - 0.03 * 0.01] * half + [1.0] * (steps - half)


def test_bias_factor_uses_the_base_learning_rate() -> None:
    spec = ModelSpec(bias_decay=0.5, lr=0.25, schedule="published", steps=4096)
    assert learning_rates(spec, 512, 1) == [0.0]
    assert bias_factor(spec, 512) == 1 - 0.5 * 0.25
    assert bias_factor(spec.replace(bias_decay=0.0), 512) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 9])
def test_decay_of_the_other_modes_acts_in_the_same_half_and_in_its_own_unit(steps: int) -> None:
    half = math.ceil(steps / 2)
    for mode, strength in (("per_neuron", 0.03 * 0.01), ("rate", 0.03), ("global", 0.0)):
        spec = ModelSpec(bias_decay=0.03, lr=0.01, steps=steps, bias_decay_mode=mode)
        assert [decay_strength(spec, t) for t in range(steps)] == [strength] * half + [0.0] * (steps - half)
        if mode != "global":
            assert [bias_factor(spec, t) for t in range(steps)] == [1.0] * steps


def test_spread_is_0_for_one_output_and_1_for_all_alike_whatever_their_size_and_signs() -> None:
    rows = torch.zeros(5, 100, dtype=torch.float64)
    rows[0, 7] = -3.0
    rows[1] = torch.where(torch.arange(100) % 3 == 0, -0.2, 0.2)
    rows[2, :10] = 1e-3  # n of o alike: (1 - 1/n) / (1 - 1/o)
    rows[3] = 0.05
    rows[3, 50] = 1.0
    participation = (1 + 99 * 0.05**2) ** 2 / (1 + 99 * 0.05**4)
    expected = [0.0, 1.0, 0.9 / 0.99, (1 - 1 / participation) / 0.99, 1.0]  # the last row is zero
    assert expected[3] == pytest.approx(0.36, abs=0.005)  # as the docstring has it
    np.testing.assert_allclose(spread(rows).numpy(), expected, rtol=1e-12, atol=1e-15)
    # sums of 100 float32 numbers in pairs: a few roundings
    np.testing.assert_allclose(spread(rows.float()).numpy(), expected, rtol=0, atol=8 * 2.0**-24)
    assert spread(rows.float() * 1e-25).tolist() == [1.0] * 5  # whose squares are 0
    assert spread(torch.full((2, 1), 3.0)).tolist() == [0.0, 0.0]  # one output
    drawn = torch.rand(50, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # uniform weights: sum w^4 / (sum w^2)^2 is about (1/5) / (1/3)^2 / o
    assert float(spread(drawn).mean()) == pytest.approx(1 - 0.8 / 100, abs=0.002)


def test_spread_is_that_of_each_row_by_its_definition() -> None:
    rows = torch.randn(20, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    for s, row in zip(spread(rows).tolist(), rows.tolist(), strict=True):
        participation = sum(w * w for w in row) ** 2 / sum(w**4 for w in row)
        assert s == pytest.approx((1 - 1 / participation) / (1 - 1 / 33), rel=1e-12)


def test_spread_passes_nan_on() -> None:
    assert spread(torch.tensor([[1.0, math.nan], [1.0, 0.0]])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("norm", [3.0, 20.0])
def test_relative_change_of_a_lamb_update_is_its_rate_where_no_norm_is_above_ten(norm: float) -> None:
    generator = torch.Generator().manual_seed(5)
    before = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 9), (40, 30))]
    before = [p * norm / p.norm() for p in before]
    after = [p.clone() for p in before]
    for p in after:
        lamb_(p, torch.randn(p.shape, generator=generator, dtype=torch.float64), p * 0, p * 0, 0.02)
    assert float(relative_change(before, after)) == pytest.approx(0.02 * min(1.0, 10 / norm), rel=1e-12)


def test_relative_change_is_of_all_tensors_together_and_0_where_they_are_zero() -> None:
    generator = torch.Generator().manual_seed(6)
    before, after = ([torch.randn(s, generator=generator).double() for s in ((3, 4), (7,))] for _ in range(2))
    old, new = (torch.cat([p.flatten() for p in each]) for each in (before, after))
    assert float(relative_change(before, after)) == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-12)
    assert float(relative_change([torch.zeros(3)], [torch.ones(3)])) == 0.0
