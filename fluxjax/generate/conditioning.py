"""What an image is conditioned on, as one value: all inputs of the transformer but the noise."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.devices.tokens import PreparedShard, TokenParallelFlux
from fluxjax.nets.flux import Flux
from fluxjax.nets.flux_state import Prepared
from fluxjax.nets.image_prompt import ImagePrompt, for_image_tokens
from fluxjax.shapes import Array, Float, PerImage

Transformer = Flux | TokenParallelFlux
"""A transformer on one device, or with its tokens split over several."""


@convert_arguments
class ReferenceTokens(eqx.Module):
    """Further image tokens that the noisy ones attend to, as those of a reference image.

    `tokens`: [reference_tokens, channels], packed like the noise. `ids`: their positions. What the
    network predicts for them is dropped.
    """

    tokens: Float[Array, "... reference_tokens channels"]
    ids: Float[Array, "... reference_tokens axes"]


@convert_arguments
class Conditioning(eqx.Module):
    """What one image is conditioned on: all inputs of the transformer but the noise and the time.

    A pytree: it can be mapped over, differentiated, and passed to compiled functions. A batch is a
    `Conditioning` whose arrays have a leading axis of images; arrays that all images share may be
    without it.

    `txt`: hidden states of the prompt, [txt_tokens, context]. `vec`: its pooled state, [pooled].
    `img_ids`: positions of the image's tokens, from `image_ids`. `guidance`: the distilled guidance
    scale, as 3.5; None for networks that take none. `concat`: features that are appended to those
    of each noisy token, [img_tokens, features], as FLUX.1 Fill, Canny and Depth take them.
    `reference`: tokens that follow the noisy ones, as FLUX.1 Kontext takes them. `image_prompts`:
    keys and values that the blocks attend to as well, of IP-Adapters.
    """

    txt: Float[Array, "... txt_tokens context"]
    vec: Float[Array, "... pooled"]
    img_ids: Float[Array, "... img_tokens axes"]
    guidance: PerImage | None = None
    concat: Float[Array, "... img_tokens features"] | None = None
    reference: ReferenceTokens | None = None
    image_prompts: tuple[ImagePrompt, ...] = ()


class AddedCondition(eqx.Module):
    """What images are conditioned on beside a prompt: a pytree that adds itself to a conditioning.

    A member of the FLUX.1 family that takes an image as well as a prompt is one of these.
    """

    @abstractmethod
    def add(self, conditioning: Conditioning) -> Conditioning:
        """Return a conditioning, of one image or of a batch, with this added for all of them.

        **Raises:** `ValueError` if it does not fit, as for another number of image tokens.
        """

    def add_to_negative(self, conditioning: Conditioning) -> Conditioning:
        """Return a conditioning that images are guided away from, with this added."""
        return self.add(conditioning)


_RANKS = {
    "txt": 2,
    "vec": 1,
    "img_ids": 2,
    "guidance": 0,
    "concat": 2,
    "tokens": 2,
    "ids": 2,
    "k": 4,
    "v": 4,
    "scales": 1,
    "token_weights": 1,
}
"""Axes that the arrays of one image's conditioning have, by the names of their fields."""


def split_images(conditioning: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Split a batch into the arrays with one row for each image, and those that all images share.

    Each part has None in the place of the other's arrays; `eqx.combine` joins them again.
    """

    def has_rows(path: tuple[jax.tree_util.GetAttrKey, ...], leaf: Array | float) -> bool:
        return jnp.ndim(leaf) > _RANKS[path[-1].name]

    rows = jax.tree_util.tree_map_with_path(has_rows, conditioning)
    return eqx.partition(conditioning, rows)


class PreparedConditioning(eqx.Module):
    """A conditioning of which all is computed that does not depend on the noisy image.

    `prepared`: from `Flux.prepare`, for the times at which the network will be evaluated. The rest
    as in `Conditioning`.
    """

    prepared: Prepared | PreparedShard
    concat: Float[Array, "... img_tokens features"] | None = None
    reference_tokens: Float[Array, "... reference_tokens channels"] | None = None


def prepare_conditioning(
    flux: Transformer, conditioning: Conditioning, times: Float[Array, " times"]
) -> PreparedConditioning:
    """Compute what does not depend on the noisy image, for all times of evaluation at once.

    **Arguments:** `conditioning`: of one image. `times`: every time at which the network will be
    evaluated; at any other the velocity is NaN.
    """
    ids = conditioning.img_ids
    reference = conditioning.reference
    if reference is not None:
        ids = jnp.concatenate([ids, reference.ids])
    prepared = flux.prepare(
        times,
        txt=conditioning.txt,
        vec=conditioning.vec,
        img_ids=ids,
        guidance=conditioning.guidance,
    )
    if conditioning.image_prompts:
        own = len(conditioning.img_ids)
        prompts = []
        for prompt in conditioning.image_prompts:
            prompts.append(for_image_tokens(prompt, own, len(ids) - own))
        prepared = flux.with_image_prompts(prepared, prompts)  # type: ignore[arg-type]
    tokens = None if reference is None else reference.tokens
    return PreparedConditioning(prepared, conditioning.concat, tokens)


def network_input(
    x: Float[Array, "img_tokens channels"], condition: PreparedConditioning
) -> Float[Array, "all_tokens in_channels"]:
    """Return the transformer's input tokens: the noisy ones and those of the condition."""
    if condition.concat is not None:
        x = jnp.concatenate([x, condition.concat.astype(x.dtype)], axis=-1)
    if condition.reference_tokens is not None:
        x = jnp.concatenate([x, condition.reference_tokens.astype(x.dtype)])
    return x
