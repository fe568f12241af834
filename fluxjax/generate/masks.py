"""Images of any size beside the sizes that networks take, and masks of what is repainted."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.generate.image import read_image
from fluxjax.generate.latents import pack_latents
from fluxjax.printable import printable
from fluxjax.shapes import Array, Float, Image
from fluxjax.zoo import FLUX1

PixelMask = Float[Array, "height width"]
"""How strongly each pixel is repainted: 1 wholly, 0 not at all."""

_LAYOUT = FLUX1.latent
MARGIN = _LAYOUT.cell
"""Pixels around what is repainted that are repainted in the latent as well: those next to it are
encoded with its colors."""


def read_mask(path: Path | str, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read an image file as a mask: white is repainted, black is kept, gray is in between.

    Colors count by the mean of their channels, and transparent pixels as white, since `read_image`
    lays them over it.

    **Arguments:** `size`: the height and width in pixels that it must have, if any.
    **Returns:** float32 in [0, 1], [height, width].
    **Raises:** as `read_image`; `ValueError` for another size.
    """
    mask = (read_image(path).mean(axis=-1) + 1) / 2
    if size is not None and mask.shape != tuple(size):
        raise ValueError(
            f"`read_mask` needs a mask of the image's size, {size[1]}x{size[0]} pixels, and "
            f"{printable(str(path))} has {mask.shape[1]}x{mask.shape[0]}. "
            "Make it as large as the image."
        )
    return np.clip(mask, 0, 1).astype(np.float32)


def check_mask(call: str, mask: Float[Array, "mask_height mask_width"], image: Image) -> None:
    """Check that a mask fits an image.

    **Raises:** `ValueError` for a mask of another size, or with values outside of [0, 1].
    """
    height, width = image.shape[:2]
    if mask.shape != (height, width):
        raise ValueError(
            f"`{call}(mask)` needs one value for each of the {width}x{height} pixels, got "
            f"{mask.shape[1]}x{mask.shape[0]}. Make the mask as large as the image."
        )
    values = np.asarray(mask)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"`{call}(mask)` needs values in [0, 1], from kept to repainted, got "
            f"{values.min():g} to {values.max():g}. An image of [-1, 1] is (image + 1) / 2."
        )


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Return the least size that networks take, multiples of 16 pixels, and that holds an image."""
    side = _LAYOUT.token_side
    return height + -height % side, width + -width % side


@convert_arguments
def pad_image(
    image: Float[Array, "height width *channels"],
) -> Float[Array, "padded_height padded_width *channels"]:
    """Return an image whose sides are multiples of 16 pixels.

    It is mirrored at its lower and right edge, so that its first rows and columns are the image.

    **Arguments:** `image`: with or without a last axis of channels; a mask has none.
    """
    height, width = image.shape[:2]
    padded_height, padded_width = padded_size(height, width)
    padding = [(0, padded_height - height), (0, padded_width - width)]
    padding += [(0, 0)] * (image.ndim - 2)
    return jnp.pad(image, padding, mode="symmetric")


@convert_arguments
def cell_mask(mask: PixelMask, *, margin: int = MARGIN) -> Float[Array, "rows columns"]:
    """Return how strongly each latent cell is repainted: as its most repainted pixel.

    A cell covers 8x8 pixels. It counts as 0, as kept, only if no pixel in it and in the margin
    around it is repainted at all.

    **Arguments:** `mask`: sides are multiples of 16, as `pad_image` returns it. `margin`: in
    pixels, around each cell.
    **Raises:** `ValueError` for other sizes or a negative margin.
    """
    cell = _LAYOUT.cell
    height, width = mask.shape
    if margin < 0 or (height, width) != padded_size(height, width):
        raise ValueError(
            f"`cell_mask` needs sides that are multiples of {_LAYOUT.token_side} pixels and a "
            f"margin from 0 on, got {height}x{width} and {margin}. Pad the mask with `pad_image`."
        )
    wide = jnp.pad(mask, margin, mode="constant")
    by_row = [wide[shift : shift + height] for shift in range(2 * margin + 1)]
    tall = jnp.stack(by_row).max(axis=0)
    by_column = [tall[:, shift : shift + width] for shift in range(2 * margin + 1)]
    widest = jnp.stack(by_column).max(axis=0)
    return widest.reshape(height // cell, cell, width // cell, cell).max(axis=(1, 3))


@convert_arguments
def mask_tokens(
    cells: Float[Array, "rows columns"], *, channels: int = _LAYOUT.channels
) -> Float[Array, "img_tokens features"]:
    """Return a mask of latent cells packed as latents are: each cell's value for all its channels.

    **Arguments:** `cells`: from `cell_mask`. `channels`: of the latent.
    """
    return pack_latents(jnp.broadcast_to(cells, (channels, *cells.shape)))


@convert_arguments
def paste_kept(
    drawn: Float[Array, "*images height width 3"],
    image: Image,
    mask: Float[Array, "height width"],
) -> Float[Array, "*images height width 3"]:
    """Return drawn images with the image's own pixels wherever its mask is 0."""
    return jnp.where(mask[..., None] == 0, image.astype(drawn.dtype), drawn)
