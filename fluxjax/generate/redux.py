"""FLUX.1 Redux: images as prompts, whose tokens follow those of the text."""

from collections.abc import Sequence
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.generate.conditioning import AddedCondition, Conditioning
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.encoder_pixels import siglip_pixels
from fluxjax.nets.redux import Redux
from fluxjax.nets.siglip import Siglip
from fluxjax.numeric import check_finite, wide_dtype
from fluxjax.shapes import Array, Float, Image, PerImage, ScalarLike

REDUX_RULES = ("append", "sum")
"""How several images are combined: one after the other, or added up."""
REDUX_STEPS = 50
REDUX_GUIDANCE = 2.5
"""How FLUX.1 Redux is meant to be sampled with FLUX.1-dev."""


class ReduxCondition(AddedCondition):
    """Tokens of images that follow a prompt's, as FLUX.1 Redux has them.

    `tokens`: of all images, weighted, [tokens, context]. `txt_weight`, `vec_weight`: factors of the
    prompt's hidden states and of its pooled state. `in_negative`: whether negative prompts get the
    tokens too.
    """

    tokens: Float[Array, "tokens context"]
    txt_weight: ScalarLike
    vec_weight: ScalarLike
    in_negative: bool = eqx.field(static=True, default=False)

    def add(self, conditioning: Conditioning) -> Conditioning:
        """Return a conditioning with the tokens after those of its prompt.

        **Raises:** `ValueError` for text tokens of another width.
        """
        txt = conditioning.txt
        if conditioning.txt_length is not None or conditioning.vec is None:
            raise ValueError(
                "`ReduxCondition` follows a text whose padding is attended to, and goes with a "
                "pooled text; this model's is not. Use it with FLUX.1-dev or schnell."
            )
        if self.tokens.shape[-1] != txt.shape[-1]:
            raise ValueError(
                f"`ReduxCondition` has tokens of {self.tokens.shape[-1]} features, and the prompt "
                f"of {txt.shape[-1]}. Load the Redux embedder of this model."
            )
        images = jnp.broadcast_to(self.tokens, (*txt.shape[:-2], *self.tokens.shape))
        weighted = _weighted(txt, self.txt_weight)
        joined = jnp.concatenate([weighted, images.astype(txt.dtype)], axis=-2)
        return replace(conditioning, txt=joined, vec=_weighted(conditioning.vec, self.vec_weight))

    def add_to_negative(self, conditioning: Conditioning) -> Conditioning:
        return self.add(conditioning) if self.in_negative else conditioning


def _weighted(x: Array, weight: ScalarLike | Float[Array, "images 1 1"]) -> Array:
    """Return x times a weight, in the dtype of x."""
    wide = wide_dtype(x.dtype)
    return (x.astype(wide) * jnp.asarray(weight, wide)).astype(x.dtype)


@convert_arguments
def redux_tokens(
    siglip: Siglip,
    redux: Redux,
    images: Sequence[Image],
    *,
    crop: bool = False,
    dtype: DTypeLike | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images tokens context"]:
    """Return the tokens of images, for `redux_condition`; 729 of each.

    **Arguments:** `images`: of any sizes. `crop`: as for `siglip_pixels`. `dtype`: of the
    activations, by default that of SigLIP's weights. `hooks`: run the encoder.
    **Raises:** `ValueError` for no image.
    """
    if not images:
        raise ValueError("`redux_tokens(images)` needs at least one image. Pass a list of them.")
    pixels = [siglip_pixels(image, siglip.config, crop=crop) for image in images]
    run = (DrawHooks() if hooks is None else hooks).run
    return run("encode", _embed, siglip, redux, jnp.stack(pixels), dtype)


@eqx.filter_jit
def _embed(
    siglip: Siglip,
    redux: Redux,
    pixels: Float[Array, "images image_size image_size 3"],
    dtype: DTypeLike | None,
) -> Float[Array, "images tokens context"]:
    return jax.vmap(lambda one: redux(siglip(one, dtype=dtype)))(pixels)


@convert_arguments
def redux_condition(
    tokens: Float[Array, "images tokens context"],
    *,
    weights: PerImage = 1.0,
    pooled_weights: PerImage | None = None,
    rule: str = "append",
    text_weight: ScalarLike = 1.0,
    in_negative: bool = False,
) -> ReduxCondition:
    """Return what images of a prompt are conditioned on besides it: images, by FLUX.1 Redux.

    It is one of `DrawSettings.conditions`. At weight 1 an image outweighs the prompt; 0.2 to 0.6
    leaves room for both. Sample with a distilled guidance of 2.5 and 50 steps.

    **Arguments:** `tokens`: from `redux_tokens`. `weights`: factors of the images' tokens, one for
    all or one for each. `rule`: "append" puts the images' tokens one after the other, as ComfyUI
    does; "sum" adds up the images' tokens, and with them the prompt's states times the sum of the
    weights, as diffusers does: weights should add to 1. `pooled_weights`: the weights of the pooled
    prompt for "sum"; None takes `weights`. `text_weight`: factor of the prompt; 0 is no prompt, as
    of diffusers without text encoders. `in_negative`: add the images to negative prompts too, so
    that images are guided away from those by the prompt only; normalized attention guidance needs
    it.
    **Raises:** `ValueError` for another rule, another number of weights, weights that are not
    finite, or pooled weights that are not used.
    """
    if rule not in REDUX_RULES:
        raise ValueError(
            f"`redux_condition(rule)` takes one of {', '.join(REDUX_RULES)}, got {rule!r}."
        )
    if rule == "append" and pooled_weights is not None:
        raise ValueError(
            '`redux_condition(pooled_weights)` is for rule="sum". Pass text_weight= instead.'
        )
    check_finite(
        "redux_condition", weights=weights, pooled_weights=pooled_weights, text_weight=text_weight
    )
    factors = _per_image(weights, len(tokens))
    weighted = _weighted(tokens, factors[:, None, None])
    text = jnp.asarray(text_weight, jnp.float32)
    if rule == "append":
        return ReduxCondition(weighted.reshape(-1, tokens.shape[-1]), text, text, in_negative)
    pooled = factors
    if pooled_weights is not None:
        pooled = _per_image(pooled_weights, len(tokens))
    summed = jnp.sum(weighted.astype(wide_dtype(tokens.dtype)), axis=0).astype(tokens.dtype)
    return ReduxCondition(summed, text * factors.sum(), text * pooled.sum(), in_negative)


def _per_image(weights: PerImage, images: int) -> Float[Array, " images"]:
    return jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (images,))
