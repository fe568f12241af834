"""The velocity and the integrator of one image of a batch, from its conditions and the recipe."""

from typing import NamedTuple, cast

import equinox as eqx

from fluxjax.devices.copies import SplitVelocity
from fluxjax.flow.sample import evaluation_times
from fluxjax.flow.step import Step
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.batch_rows import CommonInputs, FieldNetworks, ImageRows
from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.conditions import Conditions, join_conditions, prepare_joined
from fluxjax.generate.velocity import Guidance, guided_velocity


class FieldConditions(NamedTuple):
    """The conditions of an image, `own`, and of its source, if it has one."""

    own: Conditions
    source: Conditions | None


def conditions_of_image(row: ImageRows, shared: CommonInputs) -> FieldConditions:
    """Return the conditions of an image and of its source, not yet prepared for any time."""
    positive = eqx.combine(row.positive, shared.positive)
    negative = None
    if row.negative is not None:
        negative = eqx.combine(row.negative, shared.negative)
    guidance = eqx.combine(row.guidance, shared.guidance)
    own = join_conditions(positive, negative, texts=guidance.nag is not None)
    if row.source is None:
        return FieldConditions(own, None)
    source = cast(Conditioning, eqx.combine(row.source, shared.source))
    return FieldConditions(own, join_conditions(source, None, texts=False))


def prepare_conditions(
    networks: FieldNetworks, conditions: FieldConditions, row: ImageRows, shared: CommonInputs
) -> FieldConditions:
    """Return conditions prepared for all times at which the image's integrator evaluates them.

    **Arguments:** `conditions`: from `conditions_of_image`.
    """
    _, step = image_field(networks, conditions, row, shared)
    evaluations = evaluation_times(step, shared.recipe.times)
    flux, source = networks.flux, conditions.source
    if source is not None:
        source = prepare_joined(flux, source, evaluations, networks.source)
    own = prepare_joined(flux, conditions.own, evaluations, networks.own)
    return FieldConditions(own, source)


def image_field(
    networks: FieldNetworks,
    conditions: FieldConditions,
    row: ImageRows,
    shared: CommonInputs,
    image_axes: tuple[str, ...] = (),
) -> tuple[Velocity, Step]:
    """Return the velocity of an image and its integrator, changed as the recipe says.

    **Arguments:** as for `image_velocities`.
    """
    velocity, source = image_velocities(networks, conditions, row, shared, image_axes)
    change, step = shared.recipe.change, shared.recipe.step
    if change is None:
        return velocity, step
    if shared.split_axes:
        # A change may take gradients of velocities.
        velocity = SplitVelocity(velocity, shared.split_axes)  # type: ignore[assignment]
        if source is not None:
            source = SplitVelocity(source, shared.split_axes)  # type: ignore[assignment]
    return change(velocity, step, row.inputs, source)


def image_velocities(
    networks: FieldNetworks,
    conditions: FieldConditions,
    row: ImageRows,
    shared: CommonInputs,
    image_axes: tuple[str, ...] = (),
) -> tuple[Velocity, Velocity | None]:
    """Return the guided velocity of an image, and that of its source, which is not guided.

    **Arguments:** `conditions`: of the image, prepared for times or not. `row`, `shared`: the image
    and what it shares with its batch, from `split_batch`. `image_axes`: the axes over which images
    are mapped, for guidance that decides by all images of a batch.
    **Returns:** the second is None for an image without a source.
    """
    attention, remat = shared.recipe.attention, shared.recipe.remat
    guidance = eqx.combine(row.guidance, shared.guidance)
    flux = networks.flux
    own = guided_velocity(
        flux, conditions.own, guidance, attention, image_axes, networks.own, remat
    )
    source = None
    if conditions.source is not None:
        unguided = guided_velocity(
            flux, conditions.source, Guidance(), attention, (), networks.source, remat
        )
        source = cast(Velocity, unguided)
    return cast(Velocity, own), source
