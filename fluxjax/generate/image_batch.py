"""What is drawn at once: a batch of images, the recipe of their sampling, and checks of both."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from fluxjax.arguments import convert_arguments
from fluxjax.devices.tokens import TokenParallelFlux
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.cache import AttentionChoice
from fluxjax.generate.channels import check_features
from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.conditions import check_control
from fluxjax.generate.velocity import Guidance, check_guidance, check_regions
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float, Int, PerImage, Times

IntLike = int | Int[Array, ""]


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
