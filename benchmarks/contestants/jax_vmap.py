"""JAX: `jit(scan(vmap))` with donated buffers, over streams and their models; whole steps run in one XLA program."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contestants.base import Contestant, Unavailable, factor_table, rate_table, stream_seed
from benchmarks.state import TENSORS, State
from fastmono.optim import BETA1, BETA2, LAMB_EPS, LAMB_LARGEST_NORM

SCAN_STEPS = 16
PRODUCTS = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "default"}


def import_jax(device: torch.device) -> Any:
    """The module, and its device. Raises `Unavailable` where either is missing."""
    # By default JAX takes three quarters of a GPU's memory, which the other contestants need too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except ImportError:
        raise Unavailable("jax is not installed: pip install jax") from None
    try:
        return jax, jax.devices("cuda" if device.type == "cuda" else "cpu")[0]
    except RuntimeError:
        raise Unavailable("this jax has no CUDA backend: pip install 'jax[cuda12]'") from None


class JaxVmap(Contestant):
    """Raises `Unavailable` without jax, or without its CUDA backend for a GPU."""

    warm_steps = SCAN_STEPS

    def __init__(self, device: torch.device, precision: str = "fp32") -> None:
        self.precision = precision
        self.jax, self.place = import_jax(device)
        self.operand = self.jax.numpy.bfloat16 if precision == "bf16" else self.jax.numpy.float32
        self.state: State | None = None
        self.programs: dict[Any, Any] = {}

    def _product(self) -> Any:
        """a @ b with sums in float32. Gradients too multiply operands of the precision: left alone, JAX would multiply
        a float32 cotangent with bf16, at the rate of the former."""
        jax, jnp, operand = self.jax, self.jax.numpy, self.operand

        def dot(a: Any, b: Any) -> Any:
            return jnp.dot(a, b, preferred_element_type=jnp.float32)

        if operand == jnp.float32:
            return dot

        def backward(saved: Any, g: Any) -> Any:
            a, b = saved
            g = g.astype(operand)
            return dot(g, b.T).astype(operand), dot(a.T, g).astype(operand)

        product = jax.custom_vjp(dot)
        product.defvjp(lambda a, b: (dot(a, b), (a, b)), backward)
        return product

    def _functions(self, S: int, B: int, N: int, probability: float) -> tuple[Any, Any]:
        """A step on given features, and a scan of sampled steps: carry (p, m, v, key), rates and factors [n, S, G]."""
        jax, jnp, operand = self.jax, self.jax.numpy, self.operand
        product = self._product()

        def loss(p: dict[str, Any], x: Any, f: Any) -> Any:
            z = product(x.astype(operand), p["W_in"].astype(operand).T) + p["b"]
            h = jax.nn.relu(z).astype(operand)
            return jnp.sum((product(h, p["W_outT"].astype(operand)) - f) ** 2) / B

        def lamb(p: Any, g: Any, m: Any, v: Any, lr: Any) -> tuple[Any, Any, Any]:
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
            u = m / (jnp.sqrt(v) + LAMB_EPS)
            norm_p, norm_u = jnp.sqrt(jnp.sum(p * p)), jnp.sqrt(jnp.sum(u * u))
            ratio = jnp.where((norm_p == 0) | (norm_u == 0), 1.0, jnp.minimum(norm_p, LAMB_LARGEST_NORM) / norm_u)
            return p - lr * ratio * u, m, v

        def one_model(p: Any, m: Any, v: Any, x: Any, f: Any, lr: Any, factor: Any) -> Any:
            value, g = jax.value_and_grad(loss)(p, x, f)
            new = {name: lamb(p[name], g[name], m[name], v[name], lr) for name in TENSORS}
            p, m, v = ({name: new[name][i] for name in TENSORS} for i in range(3))
            return p | {"b": p["b"] * factor}, m, v, value

        of_group = jax.vmap(one_model, in_axes=(0, 0, 0, None, None, 0, 0))
        of_all = jax.vmap(of_group)

        def step(p: Any, m: Any, v: Any, PT: Any, f: Any, lr: Any, factor: Any) -> Any:
            return of_all(p, m, v, jax.vmap(product)(f.astype(operand), PT.astype(operand)), f, lr, factor)

        def sampled(PT: Any, carry: Any, row: Any) -> Any:
            p, m, v, key = carry
            key, own = jax.random.split(key)
            u = jax.random.uniform(own, (S, B, N))
            p, m, v, losses = step(p, m, v, PT, jnp.where(u < probability, u / probability, 0.0), *row)
            return (p, m, v, key), losses

        def scan(carry: Any, PT: Any, rows: Any) -> Any:
            return jax.lax.scan(partial(sampled, PT), carry, rows)

        return jax.jit(step), jax.jit(scan, donate_argnums=(0,))

    def load(self, state: State) -> None:
        self.state, self.step, spec = state, state.step, state.specs[0]
        self.shape = state.n_streams, state.group
        part = state.parameters, state.first_moment, state.second_moment
        p, m, v = (
            {name: self._put(tensor.reshape(*self.shape, *tensor.shape[1:])) for name, tensor in one.items()}
            for one in part
        )
        # The default generator: on 2 CPU cores (jax 0.10.2, 512 x 128 numbers) half the time of "rbg".
        key = self.jax.random.key(stream_seed(spec.seed, state.step))
        self.carry = (p, m, v, self.jax.device_put(key, self.place))
        self.PT = self._put(state.P.mT)
        self.lr = torch.tensor([spec.lr for spec in state.specs], dtype=torch.float64)
        setting = (state.n_streams, spec.batch_size, spec.n_features, spec.feature_prob)
        if setting not in self.programs:
            self.programs[setting] = self._functions(*setting)
        self.on_features, self.scan = self.programs[setting]

    def _put(self, tensor: Tensor) -> Any:
        return self.jax.device_put(np.array(tensor.numpy()), self.place)

    def _tables(self, n: int) -> tuple[Any, Any]:
        assert self.state is not None
        tables = rate_table(self.lr, self.step, n), factor_table(self.state, self.step, n)
        return tuple(table.view(n, *self.shape).numpy() for table in tables)  # type: ignore[return-value]

    def advance(self, n_steps: int) -> Tensor:
        scan, (rates, factors) = math.gcd(n_steps, SCAN_STEPS), self._tables(n_steps)
        losses = []
        with self.jax.default_matmul_precision(PRODUCTS[self.precision]):
            for start in range(0, n_steps, scan):
                rows = rates[start : start + scan], factors[start : start + scan]
                self.carry, found = self.scan(self.carry, self.PT, self.jax.device_put(rows, self.place))
                losses.append(found)
        self.step += n_steps
        self.jax.block_until_ready(self.carry[0])
        return torch.from_numpy(np.concatenate([np.asarray(one) for one in losses])).flatten(1).T

    def advance_on(self, batches: Tensor) -> Tensor:
        rates, factors = self._tables(len(batches))
        losses = []
        with self.jax.default_matmul_precision(PRODUCTS[self.precision]):
            for f, lr, factor in zip(batches, rates, factors, strict=True):
                *self.carry, found = self.on_features(*self.carry[:3], self.PT, self._put(f), lr, factor)
                losses.append(torch.from_numpy(np.array(found)).flatten())
        self.step += len(batches)
        return torch.stack(losses, 1)

    def read(self) -> State:
        assert self.state is not None
        p, m, v = (
            {name: torch.from_numpy(np.array(part[name])).flatten(0, 1) for name in TENSORS} for part in self.carry[:3]
        )
        return replace(self.state, step=self.step, parameters=p, first_moment=m, second_moment=v)

    def unload(self) -> None:
        self.carry = ()
