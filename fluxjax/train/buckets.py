"""Image sizes of about one area and several proportions, and the size that each image takes."""

from math import log

import numpy as np
import PIL.Image

from fluxjax.arguments import convert_arguments
from fluxjax.generate.latents import check_size
from fluxjax.shapes import Array, Float
from fluxjax.zoo import FLUX1

Size = tuple[int, int]
"""Height and width in pixels."""
_SIDE = FLUX1.latent.token_side
_LARGE = 512
"""From this side on, sizes differ by four tokens, so that fewer programs are compiled."""


@convert_arguments
def bucket_sizes(side: int, *, max_ratio: float = 2.0, step: int | None = None) -> tuple[Size, ...]:
    """Return sizes of about side * side pixels, from upright to wide.

    The longer side of each is the multiple of `step` that comes closest to the area.

    **Arguments:** `side`: a multiple of 16 pixels. `max_ratio`: of the longer to the shorter side,
    at least 1; 1 leaves only the square. `step`: all sides are multiples of it, and it is one of
    16; by default 64, for sides below 512 16.
    **Raises:** `ValueError` for other arguments.
    """
    check_size("`bucket_sizes(side)`", side, side)
    if step is None:
        step = _default_step(side)
    if step < _SIDE or step % _SIDE or side % step:
        raise ValueError(
            f"`bucket_sizes(step)` needs a multiple of {_SIDE} pixels that divides the side "
            f"{side}, got {step}. Choose {_SIDE}."
        )
    if not 1 <= max_ratio <= 16:
        raise ValueError(
            f"`bucket_sizes(max_ratio)` needs a number from 1 to 16, got {max_ratio:g}. Choose 2."
        )
    sizes = {(side, side)}
    for shorter in range(step, side, step):
        longer = round(side * side / shorter / step) * step
        if longer <= max_ratio * shorter:
            sizes |= {(shorter, longer), (longer, shorter)}
    return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size)))


def _default_step(side: int) -> int:
    """Return what all sides are multiples of where no argument says it."""
    coarse = 4 * _SIDE
    if side >= _LARGE and side % coarse == 0:
        return coarse
    return _SIDE


def nearest_bucket(height: int, width: int, sizes: tuple[Size, ...]) -> Size:
    """Return the size whose proportions are the nearest to those of an image.

    The distance is that of the logarithms, so that of an upright and a wide size neither is
    preferred. Of two that are equally near, it is the larger one, then the narrower one.

    **Arguments:** `height`, `width`: of the image in pixels. `sizes`: from `bucket_sizes`.
    """
    proportions = log(width / height)

    def distance(size: Size) -> tuple[float, int, int]:
        size_height, size_width = size
        ratio = abs(log(size_width / size_height) - proportions)
        return round(ratio, 9), -size_height * size_width, size_width

    return min(sizes, key=distance)


def covering_box(height: int, width: int, size: Size) -> tuple[float, float, float, float]:
    """Return the part in the middle of an image that has the proportions of a size.

    **Arguments:** `height`, `width`: of the image in pixels.
    **Returns:** its left, upper, right and lower edge in pixels of the image.
    """
    scale = min(height / size[0], width / size[1])
    crop_height = size[0] * scale
    crop_width = size[1] * scale
    left = (width - crop_width) / 2
    top = (height - crop_height) / 2
    return (
        max(0.0, left),
        max(0.0, top),
        min(width, left + crop_width),
        min(height, top + crop_height),
    )


def resize_to_cover(image: np.ndarray, size: Size, *, smooth: bool = False) -> np.ndarray:
    """Return an image resized to cover a size, and cropped around its middle.

    **Arguments:** `image`: float32, [height, width, channels], in [-1, 1]. `smooth`: interpolate
    linearly, which keeps a mask within its range; otherwise by Lanczos' filter.
    **Returns:** float32, [*size, channels], in [-1, 1].
    """
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    kernels = PIL.Image.Resampling
    kernel = kernels.BILINEAR if smooth else kernels.LANCZOS
    box = covering_box(height, width, size)
    new_height, new_width = size
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        picture = PIL.Image.fromarray(np.ascontiguousarray(channel, np.float32))
        resized = picture.resize((new_width, new_height), kernel, box)
        channels.append(np.asarray(resized))
    # Lanczos' filter overshoots at edges.
    return np.clip(np.stack(channels, axis=-1), -1, 1)


def token_means(mask: Float[Array, "height width"] | np.ndarray) -> np.ndarray:
    """Return the mean of a mask over the pixels of each token, [tokens] in row-major order."""
    height, width = mask.shape
    rows, columns = height // _SIDE, width // _SIDE
    cells = np.asarray(mask, np.float32).reshape(rows, _SIDE, columns, _SIDE)
    return cells.mean(axis=(1, 3)).reshape(-1)
