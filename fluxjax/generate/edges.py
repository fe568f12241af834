"""Edges of an image, as FLUX.1 Canny is conditioned on, by OpenCV (extra `canny`)."""

from types import ModuleType

import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.generate.image import to_bytes
from fluxjax.shapes import Image


@convert_arguments
def canny_edges(image: Image, *, low: float = 50.0, high: float = 200.0) -> Image:
    """Return the edges of an image by Canny's detector, white on black.

    **Arguments:** `image`: in [-1, 1]. `low`, `high`: of the gradient's magnitude, for colors from
    0 to 255. Edges above `high` are kept, and those above `low` that touch them. The defaults are
    those that FLUX.1 Canny was made for.
    **Returns:** 1 where there is an edge, else -1, in all three channels.
    **Raises:** `ImportError` without OpenCV; `ValueError` unless 0 <= low <= high.
    **Source:** Canny 1986; thresholds of Black Forest Labs 2024, FLUX.1 tools.
    """
    if not 0 <= low <= high:
        raise ValueError(
            f"`canny_edges` needs thresholds with 0 <= low <= high, got {low:g} and {high:g}. "
            "Choose others, as 50 and 200."
        )
    edges = import_opencv().Canny(to_bytes(image), low, high)
    values = np.asarray(edges, np.float32) / 127.5 - 1
    return jnp.asarray(np.repeat(values[..., None], 3, axis=-1))


def import_opencv() -> ModuleType:
    """**Raises:** `ImportError` that names the extra, without OpenCV."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "Canny edges need OpenCV. Install it with `pip install 'fluxjax[canny]'`."
        ) from error
    return cv2
