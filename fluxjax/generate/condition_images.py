"""Images that others are conditioned on: resized to a size, and encoded."""

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.autoencode import encode
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Image, Latent


@convert_arguments
def resize_image(image: Image, height: int, width: int) -> Float[Array, "new_height new_width 3"]:
    """Return an image resized by Lanczos' filter, each channel in float32, clipped to [-1, 1].

    **Arguments:** `image`: in [-1, 1]. `height`, `width`: in pixels; the proportions may change.
    **Returns:** the image itself if it has this size.
    """
    if image.shape[:2] == (height, width):
        return image
    channels = []
    for channel in np.moveaxis(np.asarray(image, np.float32), -1, 0):
        resized = PIL.Image.fromarray(channel).resize((width, height), PIL.Image.Resampling.LANCZOS)
        channels.append(np.asarray(resized))
    return jnp.asarray(np.clip(np.stack(channels, axis=-1), -1, 1))


@convert_arguments
def encode_image(
    vae: Vae,
    image: Image,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> Latent:
    """Return the latent of one image, the mean of its posterior, scaled and shifted, float32.

    **Arguments:** `image`: in [-1, 1], sides multiples of 8 pixels. `dtype`: of the activations.
    `mesh`: of devices, if the VAE is from `shard`. `hooks`: run the encoder.
    """
    run = (DrawHooks() if hooks is None else hooks).run
    # On a mesh each part of it gets a copy: it refuses to leave some idle.
    copies = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    images = jnp.broadcast_to(image, (copies, *image.shape))
    return run("encode", encode, vae, images, dtype=dtype, mesh=mesh)[0]
