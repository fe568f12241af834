"""Drawing: from noise and conditioning to images, a batch at once. The one loop of the package."""

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.arguments import convert_arguments
from fluxjax.devices.run import on_mesh
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.sample import (
    SampleState,
    advance_sample,
    begin_sample,
    evaluation_times,
    sample,
)
from fluxjax.flow.step import Step
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.autoencode import decode
from fluxjax.generate.cache import AttentionChoice, CacheMemory
from fluxjax.generate.channels import check_features
from fluxjax.generate.conditioning import Conditioning, Transformer, split_images
from fluxjax.generate.conditions import (
    Conditions,
    Nets,
    check_control,
    join_conditions,
    nets_of,
    prepare_joined,
)
from fluxjax.generate.controls import without_networks
from fluxjax.generate.latents import image_size, pack_latents, unpack_latents
from fluxjax.generate.velocity import (
    Guidance,
    check_guidance,
    check_regions,
    guided_velocity,
    split_scales,
)
from fluxjax.nets.image_prompt import ImagePrompt
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Int, Packed, PerImage, PRNGKeyArray, Times

IntLike = int | Int[Array, ""]
Result = TypeVar("Result")


@convert_arguments
class ImageBatch(eqx.Module):
    """The images of a batch: what differs from one to the next.

    `noise`: their latents at the time of the first step, which is t = 1 unless the recipe says
    otherwise: then those are from `initial_noise`. `positive`: what they are conditioned on, a
    batch of `Conditioning`. `negative`: what they are guided away from, if anything. `keys`: one
    for each image, for a step that draws noise. `inputs`: what the recipe's change takes of each
    image, a pytree whose arrays have a row for each. `source`: another condition of each image, as
    that of the image which is edited; the change gets its velocity.
    """

    noise: Float[Array, "images latent_channels rows columns"]
    positive: Conditioning
    negative: Conditioning | None = None
    keys: Array | None = None
    inputs: PyTree = None
    source: Conditioning | None = None


class DrawChange(eqx.Module):
    """How the velocity and the integrator of each image are changed by inputs of its own.

    It is a pytree, so that its arrays are arguments of compiled programs.
    """

    @abstractmethod
    def __call__(
        self, velocity: Velocity, step: Step, inputs: PyTree, source: Velocity | None
    ) -> tuple[Velocity, Step]:
        """Return the velocity that is integrated for an image, and the integrator.

        **Arguments:** `velocity`: of the image, guided. `step`: of the recipe. `inputs`: the
        image's row of `ImageBatch.inputs`. `source`: the velocity of its `ImageBatch.source`.
        """


@convert_arguments
class Recipe(eqx.Module):
    """How a batch is sampled: what is the same for all of its images.

    `times`: nodes from `flow_times` or another timer, falling from 1 to 0; rising ones invert an
    image. `step`: the integrator. `guidance`: how velocities are combined. `attention`: as for
    `Flux`. `change`: of velocity and integrator by the images' own inputs, if any. `first`: the
    number of the first step that is taken: the batch's `noise` is then the state at
    `times[first]`. An integer array compiles one program for all numbers, which has no gradient; a
    Python integer compiles one for each. `remat`: as for `flux_velocity`, for a change that takes
    gradients of the velocity.
    """

    times: Times
    step: Step = Euler()
    guidance: Guidance = Guidance()
    attention: AttentionChoice = None
    change: DrawChange | None = None
    first: IntLike = 0
    remat: bool = eqx.field(static=True, default=False)


class DrawProgress(NamedTuple):
    """How far a batch is: `done` of the steps that are taken, the image each latent points to.

    `estimate`: the images at t = 0 that the last step points to, as packed latents,
    [images, img_tokens, channels], float32.
    """

    done: int
    steps: int
    estimate: Float[Array, "images img_tokens channels"]


class DrawHooks:
    """What the drawing loop calls as it goes: for progress, timing, previews, and to stay
    interruptible. Subclasses replace what they need.

    `steps_between`: after how many steps `progress` is called at the latest, and whenever a
    multiple of it is done; 1 calls it after every step. None leaves it to the clock.
    """

    steps_between: int | None = None

    def run(self, stage: str, function: Callable[..., Result], *inputs, **options) -> Result:
        """Return function(*inputs, **options) of a jitted function.

        `stage`: "encode" for prompts and images, "denoise", "decode". One function may be run with
        inputs of different shapes.
        """
        return function(*inputs, **options)

    def compile_ahead(self, function: Callable[..., Any], *inputs, **options) -> None:
        """Called with a jitted function that `run` will be called with later, and with inputs of
        the same shapes, so that it can be compiled in another thread meanwhile."""

    def progress(self, progress: DrawProgress) -> None:
        """Called between segments of the integration: a few times a second, or after each step
        that takes longer, and as `steps_between` says."""


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


_SEGMENT_SECONDS = 0.25
"""How long a segment of the integration is to take: so often is progress reported."""
_SEGMENTS = 20
"""Segments where several processes draw together: all must cut the integration alike."""


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


def check_batch(
    flux: AbstractTransformer, batch: ImageBatch, recipe: Recipe, mesh: Mesh | None
) -> None:
    """Check what can be known of a batch before it is drawn.

    **Raises:** `ValueError` for what does not go together.
    """
    images, guidance = len(batch.noise), recipe.guidance
    splits_tokens = mesh is not None and mesh.shape["context"] > 1
    network = TokenParallelFlux(flux) if splits_tokens else flux
    concat = batch.positive.concat
    check_features("`denoise`", flux.config, 0 if concat is None else concat.shape[-1])
    has_negative = batch.negative is not None
    check_guidance(network, guidance, recipe.attention, has_negative=has_negative)
    check_control(network, batch.positive, batch.negative)
    conditions = (batch.positive, batch.negative, batch.source)
    check_regions(network, guidance, recipe.attention, conditions)
    scales: dict[str, PerImage | None] = {
        "guidance": batch.positive.guidance,
        "scale": guidance.scale,
    }
    if guidance.weak is not None:
        scales["strength"] = guidance.weak.strength
    for name, scale in scales.items():
        if scale is not None and jnp.ndim(scale) == 1:
            check_image_count("denoise", name, jnp.size(scale), images)


def check_image_count(call: str, name: str, count: int, images: int) -> None:
    """**Raises:** `ValueError` for a number of values that is not that of the images."""
    if count != images:
        raise ValueError(
            f"`{call}({name})` takes one number, or one for each of the {images} images, "
            f"got {count}."
        )


class _Rows(eqx.Module):
    """What each image of a batch has of its own: every array has a leading axis of images."""

    noise: Float[Array, "... latent_channels rows columns"]
    positive: Conditioning
    negative: Conditioning | None
    guidance: Guidance
    key: Array | None
    inputs: PyTree
    source: Conditioning | None


class _Shared(eqx.Module):
    """What all images of a batch share."""

    positive: Conditioning
    negative: Conditioning | None
    guidance: Guidance
    recipe: Recipe
    source: Conditioning | None


class _Networks(NamedTuple):
    """The transformer, and the networks of the controls of an image and of its source."""

    flux: Transformer
    own: Nets
    source: Nets


class _AllConditions(NamedTuple):
    """The conditions of an image, and of its source, if it has one."""

    own: Conditions
    source: Conditions | None


class _Drawing(NamedTuple):
    """A batch under way: the conditions of each image, and the state of its integration."""

    conditions: _AllConditions
    state: SampleState


def _begin(
    flux: AbstractTransformer, batch: ImageBatch, recipe: Recipe, mesh: Mesh | None
) -> _Drawing:
    """Prepare the conditions of a batch, and the state before the first step."""
    # Tokens that are split over devices are prepared where they are used, in every segment.
    prepares = mesh is None or mesh.shape["context"] == 1

    def begin(networks: _Networks, row: _Rows, shared: _Shared) -> _Drawing:
        recipe = shared.recipe
        conditions = _conditions(row, shared)
        if prepares:
            conditions = _prepare(networks, conditions, row, shared)
        velocity, step = _field(networks, conditions, row, shared)
        first = jnp.asarray(recipe.first, jnp.int32)
        # Some steps evaluate the velocity before the first one, at the first of the times.
        times = recipe.times.at[0].set(recipe.times[first])
        state = begin_sample(velocity, pack_latents(row.noise), times, step=step)
        state = eqx.tree_at(lambda state: state.finite_steps, state, first)
        return _Drawing(conditions, state)

    rows, shared = _split(batch, recipe, mesh)
    return _for_each_image(begin, _networks(flux, batch), (rows,), shared, mesh)


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
        networks: _Networks, row: _Rows, drawing: _Drawing, inputs: tuple[_Shared, tuple]
    ) -> SampleState:
        shared, (start, stop) = inputs
        conditions = drawing.conditions
        if isinstance(networks.flux, TokenParallelFlux):
            conditions = _prepare(networks, conditions, row, shared)
        velocity, step = _field(networks, conditions, row, shared, image_axes)
        times = shared.recipe.times
        return advance_sample(velocity, drawing.state, times, start, stop, step=step, key=row.key)

    rows, shared = _split(batch, recipe, mesh)
    networks = _networks(flux, batch)
    state = _for_each_image(advance, networks, (rows, drawing), (shared, bounds), mesh)
    return _Drawing(drawing.conditions, state)


def _networks(flux: AbstractTransformer, batch: ImageBatch) -> _Networks:
    return _Networks(flux, nets_of(batch.positive), nets_of(batch.source))


def _conditions(row: _Rows, shared: _Shared) -> _AllConditions:
    """Return the conditions of an image and of its source, not yet prepared for any time."""
    positive = eqx.combine(row.positive, shared.positive)
    negative = None
    if row.negative is not None:
        negative = eqx.combine(row.negative, shared.negative)
    guidance = eqx.combine(row.guidance, shared.guidance)
    own = join_conditions(positive, negative, texts=guidance.nag is not None)
    if row.source is None:
        return _AllConditions(own, None)
    source = cast(Conditioning, eqx.combine(row.source, shared.source))
    return _AllConditions(own, join_conditions(source, None, texts=False))


def _prepare(
    networks: _Networks, conditions: _AllConditions, row: _Rows, shared: _Shared
) -> _AllConditions:
    """Return conditions prepared for all times at which the image's integrator evaluates them."""
    _, step = _field(networks, conditions, row, shared)
    evaluations = evaluation_times(step, shared.recipe.times)
    flux, source = networks.flux, conditions.source
    if source is not None:
        source = prepare_joined(flux, source, evaluations, networks.source)
    own = prepare_joined(flux, conditions.own, evaluations, networks.own)
    return _AllConditions(own, source)


def _field(
    networks: _Networks,
    conditions: _AllConditions,
    row: _Rows,
    shared: _Shared,
    image_axes: tuple[str, ...] = (),
) -> tuple[Velocity, Step]:
    """Return the velocity of an image and its integrator, changed as the recipe says."""
    velocity, source = _velocities(networks, conditions, row, shared, image_axes)
    change, step = shared.recipe.change, shared.recipe.step
    if change is None:
        return velocity, step
    return change(velocity, step, row.inputs, source)


def _velocities(
    networks: _Networks,
    conditions: _AllConditions,
    row: _Rows,
    shared: _Shared,
    image_axes: tuple[str, ...] = (),
) -> tuple[Velocity, Velocity | None]:
    """Return the guided velocity of an image, and that of its source, which is not guided."""
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


def _for_each_image(
    function: Callable[..., Result],
    networks: _Networks,
    rows: tuple,
    shared: object,
    mesh: Mesh | None,
) -> Result:
    """Return function(networks, *row, shared) of each image, on a mesh if there is one."""

    def batched(networks: _Networks, rows: tuple, shared: object) -> Result:
        if (
            mesh is not None
            and mesh.shape["context"] > 1
            and isinstance(networks.flux, AbstractTransformer)
        ):
            networks = networks._replace(flux=TokenParallelFlux(networks.flux))
        by_row = jax.vmap(lambda *row: function(networks, *row, shared), axis_name="images")
        return by_row(*rows)

    if mesh is None:
        return batched(networks, rows, shared)
    return on_mesh(batched, mesh, networks, rows, shared)


def _split(batch: ImageBatch, recipe: Recipe, mesh: Mesh | None) -> tuple[_Rows, _Shared]:
    """Split a batch into what each image has of its own, and what all share."""
    if mesh is not None:
        batch = _with_split_heads(batch)
    positive_rows, positive = _split_condition(batch.positive)
    negative_rows = negative = None
    if batch.negative is not None:
        negative_rows, negative = _split_condition(batch.negative)
    source_rows = source = None
    if batch.source is not None:
        source_rows, source = _split_condition(batch.source)
    guidance = recipe.guidance
    if mesh is not None and guidance.nag is not None:
        # Its norms are over all heads of a token, which are split over this axis.
        nag = replace(guidance.nag, head_axes=("tensor",))
        guidance = replace(guidance, nag=nag)
    guidance_rows, guidance = split_scales(guidance)
    rows = _Rows(
        batch.noise,
        positive_rows,
        negative_rows,
        guidance_rows,
        batch.keys,
        batch.inputs,
        source_rows,
    )
    return rows, _Shared(positive, negative, guidance, recipe, source)


def _split_condition(conditioning: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Return `split_images` of a condition, without the networks of its controls."""

    def without_nets(part: Conditioning) -> Conditioning:
        return eqx.tree_at(lambda one: one.control, part, without_networks(part.control))

    rows, shared = split_images(conditioning)
    return without_nets(rows), without_nets(shared)


def _with_split_heads(batch: ImageBatch) -> ImageBatch:
    """Return a batch whose image prompts are for a transformer with heads split over "tensor"."""

    def is_prompt(node: PyTree) -> bool:
        return isinstance(node, ImagePrompt)

    def split(node: PyTree) -> PyTree:
        return replace(node, head_axis="tensor") if is_prompt(node) else node

    return jax.tree.map(split, batch, is_leaf=is_prompt)


@eqx.filter_jit
def trajectories(
    flux: AbstractTransformer, batch: ImageBatch, recipe: Recipe, *, mesh: Mesh | None = None
) -> Float[Array, "images nodes img_tokens channels"]:
    """Return the packed latents of a batch at all times of the recipe, as of an inversion.

    **Arguments:** as for `denoise`, of which all steps are taken.
    """
    check_batch(flux, batch, recipe, mesh)

    def run(networks: _Networks, row: _Rows, shared: _Shared) -> Array:
        conditions = _prepare(networks, _conditions(row, shared), row, shared)
        velocity, step = _field(networks, conditions, row, shared)
        x, times = pack_latents(row.noise), shared.recipe.times
        path = sample(velocity, x, times, step=step, key=row.key, history=True).history
        assert path is not None
        return path

    rows, shared = _split(batch, recipe, mesh)
    return _for_each_image(run, _networks(flux, batch), (rows,), shared, mesh)


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

    def apply(networks: _Networks, row: _Rows, inputs: tuple[_Shared, FieldFunction]) -> Array:
        shared, function = inputs
        conditions = _conditions(row, shared)
        velocity, source = _velocities(networks, conditions, row, shared)
        return function(velocity, source, pack_latents(row.noise), row.key)

    rows, shared = _split(batch, recipe, mesh)
    return _for_each_image(apply, _networks(flux, batch), (rows,), (shared, function), mesh)


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
