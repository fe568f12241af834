"""Methods of editing that first invert the image: from its latent to noise, and back."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.flow_edit import edit_mask
from fluxjax.flow.inpaint import KeepHistory
from fluxjax.flow.invert import FireFlow, Steered
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.draw import DrawnBatch
from fluxjax.generate.edit_record import Edit, EditMethod
from fluxjax.generate.field_functions import FieldFunction, apply_to_fields
from fluxjax.generate.image_batch import DrawChange, ImageBatch, Recipe
from fluxjax.generate.latents import pack_latents
from fluxjax.shapes import Array, Float, Packed, PRNGKeyArray, Scalar


@dataclass(frozen=True, kw_only=True)
class InvertingMethod(EditMethod):
    """A method that integrates from the image to noise under its own prompt, and then back.

    - `step`: the integrator of both directions.
    - `source_prompt`: describes the image as it is.
    - `source_guidance`: the distilled scale of the inversion.
    """

    phases = 2
    step: ClassVar[Step] = FireFlow()
    source_prompt: str
    source_guidance: float = 1.0

    @property
    def source_text(self) -> str:
        return self.source_prompt

    def draw(self, edit: Edit, numbers: Sequence[int]) -> DrawnBatch:
        batch = edit.batch(numbers)
        recipe = replace(edit.drawing.recipe(numbers), step=self.step)
        start = self.start_of(recipe.times)
        if start.steps == 0:
            return edit.drawing.draw(batch, replace(recipe, first=jnp.int32(start.first)))
        recipe = replace(recipe, times=start.times[start.first :])
        return self.draw_back(edit, numbers, batch, recipe)

    @abstractmethod
    def draw_back(
        self, edit: Edit, numbers: Sequence[int], batch: ImageBatch, recipe: Recipe
    ) -> DrawnBatch:
        """Invert the images of these numbers, and draw them again.

        **Arguments:** `batch`: its state is the image itself. `recipe`: the way back, with falling
        times from where the inversion ends.
        """


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class FireFlowEditing(InvertingMethod):
    """Inversion by FireFlow under the source prompt, and back under the new one.

    `source_prompt`: describes the image as it is. `strength`: the share of the steps through which
    it is inverted. `source_guidance`: the distilled scale of the inversion.
    **Source:** Deng et al. 2024, algorithm 1.
    """

    name = "fireflow"
    draws = False
    strength: float = 1.0

    def draw_back(
        self, edit: Edit, numbers: Sequence[int], batch: ImageBatch, recipe: Recipe
    ) -> DrawnBatch:
        path = edit.path_to_noise(batch, replace(recipe, times=recipe.times[::-1]))
        return edit.drawing.draw(replace(batch, noise=edit.unpack(path[:, -1])), recipe)


class SteerTo(DrawChange):
    """A change to a velocity that leads to a known end, by `fluxjax.flow.Steered`.

    `rate`, `low`, `towards`: as there. Its inputs are the packed latents of the ends.
    """

    rate: Scalar
    low: Scalar
    towards: str = eqx.field(static=True)

    def __call__(
        self, velocity: Velocity, step: Step, inputs: Packed, source: Velocity | None
    ) -> tuple[Velocity, Step]:
        steered = Steered(velocity, inputs, self.rate, self.towards, low=self.low)
        return cast(Velocity, steered), step


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class RFInverting(InvertingMethod):
    """RF-Inversion: inversion steered to noise, and back steered to the image at first.

    `source_prompt`: of the inversion, usually empty. `strength`: the share of the steps through
    which it is inverted. `noise_rate`: how strongly the inversion leads to noise. `image_rate`: how
    strongly the way back leads to the image, during the first `image_share` of its steps.
    `source_guidance`: the distilled scale of the inversion.
    **Source:** Rout et al. 2024, eq. 8 and 15.
    """

    name = "rf-inversion"
    step = Euler()
    source_prompt: str = ""
    strength: float = 1.0
    noise_rate: float = 0.5
    image_rate: float = 0.9
    image_share: float = 0.25

    def draw_back(
        self, edit: Edit, numbers: Sequence[int], batch: ImageBatch, recipe: Recipe
    ) -> DrawnBatch:
        drawing, times = edit.drawing, recipe.times
        steps = len(times) - 1
        noise = jax.vmap(pack_latents)(drawing.batch(numbers).noise)
        to_noise = SteerTo(jnp.float32(self.noise_rate), jnp.float32(0), "noise")
        path = edit.path_to_noise(
            replace(batch, inputs=noise), replace(recipe, times=times[::-1], change=to_noise)
        )
        # Steps that begin above this time are the first ones.
        steered = min(round(self.image_share * steps), steps)
        low = times[steered - 1] if steered > 0 else jnp.full((), 2, times.dtype)
        to_image = SteerTo(jnp.float32(self.image_rate), low, "image")
        images = jax.vmap(pack_latents)(batch.noise)
        batch = replace(batch, noise=edit.unpack(path[:, -1]), inputs=images)
        return drawing.draw(batch, replace(recipe, change=to_image))


class PromptDifference(FieldFunction):
    """Where an image's two prompts differ, by `fluxjax.flow.edit_mask`, as a row for each token."""

    t: Scalar
    ratio: Scalar
    draws: int = eqx.field(static=True)

    def __call__(
        self, velocity: Velocity, source: Velocity | None, x: Packed, key: PRNGKeyArray | None
    ) -> Array:
        if source is None or key is None:
            raise ValueError(
                "`PromptDifference` needs the velocity of the image as it is, and a key. "
                "Pass `ImageBatch(source=..., keys=...)`."
            )
        return edit_mask(
            source, velocity, x, key=key, t=self.t, draws=self.draws, ratio=self.ratio, axis=-1
        )


class KeepPath(DrawChange):
    """A change that keeps the path of an inversion outside a mask, by `fluxjax.flow.KeepHistory`.

    Its inputs are the packed paths, [images, nodes, ...], and the masks of the tokens.
    """

    def __call__(
        self,
        velocity: Velocity,
        step: Step,
        inputs: tuple[Float[Array, "nodes img_tokens channels"], Float[Array, "img_tokens 1"]],
        source: Velocity | None,
    ) -> tuple[Velocity, Step]:
        path, mask = inputs
        return velocity, KeepHistory(step, path, mask)


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class DiffEditing(InvertingMethod):
    """DiffEdit: only where the two prompts' velocities differ is the inverted image drawn again.

    `source_prompt`: describes the image as it is. `strength`: the share of the steps through which
    it is inverted. `ratio`: how far above its mean the difference must be; larger ones give smaller
    masks. `mask_time`: the time t at which both velocities are compared. `averages`: the number of
    draws of noise over which that difference is averaged.
    `source_guidance`: the distilled scale of the source prompt.
    **Source:** Couairon et al. 2022, section 3.2.
    """

    name = "diffedit"
    strength: float = 0.75
    ratio: float = 1.5
    mask_time: float = 0.5
    averages: int = 10

    def draw_back(
        self, edit: Edit, numbers: Sequence[int], batch: ImageBatch, recipe: Recipe
    ) -> DrawnBatch:
        masks = self._masks(edit, batch, recipe)
        path = edit.path_to_noise(batch, replace(recipe, times=recipe.times[::-1]))
        batch = replace(batch, noise=edit.unpack(path[:, -1]), inputs=(path[:, ::-1], masks))
        return edit.drawing.draw(batch, replace(recipe, change=KeepPath()))

    def _masks(
        self, edit: Edit, batch: ImageBatch, recipe: Recipe
    ) -> Float[Array, "images img_tokens 1"]:
        """Return where the velocities of both prompts differ most, as the mask of each image."""
        models = edit.drawing.models
        function = PromptDifference(
            jnp.float32(self.mask_time), jnp.float32(self.ratio), self.averages
        )
        batch = replace(batch, source=edit.source)
        run = edit.drawing.run
        return run(
            "denoise", apply_to_fields, models.flux, batch, recipe, function, mesh=models.mesh
        )
