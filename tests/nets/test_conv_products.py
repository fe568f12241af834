"""Convolutions of bfloat16, which CPUs compute as matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.nets import conv
from fluxjax.nets.conv import Conv

CHANNELS = 64
"""The least that are computed as products."""


@pytest.fixture(scope="module")
def layer():
    return Conv(CHANNELS, CHANNELS, key=jax.random.key(0))


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


def test_gradients_are_those_of_the_convolution(layer, cells, monkeypatch):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    x = cells.astype(jnp.bfloat16)

    def total(layer):
        return jnp.sum(layer(x).astype(jnp.float32) ** 2)

    found = jax.jit(jax.grad(total))(half).weight.value
    monkeypatch.setattr(conv, "_WIDE", CHANNELS + 1)
    expected = jax.jit(lambda layer: jax.grad(total)(layer))(half).weight.value
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.02 * float(expected.std())
    )
