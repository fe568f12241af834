"""Weights of 8 bits, and their matmuls: int8, or float8 with 4 bits of exponent."""

from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from fluxjax.nets.stack import is_rounded, path_name
from fluxjax.nets.weight import Dense, LocalWeight, Weight, product_dtype
from fluxjax.shapes import Array, Float, Int

Network = TypeVar("Network", bound=eqx.Module)

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

    def matmul(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        return _quantized_matmul(x, self.value, self.scale)


def round_rows(
    x: Float[Array, "*rows features"],
    dtype: jnp.dtype,
) -> tuple[Array, Float[Array, "*rows"]]:
    """Quantize rows, each with the scale that maps its largest magnitude to the format's largest.

    **Arguments:** `dtype`: one of `EIGHT_BITS`.
    **Returns:** the rows in `dtype`, and their scales in float32.
    """
    x = x.astype(jnp.float32)
    magnitude = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
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
    value: Array,
    scale: Array,
) -> Array:
    """Return x (value * scale)^T, accumulated exactly for int8 and in float32 for float8."""
    rows, row_scale = round_rows(x, value.dtype)
    if jnp.issubdtype(value.dtype, jnp.integer):
        accumulated = jnp.dtype(jnp.int32)
    else:
        accumulated = product_dtype(x)
    contract_last = (((rows.ndim - 1,), (1,)), ((), ()))
    # Both operands have 8 bits, so that a chip that can multiply these does.
    product = jax.lax.dot_general(rows, value, contract_last, preferred_element_type=accumulated)
    return product.astype(jnp.float32) * row_scale[..., None] * scale.astype(jnp.float32)


@_quantized_matmul.defjvp
def _quantized_matmul_jvp(
    primals: tuple[Array, Array, Array],
    tangents: tuple[Array, object, Array],
) -> tuple[Array, Array]:
    """Differentiate with respect to x only: the weight is not trained."""
    x, value, scale = primals
    # Integers have tangents of no dtype.
    x_tangent, _, _ = tangents
    plain = value.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
    tangent = Dense(plain).matmul(x_tangent).astype(jnp.float32)
    return _quantized_matmul(x, value, scale), tangent


def quantize(
    network: Network,
    format: str,
    *,
    donate: bool = False,
) -> Network:
    """Return a network whose blocks' matrices are rounded to 8 bits, with one scale per output.

    Embedders, norms, biases and everything outside of the blocks are kept as they are.

    **Arguments:** `network`: a `Flux`, `Chroma` or `T5`; merge adapters before, or attach them
    after. `format`: "int8" or "fp8" (e4m3). `donate`: free each matrix once it is quantized, after
    which `network` can't be used.
    **Raises:** `ValueError` for another format, or a network without blocks of plain matrices.
    """
    dtype = eight_bit_dtype(format)
    quantized_names = []

    def quantize_node(path: KeyPath, node: PyTree) -> PyTree:
        name = path_name(path)
        if not isinstance(node, Weight) or not is_rounded(name):
            return node
        quantized_names.append(name)
        return _quantize_weight(node, dtype, donate)

    result = jax.tree_util.tree_map_with_path(quantize_node, network, is_leaf=_is_weight)
    if not quantized_names:
        raise ValueError(
            "`quantize(network)` rounds plain matrices of blocks, and a "
            f"{type(network).__name__} has none. Pass a Flux, Chroma or T5."
        )
    return result


def _is_weight(node: PyTree) -> bool:
    return isinstance(node, Weight)


def _quantize_weight(
    weight: Weight,
    dtype: jnp.dtype,
    donate: bool,
) -> QuantizedWeight:
    """Return a stacked weight in 8 bits. **Raises:** `ValueError` if it is not a plain one."""
    if not isinstance(weight, Dense):
        raise ValueError(
            f"`quantize(network)` rounds plain matrices, got a {type(weight).__name__}. Merge "
            "adapters before, and quantize a network once."
        )
    if weight.value.ndim != 3:
        raise ValueError("`quantize(network)` takes stacked blocks. Quantize before `unroll`.")
    # Block by block, so that no whole stack is in memory in float32.
    result = empty_quantized(weight.value.shape, dtype)
    for block in range(len(weight.value)):
        result = put_block(result, weight.value[block], block)
    if donate:
        # The rounding has to be finished before its source is freed.
        jax.block_until_ready(result)
        weight.value.delete()
    return result


def eight_bit_dtype(format: str) -> jnp.dtype:
    """Return the dtype of a format's name. **Raises:** `ValueError` for an unknown name."""
    if format not in EIGHT_BITS:
        known = ", ".join(EIGHT_BITS)
        raise ValueError(f"There is no format {format!r} of 8 bits. Choose one of {known}.")
    return EIGHT_BITS[format]


def empty_quantized(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> QuantizedWeight:
    """Return a stacked weight of zeros, for `put_block` to fill."""
    return QuantizedWeight(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1]))


@partial(jax.jit, donate_argnums=0)
def put_block(
    weight: QuantizedWeight,
    block: Array,
    number: int | Int[Array, ""],
) -> QuantizedWeight:
    """Return a stacked weight, updated in place, with one block quantized from a plain matrix."""
    value, scale = round_rows(block, weight.value.dtype)
    return QuantizedWeight(weight.value.at[number].set(value), weight.scale.at[number].set(scale))
