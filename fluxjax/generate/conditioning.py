"""What an image is conditioned on, as one value: all inputs of the transformer but the noise."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.devices.tokens import PreparedShard, TokenParallelFlux
from fluxjax.generate.controls import (
    Control,
    PreparedControl,
    prepare_control,
    without_networks,
)
from fluxjax.generate.region_prompts import MixedPrompts, RegionLabels, RegionPrompts
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.flux_state import Prepared
from fluxjax.nets.image_prompt import ImagePrompt, for_image_tokens
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float, Int, PerImage, Times

Transformer = AbstractTransformer | TokenParallelFlux
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

    `txt`: hidden states of the prompt, [txt_tokens, context]. `vec`: its pooled state, [pooled];
    None for networks that read none.
    `img_ids`: positions of the image's tokens, from `image_ids`. `guidance`: the distilled guidance
    scale, as 3.5; None for networks that take none. `concat`: features that are appended to those
    of each noisy token, [img_tokens, features], as FLUX.1 Fill, Canny and Depth take them.
    `reference`: tokens that follow the noisy ones, as FLUX.1 Kontext takes them. `control`:
    ControlNets, whose residuals are added up. `image_prompts`: of IP-Adapters, keys and values that
    the blocks attend to as well. `txt_length`: how many of the text tokens are attended to, for
    models that leave out padding; None for all of them. `regions`, `mixed`: prompts of the image's
    parts, which attend to them, or whose velocities are mixed; `txt` and `vec` are then the base
    prompt.
    """

    txt: Float[Array, "... txt_tokens context"]
    vec: Float[Array, "... pooled"] | None
    img_ids: Float[Array, "... img_tokens axes"]
    guidance: PerImage | None = None
    concat: Float[Array, "... img_tokens features"] | None = None
    reference: ReferenceTokens | None = None
    control: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    txt_length: Int[Array, "..."] | None = None
    regions: RegionPrompts | None = None
    mixed: MixedPrompts | None = None


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

    def for_times(self, times: Times) -> "AddedCondition":
        """Return this condition for a sampling of these nodes, by default itself.

        One that is on for a share of the steps translates it into times here.
        """
        return self


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
    "txt_length": 0,
    "region_txt": 2,
    "txt_labels": 1,
    "img_labels": 1,
    "base_ratio": 0,
    "low": 0,
    "texts": 3,
    "pooled": 2,
    "weights": 3,
}
"""Axes that the arrays of one image's conditioning have, by the names of their fields."""


def split_images(conditioning: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Split a batch into the arrays with one row for each image, and those that all images share.

    Each part has None in the place of the other's arrays; `eqx.combine` joins them again.
    """

    def has_rows(path: jax.tree_util.KeyPath, node: Array | float | Control) -> bool | Control:
        if isinstance(node, Control):
            return node.rows()
        return jnp.ndim(node) > _RANKS[path[-1].name]

    rows = jax.tree_util.tree_map_with_path(
        has_rows, conditioning, is_leaf=lambda node: isinstance(node, Control)
    )
    return eqx.partition(conditioning, rows)


def bind_control(conditioning: Conditioning) -> tuple[Control, ...]:
    """Return the controls of one image, without their networks, with all that these read."""
    return tuple(_bound(one, conditioning) for one in without_networks(conditioning.control))


def _bound(control: Control, conditioning: Conditioning) -> Control:
    """Return a control with the fields that it lacks taken from the conditioning."""
    names = ("txt", "vec", "img_ids", "guidance")
    missing = [name for name in names if getattr(control, name) is None]
    return eqx.tree_at(
        lambda one: [getattr(one, name) for name in missing],
        control,
        [getattr(conditioning, name) for name in missing],
        is_leaf=lambda node: node is None,
    )


class PreparedConditioning(eqx.Module):
    """A conditioning of which all is computed that does not depend on the noisy image.

    `prepared`: from the transformer's `prepare`, for the times at which it will be evaluated.
    `regions`: the labels of its text tokens and of the image's, if the image has regions. `mixed`:
    this conditioning with other prompts, whose velocities are mixed by `weights`. The rest as in
    `Conditioning`.
    """

    prepared: Prepared | PreparedShard
    concat: Float[Array, "... img_tokens features"] | None = None
    reference_tokens: Float[Array, "... reference_tokens channels"] | None = None
    control: tuple[PreparedControl, ...] = ()
    regions: RegionLabels | None = None
    mixed: "tuple[PreparedConditioning, ...]" = ()
    weights: Float[Array, "... prompts img_tokens features"] | None = None


def prepare_conditioning(
    flux: Transformer,
    conditioning: Conditioning,
    times: Float[Array, " times"],
    nets: Sequence[ControlNet] = (),
) -> PreparedConditioning:
    """Compute what does not depend on the noisy image, for all times of evaluation at once.

    **Arguments:** `conditioning`: of one image. `times`: every time at which the network will be
    evaluated; at any other the velocity is NaN. `nets`: those of the conditioning's controls, which
    are from `bind_control`.
    """
    ids = conditioning.img_ids
    reference, regions = conditioning.reference, conditioning.regions
    if reference is not None:
        ids = jnp.concatenate([ids, reference.ids])
    txt, labels = conditioning.txt, None
    if regions is not None:
        txt = jnp.concatenate([txt, regions.region_txt])
        labels = regions.labels.with_references(len(ids) - len(conditioning.img_ids))
    prepared = flux.prepare(
        times,
        txt=txt,
        vec=conditioning.vec,
        img_ids=ids,
        guidance=conditioning.guidance,
    )
    if conditioning.txt_length is not None:
        prepared = flux.with_txt_length(prepared, conditioning.txt_length)  # type: ignore[arg-type]
    if conditioning.image_prompts:
        own = len(conditioning.img_ids)
        prompts = []
        for prompt in conditioning.image_prompts:
            prompts.append(for_image_tokens(prompt, own, len(ids) - own))
        prepared = flux.with_image_prompts(prepared, prompts)  # type: ignore[arg-type]
    tokens = None if reference is None else reference.tokens
    control = []
    for net, one in zip(nets, conditioning.control, strict=True):
        control.append(prepare_control(net, one, times))
    ready = PreparedConditioning(prepared, conditioning.concat, tokens, tuple(control), labels)
    return _with_mixed(flux, ready, conditioning, times)


def _with_mixed(
    flux: Transformer,
    ready: PreparedConditioning,
    conditioning: Conditioning,
    times: Float[Array, " times"],
) -> PreparedConditioning:
    """Return a prepared conditioning with those of the prompts that its velocity is mixed with."""
    mixed = conditioning.mixed
    if mixed is None:
        return ready
    parts = []
    for txt, vec in zip(mixed.texts, mixed.pooled, strict=True):
        # ControlNets read the base prompt; what they add is the same for all.
        part = replace(conditioning, txt=txt, vec=vec, mixed=None, control=())
        parts.append(prepare_conditioning(flux, part, times))
    return replace(ready, mixed=tuple(parts), weights=mixed.weights)


def network_input(
    x: Float[Array, "img_tokens channels"], condition: PreparedConditioning
) -> Float[Array, "all_tokens in_channels"]:
    """Return the transformer's input tokens: the noisy ones and those of the condition."""
    if condition.concat is not None:
        x = jnp.concatenate([x, condition.concat.astype(x.dtype)], axis=-1)
    if condition.reference_tokens is not None:
        x = jnp.concatenate([x, condition.reference_tokens.astype(x.dtype)])
    return x
