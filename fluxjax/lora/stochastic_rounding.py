"""Weights cast to their stored dtype: to nearest, or stochastically for 8-bit floats."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.shapes import Array, Float, PRNGKeyArray


def rounding_seed(name: str) -> np.uint32:
    """Return the seed of a weight's rounding: the same in every run, process and layout."""
    return np.uint32(zlib.crc32(name.encode()))


def round_to_dtype(
    x: Float[Array, "*shape"],
    dtype: jnp.dtype,
    seed: Array | np.uint32,
) -> tuple[Array, Float[Array, ""]]:
    """Cast x to a dtype, stochastically if that is an 8-bit float, otherwise to nearest.

    Neighbouring 8-bit floats are 1/16 to 1/8 of their value apart, so rounding to nearest would
    undo most small changes of a weight. Stochastic rounding chooses the lower or the upper
    neighbour with probabilities that make the mean exact. A representable value does not change.

    **Arguments:**

    - `x`: float32.
    - `dtype`: of the result.
    - `seed`: of the random draws, from `rounding_seed`.

    **Returns:** the rounded array; and the largest magnitude in x that the dtype can't represent:
    0 if there is none, infinity for NaN.
    """
    nearest = x.astype(dtype)
    out = nearest
    if _has_8_bits(dtype):
        # A fixed generator: the configured one may draw other numbers, or others on each device.
        out = round_stochastically(x, nearest, jax.random.key(seed, impl="threefry2x32"))
    # The maximum that XLA:CPU compiles can lose a NaN, so NaN is counted as infinity.
    magnitude = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    return out, jnp.max(jnp.where(jnp.isfinite(nearest), 0.0, magnitude), initial=0.0)


def _has_8_bits(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 1


def round_stochastically(
    x: Float[Array, "*shape"],
    nearest: Float[Array, "*shape"],
    key: PRNGKeyArray,
) -> Float[Array, "*shape"]:
    """Return x rounded away from 0 with the probability of its distance from the lower neighbour.

    **Arguments:**

    - `x`: float32.
    - `nearest`: x in the dtype of the result, which is kept where it is not finite.
    - `key`: of the random draws.
    """
    info = jnp.finfo(nearest.dtype)
    size = jnp.abs(x)
    # Below the smallest normal number, the spacing is constant.
    exponent = jnp.maximum(jnp.frexp(size)[1] - 1, info.minexp)
    spacing = jnp.ldexp(jnp.float32(1.0), exponent - info.nmant)
    # The quotient is exact, because the spacing is a power of two.
    steps = size / spacing
    lower = jnp.floor(steps)
    draws = jax.random.uniform(key, x.shape, jnp.float32)
    up = (draws < steps - lower).astype(jnp.float32)
    # A value just above the largest number may be rounded up, but its nearest is the largest.
    chosen = jnp.minimum((lower + up) * spacing, float(info.max))
    return jnp.where(jnp.isfinite(nearest), jnp.copysign(chosen, x).astype(nearest.dtype), nearest)


def check_representable(
    name: str,
    dtype: jnp.dtype,
    largest: float,
) -> None:
    """Check that a merged weight fits in its dtype.

    **Arguments:**

    - `name`: of the weight, for the error message.
    - `dtype`: of the weight.
    - `largest`: the second result of `round_to_dtype`.

    **Raises:** `WeightsError` if it does not fit.
    """
    if largest == 0:
        return
    if not math.isfinite(largest):
        raise WeightsError(
            f"{name} with the adapters added is infinite or NaN. Use smaller scales, and look for "
            "an adapter that is damaged."
        )
    most = float(jnp.finfo(dtype).max)
    raise WeightsError(
        f"{name} with the adapters added holds {largest:.4g}, which {dtype} can't represent "
        f"(at most {most:g}). Use smaller scales, or a wider dtype: bfloat16 or float32."
    )
