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
        step = 4 * _SIDE if side >= _LARGE and side % (4 * _SIDE) == 0 else _SIDE
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


def nearest_bucket(height: int, width: int, sizes: tuple[Size, ...]) -> Size:
    """Return the size whose proportions are the nearest to those of an image.

    The distance is that of the logarithms, so that of an upright and a wide size neither is
    preferred. Of two that are equally near, it is the larger one, then the narrower one.
    """

    def distance(size: Size) -> tuple[float, int, int]:
        ratio = abs(log(size[1] / size[0]) - log(width / height))
        return round(ratio, 9), -size[0] * size[1], size[1]

    return min(sizes, key=distance)


def covering_box(height: int, width: int, size: Size) -> tuple[float, float, float, float]:
    """Return the part in the middle of an image that has the proportions of a size.

    **Returns:** its left, upper, right and lower edge in pixels of the image.
    """
    scale = min(height / size[0], width / size[1])
    crop_height, crop_width = size[0] * scale, size[1] * scale
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
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
    kernel = PIL.Image.Resampling.BILINEAR if smooth else PIL.Image.Resampling.LANCZOS
    box = covering_box(height, width, size)
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        picture = PIL.Image.fromarray(np.ascontiguousarray(channel, np.float32))
        channels.append(np.asarray(picture.resize((size[1], size[0]), kernel, box)))
    return np.clip(np.stack(channels, axis=-1), -1, 1)


def token_means(mask: Float[Array, "height width"] | np.ndarray) -> np.ndarray:
    """Return the mean of a mask over the pixels of each token, [tokens] in row-major order."""
    rows, columns = mask.shape[0] // _SIDE, mask.shape[1] // _SIDE
    cells = np.asarray(mask, np.float32).reshape(rows, _SIDE, columns, _SIDE)
    return cells.mean(axis=(1, 3)).reshape(-1)
