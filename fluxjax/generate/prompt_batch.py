"""Batches of encoded prompts: what prompts and guidance are, as networks take them."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from fluxjax.generate.conditioning import AddedCondition, Conditioning
from fluxjax.generate.image_batch import ImageBatch
from fluxjax.generate.latents import image_ids, image_size
from fluxjax.generate.load_models import Models
from fluxjax.generate.text import TextStates
from fluxjax.generate.velocity import Guidance
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float, PerImage
from fluxjax.zoo import FLUX1, Defaults

Tree = TypeVar("Tree")


def prompt_batch(
    states: TextStates,
    negative: TextStates | None,
    *,
    noise: Float[Array, "images latent_channels rows columns"],
    keys: Array | None,
    distilled: PerImage | None,
    conditions: Sequence[AddedCondition] = (),
) -> ImageBatch:
    """Return the batch of images of encoded prompts, one for each.

    **Arguments:** `negative`: prompts to guide away from, if any. `distilled`: the distilled
    guidance scale, for a network that takes one. `conditions`: what is added to both, in order.
    """
    ids = image_ids(*image_size(noise))
    positive = text_conditioning(states, ids, distilled)
    for condition in conditions:
        positive = condition.add(positive)
    if negative is None:
        return ImageBatch(noise, positive, None, keys)
    guided_away = text_conditioning(negative, ids, distilled)
    for condition in conditions:
        guided_away = condition.add_to_negative(guided_away)
    return ImageBatch(noise, positive, guided_away, keys)


def text_conditioning(
    states: TextStates, ids: Float[Array, "... img_tokens axes"], distilled: PerImage | None
) -> Conditioning:
    """Return what encoded texts condition images on; arguments as for `prompt_batch`."""
    return Conditioning(states.txt, states.vec, ids, distilled, txt_length=states.txt_length)


def guidance_of(models: Models, guidance: Guidance | None) -> Guidance:
    """Return a guidance, or that which a model is meant to be sampled with."""
    if guidance is None:
        return Guidance(scale=models.defaults.cfg)
    return guidance


def distilled_guidance(
    flux: AbstractTransformer, defaults: Defaults, guidance: PerImage | None
) -> Float[Array, "*images"] | None:
    """Return the distilled guidance scale as an array, by default the model's; None for a network
    that takes none.

    **Raises:** `ValueError` for a scale that the network does not take.
    """
    if flux.config.guidance_embed:
        for scale in (guidance, defaults.guidance, FLUX1.guidance):
            if scale is not None:
                return jnp.asarray(scale, jnp.float32)
    if guidance is not None:
        raise ValueError(
            "This model has no guidance embedder (as schnell), so a distilled guidance of "
            f"{guidance} would do nothing. Leave it out."
        )
    return None


def as_arrays(tree: Tree) -> Tree:
    """Return a pytree with its Python numbers as float32 arrays, so that other values do not
    compile a new program.
    """

    def convert(leaf: object) -> object:
        if isinstance(leaf, bool) or not isinstance(leaf, int | float):
            return leaf
        return jnp.float32(leaf)

    return jax.tree.map(convert, tree)
