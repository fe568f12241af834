"""Derivatives of convolutions: those that JAX takes of `jax.lax.conv_general_dilated`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import draw

from fluxjax.nets.conv import Conv

X = draw(5, 7, 3)
CASES = [
    (3, {}, ((1, 1), (1, 1))),
    (1, {}, ((0, 0), (0, 0))),
    (3, {"stride": 2, "padding": ((0, 1), (0, 1))}, ((0, 1), (0, 1))),
]


@pytest.mark.parametrize(("side", "given", "padding"), CASES, ids=["same", "1x1", "halved"])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_derivatives_by_cells_and_kernel_are_those_of_jaxs_convolution(
    side, given, padding, dtype, bound
):
    layer = Conv(3, 4, side=side, key=jax.random.key(0))
    kernel = layer.weight.value

    def ours(x, kernel):
        changed = eqx.tree_at(lambda one: one.weight.value, layer, kernel)
        return changed(x.astype(dtype), **given).astype(jnp.float32)

    def theirs(x, kernel):
        strides = (given.get("stride", 1),) * 2
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x[None], kernel, strides, padding, dimension_numbers=dims
        )[0]

    value, pull_back = jax.vjp(ours, X, kernel)
    direction = draw(*value.shape, seed=2)
    expected = jax.vjp(theirs, X, kernel)[1](direction)
    for found, right in zip(pull_back(direction), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=bound * float(jnp.abs(right).max()))
    tangents = draw(*X.shape, seed=3), draw(*kernel.shape, seed=4)
    found = jax.jvp(ours, (X, kernel), tangents)[1]
    right = jax.jvp(theirs, (X, kernel), tangents)[1]
    np.testing.assert_allclose(found, right, atol=bound * float(jnp.abs(right).max()))
