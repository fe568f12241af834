"""The conditions of an image together: their texts joined, their controls taken out, prepared."""

from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp

from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.generate.conditioning import (
    Conditioning,
    PreparedConditioning,
    Transformer,
    bind_control,
    prepare_conditioning,
)
from fluxjax.generate.controls import (
    Control,
    ControlInput,
    networks_of,
    prepare_control,
)
from fluxjax.nets.controlnet import ControlNet
from fluxjax.shapes import Array, Float

Condition = Conditioning | PreparedConditioning


class Nets(NamedTuple):
    """The networks of a conditioning's controls: those of shared ones, and of the others."""

    shared: tuple[ControlNet, ...] = ()
    own: tuple[ControlNet, ...] = ()


class Conditions(NamedTuple):
    """The conditions of an image.

    `positive`, `negative`: they hold only those controls that are not shared. `shared`: the others,
    of the positive one.
    """

    positive: Condition
    negative: Condition | None
    shared: tuple[ControlInput, ...] = ()


def nets_of(positive: Conditioning | None) -> Nets:
    """Return the networks of a positive conditioning's controls."""
    control = () if positive is None else positive.control
    shared = [one for one in control if one.shared]
    return Nets(networks_of(shared), networks_of([one for one in control if not one.shared]))


def join_conditions(
    positive: Conditioning, negative: Conditioning | None, *, texts: bool
) -> Conditions:
    """Return both conditions as `guided_velocity` takes them, not yet prepared for any time.

    Controls that are shared are taken out of them, and so are the networks of all.

    **Arguments:** `texts`: whether the negative text is put before each text, as `Nag` takes it;
    controls read the texts as they were.
    """
    control = bind_control(positive)
    shared = tuple(one for one in control if one.shared)
    own = tuple(one for one in control if not one.shared)
    joined = positive
    if texts and negative is not None:
        joined = _with_negative_text(positive, negative)
    joined = replace(joined, control=own)
    if negative is None:
        return Conditions(joined, None, shared)
    own_negative = bind_control(negative)
    if not own_negative:
        # Of the same structure as the positive one's, but off.
        own_negative = tuple(_switched_off(one) for one in own)
    if texts:
        negative = _with_negative_text(negative, negative)
    return Conditions(joined, replace(negative, control=own_negative), shared)


def _switched_off(control: Control) -> Control:
    return eqx.tree_at(lambda one: one.scale, control, jnp.zeros_like(control.scale))


def prepare_joined(
    flux: Transformer,
    conditions: Conditions,
    times: Float[Array, " evaluations"] | None,
    nets: Nets = Nets(),
) -> Conditions:
    """Return conditions from `join_conditions` prepared for all times of evaluation, if known."""
    if times is None:
        return conditions
    positive, negative, shared = conditions
    if isinstance(positive, Conditioning):
        positive = prepare_conditioning(flux, positive, times, nets.own)
    if isinstance(negative, Conditioning):
        negative = prepare_conditioning(flux, negative, times, nets.own)
    inputs: list[ControlInput] = []
    for net, control in zip(nets.shared, shared, strict=True):
        if isinstance(control, Control):
            control = prepare_control(net, control, times)
        inputs.append(control)
    return Conditions(positive, negative, tuple(inputs))


def check_control(flux: Transformer, positive: Conditioning, negative: Conditioning | None) -> None:
    """Check that the controls of both conditions go together, and with the transformer.

    **Raises:** `ValueError` where tokens are split over devices; for a ControlNet of another width;
    for a negative conditioning with other controls than those of the positive one that are not
    shared.
    """
    if not positive.control and (negative is None or not negative.control):
        return
    if isinstance(flux, TokenParallelFlux):
        raise ValueError(
            "`Conditioning(control)` adds to all tokens of an image, and here they are split over "
            "devices. Use a mesh of context=1 with it."
        )
    for control in positive.control:
        if control.vec is None and positive.vec is None:
            raise ValueError(
                "`Conditioning(control)` has a ControlNet, which reads a pooled text, and this "
                "model has none. Pass `Control(vec=…)`, from the CLIP that it was trained with."
            )
    for net in networks_of(positive.control):
        if net.config.width != flux.config.width:
            raise ValueError(
                f"`Conditioning(control)` has a ControlNet of width {net.config.width}, and the "
                f"transformer has {flux.config.width}. Use one that was made for this transformer."
            )
    own = [one for one in positive.control if not one.shared]
    of_negative = [] if negative is None else list(negative.control)
    if of_negative and len(of_negative) != len(own):
        raise ValueError(
            f"A negative conditioning has one control for each of the positive one's that is not "
            f"shared, which are {len(own)}, or none; got {len(of_negative)}. Pass the positive "
            "one's controls with shared=False to both."
        )


def _with_negative_text(conditioning: Conditioning, negative: Conditioning) -> Conditioning:
    """Return a conditioning with the negative text before its own, as `Nag` takes it.

    **Raises:** `ValueError` for another number of tokens, of which `Nag` would take the wrong half.
    """
    if len(negative.txt) != len(conditioning.txt):
        raise ValueError(
            f"`Guidance(nag)` needs as many text tokens in the negative conditioning as in the "
            f"positive one, got {len(negative.txt)} and {len(conditioning.txt)}. Add the same "
            "number to both, as `redux_condition(in_negative=True)` does."
        )
    text = jnp.concatenate([negative.txt, conditioning.txt])
    lengths = negative.txt_length, conditioning.txt_length
    both = None if None in lengths else jnp.stack(lengths)  # type: ignore[arg-type]
    return replace(conditioning, txt=text, txt_length=both)
