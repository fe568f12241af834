"""Several images as one, side by side: for previews, and to look at in notebooks."""

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image

from fluxjax.arguments import convert_arguments
from fluxjax.generate.image import to_bytes
from fluxjax.shapes import Array, Float, Image


def tile_images(
    images: Float[Array, "images height width 3"] | np.ndarray | Sequence[Image],
    columns: int | None = None,
) -> np.ndarray:
    """Return images of one size as one, row by row; places that are left are white.

    **Arguments:** `columns`: of the grid; None makes it nearly square.
    **Returns:** [rows * height, columns * width, 3].
    """
    tiles = np.asarray(images, np.float32)
    count, height, width, _ = tiles.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else min(columns, count)
    rows = -(-count // columns)
    grid = np.ones((rows * columns, height, width, 3), np.float32)
    grid[:count] = tiles
    grid = grid.reshape(rows, columns, height, width, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)


@convert_arguments
def show_images(
    images: Float[Array, "*images height width 3"], *, columns: int | None = None
) -> PIL.Image.Image:
    """Return images as one picture of Pillow's, which a notebook shows as the value of its cell.

    **Arguments:** `images`: in [-1, 1], one or several. `columns`: of the grid of several; None
    makes it nearly square.
    **Raises:** `ValueError` for no image, or fewer than one column.
    """
    tiles = np.asarray(images, np.float32)
    tiles = tiles[None] if tiles.ndim == 3 else tiles
    if tiles.ndim != 4 or not len(tiles) or (columns is not None and columns < 1):
        raise ValueError(
            "`show_images(images, columns)` needs at least one image, [height, width, 3] or "
            f"[images, height, width, 3], and a column, got {list(tiles.shape)} and {columns}. "
            "Pass what `text_to_image` returns."
        )
    return PIL.Image.fromarray(to_bytes(tile_images(tiles, columns)))
