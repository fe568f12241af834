"""Derivatives of the decoder whose layers are computed again: the same, with less kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import draw

from fluxjax import Vae
from fluxjax.devices import VaeStrips, strip_vae
from fluxjax.nets import VaeConfig
from fluxjax.nets.rows import WHOLE

CONFIG = VaeConfig(channels=(4, 8), groups=2, resnets=1, latent_channels=2)
LATENT, DIRECTION, COTANGENT = draw(2, 4, 6, seed=1), draw(2, 4, 6, seed=2), draw(8, 12, 3, seed=3)


@pytest.fixture(scope="module")
def vae():
    return Vae(CONFIG, key=jax.random.key(0))


def derivatives(vae, remat):
    """Return the image, its derivative in a direction, and the gradient of a product with it."""

    @jax.jit
    def run(latent):
        image, forward = jax.linearize(lambda z: vae.decode(z, remat=remat), latent)
        (gradient,) = jax.linear_transpose(forward, latent)(COTANGENT)
        return image, forward(DIRECTION), gradient

    return run(LATENT)


def kept_bytes(vae, remat):
    """Return the bytes of what is kept of an evaluation for its gradient, without the weights."""
    _, gradient = jax.eval_shape(lambda z: jax.vjp(lambda z: vae.decode(z, remat=remat), z), LATENT)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(vae.decoder))
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(gradient))
    return kept - weights


def test_derivatives_are_the_same(vae):
    for found, expected in zip(derivatives(vae, True), derivatives(vae, False), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(expected).max() > 0.1


def test_only_the_inputs_of_layers_are_kept(vae):
    inputs = jax.eval_shape(lambda z: stage_inputs(vae.decoder, z), jnp.moveaxis(LATENT, 0, -1))
    most = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs))
    assert kept_bytes(vae, True) <= most < kept_bytes(vae, False) / 3


def run_stage(stage, z):
    return stage.run(z, WHOLE)


def stage_inputs(decoder, z):
    """Return the input of each layer."""
    inputs = []
    for stage in decoder.stages():
        inputs.append(z)
        z = jax.eval_shape(partial(run_stage, stage), z)
    return inputs


def test_a_decoder_in_strips_is_refused(vae):
    strips = strip_vae(vae, VaeStrips(rows=2, columns=4, stored=1))
    with pytest.raises(ValueError, match=r"Differentiate the VAE that `strip_vae`"):
        strips.decode(LATENT, remat=True)
