"""The peers: what they multiply, and that they differentiate what they say."""

import pytest
import torch

from benchmarks.contestants.jax_vmap import JaxVmap


def products(jaxpr):
    """The types of the operands of every matrix product, in the functions that are called as well."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in equation.invars)
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def test_jax_multiplies_bf16_in_its_gradients_too_and_they_are_those_of_float32_but_for_rounding():
    jax = pytest.importorskip("jax")
    one, plain = (JaxVmap(torch.device("cpu"), precision) for precision in ("bf16", "fp32"))
    a, b, c = (jax.random.normal(jax.random.PRNGKey(i), shape) for i, shape in enumerate(((7, 5), (5, 6), (7, 6))))

    def loss(contestant):
        product, operand = contestant._product(), contestant.operand
        return lambda a, b: (c * product(a.astype(operand), b.astype(operand))).sum()

    found = jax.make_jaxpr(jax.grad(loss(one), (0, 1)))(a, b)
    assert set(products(found.jaxpr)) == {("bfloat16", "bfloat16")} and len(list(products(found.jaxpr))) >= 2
    for ours, truth in zip(jax.grad(loss(one), (0, 1))(a, b), jax.grad(loss(plain), (0, 1))(a, b), strict=True):
        # Two operands and the result are rounded to 8 bits: 2^-9 of each, of a sum of products of either sign.
        assert abs(ours - truth).max() <= 3 * 2.0**-8 * abs(truth).max()
