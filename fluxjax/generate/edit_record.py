"""What a method of editing is, and what it is given: the interface of all of them."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.draw import DrawnBatch
from fluxjax.generate.draw_hooks import DrawProgress
from fluxjax.generate.field_functions import trajectories
from fluxjax.generate.image_batch import ImageBatch, Recipe
from fluxjax.generate.image_to_image import Repaint, Start
from fluxjax.generate.latents import image_ids, unpack_latents
from fluxjax.generate.prompt_batch import distilled_guidance, text_conditioning
from fluxjax.generate.prompted import PromptedDrawing
from fluxjax.generate.velocity import Guidance
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Latent, Times


@dataclass(frozen=True)
class EditMethod:
    """How an image is edited.

    - `name`: of the method on the command line.
    - `draws`: whether each image of one prompt is another one: the method draws noise.
    - `target_guidance`: the distilled scale of the prompt, unless the settings have one; None takes
      the model's.
    - `phases`: how often the steps are taken: twice with an inversion.
    - `any_step`: whether it uses the integrator of the settings; others have their own.
    """

    name: ClassVar[str]
    draws: ClassVar[bool] = True
    target_guidance: ClassVar[float | None] = None
    phases: ClassVar[int] = 1
    any_step: ClassVar[bool] = False
    strength: float

    def __post_init__(self):
        check_finite(type(self).__name__, **vars_of_numbers(self))
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"`{type(self).__name__}(strength)` needs a number in [0, 1], got "
                f"{self.strength:g}. 0 keeps the image, 1 replaces it."
            )

    @property
    def source_text(self) -> str | None:
        """The prompt that describes the image as it is, or None for a method without one."""
        return None

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for each step."""
        return 1

    def start_of(self, times: Times) -> Start:
        """Return where sampling over these times starts."""
        return Repaint(strength=self.strength).start_of(times)

    @abstractmethod
    def draw(self, edit: "Edit", numbers: Sequence[int]) -> DrawnBatch:
        """Draw the images of these numbers."""


def vars_of_numbers(record: object) -> dict[str, float]:
    """Return the fields of a record that are numbers, by name."""
    numbers = {}
    for name, value in vars(record).items():
        if isinstance(value, int | float):
            numbers[name] = value
    return numbers


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit that is under way: everything that a method draws from.

    `drawing`: of the prompt. `latent`: of the image. `source`: what the image is conditioned on as
    it is, for methods that take it.
    """

    drawing: PromptedDrawing
    latent: Latent
    source: Conditioning | None

    def latents(self, numbers: Sequence[int]) -> Float[Array, "images channels rows columns"]:
        """Return the image's latent once for each of the images of these numbers."""
        return jnp.broadcast_to(self.latent, (len(numbers), *self.latent.shape))

    def batch(self, numbers: Sequence[int]) -> ImageBatch:
        """Return the batch of the images of these numbers, whose state is the image itself."""
        batch = self.drawing.batch(numbers)
        latents = self.latents(numbers).astype(batch.noise.dtype)
        keys = self.drawing.step_noise_keys(numbers)
        return replace(batch, noise=latents, keys=keys)

    def path_to_noise(
        self, batch: ImageBatch, recipe: Recipe
    ) -> Float[Array, "images nodes img_tokens channels"]:
        """Return the path of the image's inversion under its own prompt.

        `recipe`: with rising times; its guidance is not used.
        """
        assert self.source is not None
        batch = replace(batch, positive=self.source, negative=None, source=None)
        recipe = replace(recipe, guidance=Guidance())
        drawing, models = self.drawing, self.drawing.models
        path = drawing.run("denoise", trajectories, models.flux, batch, recipe, mesh=models.mesh)
        if drawing.hooks is not None:
            steps = len(recipe.times) - 1
            drawing.hooks.progress(DrawProgress(steps, steps, path[:, -1]))
        return path

    def unpack(
        self, packed: Float[Array, "images img_tokens channels"]
    ) -> Float[Array, "images latent_channels rows columns"]:
        """Return packed latents of the image's size as latents."""
        height, width = self.drawing.height, self.drawing.width
        return jax.vmap(lambda one: unpack_latents(one, height, width))(packed)


def source_conditioning(
    drawing: PromptedDrawing, prompt: str, guidance: float | None
) -> Conditioning:
    """Return the conditioning of the prompt that describes an image as it is.

    **Arguments:** `guidance`: the distilled scale, for a network that takes one.
    """
    states = drawing.encode_prompt(prompt)
    flux = drawing.models.flux
    if not flux.config.guidance_embed:
        guidance = None
    scale = distilled_guidance(flux, drawing.models.defaults, guidance)
    ids = image_ids(drawing.height, drawing.width)
    conditioning = text_conditioning(jax.tree.map(lambda rows: rows[0], states), ids, scale)
    for condition in drawing.settings.conditions:
        conditioning = condition.add(conditioning)
    return conditioning
