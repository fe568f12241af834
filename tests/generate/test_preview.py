"""Previews, beside the decoder that they stand for."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from fluxjax.generate import fit_preview
from fluxjax.generate.preview import Preview


class LinearVae(eqx.Module):
    """A decoder that is a preview, enlarged."""

    matrix: jax.Array

    def decode(self, latent):
        small = jnp.einsum("chw,cr->hwr", latent, self.matrix[1:]) + self.matrix[0]
        return repeat(small, "rows columns rgb -> (rows a) (columns b) rgb", a=8, b=8)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_an_affine_decoder_is_found_again():
    matrix = 0.02 * draw(17, 3)
    fitted = inspect.unwrap(fit_preview)(LinearVae(matrix), draw(2, 16, 16, 16, seed=1))
    # The ridge of a hundredth takes about a hundredth off.
    np.testing.assert_allclose(fitted.matrix, matrix, atol=2e-3)


def test_previews_are_clipped():
    assert Preview(jnp.full((17, 3), 5.0))(draw(16, 2, 2)).max() == 1
