"""Drawing of encoded prompts: what all functions share that draw images of prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.devices.offload import fetch
from fluxjax.flow.checks import check_times
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step
from fluxjax.flow.stochastic import draws_noise
from fluxjax.generate.cache import AttentionChoice
from fluxjax.generate.condition_images import encode_image
from fluxjax.generate.conditioning import AddedCondition, Conditioning
from fluxjax.generate.draw import DrawnBatch, draw_batch
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.image_batch import ImageBatch, Recipe, check_image_count
from fluxjax.generate.latents import image_ids, image_size, keys_of_steps, noise_batch, seed_key
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models
from fluxjax.generate.samplers import model_times
from fluxjax.generate.text import TextStates, encode_text, prompt_ids
from fluxjax.generate.velocity import Guidance, select_scales
from fluxjax.nets.layers import check_ids
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.numeric import check_finite, wide_dtype
from fluxjax.shapes import Array, Bool, Float, Image, Latent, PerImage, PRNGKeyArray, Times
from fluxjax.zoo import FLUX1, Defaults

Tree = TypeVar("Tree")
Runner = Callable[..., Any]
"""(stage, function, *inputs, **options) -> function(*inputs, **options), as `DrawHooks.run`."""


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


class PromptTexts(NamedTuple):
    """The texts of what is drawn.

    `prompts`: one or more. `seconds`: as many, which T5 reads in their place. `negatives`: as many
    that are guided away from, or None.
    """

    prompts: list[str]
    seconds: list[str] | None = None
    negatives: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class PromptedDrawing:
    """Everything that images of prompts are drawn from.

    `call`: the function that is named in messages. `key`: the noise of each image is drawn from it
    and from the number of the image; None where the settings have seeds. `settings`, `guidance`,
    `hooks`: as for `text_to_image`. `states`, `negative`: the encoded prompts. `distilled`: the
    scale that the network takes, if it takes one. `times`: nodes of the sampling. `height`,
    `width`: in pixels, multiples of 16. `dtype`: of the activations.
    """

    call: str
    models: Models
    key: PRNGKeyArray | None
    settings: DrawSettings
    guidance: Guidance
    hooks: DrawHooks | None
    states: TextStates
    negative: TextStates | None
    distilled: Float[Array, "*images"] | None
    times: Times
    height: int
    width: int
    dtype: DTypeLike

    @property
    def count(self) -> int:
        """The number of images."""
        return self.settings.images * len(self.states.txt)

    def groups(self) -> list[list[int]]:
        """Return the numbers of the images that are drawn together."""
        count, batch = self.count, self.settings.batch
        return batches(count, count if batch is None else batch)

    def batch(self, numbers: Sequence[int]) -> ImageBatch:
        """Return the batch of the images of these numbers, which begins as noise at t = 1."""
        rows = [number // self.settings.images for number in numbers]
        channels = self.models.vae.config.latent_channels
        draw = partial(noise_batch, height=self.height, width=self.width, channels=channels)
        noise = self._each(draw, numbers)
        keys = None
        if draws_noise(self.settings.step):
            keys = self.step_noise_keys(numbers)
        return prompt_batch(
            self.states.rows(rows),
            None if self.negative is None else self.negative.rows(rows),
            noise=noise.astype(wide_dtype(jnp.dtype(self.dtype))),
            keys=keys,
            distilled=_select_images(self.distilled, numbers),
            conditions=self.settings.conditions,
        )

    def step_noise_keys(self, numbers: Sequence[int]) -> Array:
        """Return the keys of what steps draw, one for each of the images of these numbers."""
        return self._each(keys_of_steps, numbers)

    def _each(
        self, draw: Callable[[PRNGKeyArray, Sequence[int]], Array], numbers: Sequence[int]
    ) -> Array:
        """Return draw(key, numbers) of images, each with the key and the number that it has."""
        if self.key is not None:
            return draw(self.key, numbers)
        assert self.settings.seeds is not None
        rows = []
        for number in numbers:
            seed = self.settings.seeds[number % self.settings.images]
            rows.append(draw(seed_key(seed), [0]))
        return jnp.concatenate(rows)

    def recipe(self, numbers: Sequence[int]) -> Recipe:
        """Return how the images of these numbers are sampled."""
        guidance = select_scales(self.guidance, numbers)
        return Recipe(self.times, self.settings.step, guidance, self.settings.attention)

    def encode_prompt(self, prompt: str) -> TextStates:
        """Return another prompt encoded, as a batch of one.

        **Arguments:** `prompt`: for both text encoders.
        """
        texts = PromptTexts([prompt])
        return encode_prompts(self.models, texts, self.settings, self.hooks)[0]

    @property
    def run(self) -> Runner:
        """What runs a jitted function: the hooks, if there are any."""
        return _runner(self.hooks)

    def encode_image(self, image: Image) -> Latent:
        """Return the latent of an image, whose sides are multiples of 16 pixels."""
        models = self.models
        return encode_image(models.vae, image, dtype=self.dtype, mesh=models.mesh, hooks=self.hooks)

    def draw(self, batch: ImageBatch, recipe: Recipe) -> DrawnBatch:
        """Denoise and decode a batch.

        **Arguments:** `batch`, `recipe`: from the methods of these names, or changed ones.
        **Raises:** as `denoise`.
        """
        return draw_batch(
            self.models.flux,
            self.models.vae,
            batch,
            recipe,
            dtype=self.dtype,
            mesh=self.models.mesh,
            hooks=self.hooks,
        )

    def images(self, drawn: Sequence[DrawnBatch]) -> Float[Array, "images height width 3"]:
        """Return the images of all batches, in order.

        **Raises:** `ValueError` for one that is not finite (unless it is traced).
        """
        _check_finite_stages(self.call, (self.states, self.negative), drawn)
        return jnp.concatenate([one.images for one in drawn])[: self.count]


def prompted_drawing(
    call: str,
    models: Models,
    texts: PromptTexts,
    *,
    key: PRNGKeyArray | None,
    settings: DrawSettings,
    guidance: Guidance,
    hooks: DrawHooks | None,
) -> PromptedDrawing:
    """Encode the prompts and fill in the model's defaults.

    **Arguments:** `call`: the function that messages name. The rest as for `text_to_image`.
    **Raises:** `ValueError` as `text_to_image`.
    """
    settings = _with_seeds(call, key, settings)
    prompts = len(texts.prompts)
    count = settings.images * prompts
    _check_settings(call, settings, count, prompts, guidance)
    defaults = models.defaults
    dtype = activation_dtype() if settings.dtype is None else settings.dtype
    height = defaults.height if settings.height is None else settings.height
    width = defaults.width if settings.width is None else settings.width
    times = _times(call, settings, defaults, height, width)
    states, negative = encode_prompts(models, texts, settings, hooks)
    distilled = distilled_guidance(models.flux, defaults, settings.distilled_guidance)
    conditions = tuple(condition.for_times(times) for condition in settings.conditions)
    return PromptedDrawing(
        call=call,
        models=models,
        key=key,
        settings=replace(settings, conditions=conditions),
        guidance=as_arrays(guidance),
        hooks=hooks,
        states=states,
        negative=negative,
        distilled=distilled,
        times=times,
        height=height,
        width=width,
        dtype=dtype,
    )


def _with_seeds(call: str, key: PRNGKeyArray | None, settings: DrawSettings) -> DrawSettings:
    """Return settings with as many images as seeds, if there are any.

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


def negative_prompts(
    call: str, negative_prompt: str | Sequence[str], prompts: int, guidance: Guidance
) -> list[str] | None:
    """Return one negative prompt for each prompt, or None if nothing is guided by them."""
    if isinstance(negative_prompt, str):
        negatives = [negative_prompt] * prompts
    else:
        negatives = list(negative_prompt)
    if len(negatives) != prompts:
        raise ValueError(
            f"`{call}(negative_prompt)` takes one text, or one for each of {prompts} "
            f"prompts, got {len(negatives)}."
        )
    # The value of an array may change from call to call, and may well be 1 at times.
    scale = guidance.scale
    unguided = guidance.nag is None and not isinstance(scale, jax.Array) and np.all(scale == 1)
    if not unguided:
        return negatives
    if negative_prompt != "":
        raise ValueError(
            f"`{call}(negative_prompt)` does nothing without guidance away from it. "
            "Pass guidance=Guidance(scale=3.0), or Guidance(nag=Nag())."
        )
    return None


def _runner(hooks: DrawHooks | None) -> Runner:
    """Return what runs a jitted function: the hooks, or a call of it."""
    return (DrawHooks() if hooks is None else hooks).run


def prompt_batch(
    states: TextStates,
    negative: TextStates | None,
    *,
    noise: Float[Array, "images latent_channels rows columns"],
    keys: Array | None,
    distilled: PerImage | None,
    conditions: Sequence[AddedCondition] = (),
) -> ImageBatch:
    """Return the batch of images of encoded prompts, one for each.

    **Arguments:** `negative`: prompts to guide away from, if any. `distilled`: the distilled
    guidance scale, for a network that takes one. `conditions`: what is added to both, in order.
    """
    ids = image_ids(*image_size(noise))
    positive = text_conditioning(states, ids, distilled)
    for condition in conditions:
        positive = condition.add(positive)
    if negative is None:
        return ImageBatch(noise, positive, None, keys)
    guided_away = text_conditioning(negative, ids, distilled)
    for condition in conditions:
        guided_away = condition.add_to_negative(guided_away)
    return ImageBatch(noise, positive, guided_away, keys)


def text_conditioning(
    states: TextStates, ids: Float[Array, "... img_tokens axes"], distilled: PerImage | None
) -> Conditioning:
    """Return what encoded texts condition images on; arguments as for `prompt_batch`."""
    return Conditioning(states.txt, states.vec, ids, distilled, txt_length=states.txt_length)


def guidance_of(models: Models, guidance: Guidance | None) -> Guidance:
    """Return a guidance, or that which a model is meant to be sampled with."""
    return Guidance(scale=models.defaults.cfg) if guidance is None else guidance


def distilled_guidance(
    flux: AbstractTransformer, defaults: Defaults, guidance: PerImage | None
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


def _check_settings(
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


def _times(call: str, settings: DrawSettings, defaults: Defaults, height: int, width: int) -> Times:
    """Return the nodes of the settings, or of the model's own timer."""
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


def encode_prompts(
    models: Models, texts: PromptTexts, settings: DrawSettings, hooks: DrawHooks | None
) -> tuple[TextStates, TextStates | None]:
    """Encode the prompts, and each different negative prompt once, with encoders fetched for it.

    **Arguments:** `settings`: of which the length of prompts and the dtype count.
    """
    run = _runner(hooks)
    clip = None if models.clip is None else fetch(models.clip)
    t5 = fetch(models.t5)
    max_length = models.defaults.max_length if settings.max_length is None else settings.max_length
    dtype = activation_dtype() if settings.dtype is None else settings.dtype

    def encode(prompts: Sequence[str], seconds: Sequence[str] | None) -> TextStates:
        ids = prompt_ids(
            models.tokenizers,
            prompts,
            seconds,
            max_length=max_length,
            visible_padding=models.defaults.visible_padding,
        )
        if clip is not None and ids.clip is not None:
            check_ids("Clip", ids.clip, clip.config.vocabulary)
        check_ids("T5", ids.t5, t5.config.vocabulary)
        return run("encode", encode_text, clip, t5, ids, dtype=dtype, mesh=models.mesh)

    negative_states = None
    if texts.negatives is not None:
        different = list(dict.fromkeys(texts.negatives))
        rows = [different.index(text) for text in texts.negatives]
        negative_states = encode(different, None).rows(rows)
    return encode(texts.prompts, texts.seconds), negative_states


def _select_images(scale: Array | None, numbers: Sequence[int]) -> Array | None:
    """Return the scale of the images of these numbers: the one of all, or their own."""
    if scale is None or scale.ndim == 0:
        return scale
    return scale[np.array(numbers)]


def _check_finite_stages(call: str, states: object, drawn: Sequence[DrawnBatch]) -> None:
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
                f"`{call}` has NaN or infinity after {stage}. Pass "
                "settings=DrawSettings(dtype=jnp.float32) if it is float16 that overflows; "
                "else look at the weights and adapters."
            )
