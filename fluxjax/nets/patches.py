"""The patches of an image as tokens."""

from einops import rearrange

from fluxjax.nets.conv import Conv
from fluxjax.nets.encoder_block import EncoderStates
from fluxjax.shapes import Array, Float

Pixels = Float[Array, "image_size image_size 3"]
"""The pixels of a square image, channels last, normalized as its encoder was trained."""


def embed_patches(patches: Conv, pixels: Pixels, side: int) -> EncoderStates:
    """Return one token for each patch, row by row.

    **Arguments:** `patches`: the convolution from the pixels of a patch to its token. `side`: of a
    patch, in pixels; those beyond the last whole patch are not read.
    """
    no_padding = ((0, 0), (0, 0))
    grid = patches(pixels, stride=side, padding=no_padding)
    return rearrange(grid, "rows columns width -> (rows columns) width")


def check_pixels(call: str, pixels: Pixels, image_size: int) -> None:
    """**Raises:** `ValueError` for an image of another size than the encoder's."""
    if pixels.shape[:2] != (image_size, image_size):
        raise ValueError(
            f"`{call}(pixels)` takes {image_size}x{image_size} pixels, got "
            f"{pixels.shape[0]}x{pixels.shape[1]}. Make them with `siglip_pixels` or `clip_pixels`."
        )
