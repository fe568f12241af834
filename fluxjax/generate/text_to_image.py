"""Text to image in one call: prompts to conditioning, conditioning to images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.devices.offload import fetch
from fluxjax.flow.checks import check_times
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step
from fluxjax.generate.cache import AttentionChoice
from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.draw import (
    DrawHooks,
    DrawnBatch,
    ImageBatch,
    Recipe,
    check_image_count,
    draw_batch,
)
from fluxjax.generate.latents import image_ids, image_size, noise_batch, step_keys
from fluxjax.generate.load import Models, activation_dtype
from fluxjax.generate.samplers import model_times
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.generate.velocity import Guidance, select_scales
from fluxjax.nets.flux import Flux
from fluxjax.nets.layers import check_ids
from fluxjax.numeric import check_finite, wide_dtype
from fluxjax.shapes import Array, Bool, Float, PerImage, PRNGKeyArray, Times
from fluxjax.zoo import FLUX1, Defaults

Tree = TypeVar("Tree")


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How images are drawn; None takes the model's default.

    `height`, `width`: in pixels, multiples of 16. `images`: of each prompt. `steps`: of the model's
    own timer, or `times`: nodes of another. `step`: the integrator. `distilled_guidance`: the scale
    that guidance-distilled networks take, one number or one for each image. `max_length`: T5 tokens
    for each prompt. `batch`: images in a forward pass; None draws all at once. `dtype`: of the
    activations; None takes that of `activation_dtype`. `attention`: as for `Flux`.
    """

    height: int | None = None
    width: int | None = None
    images: int = 1
    steps: int | None = None
    times: Times | None = None
    step: Step = field(default_factory=Euler)
    distilled_guidance: PerImage | None = None
    max_length: int | None = None
    batch: int | None = None
    dtype: DTypeLike | None = None
    attention: AttentionChoice = None


@convert_arguments
def text_to_image(
    models: Models,
    prompt: str | Sequence[str],
    *,
    key: PRNGKeyArray,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] = "",
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance = Guidance(),
    hooks: DrawHooks | None = None,
) -> Float[Array, "images height width 3"]:
    """Draw images of prompts.

    An image depends on the key, its prompt and its number, not on the batch that it is drawn in.

    **Arguments:** `models`: from `load_models`. `prompt`: one, or several. `prompt_2`: as many,
    which T5 reads in their place. `negative_prompt`: what `guidance` guides away from, one for all
    prompts or one for each. `settings`: sizes, steps, integrator. `guidance`: classifier-free
    guidance, NAG, degraded blocks, step cache. `hooks`: called as drawing proceeds.
    **Returns:** float32 in [-1, 1]; the images of each prompt one after another, prompt by prompt.
    **Raises:** `ValueError` for sizes that are not multiples of 16; no steps, images or prompts;
    both steps and times; numbers that are not finite or not as many as images; a guidance that the
    model does not take; a negative prompt that no guidance uses; what `denoise` refuses; an image
    that is not finite (unless it is traced).
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = _negative_prompts(negative_prompt, len(prompts), guidance)
    count = settings.images * len(prompts)
    _check_settings(settings, count, len(prompts), guidance)
    defaults = models.defaults
    dtype = activation_dtype() if settings.dtype is None else settings.dtype
    height = defaults.height if settings.height is None else settings.height
    width = defaults.width if settings.width is None else settings.width
    times = _times(settings, models, height, width)
    states, negative_states = _encode(models, prompts, prompt_2, negatives, settings, dtype)
    distilled = distilled_guidance(models.flux, defaults, settings.distilled_guidance)
    guidance = as_arrays(guidance)
    drawn = []
    for numbers in batches(count, count if settings.batch is None else settings.batch):
        rows = [number // settings.images for number in numbers]
        noise = noise_batch(key, numbers, height, width, channels=models.vae.config.latent_channels)
        batch = prompt_batch(
            states.rows(rows),
            None if negative_states is None else negative_states.rows(rows),
            noise=noise.astype(wide_dtype(jnp.dtype(dtype))),
            keys=step_keys(key, numbers, settings.step),
            distilled=_select_images(distilled, numbers),
        )
        recipe = Recipe(times, settings.step, select_scales(guidance, numbers), settings.attention)
        drawn.append(
            draw_batch(
                models.flux, models.vae, batch, recipe, dtype=dtype, mesh=models.mesh, hooks=hooks
            )
        )
    _check_finite_stages((states, negative_states), drawn)
    return jnp.concatenate([one.images for one in drawn])[:count]


def prompt_batch(
    states: TextStates,
    negative: TextStates | None,
    *,
    noise: Float[Array, "images latent_channels rows columns"],
    keys: Array | None,
    distilled: PerImage | None,
) -> ImageBatch:
    """Return the batch of images of encoded prompts, one for each.

    **Arguments:** `negative`: prompts to guide away from, if any. `distilled`: the distilled
    guidance scale, for a network that takes one.
    """
    ids = image_ids(*image_size(noise))
    positive = Conditioning(states.txt, states.vec, ids, distilled)
    if negative is None:
        return ImageBatch(noise, positive, None, keys)
    return ImageBatch(
        noise, positive, Conditioning(negative.txt, negative.vec, ids, distilled), keys
    )


def distilled_guidance(
    flux: Flux, defaults: Defaults, guidance: PerImage | None
) -> Float[Array, "*images"] | None:
    """Return the distilled guidance scale as an array, by default the model's; None for a network
    that takes none.

    **Raises:** `ValueError` for a scale that the network does not take.
    """
    if flux.config.guidance_embed:
        for scale in (guidance, defaults.guidance, FLUX1.guidance):
            if scale is not None:
                return jnp.asarray(scale, jnp.float32)
    if guidance is not None:
        raise ValueError(
            "This model has no guidance embedder (as schnell), so a distilled guidance of "
            f"{guidance} would do nothing. Leave it out."
        )
    return None


def as_arrays(tree: Tree) -> Tree:
    """Return a pytree with its Python numbers as float32 arrays, so that other values do not
    compile a new program.
    """

    def convert(leaf: object) -> object:
        if isinstance(leaf, bool) or not isinstance(leaf, int | float):
            return leaf
        return jnp.float32(leaf)

    return jax.tree.map(convert, tree)


def batches(count: int, size: int) -> list[list[int]]:
    """Split range(count) into lists of one size, so that one compiled program serves all.

    The last list repeats its last number. There are never more rows than images.
    """
    size = min(size, count)
    lists = []
    for start in range(0, count, size):
        lists.append([min(number, count - 1) for number in range(start, start + size)])
    return lists


@jax.jit
def is_finite_tree(tree: object) -> Bool[Array, ""]:
    """Return whether no number in a pytree of arrays is NaN or infinite."""
    flags = [jnp.asarray(True)]
    flags += [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags))


def _negative_prompts(
    negative_prompt: str | Sequence[str], prompts: int, guidance: Guidance
) -> list[str] | None:
    """Return one negative prompt for each prompt, or None if nothing is guided by them."""
    if isinstance(negative_prompt, str):
        negatives = [negative_prompt] * prompts
    else:
        negatives = list(negative_prompt)
    if len(negatives) != prompts:
        raise ValueError(
            f"`text_to_image(negative_prompt)` takes one text, or one for each of {prompts} "
            f"prompts, got {len(negatives)}."
        )
    # The value of an array may change from call to call, and may well be 1 at times.
    scale = guidance.scale
    unguided = guidance.nag is None and not isinstance(scale, jax.Array) and np.all(scale == 1)
    if not unguided:
        return negatives
    if negative_prompt != "":
        raise ValueError(
            "`text_to_image(negative_prompt)` does nothing without guidance away from it. "
            "Pass guidance=Guidance(scale=3.0), or Guidance(nag=Nag())."
        )
    return None


def _check_settings(settings: DrawSettings, count: int, prompts: int, guidance: Guidance) -> None:
    batch = count if settings.batch is None else settings.batch
    if count < 1 or batch < 1:
        raise ValueError(
            f"`text_to_image` needs at least one prompt, image and batch, got {prompts}, "
            f"{settings.images}, {batch}."
        )
    scales = {"distilled_guidance": settings.distilled_guidance, "scale": guidance.scale}
    if guidance.weak is not None:
        scales["strength"] = guidance.weak.strength
    check_finite("text_to_image", **scales)
    for name, scale in scales.items():
        if scale is not None and jnp.ndim(scale) == 1:
            check_image_count("text_to_image", name, jnp.size(scale), count)


def _times(settings: DrawSettings, models: Models, height: int, width: int) -> Times:
    """Return the nodes of the settings, or of the model's own timer."""
    if settings.times is None:
        steps = models.defaults.steps if settings.steps is None else settings.steps
        return model_times(models.defaults, steps, height, width)
    if settings.steps is not None:
        raise ValueError(
            "`DrawSettings` takes `steps` of the model's timer, or `times` of another, not both."
        )
    times = jnp.asarray(settings.times)
    check_times("text_to_image", times, rising=False, step="drawing")
    return times


def _encode(
    models: Models,
    prompts: list[str],
    prompt_2: str | Sequence[str] | None,
    negatives: list[str] | None,
    settings: DrawSettings,
    dtype: DTypeLike,
) -> tuple[TextStates, TextStates | None]:
    """Encode the prompts, and each different negative prompt once, with encoders fetched for it."""
    clip, t5 = fetch(models.clip), fetch(models.t5)
    max_length = models.defaults.max_length if settings.max_length is None else settings.max_length

    def encode(texts: Sequence[str], t5_texts: Sequence[str] | None) -> TextStates:
        ids = prompt_ids(models.tokenizers, texts, t5_texts, max_length=max_length)
        check_ids("Clip", ids.clip, clip.config.vocabulary)
        check_ids("T5", ids.t5, t5.config.vocabulary)
        return encode_text(clip, t5, ids, dtype=dtype, mesh=models.mesh)

    negative_states = None
    if negatives is not None:
        different = list(dict.fromkeys(negatives))
        rows = [different.index(text) for text in negatives]
        negative_states = encode(different, None).rows(rows)
    seconds = [prompt_2] if isinstance(prompt_2, str) else prompt_2
    return encode(prompts, seconds), negative_states


def _select_images(scale: Array | None, numbers: Sequence[int]) -> Array | None:
    """Return the scale of the images of these numbers: the one of all, or their own."""
    if scale is None or scale.ndim == 0:
        return scale
    return scale[np.array(numbers)]


def _check_finite_stages(states: object, drawn: Sequence[DrawnBatch]) -> None:
    """Check each stage's results, except where they are traced.

    **Raises:** `ValueError` that names the first stage whose result is not finite.
    """
    stages: Mapping[str, object] = {
        "the text encoders": states,
        "denoising": [one.latents for one in drawn],
        "decoding": [one.images for one in drawn],
    }
    for stage, results in stages.items():
        finite = is_finite_tree(results)
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise ValueError(
                f"`text_to_image` has NaN or infinity after {stage}. Pass "
                "settings=DrawSettings(dtype=jnp.float32) if it is float16 that overflows; "
                "else look at the weights and adapters."
            )
