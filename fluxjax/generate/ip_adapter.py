"""IP-Adapters: images as prompts, to which the transformer's blocks attend separately."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.conditioning import AddedCondition, Conditioning
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.encoder_pixels import clip_pixels, siglip_pixels
from fluxjax.nets.clip_vision import ClipVision
from fluxjax.nets.image_prompt import ImagePrompt
from fluxjax.nets.ip_adapter import IpAdapter
from fluxjax.nets.patches import Pixels
from fluxjax.nets.siglip import Siglip
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Image, ScalarLike, Times

ImageEncoder = ClipVision | Siglip
"""The encoder of an adapter's images: CLIP's for XLabs' adapters, SigLIP for InstantX's."""


class ImagePromptCondition(AddedCondition):
    """An image prompt, and the one that negative prompts get in its place."""

    prompt: ImagePrompt
    negative: ImagePrompt

    def add(self, conditioning: Conditioning) -> Conditioning:
        return _with_prompt(conditioning, self.prompt)

    def add_to_negative(self, conditioning: Conditioning) -> Conditioning:
        return _with_prompt(conditioning, self.negative)


class CombinedCondition(AddedCondition):
    """Several conditions as one, added in their order."""

    conditions: tuple[AddedCondition, ...]

    def add(self, conditioning: Conditioning) -> Conditioning:
        for condition in self.conditions:
            conditioning = condition.add(conditioning)
        return conditioning

    def add_to_negative(self, conditioning: Conditioning) -> Conditioning:
        for condition in self.conditions:
            conditioning = condition.add_to_negative(conditioning)
        return conditioning

    def for_times(self, times: Times) -> "CombinedCondition":
        return CombinedCondition(tuple(one.for_times(times) for one in self.conditions))


def _with_prompt(conditioning: Conditioning, prompt: ImagePrompt) -> Conditioning:
    return replace(conditioning, image_prompts=(*conditioning.image_prompts, prompt))


@convert_arguments
def ip_adapter_condition(
    adapter: IpAdapter,
    encoder: ImageEncoder,
    image: Image,
    *,
    scale: ScalarLike | Float[Array, " blocks"] = 1.0,
    negative: Image | None = None,
    dtype: DTypeLike | None = None,
    hooks: DrawHooks | None = None,
) -> ImagePromptCondition:
    """Return what images of a prompt are conditioned on besides it: an image, by an IP-Adapter.

    It is one of `DrawSettings.conditions`; several images are several conditions. XLabs' adapters
    are meant for true classifier-free guidance with a scale of 4.

    **Arguments:** `adapter`: from `load_ip_adapter`. `encoder`: from `load_clip_vision` for XLabs'
    adapters, from `load_siglip` for InstantX's. `image`: of any size. `scale`: factor of the
    image's influence, one number or one for each block of the adapter; 0 is none. `negative`: an
    image that is guided away from with a negative prompt; None is a black one. `dtype`: of the
    encoder's activations, and of keys and values; by default that of the encoder's weights.
    `hooks`: run the encoder.
    **Raises:** `ValueError` for the encoder of another adapter, another number of scales, or one
    that is not finite.
    """
    check_finite("ip_adapter_condition", scale=scale)
    black = jnp.full((1, 1, 3), -1.0)
    pixels = _pixels(encoder, image), _pixels(encoder, black if negative is None else negative)
    scale = jnp.asarray(scale, jnp.float32)
    run = (DrawHooks() if hooks is None else hooks).run
    prompts = []
    for one in pixels:
        prompts.append(run("encode", _image_prompt, adapter, encoder, one, scale, dtype))
    return ImagePromptCondition(*prompts)


def _pixels(encoder: ImageEncoder, image: Image) -> Pixels:
    if isinstance(encoder, ClipVision):
        return clip_pixels(image, encoder.config)
    return siglip_pixels(image, encoder.config)


@eqx.filter_jit
def _image_prompt(
    adapter: IpAdapter,
    encoder: ImageEncoder,
    pixels: Pixels,
    scale: Float[Array, "*blocks"],
    dtype: DTypeLike | None,
) -> ImagePrompt:
    """Return the keys and values of one image. `scale`: how strongly it is followed."""
    if isinstance(encoder, ClipVision):
        embedding = encoder(pixels, dtype=dtype)
    else:
        embedding = encoder.pool(encoder(pixels, dtype=dtype))
    return adapter(embedding, scale=scale)
