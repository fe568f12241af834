"""Weights of 8 bits, and their matmuls: int8, or float8 with 4 bits of exponent."""

import jax
import jax.numpy as jnp

from fluxjax.kernels.chips import default_device
from fluxjax.nets.weight import Dense, FindMaxima, LocalWeight, multiply_rows, product_dtype
from fluxjax.shapes import Array, Float

EIGHT_BITS = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""The formats of 8 bits, by name."""


class QuantizedWeight(LocalWeight):
    """A weight of 8 bits, `value` * `scale`, with one scale for each output.

    The activations are quantized too, with one scale for each row, so that the matmul itself is one
    of 8 bits. The gradient with respect to them ignores both roundings.

    **Source:** Dettmers et al. 2022 (2208.07339), section 2.2, row-wise; Micikevicius et al. 2022
    (2209.05433), E4M3.
    """

    value: Array  # [*depth, out, features], of 8 bits
    scale: Float[Array, "*depth out"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def matmul(
        self, x: Float[Array, "*batch features"], maxima: FindMaxima | None = None
    ) -> Float[Array, "*batch out"]:
        largest = None
        # On GPUs an int8 network finds them in a product in int32, whose reading twice costs more
        # bytes than writing what is multiplied.
        if maxima is not None and not jnp.issubdtype(self.value.dtype, jnp.integer):
            largest = maxima()
        return _quantized_matmul(x, largest, self.value, self.scale)


def round_rows(
    x: Float[Array, "*rows features"],
    dtype: jnp.dtype,
    largest: Float[Array, "*rows"] | None = None,
) -> tuple[Array, Float[Array, "*rows"]]:
    """Quantize rows, each with the scale that maps its largest magnitude to the format's largest.

    **Arguments:** `dtype`: one of `EIGHT_BITS`. `largest`: the largest magnitude of each row, where
    it is known.
    **Returns:** the rows in `dtype`, and their scales in float32.
    """
    x = x.astype(jnp.float32)
    if largest is None:
        largest = jnp.max(jnp.abs(x), axis=-1)
    magnitude = largest.astype(jnp.float32)[..., None]
    # A row of zeros gets the scale 1, so that it stays zeros.
    scale = jnp.where(magnitude > 0, magnitude / _largest_value(dtype), 1)
    scaled = x / scale
    if jnp.issubdtype(dtype, jnp.integer):
        # Casts to integers cut off, while those to floats round to the nearest.
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), scale[..., 0]


def _largest_value(dtype: jnp.dtype) -> float:
    """Return the largest number of a format: 127 or 448."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).max
    return float(jnp.finfo(dtype).max)


@jax.custom_jvp
def _quantized_matmul(
    x: Array,
    largest: Array | None,
    value: Array,
    scale: Array,
) -> Array:
    """Return x (value * scale)^T, accumulated exactly for int8 and in float32 for float8."""
    rows, row_scale = round_rows(x, value.dtype, largest)
    if jnp.issubdtype(value.dtype, jnp.integer):
        accumulated = jnp.dtype(jnp.int32)
    else:
        accumulated = product_dtype(x)
        if default_device().platform == "cpu":
            # XLA:CPU multiplies float8 two to ten times slower. bfloat16 has all of its numbers.
            rows, value = rows.astype(jnp.bfloat16), value.astype(jnp.bfloat16)
    # Both operands have 8 bits elsewhere, so that a chip that can multiply these does.
    product = multiply_rows(rows, value, accumulated)
    return product.astype(jnp.float32) * row_scale[..., None] * scale.astype(jnp.float32)


@_quantized_matmul.defjvp
def _quantized_matmul_jvp(
    primals: tuple[Array, Array | None, Array, Array],
    tangents: tuple[Array, Array | None, object, Array],
) -> tuple[Array, Array]:
    """Differentiate with respect to x only: the weight is not trained."""
    x, largest, value, scale = primals
    # Integers have tangents of no dtype.
    x_tangent, *_ = tangents
    plain = value.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
    tangent = Dense(plain).matmul(x_tangent).astype(jnp.float32)
    return _quantized_matmul(x, largest, value, scale), tangent
