"""Functions of the velocities of each image of a batch: its path through all times, or another."""

from abc import abstractmethod

import equinox as eqx
from jax.sharding import Mesh

from fluxjax.flow.sample import sample
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.batch_rows import (
    CommonInputs,
    FieldNetworks,
    ImageRows,
    for_each_image,
    networks_of_batch,
    split_batch,
)
from fluxjax.generate.image_batch import ImageBatch, Recipe, check_batch
from fluxjax.generate.image_field import (
    conditions_of_image,
    image_field,
    image_velocities,
    prepare_conditions,
)
from fluxjax.generate.latents import pack_latents
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float, Packed, PRNGKeyArray


@eqx.filter_jit
def trajectories(
    flux: AbstractTransformer, batch: ImageBatch, recipe: Recipe, *, mesh: Mesh | None = None
) -> Float[Array, "images nodes img_tokens channels"]:
    """Return the packed latents of a batch at all times of the recipe, as of an inversion.

    **Arguments:** as for `denoise`, of which all steps are taken.
    """
    check_batch(flux, batch, recipe, mesh)

    def run(networks: FieldNetworks, row: ImageRows, shared: CommonInputs) -> Array:
        conditions = prepare_conditions(networks, conditions_of_image(row, shared), row, shared)
        velocity, step = image_field(networks, conditions, row, shared)
        x, times = pack_latents(row.noise), shared.recipe.times
        path = sample(velocity, x, times, step=step, key=row.key, history=True).history
        assert path is not None
        return path

    rows, shared = split_batch(batch, recipe, mesh)
    return for_each_image(run, networks_of_batch(flux, batch), (rows,), shared, mesh)


class FieldFunction(eqx.Module):
    """A function of the velocities of one image, for `apply_to_fields`."""

    @abstractmethod
    def __call__(
        self, velocity: Velocity, source: Velocity | None, x: Packed, key: PRNGKeyArray | None
    ) -> Array:
        """Return what is computed of an image.

        **Arguments:** `velocity`, `source`: of the image's conditions. `x`: its packed latent.
        `key`: its own.
        """


@eqx.filter_jit
def apply_to_fields(
    flux: AbstractTransformer,
    batch: ImageBatch,
    recipe: Recipe,
    function: FieldFunction,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "images ..."]:
    """Return function(velocity, source, x, key) for each image of a batch.

    **Arguments:** as for `denoise`; the recipe says how velocities are guided.
    """
    check_batch(flux, batch, recipe, mesh)

    def apply(
        networks: FieldNetworks, row: ImageRows, inputs: tuple[CommonInputs, FieldFunction]
    ) -> Array:
        shared, function = inputs
        conditions = conditions_of_image(row, shared)
        velocity, source = image_velocities(networks, conditions, row, shared)
        return function(velocity, source, pack_latents(row.noise), row.key)

    rows, shared = split_batch(batch, recipe, mesh)
    return for_each_image(apply, networks_of_batch(flux, batch), (rows,), (shared, function), mesh)
