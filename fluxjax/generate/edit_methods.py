"""Methods of editing an image by prompts, each as a record of its numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.flow_edit import FlowEdit
from fluxjax.flow.step import Step
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.draw import DrawnBatch
from fluxjax.generate.edit_record import Edit, EditMethod
from fluxjax.generate.image_batch import DrawChange
from fluxjax.generate.image_to_image import Repaint, begin_from_images
from fluxjax.generate.inverting_edits import DiffEditing, FireFlowEditing, RFInverting
from fluxjax.generate.latents import pack_latents
from fluxjax.shapes import Packed


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


EDIT_METHODS: Mapping[str, Callable[..., EditMethod]] = {
    method.name: method
    for method in (FlowEditing, SDEditing, FireFlowEditing, RFInverting, DiffEditing)
}
"""The methods of editing by name; each is made with its own numbers."""
