"""Images as the pixels that vision encoders take: resized, cropped and normalized."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from fluxjax.arguments import convert_arguments
from fluxjax.generate.image import to_bytes
from fluxjax.generate.image_to_image import check_image
from fluxjax.nets.clip_vision import ClipVisionConfig
from fluxjax.nets.patches import Pixels
from fluxjax.nets.siglip import SiglipConfig
from fluxjax.shapes import Image

# Of the images that CLIP was trained with, red, green and blue.
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_SIGLIP_MEAN = _SIGLIP_DEVIATION = (0.5, 0.5, 0.5)


@convert_arguments
def siglip_pixels(
    image: Image,
    config: SiglipConfig = SiglipConfig(),
    *,
    crop: bool = False,
) -> Pixels:
    """Return an image as the pixels that SigLIP takes, in [-1, 1].

    It is resized by a bicubic filter to the encoder's square, whatever its sides.

    **Arguments:** `image`: of any size; values outside of [-1, 1] are clipped. `config`: of the
    encoder. `crop`: keep the proportions, and read only the square in the middle, as ComfyUI does.
    **Raises:** `ValueError` for an image that is empty, not finite, or traced.
    **Source:** transformers' `SiglipImageProcessor`.
    """
    resized = _resized("siglip_pixels", image, config.image_size, crop)
    return _normalized(resized, _SIGLIP_MEAN, _SIGLIP_DEVIATION)


@convert_arguments
def clip_pixels(image: Image, config: ClipVisionConfig = ClipVisionConfig()) -> Pixels:
    """Return an image as the pixels that CLIP takes: normalized by CLIP's means and deviations.

    Its shorter side is resized by a bicubic filter, and the square in the middle is kept.

    **Arguments:** `image`: of any size; values outside of [-1, 1] are clipped. `config`: of the
    encoder.
    **Raises:** `ValueError` for an image that is empty, not finite, or traced.
    **Source:** transformers' `CLIPImageProcessor`.
    """
    resized = _resized("clip_pixels", image, config.image_size, True)
    return _normalized(resized, _CLIP_MEAN, _CLIP_DEVIATION)


def _resized(call: str, image: Image, side: int, crop: bool) -> np.ndarray:
    """Return an image as bytes, resized to a square."""
    if isinstance(image, jax.core.Tracer):
        raise ValueError(
            f"`{call}(image)` resizes on the host, got a traced image. Call it outside of jit."
        )
    check_image(call, image)
    picture = PIL.Image.fromarray(to_bytes(image))
    if not crop:
        return np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC))
    shorter = min(picture.size)
    # The longer side is rounded down, as in transformers.
    width, height = (side * size // shorter for size in picture.size)
    picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(picture)[top : top + side, left : left + side]


def _normalized(levels: np.ndarray, mean: Sequence[float], deviation: Sequence[float]) -> Pixels:
    """Return bytes as floats with the mean subtracted, in units of the deviation."""
    colors = levels.astype(np.float32) / np.float32(255)
    normalized = (colors - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)
    return jnp.asarray(normalized)
