"""Latents as tokens: seeds, noise, packing, positions."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.arguments import convert_arguments
from fluxjax.shapes import Array, Float, PRNGKeyArray

CELL = 8
"""Pixels along a side of a latent cell."""
PATCH = 2
"""Cells along a side of an image token."""
SEEDS = 2**63
"""How many seeds there are, from 0 on."""


def seed_key(seed: Any) -> PRNGKeyArray:
    """Return the key that `jax.random.key(seed)` gives with 64-bit integers enabled, whether they are or not.

    Without them JAX keeps the seed's lowest 32 bits, so that seeds 2^32 apart would give the same noise. Below 2^32 both
    keys are the same.

    **Arguments:** `seed`: a Python or NumPy whole number from 0 to 2^63 - 1.
    **Returns:** a key of the default PRNG implementation.
    **Raises:** `ValueError` for another seed.
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < SEEDS:
        raise ValueError(
            f"`seed_key(seed)` needs a whole number from 0 to 2^63 - 1, got {seed!r}. Choose another seed."
        )
    with jax.enable_x64(True):
        return jax.random.key(number)


@convert_arguments
def initial_noise(
    key: PRNGKeyArray, height: int, width: int, *, channels: int = 16
) -> Float[Array, "channels rows columns"]:
    """Draw the latent at t = 1: standard normal, float32.

    **Arguments:** `height`, `width`: of the image, in pixels, multiples of 16. `channels`: of the latent.
    **Raises:** `ValueError` for other sizes.
    """
    rows, columns = _grid("initial_noise", height, width)
    return jax.random.normal(key, (channels, PATCH * rows, PATCH * columns), jnp.float32)


@convert_arguments
def pack_latents(
    latent: Float[Array, "channels rows columns"],
) -> Float[Array, "img_tokens features"]:
    """Fold 2x2 cells into a token, features in the order (channel, row in patch, column in patch).

    **Returns:** [rows * columns / 4, 4 * channels], tokens in row-major order.
    **Raises:** `ValueError` if rows or columns are odd.
    """
    _, rows, columns = latent.shape
    if rows % PATCH or columns % PATCH:
        raise ValueError(
            f"`pack_latents(latent)` needs even rows and columns, got {rows}x{columns}. "
            "Choose an image size that is a multiple of 16 pixels."
        )
    return rearrange(latent, "c (y py) (x px) -> (y x) (c py px)", py=PATCH, px=PATCH)


@convert_arguments
def unpack_latents(
    packed: Float[Array, "img_tokens features"], height: int, width: int
) -> Float[Array, "channels rows columns"]:
    """Invert `pack_latents`; `height` and `width` are the image's, in pixels.

    **Raises:** `ValueError` if they are not multiples of 16 or do not fit the number of tokens.
    """
    rows, columns = _grid("unpack_latents", height, width)
    if rows * columns != len(packed):
        raise ValueError(
            f"`unpack_latents(packed, {height}, {width})` needs {rows * columns} tokens, got {len(packed)}. "
            "Pass the height and width that the noise was made for."
        )
    return rearrange(packed, "(y x) (c py px) -> c (y py) (x px)", y=rows, py=PATCH, px=PATCH)


@convert_arguments
def image_ids(height: int, width: int) -> Float[Array, "img_tokens 3"]:
    """Return each image token's position, (0, row, column), for an image of `height` x `width` pixels."""
    rows, columns = _grid("image_ids", height, width)
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    ids = jnp.stack([jnp.zeros_like(row), row, column], axis=-1)
    return ids.reshape(-1, 3).astype(jnp.float32)


def _grid(call: str, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of tokens."""
    check_size(f"`{call}`", height, width)
    side = CELL * PATCH
    return height // side, width // side


def check_size(call: str, height: int, width: int) -> None:
    """**Raises:** `ValueError`, which begins with `call`, for a size in pixels that is not a multiple of 16."""
    side = CELL * PATCH
    if height < side or width < side or height % side or width % side:
        raise ValueError(
            f"{call} needs height and width that are positive multiples of {side} pixels, got {height}x{width}. "
            f"The nearest such size is {max(1, round(height / side)) * side}x{max(1, round(width / side)) * side}."
        )
