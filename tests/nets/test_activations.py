"""The activations, compared with closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from fluxjax.nets.activations import ACTIVATIONS, exact_gelu, gelu, quick_gelu, silu

CLOSED_FORMS = {
    gelu: lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    exact_gelu: lambda x: x / 2 * (1 + erf(x / np.sqrt(2))),
    quick_gelu: lambda x: x * expit(1.702 * x),
    silu: lambda x: x * expit(x),
}
"""Each activation in NumPy and SciPy, of float64."""


@pytest.fixture(params=CLOSED_FORMS, ids=lambda function: function.__name__)
def activation(request):
    return request.param


def test_in_bfloat16_only_the_result_is_rounded(activation):
    x = jnp.linspace(-3, 3, 2001).astype(jnp.bfloat16)
    found = jax.jit(activation)(x)
    assert found.dtype == jnp.bfloat16
    expected = CLOSED_FORMS[activation](np.asarray(x, np.float64))
    # Half of the distance between two numbers of 8 bits, which is at most 2**-8 of either; and
    # float32's own error, which is relative to x.
    bound = 2.0**-8 * np.abs(expected) + 1e-6
    assert (np.abs(np.asarray(found, np.float64) - expected) <= bound).all()


def test_in_float32_the_result_is_the_closed_form(activation):
    x = np.random.default_rng(0).normal(0, 4, 10_000).astype(np.float32)
    expected = CLOSED_FORMS[activation](x.astype(np.float64))
    np.testing.assert_allclose(activation(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_closed_form(activation):
    x = np.linspace(-4, 4, 81)
    step = 1e-6
    form = CLOSED_FORMS[activation]
    expected = (form(x + step) - form(x - step)) / (2 * step)
    found = jax.vmap(jax.grad(activation))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_for_its_gradient_only_the_input_is_kept(activation):
    x = jnp.ones((4, 8), jnp.bfloat16)
    _, pull_back = jax.vjp(activation, x)
    (kept,) = (leaf for leaf in jax.tree.leaves(pull_back) if leaf.shape)
    assert (kept.shape, kept.dtype) == (x.shape, x.dtype)


def test_a_config_can_name_three_of_them():
    assert {"quick_gelu": quick_gelu, "gelu": exact_gelu, "gelu_tanh": gelu} == ACTIVATIONS
