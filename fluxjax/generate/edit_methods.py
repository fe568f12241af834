"""Methods of editing an image by prompts, each as a record of its numbers."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.flow_edit import FlowEdit, edit_mask
from fluxjax.flow.inpaint import KeepHistory
from fluxjax.flow.invert import FireFlow, Steered
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.conditioning import Conditioning
from fluxjax.generate.draw import DrawnBatch
from fluxjax.generate.draw_hooks import DrawProgress
from fluxjax.generate.field_functions import FieldFunction, apply_to_fields, trajectories
from fluxjax.generate.image_batch import DrawChange, ImageBatch, Recipe
from fluxjax.generate.image_to_image import Repaint, Start, begin_from_images
from fluxjax.generate.latents import image_ids, pack_latents, unpack_latents
from fluxjax.generate.prompted import PromptedDrawing, distilled_guidance, text_conditioning
from fluxjax.generate.velocity import Guidance
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Latent, Packed, PRNGKeyArray, Scalar, Times


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


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class SDEditing(EditMethod):
    """SDEdit: noise is added up to the start, and the image drawn again from there.

    `strength`: the share of the steps that are taken.
    **Source:** Meng et al. 2021, algorithm 2.
    """

    name = "sdedit"
    any_step = True
    strength: float = 0.75

    def draw(self, edit: Edit, numbers: Sequence[int]) -> DrawnBatch:
        drawing = edit.drawing
        batch, recipe = begin_from_images(
            drawing.batch(numbers),
            drawing.recipe(numbers),
            edit.latents(numbers),
            Repaint(strength=self.strength),
        )
        return drawing.draw(batch, recipe)


class ByDifference(DrawChange):
    """A change to `fluxjax.flow.FlowEdit`, between the source's velocity and the image's own.

    Its inputs are the packed latents of the images that are edited.
    """

    averages: int = eqx.field(static=True, default=1)

    def __call__(
        self, velocity: Velocity, step: Step, inputs: Packed, source: Velocity | None
    ) -> tuple[Velocity, Step]:
        if source is None:
            raise ValueError(
                "`ByDifference` needs the velocity of the image as it is. "
                "Pass `ImageBatch(source=...)`."
            )
        return velocity, FlowEdit(source, inputs, self.averages)


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class FlowEditing(EditMethod):
    """FlowEdit: moved by the difference of two prompts' velocities, without inversion.

    `source_prompt`: describes the image as it is. `strength`: the share of the steps that are
    taken. `source_guidance`: the distilled scale of the source prompt. `averages`: draws of noise
    at each step.
    **Source:** Kulikov et al. 2024, algorithm 1.
    """

    name = "flowedit"
    target_guidance = 5.5
    source_prompt: str
    strength: float = 24 / 28
    source_guidance: float = 1.5
    averages: int = 1

    @property
    def source_text(self) -> str:
        return self.source_prompt

    @property
    def evaluations(self) -> int:
        return 2 * self.averages

    def draw(self, edit: Edit, numbers: Sequence[int]) -> DrawnBatch:
        batch, recipe = edit.batch(numbers), edit.drawing.recipe(numbers)
        packed = jax.vmap(pack_latents)(batch.noise)
        batch = replace(batch, source=edit.source, inputs=packed)
        first = jnp.int32(self.start_of(recipe.times).first)
        recipe = replace(recipe, change=ByDifference(self.averages), first=first)
        return edit.drawing.draw(batch, recipe)


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


EDIT_METHODS: Mapping[str, Callable[..., EditMethod]] = {
    method.name: method
    for method in (FlowEditing, SDEditing, FireFlowEditing, RFInverting, DiffEditing)
}
"""The methods of editing by name; each is made with its own numbers."""
