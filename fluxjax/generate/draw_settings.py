"""How images of prompts are drawn: the settings of all functions that draw some."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import check_times
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step
from fluxjax.generate.cache import AttentionChoice
from fluxjax.generate.conditioning import AddedCondition
from fluxjax.generate.image_batch import check_image_count
from fluxjax.generate.samplers import model_times
from fluxjax.generate.velocity import Guidance
from fluxjax.numeric import check_finite
from fluxjax.shapes import PerImage, PRNGKeyArray, Times
from fluxjax.zoo import Defaults


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How images are drawn; None takes the model's default.

    `height`, `width`: in pixels, multiples of 16. `images`: of each prompt. `seeds`: instead, one
    for each image of a prompt, in place of a key: the first image of `seed_key(seed)` each.
    `steps`: of the model's own timer, or `times`: nodes of another. `step`: the integrator.
    `distilled_guidance`: the scale that guidance-distilled networks take, one number or one for
    each image (of all prompts, prompt by prompt); so is the scale of a `Guidance`. `max_length`: T5
    tokens for each prompt. `batch`: images in a forward pass; None draws all at once. `dtype`: of
    the activations; None takes that of `activation_dtype`. `attention`: as for `Flux`.
    `conditions`: what images are conditioned on beside their prompts, such as an image that is
    edited.
    """

    height: int | None = None
    width: int | None = None
    images: int = 1
    seeds: Sequence[int] | None = None
    steps: int | None = None
    times: Times | None = None
    step: Step = field(default_factory=Euler)
    distilled_guidance: PerImage | None = None
    max_length: int | None = None
    batch: int | None = None
    dtype: DTypeLike | None = None
    attention: AttentionChoice = None
    conditions: tuple[AddedCondition, ...] = ()


def with_seeds(call: str, key: PRNGKeyArray | None, settings: DrawSettings) -> DrawSettings:
    """Return settings with as many images as seeds, if there are any.

    **Arguments:** `call`: the function that messages name. `key`: of the call, or None.
    **Raises:** `ValueError` for seeds beside a key or a number of images, or for none of them.
    """
    if settings.seeds is None:
        if key is None:
            raise ValueError(f"`{call}` needs a key=, or DrawSettings(seeds=), got none of them.")
        return settings
    if key is not None or settings.images != 1 or not len(settings.seeds):
        raise ValueError(
            f"`{call}` draws an image for each of DrawSettings(seeds=), and needs one at least, "
            "without a key= and images=. Leave these out."
        )
    return replace(settings, images=len(settings.seeds))


def check_draw_settings(
    call: str, settings: DrawSettings, count: int, prompts: int, guidance: Guidance
) -> None:
    """Check what can be known before anything is encoded.

    **Arguments:** `count`: of the images. `prompts`: how many there are.
    **Raises:** `ValueError` for nothing to draw, or numbers that are not those of the images.
    """
    batch = count if settings.batch is None else settings.batch
    if count < 1 or batch < 1:
        raise ValueError(
            f"`{call}` needs at least one prompt, image and batch, got {prompts}, "
            f"{settings.images}, {batch}."
        )
    scales = {"distilled_guidance": settings.distilled_guidance, "scale": guidance.scale}
    if guidance.weak is not None:
        scales["strength"] = guidance.weak.strength
    check_finite(call, **scales)
    for name, scale in scales.items():
        if scale is not None and jnp.ndim(scale) == 1:
            check_image_count(call, name, jnp.size(scale), count)


def times_of_settings(
    call: str, settings: DrawSettings, defaults: Defaults, height: int, width: int
) -> Times:
    """Return the nodes of the settings, or of the model's own timer.

    **Arguments:** `height`, `width`: of the images, in pixels.
    **Raises:** `ValueError` for both steps and nodes, or nodes that do not fall.
    """
    if settings.times is None:
        steps = defaults.steps if settings.steps is None else settings.steps
        return model_times(defaults, steps, height, width)
    if settings.steps is not None:
        raise ValueError(
            "`DrawSettings` takes `steps` of the model's timer, or `times` of another, not both."
        )
    times = jnp.asarray(settings.times)
    check_times(call, times, rising=False, step="drawing")
    return times
