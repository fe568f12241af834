"""Drawing: from noise and conditioning to images, a batch at once. The one loop of the package."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.flow.sample import SampleState, advance_sample, begin_sample
from fluxjax.generate.autoencode import decode
from fluxjax.generate.batch_rows import (
    CommonInputs,
    FieldNetworks,
    ImageRows,
    for_each_image,
    networks_of_batch,
    split_batch,
)
from fluxjax.generate.cache import CacheMemory
from fluxjax.generate.draw_hooks import DrawHooks, DrawProgress
from fluxjax.generate.image_batch import ImageBatch, IntLike, Recipe, check_batch
from fluxjax.generate.image_field import (
    FieldConditions,
    conditions_of_image,
    image_field,
    prepare_conditions,
)
from fluxjax.generate.latents import image_size, pack_latents, unpack_latents
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Int

_SEGMENT_SECONDS = 0.25
"""How long a segment of the integration is to take: so often is progress reported."""
_SEGMENTS = 20
"""Segments where several processes draw together: all must cut the integration alike."""


class DrawnBatch(NamedTuple):
    """A drawn batch.

    `images`: float32 in [-1, 1]. `latents`: what they were decoded from. `finite_steps`: for each
    image the number of leading steps after which all its numbers were finite. `reused`: how many
    evaluations of the network a step cache skipped.
    """

    images: Float[Array, "images height width 3"]
    latents: Float[Array, "images latent_channels rows columns"]
    finite_steps: Int[Array, " images"]
    reused: Int[Array, ""]


class DenoisedBatch(NamedTuple):
    """Latents, and what is known of their integration, as in `DrawnBatch`."""

    latents: Float[Array, "images latent_channels rows columns"]
    finite_steps: Int[Array, " images"]
    reused: Int[Array, ""]


def draw_batch(
    flux: AbstractTransformer,
    vae: Vae,
    batch: ImageBatch,
    recipe: Recipe,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> DrawnBatch:
    """Denoise and decode a batch of images.

    With `hooks` the integration is cut into segments of one compiled program, whose number of steps
    is an argument, so that progress is reported without callbacks from the device (JAX does not
    cache programs that hold some). Without, it is one program.

    **Arguments:** `dtype`: of the decoder's activations. `mesh`: of devices, from `make_mesh`; the
    networks are then from `shard`.
    **Raises:** `ValueError` as `denoise`.
    """
    denoised = denoise_batch(flux, vae, batch, recipe, dtype=dtype, mesh=mesh, hooks=hooks)
    return decode_batch(vae, denoised, dtype=dtype, mesh=mesh, hooks=hooks)


def denoise_batch(
    flux: AbstractTransformer,
    vae: Vae,
    batch: ImageBatch,
    recipe: Recipe,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> DenoisedBatch:
    """Take the first half of `draw_batch`: after it the transformer is not needed any more.

    **Arguments:** as for `draw_batch`. `vae`, `dtype`: with hooks the decoder is compiled for them
    meanwhile.
    **Raises:** `ValueError` as `denoise`.
    """
    if hooks is None:
        return _denoise(flux, batch, recipe, mesh)

    def compile_decoder() -> None:
        if mesh is None:  # with one, how the latents are split is known only after denoising
            hooks.compile_ahead(decode, vae, batch.noise, dtype=dtype, mesh=mesh)

    return _denoise_in_segments(flux, batch, recipe, mesh, hooks, compile_decoder)


def decode_batch(
    vae: Vae,
    denoised: DenoisedBatch,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    hooks: DrawHooks | None = None,
) -> DrawnBatch:
    """Take the second half of `draw_batch`. Arguments as there."""
    run = DrawHooks().run if hooks is None else hooks.run
    images = run("decode", decode, vae, denoised.latents, dtype=dtype, mesh=mesh)
    return DrawnBatch(images, *denoised)


def denoise(
    flux: AbstractTransformer, batch: ImageBatch, recipe: Recipe, *, mesh: Mesh | None = None
) -> Float[Array, "images latent_channels rows columns"]:
    """Integrate the transformer's velocity from noise to latents, a batch at once.

    **Arguments:** `mesh`: of devices, from `make_mesh`; `flux` is then from `shard`.
    **Returns:** latents, in the dtype of the noise.
    **Raises:** `ValueError` as `flux_velocity` and `sample`; for a number of scales or keys that is
    not that of the images; for a batch that leaves devices of the mesh idle.
    """
    return _denoise(flux, batch, recipe, mesh).latents


@eqx.filter_jit
def _denoise(
    flux: AbstractTransformer, batch: ImageBatch, recipe: Recipe, mesh: Mesh | None
) -> DenoisedBatch:
    """Integrate a batch in one program."""
    check_batch(flux, batch, recipe, mesh)
    drawing = _begin(flux, batch, recipe, mesh)
    # Bounds that are Python integers make the loop a scan, which has a gradient.
    bounds = recipe.first, len(recipe.times) - 1
    drawing = _advance(flux, batch, recipe, drawing, bounds, mesh)
    return _finish(batch, drawing)


def _denoise_in_segments(
    flux: AbstractTransformer,
    batch: ImageBatch,
    recipe: Recipe,
    mesh: Mesh | None,
    hooks: DrawHooks,
    while_denoising: Callable[[], None],
) -> DenoisedBatch:
    """Integrate segment by segment, so that progress can be reported between them.

    `while_denoising` is called once the loop is compiled: from then on the host mostly waits.
    """
    check_batch(flux, batch, recipe, mesh)
    steps, first = len(recipe.times) - 1, int(recipe.first)
    recipe = replace(recipe, first=jnp.int32(first))  # an argument of the compiled programs
    drawing = hooks.run("denoise", _begin_jit, flux, batch, recipe, mesh)
    done, count = first, 1
    while done < steps:
        start = time.monotonic()
        stop = min(done + count, steps)
        if hooks.steps_between is not None:
            taken = done - first
            stop = min(stop, done + hooks.steps_between - taken % hooks.steps_between)
        bounds = jnp.int32(done), jnp.int32(stop)
        drawing = hooks.run("denoise", _advance_jit, flux, batch, recipe, drawing, bounds, mesh)
        jax.block_until_ready(drawing.state.x)
        seconds_per_step = (time.monotonic() - start) / (stop - done)
        if done == first:
            while_denoising()
        done = stop
        hooks.progress(DrawProgress(done - first, steps - first, drawing.state.estimate))
        if jax.process_count() > 1:
            count = -(-steps // _SEGMENTS)
        else:
            count = max(1, int(_SEGMENT_SECONDS / max(seconds_per_step, 1e-6)))
    return _finish_jit(batch, drawing)


class _Drawing(NamedTuple):
    """A batch under way: the conditions of each image, and the state of its integration."""

    conditions: FieldConditions
    state: SampleState


def _begin(
    flux: AbstractTransformer, batch: ImageBatch, recipe: Recipe, mesh: Mesh | None
) -> _Drawing:
    """Prepare the conditions of a batch, and the state before the first step."""
    # Tokens that are split over devices are prepared where they are used, in every segment.
    prepares = mesh is None or mesh.shape["context"] == 1

    def begin(networks: FieldNetworks, row: ImageRows, shared: CommonInputs) -> _Drawing:
        recipe = shared.recipe
        conditions = conditions_of_image(row, shared)
        if prepares:
            conditions = prepare_conditions(networks, conditions, row, shared)
        velocity, step = image_field(networks, conditions, row, shared)
        first = jnp.asarray(recipe.first, jnp.int32)
        # Some steps evaluate the velocity before the first one, at the first of the times.
        times = recipe.times.at[0].set(recipe.times[first])
        state = begin_sample(velocity, pack_latents(row.noise), times, step=step)
        state = eqx.tree_at(lambda state: state.finite_steps, state, first)
        return _Drawing(conditions, state)

    rows, shared = split_batch(batch, recipe, mesh)
    return for_each_image(begin, networks_of_batch(flux, batch), (rows,), shared, mesh)


def _advance(
    flux: AbstractTransformer,
    batch: ImageBatch,
    recipe: Recipe,
    drawing: _Drawing,
    bounds: tuple[IntLike, IntLike],
    mesh: Mesh | None,
) -> _Drawing:
    """Take the steps from bounds[0] to bounds[1] - 1."""
    image_axes = ("images",) if mesh is None else ("images", "data", "fsdp")

    def advance(
        networks: FieldNetworks,
        row: ImageRows,
        drawing: _Drawing,
        inputs: tuple[CommonInputs, tuple],
    ) -> SampleState:
        shared, (start, stop) = inputs
        conditions = drawing.conditions
        if isinstance(networks.flux, TokenParallelFlux):
            conditions = prepare_conditions(networks, conditions, row, shared)
        velocity, step = image_field(networks, conditions, row, shared, image_axes)
        times = shared.recipe.times
        return advance_sample(velocity, drawing.state, times, start, stop, step=step, key=row.key)

    rows, shared = split_batch(batch, recipe, mesh)
    networks = networks_of_batch(flux, batch)
    state = for_each_image(advance, networks, (rows, drawing), (shared, bounds), mesh)
    return _Drawing(drawing.conditions, state)


def _finish(batch: ImageBatch, drawing: _Drawing) -> DenoisedBatch:
    """Return the latents of a batch whose integration is at its end."""
    height, width = image_size(batch.noise)
    packed = drawing.state.x.astype(batch.noise.dtype)
    latents = jax.vmap(lambda one: unpack_latents(one, height, width))(packed)
    return DenoisedBatch(latents, drawing.state.finite_steps, _reused(drawing.state.memory))


_begin_jit = eqx.filter_jit(_begin)
_advance_jit = eqx.filter_jit(_advance)
_finish_jit = eqx.filter_jit(_finish)


def _reused(memory: object) -> Int[Array, ""]:
    """Return how many evaluations the step caches in a velocity's memory have skipped."""
    nodes = jax.tree.leaves(memory, is_leaf=lambda node: isinstance(node, CacheMemory))
    counts = [node.reused for node in nodes if isinstance(node, CacheMemory)]
    if not counts:
        return jnp.int32(0)
    # All images of a batch skip together.
    return jnp.sum(jnp.stack([jnp.max(count) for count in counts]))
