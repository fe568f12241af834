"""FLUX.1 Fill: parts of an image drawn by a network that reads the rest of it and the mask."""

from dataclasses import replace

import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.canvas import Margins, extend_canvas
from fluxjax.generate.channels import ConcatCondition, check_features
from fluxjax.generate.condition_images import encode_image
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.image_to_image import check_image, drawing_of_image
from fluxjax.generate.latents import check_size, pack_latents
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models
from fluxjax.generate.masks import check_mask, pad_image, paste_kept
from fluxjax.generate.velocity import Guidance
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Image, PRNGKeyArray
from fluxjax.zoo import APPENDED_FEATURES, FLUX1

Mask = Float[Array, "mask_height mask_width"]
"""How strongly each pixel is repainted: 1 wholly, 0 not at all."""


@convert_arguments
def mask_features(mask: Mask) -> Float[Array, "img_tokens features"]:
    """Return the pixels of a mask as features of the image's tokens, 256 each.

    A token covers 2x2 latent cells of 8x8 pixels. Its feature (8 py + px) 4 + 2 dy + dx is the
    pixel (py, px) of the cell (dy, dx).

    **Arguments:** `mask`: sides are multiples of 16 pixels.
    **Raises:** `ValueError` for other sides.
    """
    check_size("`mask_features(mask)`", *mask.shape)
    cell, patch = FLUX1.latent.cell, FLUX1.latent.patch
    return rearrange(
        mask,
        "(row dy py) (column dx px) -> (row column) (py px dy dx)",
        dy=patch,
        dx=patch,
        py=cell,
        px=cell,
    )


@convert_arguments
def fill_condition(
    vae: Vae,
    image: Image,
    mask: Mask,
    *,
    dtype: DTypeLike,
    soft: bool = True,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> ConcatCondition:
    """Return what FLUX.1 Fill is conditioned on: the kept part of an image, and the mask.

    Each token is [noise 64 | packed latent of image * (1 - mask) 64 | mask 256].

    **Arguments:** `image`: in [-1, 1]. `mask`: in [0, 1], of the image's size. The sides of both
    are multiples of 16 pixels: `pad_image` makes them so. `dtype`: of the VAE's activations.
    `soft`: pass on values between 0 and 1, as Black Forest Labs' program does; otherwise they are
    rounded, 0.5 up, as by diffusers. `mesh`: of devices, if the VAE is from `shard`. `hooks`: run
    the encoder.
    **Raises:** `ValueError` for other sides, an image that is not finite, or a mask of another size
    or with other values.
    **Source:** Black Forest Labs 2024, FLUX.1 tools. The latent is the mean of its posterior, as
    there; diffusers draws a sample.
    """
    check_image("fill_condition", image)
    check_mask("fill_condition", mask, image)
    check_size("`fill_condition(image)`", *image.shape[:2])
    if not soft:
        mask = jnp.where(mask >= 0.5, 1, 0).astype(mask.dtype)
    # Hidden pixels become 0, which is gray.
    kept = image * (1 - mask[..., None]).astype(image.dtype)
    latent = pack_latents(encode_image(vae, kept, dtype=dtype, mesh=mesh, hooks=hooks))
    features = mask_features(mask).astype(latent.dtype)
    return ConcatCondition(jnp.concatenate([latent, features], axis=-1))


@convert_arguments
def fill_image(
    models: Models,
    image: Image,
    mask: Mask,
    prompt: str,
    *,
    key: PRNGKeyArray | None = None,
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images height width 3"]:
    """Draw the masked part of an image by FLUX.1 Fill, as a prompt says.

    The image is padded to multiples of 16 pixels while it is drawn.

    **Arguments:** `models`: FLUX.1 Fill, or one with its adapter. `image`: in [-1, 1], of any size.
    `mask`: 1 where it is drawn, 0 where it is kept; what lies between is passed on to the network.
    The rest as for `text_to_image`; guidance leads away from the empty prompt.
    **Returns:** float32 in [-1, 1], of the image's size. Pixels whose mask is 0 are the image's.
    **Raises:** `ValueError` as `text_to_image` and `fill_condition`; for sizes in the settings; for
    a model that is not conditioned on an image and a mask.
    """
    check_features("`fill_image`", models.flux.config, APPENDED_FEATURES["fill"])
    check_mask("fill_image", mask, image)
    condition = fill_condition(
        models.vae,
        pad_image(image),
        pad_image(mask),
        dtype=activation_dtype() if settings.dtype is None else settings.dtype,
        mesh=models.mesh,
        hooks=hooks,
    )
    drawing = drawing_of_image(
        "fill_image",
        models,
        image,
        prompt,
        key=key,
        settings=replace(settings, conditions=(*settings.conditions, condition)),
        guidance=guidance,
        hooks=hooks,
    )
    drawn = []
    for numbers in drawing.groups():
        drawn.append(drawing.draw(drawing.batch(numbers), drawing.recipe(numbers)))
    height, width = image.shape[:2]
    images = drawing.images(drawn)[:, :height, :width]
    return paste_kept(images, image, mask)


@convert_arguments
def fill_around(
    models: Models,
    image: Image,
    prompt: str,
    *,
    key: PRNGKeyArray | None = None,
    margins: Margins,
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images new_height new_width 3"]:
    """Draw what lies around an image by FLUX.1 Fill, as a prompt says.

    **Arguments:** `margins`: pixels that are added on each side. The rest as for `fill_image`; the
    prompt describes the whole new image.
    **Returns:** float32 in [-1, 1]; where the image lies, its own pixels.
    **Raises:** `ValueError` as `fill_image`.
    """
    canvas, mask = extend_canvas(image, margins)
    return fill_image(
        models,
        canvas,
        mask,
        prompt,
        key=key,
        settings=settings,
        guidance=guidance,
        hooks=hooks,
    )
