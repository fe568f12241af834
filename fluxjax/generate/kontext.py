"""FLUX.1 Kontext: images that are edited by an instruction, as further tokens beside the noise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.condition_images import encode_image, resize_image
from fluxjax.generate.conditioning import AddedCondition, Conditioning, ReferenceTokens
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.image_to_image import check_image
from fluxjax.generate.latents import check_size, pack_latents
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models
from fluxjax.generate.reference_ids import check_placement, reference_ids
from fluxjax.generate.text_to_image import text_to_image
from fluxjax.generate.velocity import Guidance
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Image, PRNGKeyArray
from fluxjax.zoo import FLUX1, Defaults

ReferenceImage = Float[Array, "_ _ 3"]
"""An image of any size, in [-1, 1]: several references differ in theirs."""
_PREFERRED = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
)
"""Sizes in pixels that Kontext was trained on, the shorter side first."""
_LARGE = 512 * 512
"""From so many pixels by default, a model is taken to be meant for about 1024 x 1024."""
_SIDE = FLUX1.latent.token_side


class ReferenceCondition(AddedCondition):
    """Tokens that follow the noisy ones, the same for all images.

    `reference`: the tokens and their positions.
    """

    reference: ReferenceTokens

    def add(self, conditioning: Conditioning) -> Conditioning:
        """Return a conditioning with these tokens, after those that it has."""
        reference, own = self.reference, conditioning.reference
        if own is not None:
            tokens = _append(own.tokens, reference.tokens)
            reference = ReferenceTokens(tokens, _append(own.ids, reference.ids))
        return replace(conditioning, reference=reference)


def _append(
    tokens: Float[Array, "*images tokens features"], more: Float[Array, "more_tokens features"]
) -> Float[Array, "*images all_tokens features"]:
    """Return tokens of one image or of a batch, followed by tokens that all images share."""
    shared = jnp.broadcast_to(more, (*tokens.shape[:-2], *more.shape)).astype(tokens.dtype)
    return jnp.concatenate([tokens, shared], axis=-2)


def preferred_size(height: int, width: int) -> tuple[int, int]:
    """Return the size that FLUX.1 Kontext was trained on whose width / height is the nearest.

    **Arguments:** `height`, `width`: of an image, in pixels.
    **Returns:** height and width, about 1024 x 1024 pixels in all.
    """
    sizes = {*_PREFERRED, *((long, short) for short, long in _PREFERRED)}

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        # Of two that are equally near, the narrower one.
        return abs(size[1] / size[0] - width / height), size[1]

    return min(sizes, key=distance)


def nearest_size(height: int, width: int) -> tuple[int, int]:
    """Return the nearest height and width that are multiples of 16 pixels, at least 16."""
    return max(1, round(height / _SIDE)) * _SIDE, max(1, round(width / _SIDE)) * _SIDE


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class References:
    """How reference images are resized and placed.

    `placement`: as for `reference_ids`. `preferred`: each image is resized to the size that Kontext
    was trained on and that has the nearest proportions; otherwise to the nearest multiples of 16
    pixels. None: if the model is meant for images of about that size, which the tiny model is not.
    """

    placement: str = "offset"
    preferred: bool | None = None

    def __post_init__(self):
        check_placement("References", self.placement)

    def resize(self, image: Image, defaults: Defaults) -> Float[Array, "new_height new_width 3"]:
        """Return an image at the size at which it is a reference.

        **Arguments:** `defaults`: of the model.
        """
        preferred = self.preferred
        if preferred is None:
            preferred = defaults.height * defaults.width >= _LARGE
        size = preferred_size if preferred else nearest_size
        return resize_image(image, *size(*image.shape[:2]))


@convert_arguments
def kontext_condition(
    vae: Vae,
    images: Sequence[ReferenceImage],
    *,
    dtype: DTypeLike,
    placement: str = "offset",
    size: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> ReferenceCondition:
    """Return what FLUX.1 Kontext is conditioned on: one or more reference images.

    Their packed latents follow the noise as further tokens.

    **Arguments:** `images`: in [-1, 1], sides multiples of 16 pixels; they may differ in size from
    each other and from the image that is drawn. Kontext expects sizes from `preferred_size`.
    `dtype`: of the VAE's activations. `placement`: as for `reference_ids`. `size`: height and width
    of the image that is drawn, for the placement "uxo". `mesh`: of devices, if the VAE is from
    `shard`. `hooks`: run the encoder.
    **Raises:** `ValueError` as `reference_ids`, and for an image that is not finite.
    **Source:** Black Forest Labs 2025, FLUX.1 Kontext (2506.15742).
    """
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    ids = reference_ids(sizes, placement=placement, size=size)
    tokens = []
    for image in images:
        check_image("kontext_condition", image)
        tokens.append(pack_latents(encode_image(vae, image, dtype=dtype, mesh=mesh, hooks=hooks)))
    return ReferenceCondition(ReferenceTokens(jnp.concatenate(tokens), ids))


@convert_arguments
def kontext_image(
    models: Models,
    images: Sequence[ReferenceImage],
    prompt: str,
    *,
    key: PRNGKeyArray | None = None,
    references: References = References(),
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images height width 3"]:
    """Draw what an instruction makes of one or more images, by FLUX.1 Kontext.

    **Arguments:** `images`: in [-1, 1], of any size; the first is the one that is edited. `prompt`:
    the instruction, as "make it night". `references`: how the images are resized and placed. The
    rest as for `text_to_image`; without a height and a width in the settings, what is drawn has the
    size of the first image after resizing.
    **Returns:** float32 in [-1, 1].
    **Raises:** `ValueError` as `text_to_image` and `kontext_condition`.
    """
    if not images:
        raise ValueError("`kontext_image` needs at least one image. Pass the one to edit.")
    resized = [references.resize(image, models.defaults) for image in images]
    height, width = resized[0].shape[:2]
    height = height if settings.height is None else settings.height
    width = width if settings.width is None else settings.width
    check_size("`kontext_image`", height, width)
    condition = kontext_condition(
        models.vae,
        resized,
        dtype=activation_dtype() if settings.dtype is None else settings.dtype,
        placement=references.placement,
        size=(height, width),
        mesh=models.mesh,
        hooks=hooks,
    )
    return text_to_image(
        models,
        prompt,
        key=key,
        settings=replace(
            settings,
            height=height,
            width=width,
            conditions=(*settings.conditions, condition),
        ),
        guidance=guidance,
        hooks=hooks,
    )
