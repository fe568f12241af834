"""Images to latents and back, a batch at once."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.devices.run import on_mesh
from fluxjax.devices.vae_rows import split_vae_rows
from fluxjax.generate.latents import unpack_latents
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Image, Latent

Rows = TypeVar("Rows")


@eqx.filter_jit
def decode(
    vae: Vae,
    latents: Float[Array, "images latent_channels rows columns"],
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> Float[Array, "images height width 3"]:
    """Decode latents, one after another.

    **Arguments:** `latents`: scaled and shifted, as `denoise` returns them. `dtype`: of the
    activations. `mesh`: of devices; the VAE is then from `shard`, images are split over its axes
    "data" and "fsdp", and the rows of each image over the other axes.
    **Returns:** float32 in [-1, 1], clipped; NaN where the network gives infinity.
    """

    def decode_one(vae: Vae, latent: Latent) -> Image:
        image = vae.decode(latent.astype(dtype)).astype(jnp.float32)
        return jnp.where(jnp.isfinite(image), jnp.clip(image, -1, 1), jnp.nan)

    return _one_by_one(decode_one, vae, latents, mesh)


@convert_arguments
def decode_tokens(
    vae: Vae,
    packed: Float[Array, "*images img_tokens channels"],
    height: int,
    width: int,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*images height width 3"]:
    """Decode packed latents, as `sample` returns them, to images.

    **Arguments:** `packed`: of one image, or of several with a leading axis. `height`, `width`: of
    the images, in pixels. `dtype`: of the activations.
    **Returns:** as `decode`: clipped, so that pixels at the ends of the range have no gradient.
    **Raises:** `ValueError` for a size that the number of tokens does not fit.
    """
    return decode_packed(vae, packed, height, width, jnp.dtype(dtype))


@eqx.filter_jit
def decode_packed(
    vae: Vae,
    packed: Float[Array, "*images img_tokens channels"],
    height: int,
    width: int,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> Float[Array, "*images height width 3"]:
    """Decode packed latents, with all arguments but arrays static.

    As `decode_tokens`, and with a mesh as `decode`.
    """
    if packed.ndim == 2:
        return decode_packed(vae, packed[None], height, width, dtype, mesh)[0]
    return decode(vae, unpack_images(packed, height, width), dtype=dtype, mesh=mesh)


@eqx.filter_jit
def unpack_images(
    packed: Float[Array, "images img_tokens channels"], height: int, width: int
) -> Float[Array, "images latent_channels rows columns"]:
    """Return the latents of a batch from their image tokens. `height`, `width`: in pixels."""
    return jax.vmap(lambda one: unpack_latents(one, height, width))(packed)


@eqx.filter_jit
def encode(
    vae: Vae,
    images: Float[Array, "images height width 3"],
    *,
    dtype: DTypeLike,
    keys: Array | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "images latent_channels rows columns"]:
    """Encode images, one after another.

    **Arguments:** `images`: in [-1, 1]. `dtype`: of the activations. `keys`: one for each image, to
    sample the posterior; None takes its mean. `mesh`: as for `decode`.
    **Returns:** latents, scaled and shifted, float32.
    **Raises:** `ValueError` for sizes that are not multiples of 8.
    """

    def encode_one(vae: Vae, row: tuple[Image, Array | None]) -> Latent:
        image, key = row
        return vae.encode(image.astype(dtype), key=key).astype(jnp.float32)

    return _one_by_one(encode_one, vae, (images, keys), mesh)


def _one_by_one(
    function: Callable[[Vae, Rows], Array], vae: Vae, rows: Rows, mesh: Mesh | None
) -> Array:
    """Return function(vae, row) of each row; one at a time, since a row fills the device alone."""

    def map_rows(vae: Vae, rows: Rows, shared: None) -> Array:
        return jax.lax.map(lambda row: function(vae, row), rows)

    if mesh is None:
        return map_rows(vae, rows, None)
    split_axes = [axis for axis in ("tensor", "context") if mesh.shape[axis] > 1]

    def map_rows_in_strips(vae: Vae, rows: Rows, shared: None) -> Array:
        if split_axes:
            vae = split_vae_rows(vae, split_axes)
        return map_rows(vae, rows, None)

    return on_mesh(map_rows_in_strips, mesh, vae, rows)
