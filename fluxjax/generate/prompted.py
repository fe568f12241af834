"""Drawing of encoded prompts: what all functions share that draw images of prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.flow.stochastic import draws_noise
from fluxjax.generate.condition_images import encode_image
from fluxjax.generate.draw import DrawnBatch, draw_batch
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import (
    DrawSettings,
    check_draw_settings,
    times_of_settings,
    with_seeds,
)
from fluxjax.generate.encode_prompts import PromptTexts, Runner, encode_prompts, runner_of
from fluxjax.generate.image_batch import ImageBatch, Recipe
from fluxjax.generate.latents import keys_of_steps, noise_batch, seed_key
from fluxjax.generate.load import activation_dtype
from fluxjax.generate.load_models import Models
from fluxjax.generate.prompt_batch import as_arrays, distilled_guidance, prompt_batch
from fluxjax.generate.text import TextStates
from fluxjax.generate.velocity import Guidance, select_scales
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Bool, Float, Image, Latent, PRNGKeyArray, Times


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
        return runner_of(self.hooks)

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
    settings = with_seeds(call, key, settings)
    prompts = len(texts.prompts)
    count = settings.images * prompts
    check_draw_settings(call, settings, count, prompts, guidance)
    defaults = models.defaults
    dtype = activation_dtype() if settings.dtype is None else settings.dtype
    height = defaults.height if settings.height is None else settings.height
    width = defaults.width if settings.width is None else settings.width
    times = times_of_settings(call, settings, defaults, height, width)
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
