"""What drawing calls as it goes on: for progress, timing and previews."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from fluxjax.shapes import Array, Float

Result = TypeVar("Result")


class DrawProgress(NamedTuple):
    """How far a batch is: `done` of the steps that are taken, the image each latent points to.

    `estimate`: the images at t = 0 that the last step points to, as packed latents,
    [images, img_tokens, channels], float32.
    """

    done: int
    steps: int
    estimate: Float[Array, "images img_tokens channels"]


class DrawHooks:
    """What the drawing loop calls as it goes: for progress, timing, previews, and to stay
    interruptible. Subclasses replace what they need.

    `steps_between`: after how many steps `progress` is called at the latest, and whenever a
    multiple of it is done; 1 calls it after every step. None leaves it to the clock.
    """

    steps_between: int | None = None

    def run(self, stage: str, function: Callable[..., Result], *inputs, **options) -> Result:
        """Return function(*inputs, **options) of a jitted function.

        `stage`: "encode" for prompts and images, "denoise", "decode". One function may be run with
        inputs of different shapes.
        """
        return function(*inputs, **options)

    def compile_ahead(self, function: Callable[..., Any], *inputs, **options) -> None:
        """Called with a jitted function that `run` will be called with later, and with inputs of
        the same shapes, so that it can be compiled in another thread meanwhile."""

    def progress(self, progress: DrawProgress) -> None:
        """Called between segments of the integration: a few times a second, or after each step
        that takes longer, and as `steps_between` says."""
