"""Convolutions of bfloat16, which CPUs compute as matrix products."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from fluxjax.nets.conv import Conv

CHANNELS = 64
"""The least that are computed as products."""


@pytest.fixture(scope="module")
def layer():
    made = Conv(CHANNELS, CHANNELS, key=jax.random.key(0))
    bias = jax.random.normal(jax.random.key(3), (CHANNELS,))
    return eqx.tree_at(lambda layer: layer.bias, made, bias)


@pytest.fixture(scope="module")
def cells():
    """Rows that blocks do not divide: a block has 11 of them."""
    return jax.random.normal(jax.random.key(1), (26, 90, CHANNELS))


RUNS = {
    "3x3": lambda layer, x: layer(x),
    "padded at the end only": lambda layer, x: layer(x, padding=((0, 1), (0, 2))),
    "of enlarged cells": lambda layer, x: layer.upsample(x),
}


@pytest.mark.parametrize("name", RUNS)
def test_products_are_the_convolution(layer, cells, name):
    """The bound is bfloat16's rounding of operands and result; a wrong cell gives about 1."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    # Operands are rounded before both, so that only the result's rounding differs.
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    x = cells.astype(jnp.bfloat16)
    exact = jax.jit(RUNS[name])(rounded, x.astype(jnp.float32))
    program = jax.make_jaxpr(RUNS[name])(half, x)
    assert "conv_general_dilated" not in str(program)
    found = jax.jit(RUNS[name])(half, x).astype(jnp.float32)
    assert found.shape == exact.shape
    assert jnp.linalg.norm(found - exact) <= 4e-3 * jnp.linalg.norm(exact)


def test_few_channels_strides_and_float32_are_convolutions(layer, cells):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    few = Conv(CHANNELS, 3, key=jax.random.key(2))
    for run in (
        lambda: layer(cells),
        lambda: half(cells.astype(jnp.bfloat16), stride=2),
        lambda: few(cells.astype(jnp.bfloat16)),
    ):
        assert "conv_general_dilated" in str(jax.make_jaxpr(run)())


@pytest.mark.parametrize("name", RUNS)
def test_derivatives_are_those_of_the_convolution(layer, cells, name):
    """Those of the same layer in float32. The bound is that of bfloat16 in `test_conv.py`."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    inputs = half, cells.astype(jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs)
    tangents = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), exact
    )

    @jax.jit
    def derivatives(inputs, tangents):
        tangents = jax.tree.map(lambda leaf, change: change.astype(leaf.dtype), inputs, tangents)
        value, change = jax.jvp(RUNS[name], inputs, tangents)
        direction = jax.random.normal(jax.random.key(4), value.shape).astype(value.dtype)
        return change, jax.vjp(RUNS[name], *inputs)[1](direction)

    found, expected = (jax.tree.leaves(derivatives(one, tangents)) for one in (inputs, exact))
    assert len(found) == 4  # of the value, and by kernel, bias and cells
    for ours, right in zip(found, expected, strict=True):
        error = float(jnp.abs(ours.astype(jnp.float32) - right).max())
        assert error <= 2e-2 * float(jnp.abs(right).max())
