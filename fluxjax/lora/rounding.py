"""Merged weights in the dtype that they are stored in: the nearest value, or for 8 bits one of the two nearest at random."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.shapes import Array, Float


def seed_of(name: str) -> np.uint32:
    """Return the seed of a weight's rounding: the same in every run, process and layout."""
    return np.uint32(zlib.crc32(name.encode()))


def rounded(
    x: Float[Array, "*shape"], dtype: jnp.dtype, seed: Array | np.uint32
) -> tuple[Array, Float[Array, ""]]:
    """Return x in a dtype, and the largest magnitude in x that this can't hold: 0 if it holds all of it, infinity for NaN.

    8-bit floats are 1/16 to 1/8 of their value apart, so the nearest one to a weight that an adapter changes a little is the
    weight before. They are rounded stochastically instead: to the lower or the upper neighbour, with probabilities that
    make the mean exact. A value that is representable stays what it is. Other dtypes are rounded to the nearest.

    **Arguments:** `x`: float32. `seed`: of the draws, from `seed_of`.
    """
    nearest = x.astype(dtype)
    out = _stochastic(x, nearest, seed) if _has_8_bits(dtype) else nearest
    # The maximum that XLA:CPU compiles can lose a NaN, so NaN is counted as infinity.
    beyond = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    return out, jnp.max(jnp.where(jnp.isfinite(nearest), 0.0, beyond), initial=0.0)


def _has_8_bits(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def _stochastic(x: Array, nearest: Array, seed: Array | np.uint32) -> Array:
    """Return x rounded up in magnitude with the probability of its distance from the lower neighbour.

    **Arguments:** `nearest`: x in the dtype of the result, which is kept where it is not finite.
    """
    info = jnp.finfo(nearest.dtype)
    size = jnp.abs(x)
    exponent = jnp.maximum(
        jnp.frexp(size)[1] - 1, info.minexp
    )  # below the smallest normal number the spacing is constant
    spacing = jnp.ldexp(jnp.float32(1.0), exponent - info.nmant)
    steps = size / spacing  # exact: a power of two
    lower = jnp.floor(steps)
    # Not JAX's configured generator: others draw other numbers, and on each device their own.
    draws = jax.random.uniform(jax.random.key(seed, impl="threefry2x32"), x.shape)
    up = (draws < steps - lower).astype(jnp.float32)
    # The nearest value to something just above the largest is the largest.
    chosen = jnp.minimum((lower + up) * spacing, float(info.max))
    return jnp.where(jnp.isfinite(nearest), jnp.copysign(chosen, x).astype(nearest.dtype), nearest)


def check_fits(name: str, dtype: jnp.dtype, largest: float) -> None:
    """**Raises:** `WeightsError` for a weight that a dtype can't hold; `largest` is from `rounded`."""
    if largest == 0:
        return
    if not math.isfinite(largest):
        raise WeightsError(
            f"{name} with the adapters added is infinite or NaN. Use smaller scales, and look for the adapter that is damaged."
        )
    most = float(jnp.finfo(dtype).max)
    raise WeightsError(
        f"{name} with the adapters added holds {largest:.4g}, which {dtype} can't (at most {most:g}). Use smaller scales, or a "
        "wider dtype: bfloat16 or float32."
    )
