"""The guided velocity of a prompt, as a value that samplers integrate."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.flow.guidance import ClassifierFree, Conditional, Guided, Rule, WeakModel
from fluxjax.flow.mixing import Mixed
from fluxjax.flow.velocity import Memory, StatefulVelocity, Velocity
from fluxjax.generate.cache import (
    AttentionChoice,
    CachedFlux,
    StepCache,
    attention_at,
    condition_at,
)
from fluxjax.generate.conditioning import (
    Conditioning,
    PreparedConditioning,
    Transformer,
    network_input,
)
from fluxjax.generate.conditions import (
    Condition,
    Conditions,
    Nets,
    check_control,
    join_conditions,
    nets_of,
    prepare_joined,
)
from fluxjax.generate.controls import ControlNets, ControlNetSet, control_attention
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.nets.degraded import DegradedBlocks
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, PerImage, Scalar, ScalarLike


@convert_arguments
class WeakNetwork(eqx.Module):
    """The same network with degraded blocks, which the image is guided away from.

    `blocks`: which blocks are skipped (skip-layer guidance) or attend otherwise (PAG). `strength`:
    how far to guide away, in a batch one number or one for each image; 0 is none. `low`, `high`:
    the times between which it is used.

    **Raises:** `ValueError` for numbers that are not finite.
    """

    blocks: DegradedBlocks
    strength: PerImage
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("WeakNetwork", strength=self.strength, low=self.low, high=self.high)


@convert_arguments
class Guidance(eqx.Module):
    """How velocities of the transformer are combined into one. `Guidance()` is none.

    `scale`: of true classifier-free guidance away from a negative conditioning, in a batch one
    number or one for each image; 1 is none, any other takes two evaluations. `rule`: how both
    velocities are combined. `nag`: normalized attention guidance, away from the negative text
    inside the attention. `weak`: a degraded network to guide away from. `cache`: when blocks are
    skipped and their last output is used again. `low`, `high`: the times between which `scale` is
    used.

    **Raises:** `ValueError` for numbers that are not finite.
    """

    scale: PerImage = 1.0
    rule: Rule = ClassifierFree()
    nag: Nag | None = None
    weak: WeakNetwork | None = None
    cache: StepCache | None = None
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("Guidance", scale=self.scale, low=self.low, high=self.high)


class ConditionalFlux(eqx.Module):
    """The transformer as a function (x, t, condition) -> dx/dt.

    `attention`: as for `Flux`. `degraded`: blocks that are skipped or attend otherwise. `control`:
    ControlNets beside it. `image_axes`, `remat`: as for `flux_velocity`.

    A condition with regions gets their attention. One with mixed prompts takes an evaluation for
    each of them beside that of its own.
    """

    flux: Transformer
    attention: AttentionChoice = None
    degraded: DegradedBlocks | None = None
    control: ControlNetSet | None = None
    image_axes: tuple[str, ...] = eqx.field(static=True, default=())
    remat: bool = eqx.field(static=True, default=False)

    def __call__(
        self, x: Float[Array, "img_tokens channels"], t: Scalar, condition: Condition
    ) -> Float[Array, "img_tokens out_channels"]:
        prepared = condition_at(self.flux, condition, t, self.control)
        added: dict[str, Any] = {}
        if self.control is not None:
            added["control"] = self.control(x, t, prepared.control)
        if prepared.weights is None:
            return self._velocity(x, t, prepared, added)
        velocities = []
        for part in (prepared, *prepared.mixed):
            velocities.append(eqx.Partial(self._velocity, prepared=part, added=added))
        return Mixed(velocities, list(prepared.weights))(x, t)  # type: ignore[return-value]

    def _velocity(
        self,
        x: Float[Array, "img_tokens channels"],
        t: Scalar,
        prepared: PreparedConditioning,
        added: dict[str, Any],
    ) -> Float[Array, "img_tokens out_channels"]:
        """Return the velocity of one prompt. `added`: what else the transformer takes."""
        tokens = network_input(x, prepared)
        velocity = self.flux.velocity(
            tokens,
            t,
            prepared.prepared,  # type: ignore[arg-type]  # prepared by the same transformer
            attention=attention_at(self.attention, prepared, t, self.image_axes),
            degraded=self.degraded,
            remat=self.remat,
            **added,  # refused where tokens are split
        )
        return velocity[: len(x)]


class ControlledVelocity(StatefulVelocity):
    """A guided velocity whose conditions share ControlNets, which are evaluated once for all.

    `guided`: of networks that hold the ControlNets' `ControlNetSet`.
    """

    guided: Guided

    def init(self, x: Float[Array, "img_tokens channels"]) -> Memory:
        return self.guided.init(x)

    def __call__(
        self,
        x: Float[Array, "img_tokens channels"],
        t: ScalarLike,
        *condition: Conditioning,
        memory: Memory = None,
    ) -> Array | tuple[Array, Memory]:
        guided, time = self.guided, jnp.asarray(t, x.dtype)
        control = guided.velocity.control.at(x, time)  # type: ignore[attr-defined]
        guided = eqx.tree_at(lambda one: one.velocity.control, guided, control)
        if guided.weak is not None:
            guided = eqx.tree_at(lambda one: one.weak.velocity.control, guided, control)
        return guided(x, t, memory=memory)


@convert_arguments
def flux_velocity(
    flux: Transformer,
    positive: Conditioning,
    negative: Conditioning | None = None,
    *,
    guidance: Guidance = Guidance(),
    times: Float[Array, " evaluations"] | None = None,
    attention: AttentionChoice = None,
    image_axes: Sequence[str] = (),
    remat: bool = False,
) -> Velocity:
    """Return the guided velocity of one image: a pytree, called as velocity(x, t), for `sample`.

    It works under `jit`, `vmap`, `grad` and `scan`, and inside `on_mesh`. `x` is a packed latent,
    [img_tokens, channels].

    **Arguments:** `positive`, `negative`: what the image is guided towards, and away from. `times`:
    every time at which the velocity will be evaluated, as `evaluation_times(step, nodes)` gives
    them: what does not depend on the image is then computed once for all, and the velocity is NaN
    at any other time. None: it is computed in each evaluation, for any time. `attention`: as for
    `Flux`; NAG computes its attention with it too. `image_axes`: names of the `vmap` or mesh axes
    that the images of a batch lie along; with a cache all of them skip blocks together. `remat`:
    for a gradient of the velocity, keep only the input of each block, ControlNets' too, and compute
    the block again.
    **Raises:** `ValueError` for a scale or NAG without `negative`, for NAG beside another custom
    attention, and for a cache where tokens are split over devices; for regions beside NAG, another
    custom attention, or tokens that are split; for mixed prompts beside a cache.
    """
    check_guidance(flux, guidance, attention, has_negative=negative is not None)
    check_regions(flux, guidance, attention, (positive, negative))
    check_control(flux, positive, negative)
    nets = nets_of(positive)
    joined = join_conditions(positive, negative, texts=guidance.nag is not None)
    joined = prepare_joined(flux, joined, times, nets)
    velocity = guided_velocity(flux, joined, guidance, attention, tuple(image_axes), nets, remat)
    return cast(Velocity, velocity)


def guided_velocity(
    flux: Transformer,
    conditions: Conditions,
    guidance: Guidance,
    attention: AttentionChoice = None,
    image_axes: tuple[str, ...] = (),
    nets: Nets = Nets(),
    remat: bool = False,
) -> Guided | ControlledVelocity:
    """Return the guided velocity of conditions from `join_conditions` or `prepare_joined`.

    **Arguments:** `attention`, `image_axes`, `remat`: as for `flux_velocity`. `nets`: the networks
    of the conditions' controls.
    """
    positive, negative, shared = conditions
    control = None
    if shared or nets.own:
        named = control_attention(attention)
        together = ControlNets(nets.shared, shared, named, remat)
        control = ControlNetSet(together, nets.own, named, remat)
    if guidance.nag is not None:
        named = guidance.nag.implementation if attention is None else attention
        attention = replace(guidance.nag, implementation=named)  # type: ignore[arg-type]
    network: Conditional = ConditionalFlux(flux, attention, None, control, image_axes, remat)
    if guidance.cache is not None and isinstance(flux, AbstractTransformer):
        network = CachedFlux(  # type: ignore[assignment]  # it takes a memory, too
            flux,
            guidance.cache,
            attention,
            image_axes,
            reference_tokens=_reference_tokens(positive),
            control=control,
            remat=remat,
        )
    weak = None
    if guidance.weak is not None:
        blocks = guidance.weak.blocks
        degraded = ConditionalFlux(flux, attention, blocks, control, image_axes, remat)
        weak = WeakModel(
            degraded, guidance.weak.strength, low=guidance.weak.low, high=guidance.weak.high
        )
    guided = Guided(
        network,
        positive,
        negative,
        scale=guidance.scale,
        rule=guidance.rule,
        low=guidance.low,
        high=guidance.high,
        weak=weak,
    )
    # A cache decides for each condition whether the ControlNets are run.
    if shared and isinstance(network, ConditionalFlux):
        return ControlledVelocity(guided)
    return guided


def check_guidance(
    flux: Transformer, guidance: Guidance, attention: AttentionChoice, *, has_negative: bool
) -> None:
    """Check that the parts of a guidance go together.

    **Raises:** `ValueError` for those that do not.
    """
    nag, weak = guidance.nag, guidance.weak
    if nag is not None and not has_negative:
        raise ValueError(
            "`Guidance(nag)` guides away from a negative prompt, and there is none. "
            "Pass the negative conditioning."
        )
    if nag is not None and weak is not None and weak.blocks.attention is not None:
        raise ValueError(
            "`Guidance` takes one custom attention: that of nag, or that of the degraded blocks of "
            "weak. Leave one out."
        )
    custom = callable(attention) and not isinstance(attention, Attention)
    if nag is not None and custom:
        raise ValueError(
            "`Guidance(nag)` is a custom attention itself. "
            "Pass attention= by name, or leave one out."
        )
    if guidance.cache is not None and isinstance(flux, TokenParallelFlux):
        raise ValueError(
            "`Guidance(cache)` compares all tokens of an image, and here they are split over "
            "devices. Use a mesh of context=1 with it."
        )


def check_regions(
    flux: Transformer,
    guidance: Guidance,
    attention: AttentionChoice,
    conditions: Sequence[Conditioning | None],
) -> None:
    """Check that the prompts of an image's parts go together with all else.

    **Raises:** `ValueError` for what does not.
    """
    given = [one for one in conditions if one is not None]
    has_regions = any(one.regions is not None for one in given)
    has_mixed = any(one.mixed is not None for one in given)
    if not has_regions and not has_mixed:
        return
    weak = guidance.weak
    degrades = weak is not None and weak.blocks.attention is not None
    custom = callable(attention) and not isinstance(attention, Attention)
    if isinstance(flux, TokenParallelFlux):
        problem = "name tokens of a whole image, and here they are split over devices"
        remedy = "Use a mesh of context=1 with them."
    elif has_regions and (guidance.nag is not None or degrades or custom):
        problem = "are a custom attention, beside that of nag, of degraded blocks, or of attention="
        remedy = "Leave the other out, or mix the regions' velocities."
    elif guidance.nag is not None:
        problem = "have texts of their own, and nag guides away from one text by another"
        remedy = "Leave nag out, and guide by scale."
    elif has_mixed and guidance.cache is not None:
        problem = "mix several evaluations, and a cache remembers one"
        remedy = "Leave the cache out."
    else:
        return
    raise ValueError(f"The regions of a `Conditioning` {problem}. {remedy}")


def _reference_tokens(condition: Condition) -> int:
    if isinstance(condition, Conditioning):
        return 0 if condition.reference is None else len(condition.reference.tokens)
    return 0 if condition.reference_tokens is None else len(condition.reference_tokens)


def split_scales(guidance: Guidance) -> tuple[Guidance, Guidance]:
    """Split a batch's guidance into the scales with one number for each image, and the rest.

    Each part has None in the place of the other's numbers; `eqx.combine` joins them again.
    """

    def has_rows(path: tuple[jax.tree_util.GetAttrKey, ...], leaf: object) -> bool:
        # Leaves may be functions too, such as the attention of degraded blocks.
        is_scale = path[-1].name in ("scale", "strength")
        return is_scale and isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim == 1

    rows = jax.tree_util.tree_map_with_path(has_rows, guidance)
    return eqx.partition(guidance, rows)


def select_scales(guidance: Guidance, numbers: Sequence[int]) -> Guidance:
    """Return the guidance of the images of these numbers: their own scales, and the rest."""
    rows, shared = split_scales(guidance)
    index = np.asarray(numbers)
    return eqx.combine(jax.tree.map(lambda scale: jnp.asarray(scale)[index], rows), shared)
