"""A weight of 8 bits, multiplied as such: int8, or float8 with 4 bits of exponent."""

import jax
import jax.numpy as jnp

from fluxjax.nets.layers import Dense, Weight, written
from fluxjax.shapes import Array, Float

EIGHT_BITS = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}


class Quantized(Weight):
    """A weight of 8 bits with a scale an output, (`value` * `scale`); the rows that it is multiplied with are rounded to 8 bits
    too, each with a scale of its own, so that the matmul is one of 8 bits. A gradient for x takes both as if not rounded.

    **Source:** Dettmers et al. 2022 (2208.07339), section 2.2, row-wise; Micikevicius et al. 2022 (2209.05433), E4M3.
    """

    value: Array
    scale: Float[Array, "*depth out"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return _product(x, self.value, self.scale)


def rounded(x: Float[Array, "*rows features"], dtype: jnp.dtype) -> tuple[Array, Float[Array, "*rows"]]:
    """Return rows in 8 bits and the scale of each, by which its largest value is the format's largest; float32 in between."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = jnp.iinfo(dtype).max if integer else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    size = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(size > 0, size / largest, 1)
    steps = x / scale
    return (jnp.round(steps) if integer else steps).astype(dtype), scale[..., 0]


@jax.custom_jvp
def _product(x: Array, value: Array, scale: Array) -> Array:
    """Return x (value * scale)^T, accumulated exactly for int8 and in float32 for float8."""
    rows, size = rounded(x, value.dtype)
    wide = jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else written(x)
    contract_last = (((rows.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(rows, value, contract_last, preferred_element_type=wide)
    return product.astype(jnp.float32) * size[..., None] * scale.astype(jnp.float32)


@_product.defjvp
def _product_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, value, scale = primals
    plain = value.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
    return _product(x, value, scale), Dense(plain).matmul(tangents[0]).astype(jnp.float32)
