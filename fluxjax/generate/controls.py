"""ControlNets as a part of what an image is conditioned on, evaluated beside the transformer."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import Attention
from fluxjax.nets.controlnet import ControlNet, PreparedControlNet
from fluxjax.nets.flux_attention import AttentionChoice
from fluxjax.nets.flux_control import ControlResiduals
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Bool, Float, Int, PerImage, Scalar, ScalarLike, Times

_TOLERANCE = 1e-6
"""How far a time may be from a node and still be taken for it."""
_RANKS = {
    "mode": 0,
    "scale": 0,
    "low": 0,
    "high": 0,
    "txt": 2,
    "vec": 1,
    "img_ids": 2,
    "guidance": 0,
}
"""Axes that the arrays of one image's control have, by the names of their fields."""


@convert_arguments
class Control(eqx.Module):
    """A ControlNet, and the image that it follows.

    `net`: its weights, which all images of a batch share; None where they are kept elsewhere.
    `condition`: a packed latent, [img_tokens, channels], or for a network of `hint_image` an image,
    [height, width, 3]. `mode`: which kind of condition it is, for a network with modes. `scale`:
    the factor of the residuals; at 0 the network is not run. `low`, `high`: it is run at times
    above `low` and up to `high`, which `control_times` gives for shares of the steps. `txt`, `vec`,
    `img_ids`, `guidance`: what the network reads; None for those of the conditioning that it
    belongs to. `shared`: whether a negative conditioning gets the residuals of the positive one, as
    in diffusers; otherwise it has a control of its own for each that is not shared, or none.

    In a batch, arrays may have a leading axis of images.
    **Raises:** `ValueError` for numbers that are not finite.
    """

    net: ControlNet | None
    condition: Float[Array, "..."]
    mode: Int[Array, "..."] | None = None
    scale: PerImage = 1.0
    low: ScalarLike = -1.0
    high: ScalarLike = 1.0
    txt: Float[Array, "... txt_tokens context"] | None = None
    vec: Float[Array, "... pooled"] | None = None
    img_ids: Float[Array, "... img_tokens axes"] | None = None
    guidance: PerImage | None = None
    shared: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_finite("Control", scale=self.scale, low=self.low, high=self.high)

    def rows(self) -> "Control":
        """Return whether each array has one row for each image: a `Control` of booleans."""
        is_image = self.net is not None and self.net.config.hint_image
        ranks = {**_RANKS, "condition": 3 if is_image else 2}

        def has_rows(
            path: tuple[jax.tree_util.GetAttrKey, ...], node: Array | float | ControlNet
        ) -> bool:
            if isinstance(node, ControlNet):
                return False
            return jnp.ndim(node) > ranks[path[-1].name]

        return jax.tree_util.tree_map_with_path(has_rows, self, is_leaf=_is_net)


class PreparedControl(eqx.Module):
    """A `Control` of which all is computed that does not depend on the noisy image.

    `prepared`: from `ControlNet.prepare`. The rest as in `Control`.
    """

    prepared: PreparedControlNet
    scale: PerImage
    low: ScalarLike
    high: ScalarLike


ControlInput = Control | PreparedControl


class ControlNets(eqx.Module):
    """ControlNets with their inputs: a function of the noisy image and the time.

    `nets`: the networks. `inputs`: of each of them, for one image. `attention`, `remat`: as for
    `Flux`.
    """

    nets: tuple[ControlNet, ...]
    inputs: tuple[ControlInput, ...]
    attention: AttentionChoice = None
    remat: bool = eqx.field(static=True, default=False)

    def __call__(
        self, x: Float[Array, "img_tokens channels"], t: Scalar
    ) -> tuple[ControlResiduals, ...]:
        """Return what is added to the tokens of the noisy image in the transformer."""
        residuals = []
        for net, one in zip(self.nets, self.inputs, strict=True):
            residuals.append(_residuals(net, one, x, t, self.attention, self.remat))
        return sum_alike(residuals)


class ControlNetSet(eqx.Module):
    """The ControlNets beside a transformer that is evaluated for several conditions.

    `shared`: those whose inputs are the same for all conditions, or what they add at the current x
    and t. `nets`: those of which each condition has inputs of its own. `attention`, `remat`: as for
    `Flux`.
    """

    shared: ControlNets | tuple[ControlResiduals, ...]
    nets: tuple[ControlNet, ...] = ()
    attention: AttentionChoice = None
    remat: bool = eqx.field(static=True, default=False)

    def __call__(
        self,
        x: Float[Array, "img_tokens channels"],
        t: Scalar,
        inputs: tuple[ControlInput, ...],
    ) -> tuple[ControlResiduals, ...]:
        """Return all that is added at x and t for one condition, whose own inputs are `inputs`."""
        control = self.at(x, t).shared
        own = ControlNets(self.nets, inputs, self.attention, self.remat)
        return sum_alike((*control, *own(x, t)))  # type: ignore[misc]  # `at` has evaluated it

    def at(self, x: Float[Array, "img_tokens channels"], t: Scalar) -> "ControlNetSet":
        """Return these with what is shared evaluated."""
        if not isinstance(self.shared, ControlNets):
            return self
        return ControlNetSet(self.shared(x, t), self.nets, self.attention, self.remat)


def _residuals(
    net: ControlNet,
    control: ControlInput,
    x: Float[Array, "img_tokens channels"],
    t: Scalar,
    attention: AttentionChoice,
    remat: bool,
) -> ControlResiduals:
    """Return the scaled residuals of one network; zeros, without running it, where it is off."""
    scale = jnp.asarray(control.scale)

    def run() -> ControlResiduals:
        ready = control
        if isinstance(ready, Control):
            ready = prepare_control(net, ready, jnp.asarray(t)[None])
        residuals = net.residuals(x, t, ready.prepared, attention=attention, remat=remat)
        return residuals * scale

    def skip() -> ControlResiduals:
        return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), jax.eval_shape(run))

    # The branch is chosen at run time, so that another scale or other times do not recompile.
    return jax.lax.cond((scale != 0) & _is_between(control, t), run, skip)


def _is_between(control: ControlInput, t: Scalar) -> Bool[Array, ""]:
    t = jnp.asarray(t)
    return (t > control.low + _TOLERANCE) & (t <= control.high + _TOLERANCE)


def prepare_control(
    net: ControlNet, control: Control, times: Float[Array, " times"]
) -> PreparedControl:
    """Compute what does not depend on the noisy image, for all times of evaluation at once.

    **Arguments:** `control`: of one image, from `bind_controls`.
    """
    assert control.txt is not None
    assert control.vec is not None
    assert control.img_ids is not None
    # A network without the embedder would refuse the scale that the transformer takes.
    guidance = control.guidance if net.config.guidance_embed else None
    prepared = net.prepare(
        times,
        condition=control.condition,
        txt=control.txt,
        vec=control.vec,
        img_ids=control.img_ids,
        guidance=guidance,
        mode=control.mode,
    )
    return PreparedControl(prepared, control.scale, control.low, control.high)


def sum_alike(control: Sequence[ControlResiduals]) -> tuple[ControlResiduals, ...]:
    """Return residuals with those summed that belong to the same blocks of a transformer."""
    sums: dict[tuple, ControlResiduals] = {}
    for residuals in control:
        shapes = residuals.double.shape, residuals.single.shape, residuals.repeated
        before = sums.get(shapes)
        sums[shapes] = residuals if before is None else jax.tree.map(jnp.add, before, residuals)
    return tuple(sums.values())


@convert_arguments
def control_times(
    times: Times, *, start: ScalarLike = 0.0, end: ScalarLike = 1.0
) -> tuple[Scalar, Scalar]:
    """Return `low` and `high` of a `Control` that is on in a share of the steps.

    Of N steps, step i is on if i / N >= start and (i + 1) / N <= end, as in diffusers. A time
    belongs to the step that begins there or lies around it; so a method that evaluates the end of a
    step too finds the last one off there.

    **Arguments:** `times`: nodes, falling. `start`, `end`: in [0, 1].
    """
    steps = len(times) - 1
    shares = jnp.arange(steps + 1, dtype=jnp.float32) / steps
    # Shares such as 0.8 are not exact, and 8 of 10 steps are to end at it.
    first = jnp.sum(shares < jnp.asarray(start, jnp.float32) - _TOLERANCE)
    last = jnp.sum(shares <= jnp.asarray(end, jnp.float32) + _TOLERANCE) - 1
    # After the last step follows no node that would be off, not even the clean image.
    low = jnp.where(last == steps, -1.0, times[jnp.maximum(last, 0)])
    high = times[jnp.minimum(first, steps)]
    return low, jnp.where(first < last, high, low)


def control_attention(attention: AttentionChoice) -> AttentionChoice:
    """Return the attention of ControlNets beside a transformer of this one.

    A custom function is for the transformer's tokens, and a ControlNet may have another number.
    """
    if attention is None or isinstance(attention, str | Attention):
        return attention
    return None


def networks_of(control: Sequence[Control]) -> tuple[ControlNet, ...]:
    """Return the networks of controls."""
    return tuple(one.net for one in control if one.net is not None)


def without_networks(control: Sequence[Control]) -> tuple[Control, ...]:
    """Return controls whose networks are kept elsewhere."""
    return tuple(eqx.tree_at(lambda one: one.net, one, None, is_leaf=_is_none) for one in control)


def with_networks(control: Sequence[Control], nets: Sequence[ControlNet]) -> tuple[Control, ...]:
    """Return controls with their networks, which `networks_of` gave."""
    pairs = zip(control, nets, strict=True)
    return tuple(eqx.tree_at(lambda one: one.net, one, net, is_leaf=_is_none) for one, net in pairs)


def _is_none(node: object) -> bool:
    return node is None


def _is_net(node: object) -> bool:
    return isinstance(node, ControlNet)
