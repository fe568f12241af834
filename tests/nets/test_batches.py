"""The documented way to run a batch compiles without a warning, with the weights as arguments."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import Clip, Vae
from fluxjax.nets import ClipConfig, VaeConfig


@pytest.fixture(scope="module")
def clip():
    config = ClipConfig(
        vocabulary=20, positions=9, width=16, heads=2, depth=1, mlp_width=32, eos_token=19
    )
    return eqx.filter_jit(Clip)(config, key=jax.random.key(0))


def test_filter_vmap_of_a_network_can_be_jitted(clip):
    ids = jnp.array([[1, 5, 19], [7, 19, 19]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pooled = eqx.filter_jit(eqx.filter_vmap(clip))(ids)
    expected = [eqx.filter_jit(clip)(row) for row in ids]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


def test_its_weights_are_arguments_of_the_program(clip):
    """Closed over, they would be constants of it, and other weights would compile anew."""

    @eqx.debug.assert_max_traces(max_traces=1)
    def encode(clip, ids):
        return eqx.filter_vmap(clip)(ids)

    run = eqx.filter_jit(encode)
    ids = jnp.array([[1, 5, 19]])
    changed = jax.tree.map(lambda leaf: leaf + 1, clip)
    assert not np.allclose(run(clip, ids), run(changed, ids))


def test_filter_vmap_of_a_method_can_be_jitted():
    vae = eqx.filter_jit(Vae)(
        VaeConfig(channels=(4, 4), groups=2, resnets=1), key=jax.random.key(0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = eqx.filter_jit(eqx.filter_vmap(vae.decode))(jnp.zeros((2, 16, 2, 2)))
    assert images.shape == (2, 4, 4, 3)
