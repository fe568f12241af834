"""Previews: a latent as a small image by one matrix, fitted to what the VAE's decoder makes of some."""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from fluxjax.arguments import convert_arguments
from fluxjax.generate.latents import CELL
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Image, Latent


class Preview(eqx.Module):
    """The colour of a latent's cell as an affine function of its channels: an image of an eighth of the size, at next to no
    cost beside the decoder.

    `matrix`: from 1 and the channels to red, green, blue.
    """

    matrix: Float[Array, "channels_and_1 3"] = eqx.field(converter=jnp.asarray)

    @convert_arguments
    def __call__(self, latent: Latent) -> Image:
        """Return a pixel a cell, in [-1, 1], clipped."""
        return jnp.clip(_with_one(latent) @ self.matrix, -1, 1)


@convert_arguments
def fit_preview(vae: Vae, latents: Float[Array, "images latent_channels rows columns"]) -> Preview:
    """Return the preview whose pixels are nearest, in squares, to the mean colours of cells in the decoded images.

    `latents`: of images of many colours, the more the better: `vae.encode` of some, or what `sample` ended in.
    """

    def cells(latent: Latent) -> Image:
        decoded = jnp.clip(vae.decode(latent).astype(jnp.float32), -1, 1)
        return reduce(
            decoded, "(rows a) (columns b) rgb -> rows columns rgb", "mean", a=CELL, b=CELL
        )

    wanted = jax.lax.map(cells, latents).reshape(-1, 3)
    given = jax.vmap(_with_one)(latents).reshape(len(wanted), -1)
    # Latents have unit variance. The ridge holds the answer down where the images have fewer colours than there are channels.
    ridge = 1e-2 * len(wanted) * jnp.eye(given.shape[1])
    return Preview(jnp.linalg.solve(given.T @ given + ridge, given.T @ wanted))


def _with_one(latent: Latent) -> Float[Array, "rows columns channels_and_1"]:
    cells = rearrange(latent.astype(jnp.float32), "channels rows columns -> rows columns channels")
    return jnp.concatenate([jnp.ones((*cells.shape[:2], 1)), cells], axis=-1)
