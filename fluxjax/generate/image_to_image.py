"""Images drawn from other images: a start at less than full noise, parts that are kept."""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.inpaint import Inpaint
from fluxjax.flow.step import Step
from fluxjax.flow.strength import STRENGTH_RULES, add_noise, partial_times, start_time
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.canvas import Margins, extend_canvas
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.encode_prompts import PromptTexts, negative_prompts
from fluxjax.generate.image_batch import DrawChange, ImageBatch, Recipe
from fluxjax.generate.latents import pack_latents
from fluxjax.generate.load_models import Models
from fluxjax.generate.masks import (
    MARGIN,
    cell_mask,
    check_mask,
    mask_tokens,
    pad_image,
    padded_size,
    paste_kept,
)
from fluxjax.generate.prompt_batch import guidance_of
from fluxjax.generate.prompted import PromptedDrawing, prompted_drawing
from fluxjax.generate.velocity import Guidance
from fluxjax.shapes import Array, Float, Image, PRNGKeyArray, Times


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class Repaint:
    """How much of an image is drawn again.

    `strength`: in [0, 1]; 0 keeps the image, 1 draws it from noise alone. `rule`: what the strength
    means: "steps", the share of the steps that are taken, as in diffusers, or "time", the time at
    which all steps start. `mask`: how strongly each pixel is repainted, [height, width]: 1 by the
    strength, 0 not at all, in between by this share of the strength (Differential Diffusion); None
    repaints all. `margin`: pixels around what is repainted that are repainted in the latent as
    well. `repeats`: how often each step is taken (RePaint); above 1 the step should draw noise, as
    `DDIM(1.0)`.

    **Raises:** `ValueError` for a strength or a mask outside [0, 1], another rule, a negative
    margin, or no repeat.
    """

    strength: float = 0.6
    rule: str = "steps"
    mask: Float[Array, "height width"] | None = None
    margin: int = MARGIN
    repeats: int = 1

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"`Repaint(strength)` needs a number in [0, 1], got {self.strength:g}. "
                "0 keeps the image, 1 replaces it."
            )
        if self.rule not in STRENGTH_RULES:
            raise ValueError(
                f"`Repaint(rule)` takes one of {', '.join(STRENGTH_RULES)}, got {self.rule!r}."
            )
        if self.margin < 0 or self.repeats < 1:
            raise ValueError(
                "`Repaint` needs a margin from 0 on and at least 1 repeat, got "
                f"{self.margin} and {self.repeats}."
            )

    def start_of(self, times: Times) -> "Start":
        """Return where sampling over these times starts."""
        if self.rule == "time" and self.strength > 0:
            return Start(partial_times(times, self.strength, "time"), 0)
        # Looked up on the host: a slice of each length would compile a program of its own.
        first = np.flatnonzero(np.asarray(times) == np.asarray(start_time(times, self.strength)))
        return Start(times, int(first[0]))


@dataclass(frozen=True)
class Start:
    """Where sampling starts: at the node `first` of `times`."""

    times: Times
    first: int

    @property
    def time(self) -> float:
        """The time at which sampling starts: 1 is noise, 0 the image."""
        return float(np.asarray(self.times)[self.first])

    @property
    def steps(self) -> int:
        """How many steps are taken."""
        return len(self.times) - 1 - self.first


class _Kept(eqx.Module):
    """What an image keeps: its packed latent, and the time from which each entry is repainted."""

    image: Float[Array, "... img_tokens channels"]
    mask: Float[Array, "... img_tokens channels"]


class KeepImage(DrawChange):
    """A change that keeps the masked part of each image, by `fluxjax.flow.Inpaint`."""

    repeats: int = eqx.field(static=True, default=1)

    def __call__(
        self, velocity: Velocity, step: Step, inputs: _Kept, source: Velocity | None
    ) -> tuple[Velocity, Step]:
        return velocity, Inpaint(step, inputs.image, inputs.mask, repeats=self.repeats)


@convert_arguments
def begin_from_images(
    batch: ImageBatch,
    recipe: Recipe,
    latents: Float[Array, "images latent_channels rows columns"],
    repaint: Repaint,
    *,
    cells: Float[Array, "images rows columns"] | None = None,
    keys: Array | None = None,
) -> tuple[ImageBatch, Recipe]:
    """Return the batch and the recipe that draw images again, in place of drawing from noise.

    A strength of another value does not compile anything, however many steps it takes.

    **Arguments:** `batch`: with noise at t = 1. `latents`: of the images. `repaint`: the strength
    and the repeats. `cells`: what is repainted of each, from `cell_mask`; None repaints all.
    `keys`: one for each image, with cells: for the noise of what is kept.
    """
    start = repaint.start_of(recipe.times)
    noise = add_noise(latents.astype(batch.noise.dtype), batch.noise, start.time)
    recipe = replace(recipe, times=start.times, first=jnp.int32(start.first))
    if cells is None:
        return replace(batch, noise=noise), recipe
    release = _release_times(recipe.times, start, repaint, cells)
    channels = latents.shape[1]
    masks = jax.vmap(lambda one: mask_tokens(one, channels=channels))(release)
    kept = _Kept(jax.vmap(pack_latents)(latents), masks)
    batch = replace(batch, noise=noise, inputs=kept, keys=keys)
    return batch, replace(recipe, change=KeepImage(repaint.repeats))


def _release_times(
    times: Times, start: Start, repaint: Repaint, cells: Float[Array, "images rows columns"]
) -> Float[Array, "images rows columns"]:
    """Return the time from which on each cell is repainted, 0 where it never is."""
    strengths = jnp.clip(cells * jnp.float32(repaint.strength), 0, 1)
    release = start_time(times, strengths, repaint.rule).astype(cells.dtype)
    # White is repainted from the start, however the product was rounded.
    release = jnp.where(cells == 1, jnp.asarray(start.time, cells.dtype), release)
    return jnp.where(cells == 0, 0, release)


def check_image(call: str, image: Image) -> None:
    """**Raises:** `ValueError` for an image that is empty or not finite."""
    values = np.asarray(image)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"`{call}(image)` needs pixels that are finite numbers in [-1, 1], got an image of "
            f"{values.shape[1]}x{values.shape[0]} that has none, or others. "
            "Read it with `read_image`."
        )


def drawing_of_image(
    call: str,
    models: Models,
    image: Image,
    prompt: str,
    *,
    key: PRNGKeyArray | None = None,
    settings: DrawSettings,
    guidance: Guidance | None,
    hooks: DrawHooks | None,
) -> PromptedDrawing:
    """Return what images of the size of another one are drawn from.

    **Raises:** `ValueError` for an image that is empty or not finite, and for sizes in the
    settings.
    """
    guidance = guidance_of(models, guidance)
    check_image(call, image)
    if settings.height is not None or settings.width is not None:
        raise ValueError(
            f"`{call}` draws at the size of its image. Leave height and width out of the settings."
        )
    height, width = padded_size(*image.shape[:2])
    negatives = negative_prompts(call, "", 1, guidance)
    return prompted_drawing(
        call,
        models,
        PromptTexts([prompt], None, negatives),
        key=key,
        settings=replace(settings, height=height, width=width),
        guidance=guidance,
        hooks=hooks,
    )


@convert_arguments
def image_to_image(
    models: Models,
    image: Image,
    prompt: str,
    *,
    key: PRNGKeyArray | None = None,
    repaint: Repaint = Repaint(),
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images height width 3"]:
    """Draw an image again, or a part of it, as a prompt says (SDEdit, inpainting).

    It is padded to multiples of 16 pixels while it is drawn. With strength 1 and without a mask the
    images are those of `text_to_image` with the same key, cropped to its size.

    **Arguments:** `image`: in [-1, 1], of any size. `repaint`: how strongly, and where. The rest as
    for `text_to_image`; guidance leads away from the empty prompt.
    **Returns:** float32 in [-1, 1], of the image's size. Pixels whose mask is 0 are the image's.
    **Raises:** `ValueError` as `text_to_image`; for a mask of another size; for sizes in the
    settings.
    **Source:** Meng et al. 2021, algorithm 2; Avrahami et al. 2022; Levin & Fried 2023.
    """
    mask = repaint.mask
    if mask is not None:
        check_mask("Repaint", mask, image)
    drawing = drawing_of_image(
        "image_to_image",
        models,
        image,
        prompt,
        key=key,
        settings=settings,
        guidance=guidance,
        hooks=hooks,
    )
    images = _draw_again(drawing, image, repaint)
    if mask is None:
        return images
    return paste_kept(images, image, mask)


def _draw_again(
    drawing: PromptedDrawing, image: Image, repaint: Repaint
) -> Float[Array, "images height width 3"]:
    """Draw all images, and crop them to the size of the one that they begin from."""
    latent = drawing.encode_image(pad_image(image))
    cells = None
    if repaint.mask is not None:
        cells = cell_mask(pad_image(repaint.mask), margin=repaint.margin)
    drawn = []
    for numbers in drawing.groups():
        rows = len(numbers)
        batch, recipe = begin_from_images(
            drawing.batch(numbers),
            drawing.recipe(numbers),
            jnp.broadcast_to(latent, (rows, *latent.shape)),
            repaint,
            cells=None if cells is None else jnp.broadcast_to(cells, (rows, *cells.shape)),
            keys=drawing.step_noise_keys(numbers),
        )
        drawn.append(drawing.draw(batch, recipe))
    height, width = image.shape[:2]
    return drawing.images(drawn)[:, :height, :width]


@convert_arguments
def outpaint(
    models: Models,
    image: Image,
    prompt: str,
    *,
    key: PRNGKeyArray | None = None,
    margins: Margins,
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images new_height new_width 3"]:
    """Draw what lies around an image, as a prompt says.

    **Arguments:** `margins`: pixels that are added on each side. The rest as for `image_to_image`;
    the prompt describes the whole new image.
    **Returns:** float32 in [-1, 1]; where the image lies, its own pixels.
    **Raises:** `ValueError` as `image_to_image`.
    """
    canvas, mask = extend_canvas(image, margins)
    return image_to_image(
        models,
        canvas,
        prompt,
        key=key,
        repaint=Repaint(strength=1.0, mask=mask),
        settings=settings,
        guidance=guidance,
        hooks=hooks,
    )
