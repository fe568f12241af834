"""A weight of 8 bits, multiplied as such: int8, or float8 with 4 bits of exponent."""

from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.nets.stack import is_stacked
from fluxjax.nets.weight import Dense, Weight, product_dtype
from fluxjax.shapes import Array, Float

EIGHT_BITS = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}


class QuantizedWeight(Weight):
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


def round_rows(
    x: Float[Array, "*rows features"], dtype: jnp.dtype
) -> tuple[Array, Float[Array, "*rows"]]:
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
    rows, size = round_rows(x, value.dtype)
    wide = jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else product_dtype(x)
    contract_last = (((rows.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(rows, value, contract_last, preferred_element_type=wide)
    return product.astype(jnp.float32) * size[..., None] * scale.astype(jnp.float32)


@_product.defjvp
def _product_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, value, scale = primals
    plain = value.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
    return _product(x, value, scale), Dense(plain).matmul(tangents[0]).astype(jnp.float32)


Network = TypeVar("Network", bound=eqx.Module)


def quantize(network: Network, format: str, *, donate: bool = False) -> Network:
    """Return a network whose blocks' matrices are rounded to 8 bits, a scale an output; embedders, norms, biases, and what is
    outside of the blocks stay as they are.

    **Arguments:** `network`: a `Flux` or `T5`, merged before; adapters can be attached after. `format`: "int8" or "fp8"
    (e4m3). `donate`: give each matrix's memory free as it is done; the network can't be used after.
    **Raises:** `ValueError` for another format, or a network without blocks of plain matrices.
    """
    dtype, count = eight_bit_dtype(format), 0

    def eight(path: Any, node: Any) -> Any:
        nonlocal count
        if not isinstance(node, Weight) or not is_stacked(str(path[0].name)):
            return node
        if not isinstance(node, Dense):
            raise ValueError(
                f"`quantize(network)` rounds plain matrices, got a {type(node).__name__}. Merge or quantize before others."
            )
        if node.value.ndim != 3:
            raise ValueError("`quantize(network)` takes stacked blocks. Quantize before `unroll`.")
        count += 1
        found = empty_quantized(node.value.shape, dtype)
        for block in range(len(node.value)):
            found = put_block(found, node.value[block], block)
        if donate:
            jax.block_until_ready(found)
            node.value.delete()
        return found

    result = jax.tree_util.tree_map_with_path(
        eight, network, is_leaf=lambda node: isinstance(node, Weight)
    )
    if not count:
        raise ValueError(
            f"`quantize(network)` rounds plain matrices of blocks, and a {type(network).__name__} has none. Pass a Flux or T5."
        )
    return result


def eight_bit_dtype(format: str) -> Any:
    if format not in EIGHT_BITS:
        raise ValueError(
            f"There is no format {format!r} of 8 bits. Choose one of {', '.join(EIGHT_BITS)}."
        )
    return EIGHT_BITS[format]


def empty_quantized(shape: tuple[int, ...], dtype: Any) -> QuantizedWeight:
    return QuantizedWeight(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1]))


@partial(jax.jit, donate_argnums=0)
def put_block(weight: QuantizedWeight, block: Array, number: Any) -> QuantizedWeight:
    value, scale = round_rows(block, weight.value.dtype)
    return QuantizedWeight(weight.value.at[number].set(value), weight.scale.at[number].set(scale))
