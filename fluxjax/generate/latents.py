"""Latents as tokens: seeds, noise, packing, positions."""

import math
import operator
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fluxjax.arguments import convert_arguments
from fluxjax.flow.step import Step
from fluxjax.flow.stochastic import draws_noise
from fluxjax.shapes import Array, Float, PRNGKeyArray, UInt32
from fluxjax.zoo import FLUX1

SEEDS = 2**63
"""How many seeds there are, from 0 on."""
_LAYOUT = FLUX1.latent
_STEP_KEYS = 2**32 - 1
"""The number that is folded into a key for what the steps draw; no image has it."""


def seed_key(seed: object) -> PRNGKeyArray:
    """Return the key that `jax.random.key(seed)` gives with 64-bit integers enabled.

    Without them JAX keeps the seed's lowest 32 bits, so that seeds 2^32 apart would give the same
    noise. Below 2^32 both keys are the same.

    **Arguments:** `seed`: a Python or NumPy whole number from 0 to 2^63 - 1.
    **Returns:** a key of the default PRNG implementation.
    **Raises:** `ValueError` for another seed.
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < SEEDS:
        raise ValueError(
            f"`seed_key(seed)` needs a whole number from 0 to 2^63 - 1, got {seed!r}. "
            "Choose another seed."
        )
    with jax.enable_x64(True):
        return jax.random.key(number)


@convert_arguments
def initial_noise(
    key: PRNGKeyArray, height: int, width: int, *, channels: int = _LAYOUT.channels
) -> Float[Array, "channels rows columns"]:
    """Draw the latent at t = 1: standard normal, float32.

    **Arguments:** `height`, `width`: of the image, in pixels, multiples of 16. `channels`: of the
    latent.
    **Returns:** [channels, height / 8, width / 8].
    **Raises:** `ValueError` for other sizes.
    """
    rows, columns = _token_grid("initial_noise", height, width)
    shape = (channels, _LAYOUT.patch * rows, _LAYOUT.patch * columns)
    return jax.random.normal(key, shape, jnp.float32)


def noise_batch(
    key: PRNGKeyArray, numbers: Sequence[int], height: int, width: int, *, channels: int
) -> Float[Array, "images channels rows columns"]:
    """Draw the initial noise of the images of these numbers.

    The noise of an image depends only on the key and on its number, not on the batch.
    """
    return _noise_batch(key, np.asarray(numbers, np.uint32), height, width, channels)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _noise_batch(
    key: PRNGKeyArray, numbers: UInt32[Array, " images"], height: int, width: int, channels: int
) -> Float[Array, "images channels rows columns"]:
    """Return the noise of each image, from a key of its own number."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
    return jax.vmap(lambda key: initial_noise(key, height, width, channels=channels))(keys)


def step_keys(key: PRNGKeyArray, numbers: Sequence[int], step: Step) -> Array | None:
    """Return one key for each image of these numbers, for what a stochastic step draws.

    **Returns:** keys [images], or None for a step that draws nothing.
    """
    if not draws_noise(step):
        return None
    return keys_of_steps(key, numbers)


def keys_of_steps(key: PRNGKeyArray, numbers: Sequence[int]) -> Array:
    """Return one key for each image of these numbers, which differ from those of the initial noise.

    **Returns:** keys [images].
    """
    root = jax.random.fold_in(key, _STEP_KEYS)
    return jnp.stack([jax.random.fold_in(root, number) for number in numbers])


@convert_arguments
def pack_latents(
    latent: Float[Array, "channels rows columns"],
) -> Float[Array, "img_tokens features"]:
    """Fold 2x2 cells into a token, features in the order (channel, row in patch, column in patch).

    **Returns:** [rows * columns / 4, 4 * channels], tokens in row-major order.
    **Raises:** `ValueError` if rows or columns are odd.
    """
    _, rows, columns = latent.shape
    patch = _LAYOUT.patch
    if rows % patch or columns % patch:
        raise ValueError(
            f"`pack_latents(latent)` needs even rows and columns, got {rows}x{columns}. "
            "Choose an image size that is a multiple of 16 pixels."
        )
    return rearrange(latent, "c (y py) (x px) -> (y x) (c py px)", py=patch, px=patch)


@convert_arguments
def unpack_latents(
    packed: Float[Array, "img_tokens features"], height: int, width: int
) -> Float[Array, "channels rows columns"]:
    """Invert `pack_latents`.

    **Arguments:** `height`, `width`: of the image, in pixels.
    **Raises:** `ValueError` if they are not multiples of 16 or do not fit the number of tokens.
    """
    rows, columns = _token_grid("unpack_latents", height, width)
    if rows * columns != len(packed):
        raise ValueError(
            f"`unpack_latents(packed, {height}, {width})` needs {rows * columns} tokens, "
            f"got {len(packed)}. Pass the height and width that the noise was made for."
        )
    patch = _LAYOUT.patch
    return rearrange(packed, "(y x) (c py px) -> c (y py) (x px)", y=rows, py=patch, px=patch)


@convert_arguments
def image_ids(height: int, width: int) -> Float[Array, "img_tokens 3"]:
    """Return the position of each image token, (0, row, column).

    **Arguments:** `height`, `width`: of the image, in pixels, multiples of 16.
    """
    rows, columns = _token_grid("image_ids", height, width)
    # On the host: each operation of JAX outside of jit is a program of its own.
    row, column = np.indices((rows, columns)).reshape(2, -1)
    return jnp.asarray(np.stack([np.zeros_like(row), row, column], axis=-1), jnp.float32)


def image_tokens(height: int, width: int) -> int:
    """Return how many tokens an image of `height` x `width` pixels has."""
    side = _LAYOUT.token_side
    return (height // side) * (width // side)


def image_size(noise: Float[Array, "*images channels rows columns"]) -> tuple[int, int]:
    """Return the height and width in pixels of the image that a latent or its noise is of."""
    return _LAYOUT.cell * noise.shape[-2], _LAYOUT.cell * noise.shape[-1]


def aspect_size(ratio: float, pixels: int) -> tuple[int, int]:
    """Return the height and width of an image of a shape, in multiples of 16 pixels.

    **Arguments:** `ratio`: width over height. `pixels`: about how many the image has.
    """
    side = _LAYOUT.token_side
    width, height = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
    return max(1, round(height / side)) * side, max(1, round(width / side)) * side


def check_size(call: str, height: int, width: int) -> None:
    """Check an image size in pixels.

    **Arguments:** `call`: what the size is given to; the message begins with it.
    **Raises:** `ValueError` for a size that is not a positive multiple of 16.
    """
    side = _LAYOUT.token_side
    if height < side or width < side or height % side or width % side:
        nearest_height = max(1, round(height / side)) * side
        nearest_width = max(1, round(width / side)) * side
        raise ValueError(
            f"{call} needs height and width that are positive multiples of {side} pixels, "
            f"got {height}x{width}. The nearest such size is {nearest_height}x{nearest_width}."
        )


def _token_grid(call: str, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of tokens of an image."""
    check_size(f"`{call}`", height, width)
    return height // _LAYOUT.token_side, width // _LAYOUT.token_side
