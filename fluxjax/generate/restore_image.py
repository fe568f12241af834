"""Restore a picture from what is left of it, in one call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.devices.tokens import uses_ring
from fluxjax.devices.vae_memory import without_vae_limit
from fluxjax.flow.corrections import Correction
from fluxjax.flow.ddnm import DDNM
from fluxjax.flow.gains import dps, pigdm, proximal, tmpd
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.operators import Operator
from fluxjax.flow.posterior import Conditioned
from fluxjax.flow.restore import Decoupled, FlowDPS, Nudged
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.step import Step
from fluxjax.flow.times import static_times
from fluxjax.flow.velocity import Velocity
from fluxjax.generate.degradations import DecodePixels, Degradation, Hidden
from fluxjax.generate.draw_hooks import DrawHooks
from fluxjax.generate.draw_settings import DrawSettings
from fluxjax.generate.encode_prompts import PromptTexts, negative_prompts
from fluxjax.generate.image_batch import DrawChange
from fluxjax.generate.image_to_image import check_image
from fluxjax.generate.load_models import Models
from fluxjax.generate.masks import padded_size, paste_kept
from fluxjax.generate.prompt_batch import guidance_of
from fluxjax.generate.prompted import PromptedDrawing, prompted_drawing
from fluxjax.generate.velocity import Guidance
from fluxjax.shapes import Array, Float, Image, PRNGKeyArray, Scalar, Times


class SolverNumbers(NamedTuple):
    """The numbers of a method: `size` of its steps, and `iterations` of conjugate gradients."""

    size: Scalar
    iterations: int


Fields = tuple[Velocity, Step]
"""A velocity and its integrator."""

Solver = Callable[[Velocity, Step, Measurement, SolverNumbers], Fields]
"""What makes a velocity and an integrator of the posterior from those of the prior."""


def _decoupled(
    velocity: Velocity, step: Step, measurement: Measurement, numbers: SolverNumbers
) -> Fields:
    return velocity, Decoupled(measurement, iterations=numbers.iterations)


def _ddnm(
    velocity: Velocity, step: Step, measurement: Measurement, numbers: SolverNumbers
) -> Fields:
    return velocity, DDNM(measurement, iterations=numbers.iterations)


def _flowdps(
    velocity: Velocity, step: Step, measurement: Measurement, numbers: SolverNumbers
) -> Fields:
    return velocity, FlowDPS(measurement, numbers.size, iterations=numbers.iterations)


def _flowchef(
    velocity: Velocity, step: Step, measurement: Measurement, numbers: SolverNumbers
) -> Fields:
    return velocity, Nudged(step, measurement, numbers.size, iterations=numbers.iterations)


def _conditioned(correction: Callable[[int], Correction]) -> Solver:
    """Return the solver that integrates a conditioned velocity."""

    def solver(
        velocity: Velocity, step: Step, measurement: Measurement, numbers: SolverNumbers
    ) -> Fields:
        conditioned = Conditioned(velocity, measurement, correction(numbers.iterations))
        return conditioned, step  # type: ignore[return-value]  # without a memory it is a velocity

    return solver


SOLVERS: Mapping[str, Solver] = {
    "decoupled": _decoupled,
    "pigdm": _conditioned(pigdm),
    "tmpd": _conditioned(tmpd),
    "proximal": _conditioned(proximal),
    "dps": _conditioned(lambda iterations: dps()),
    "ddnm": _ddnm,
    "flowdps": _flowdps,
    "flowchef": _flowchef,
}
"""The methods of restoration by name."""
WITH_OWN_STEP = ("decoupled", "ddnm", "flowdps")
"""Methods that are integrators themselves."""
_WITH_SIZE = ("flowdps", "flowchef")
"""Methods whose result depends on the size of their gradient steps."""
_AT_MODEL_TIMES = ("proximal", "ddnm", "flowdps")
"""Methods that restore no better at other times than the model's own."""
_WITH_NETWORK_GRADIENT = ("pigdm", "tmpd", "dps")
"""Methods that take gradients of the transformer, which keep its activations in memory."""
_FORWARD_MODE = ("tmpd",)
"""Methods that take forward-mode gradients of the network, which attention kernels do not have."""
_WHOLE_DECODER = 512 * 512
"""Pixels up to which the decoder keeps all activations for derivatives, 9 GB in bfloat16."""
_WITHOUT_NOISE = ("decoupled", "ddnm", "flowdps", "flowchef", "proximal", "pigdm")
"""Methods that take measurements without noise."""


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What has happened to a picture, and how it is restored.

    `degradation`: `Blurred`, `Shrunk` or `Hidden`. `noise`: the standard deviation of the noise in
    what is left, in units of images of [-1, 1]; for `Hidden` in those of the latent. `method`: a
    name in `SOLVERS`. `iterations`: of conjugate gradients. `size`: of the gradient steps of
    flowdps and flowchef, by default 0.3. `remat`: for derivatives, keep only the input of each
    layer and compute the layer again, which takes one more evaluation for each derivative: of the
    transformer, for pigdm, tmpd and dps, and of the decoder, for pictures of more than 512x512
    pixels. Smaller ones have room for all activations.

    **Raises:** `ValueError` for another method, a noise that is negative, or 0 where that is not
    allowed, fewer than 1 iteration, and a size that the method does not take.
    """

    degradation: Degradation
    noise: float = 0.02
    method: str = "decoupled"
    iterations: int = 5
    size: float | None = None
    remat: bool = True

    def __post_init__(self):
        if self.method not in SOLVERS:
            raise ValueError(
                f"There is no method {self.method!r} of restoration. Choose one of "
                f"{', '.join(SOLVERS)}."
            )
        if not 0 <= self.noise < np.inf or (self.noise == 0 and self.method not in _WITHOUT_NOISE):
            raise ValueError(
                f"`Restoration(noise)` by {self.method} needs a finite deviation "
                f"{'from 0 on' if self.method in _WITHOUT_NOISE else 'above 0'}, got "
                f"{self.noise:g}. 0.02 is about three levels of 255."
            )
        if self.iterations < 1:
            raise ValueError(
                f"`Restoration(iterations)` needs at least 1, got {self.iterations}. 5 are usual."
            )
        if self.size is not None and (self.method not in _WITH_SIZE or not self.size >= 0):
            raise ValueError(
                f"`Restoration(size)` is a number from 0 on, for {' and '.join(_WITH_SIZE)}, got "
                f"{self.size:g} for {self.method}. Leave it out."
            )


def restoration_times(method: str, times: Times) -> Times:
    """Return the times at which a method restores best, as many as the model's own.

    Most methods are right near t = 0, and the models' own times spend few steps there. On the tiny
    model, times whose odds are a third of the uniform ones' are better for them, by far.

    **Arguments:** `times`: the model's own.
    """
    if method in _AT_MODEL_TIMES:
        return times
    return static_times(len(times) - 1, shift=1 / 3)


class Measured(DrawChange):
    """A change to the posterior of each image, given a measurement of it.

    Its inputs are the measured values of the images. `operator`: of a packed latent. `std`: of
    their noise. `size`, `iterations`, `method`: as in `Restoration`.
    """

    operator: Operator
    std: Scalar
    size: Scalar
    iterations: int = eqx.field(static=True)
    method: str = eqx.field(static=True)

    def __call__(
        self, velocity: Velocity, step: Step, inputs: Array, source: Velocity | None
    ) -> tuple[Velocity, Step]:
        measurement = Measurement(self.operator, inputs, self.std)
        numbers = SolverNumbers(self.size, self.iterations)
        return SOLVERS[self.method](velocity, step, measurement, numbers)


@convert_arguments
def restore_image(
    models: Models,
    image: Image,
    prompt: str = "",
    *,
    key: PRNGKeyArray | None = None,
    restoration: Restoration,
    settings: DrawSettings = DrawSettings(),
    guidance: Guidance | None = None,
    hooks: DrawHooks | None = None,
) -> Float[Array, "images restored_height restored_width 3"]:
    """Draw what a picture may have been before it was blurred, shrunk, or partly hidden.

    Each image is an approximate draw of the posterior: of the pictures that the model draws for the
    prompt, given what is left of this one. Guidance narrows the prior. On a mesh, each device has
    the whole decoder for what is measured in pixels.

    **Arguments:** `image`: what is left of the picture, in [-1, 1], of any size. `prompt`:
    describes the picture; it may be empty. `restoration`: what has happened to it, and the method.
    The rest as for `text_to_image`, but that times are by default those of `restoration_times`,
    and that attention is by default "xla_chunked" for tmpd, which takes gradients that kernels do
    not have; guidance leads away from the empty prompt.
    **Returns:** float32 in [-1, 1], of the picture's size. Pixels that were not hidden are the
    image's if there is no noise in them.
    **Raises:** `ValueError` as `text_to_image`; for a mask of another size; for a height or width
    in the settings; for an integrator in the settings where the method has its own.
    """
    guidance = guidance_of(models, guidance)
    degradation = restoration.degradation
    check_image("restore_image", image)
    degradation.check(image)
    _check_settings_of(restoration, settings)
    height, width = degradation.restored_size(*image.shape[:2])
    rows, columns = padded_size(height, width)
    settings = replace(settings, height=rows, width=columns)
    drawing = prompted_drawing(
        "restore_image",
        models,
        PromptTexts([prompt], None, negative_prompts("restore_image", "", 1, guidance)),
        key=key,
        settings=settings,
        guidance=guidance,
        hooks=hooks,
    )
    if settings.times is None:
        times = restoration_times(restoration.method, drawing.times)
        drawing = replace(drawing, times=times)
    images = _draw_posterior(drawing, image, restoration)[:, :height, :width]
    if isinstance(degradation, Hidden) and restoration.noise == 0:
        return paste_kept(images, image, degradation.mask)
    return images


def _check_settings_of(restoration: Restoration, settings: DrawSettings) -> None:
    """**Raises:** `ValueError` for settings that the restoration has no use for."""
    if settings.height is not None or settings.width is not None:
        raise ValueError(
            "`restore_image` draws at the size of the picture. Leave height and width out of the "
            "settings."
        )
    if restoration.method in WITH_OWN_STEP and not isinstance(settings.step, Euler):
        raise ValueError(
            f"`restore_image` by {restoration.method} has an integrator of its own, which "
            f"{type(settings.step).__name__} would replace. Leave the step out of the settings."
        )


def _draw_posterior(
    drawing: PromptedDrawing, image: Image, restoration: Restoration
) -> Float[Array, "images rows columns 3"]:
    """Draw all images, at the padded size."""
    degradation = restoration.degradation
    height, width = degradation.restored_size(*image.shape[:2])
    decode = DecodePixels(
        # Methods differentiate it, which images in strips do not allow.
        without_vae_limit(drawing.models.vae),
        drawing.height,
        drawing.width,
        drawing.dtype,
        remat=restoration.remat and drawing.height * drawing.width > _WHOLE_DECODER,
    )
    measured = degradation.measured(image, drawing.encode_image)
    size = 0.3 if restoration.size is None else restoration.size
    change = Measured(
        operator=degradation.of_tokens(decode, height, width),
        std=jnp.float32(restoration.noise),
        size=jnp.float32(size),
        iterations=restoration.iterations,
        method=restoration.method,
    )
    if _needs_forward_attention(restoration.method, drawing):
        settings = replace(drawing.settings, attention="xla_chunked")
        drawing = replace(drawing, settings=settings)
    # For the other methods the program is the same, and does not compile again.
    remat = restoration.remat and restoration.method in _WITH_NETWORK_GRADIENT
    drawn = []
    for numbers in drawing.groups():
        batch = replace(
            drawing.batch(numbers),
            inputs=jnp.broadcast_to(measured, (len(numbers), *measured.shape)),
            keys=drawing.step_noise_keys(numbers),
        )
        recipe = replace(drawing.recipe(numbers), change=change, remat=remat)
        drawn.append(drawing.draw(batch, recipe))
    return drawing.images(drawn)


def _needs_forward_attention(method: str, drawing: PromptedDrawing) -> bool:
    """Return whether attention is to be chosen that has forward-mode gradients."""
    if method not in _FORWARD_MODE or drawing.settings.attention is not None:
        return False
    # Ring attention has them, and is not chosen by name.
    mesh, heads = drawing.models.mesh, drawing.models.flux.config.heads
    return mesh is None or not uses_ring(heads, mesh.shape["tensor"], mesh.shape["context"])
