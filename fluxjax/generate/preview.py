"""Previews: a latent as a small image by one matrix, fitted to the VAE's decoder."""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from fluxjax.arguments import convert_arguments
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Image, Latent

_RIDGE = 1e-2
"""Weight of the ridge regression's penalty, relative to the number of cells."""


class Preview(eqx.Module):
    """The colour of a latent cell as an affine function of its channels.

    The image has an eighth of the full size, and costs next to nothing beside the decoder.
    `matrix`: from (1, channels) to (red, green, blue).
    """

    matrix: Float[Array, "channels_and_1 3"] = eqx.field(converter=jnp.asarray)

    @convert_arguments
    def __call__(self, latent: Latent) -> Image:
        """Return one pixel for each cell, in [-1, 1], clipped."""
        return jnp.clip(_affine_features(latent) @ self.matrix, -1, 1)


@convert_arguments
def fit_preview(vae: Vae, latents: Float[Array, "images latent_channels rows columns"]) -> Preview:
    """Fit a preview to the mean colours of cells in decoded images, by least squares.

    **Arguments:** `latents`: of images of many colours, as `vae.encode` or `denoise` give them.
    """

    def mean_colours(latent: Latent) -> Image:
        decoded = jnp.clip(vae.decode(latent).astype(jnp.float32), -1, 1)
        side = decoded.shape[0] // latent.shape[1]  # pixels along a side of a cell
        pattern = "(rows a) (columns b) rgb -> rows columns rgb"
        return reduce(decoded, pattern, "mean", a=side, b=side)

    colours = jax.lax.map(mean_colours, latents).reshape(-1, 3)
    features = jax.vmap(_affine_features)(latents).reshape(len(colours), -1)
    # Latents have unit variance. The ridge keeps the solution small where the images have fewer
    # colours than there are channels.
    ridge = _RIDGE * len(colours) * jnp.eye(features.shape[1])
    matrix = jnp.linalg.solve(features.T @ features + ridge, features.T @ colours)
    return Preview(matrix)


def _affine_features(latent: Latent) -> Float[Array, "rows columns channels_and_1"]:
    """Return for each cell a 1, for the offset, and its channels."""
    cells = rearrange(latent.astype(jnp.float32), "channels rows columns -> rows columns channels")
    return jnp.concatenate([jnp.ones((*cells.shape[:2], 1)), cells], axis=-1)
