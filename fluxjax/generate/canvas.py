"""A larger canvas around an image, for outpainting."""

from dataclasses import dataclass

import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.shapes import Array, Float, Image


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class Margins:
    """Pixels that are added on each side of an image.

    **Raises:** `ValueError` for a negative number, or if all are 0.
    """

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0

    def __post_init__(self):
        sides = (self.left, self.right, self.top, self.bottom)
        if min(sides) < 0 or max(sides) == 0:
            raise ValueError(
                "`Margins` needs whole numbers of pixels from 0 on, at least one of them above 0, "
                f"got left={self.left}, right={self.right}, top={self.top}, bottom={self.bottom}. "
                "Say on which side the image grows."
            )


@convert_arguments
def extend_canvas(
    image: Image, margins: Margins
) -> tuple[Float[Array, "new_height new_width 3"], Float[Array, "new_height new_width"]]:
    """Return an image on a larger canvas, and the mask of what is new.

    The image is mirrored into the margins, so that the cells at its edge are encoded as they would
    be inside of an image.

    **Returns:** the canvas, and its mask: 1 in the margins, 0 where the image is.
    """
    padding = ((margins.top, margins.bottom), (margins.left, margins.right))
    canvas = jnp.pad(image, (*padding, (0, 0)), mode="symmetric")
    kept = jnp.zeros(image.shape[:2], jnp.float32)
    return canvas, jnp.pad(kept, padding, constant_values=1.0)
