"""Networks whose blocks' matrices are rounded to fewer bits."""

from functools import partial
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.packed_rounding import pack_rows
from fluxjax.nets.quantized import EIGHT_BITS, QuantizedWeight, round_rows
from fluxjax.nets.stack import is_rounded, path_name
from fluxjax.nets.weight import Dense, Weight
from fluxjax.shapes import Array, Int

Network = TypeVar("Network", bound=eqx.Module)
RoundedWeight = QuantizedWeight | PackedWeight
QUANTIZATIONS = (*EIGHT_BITS, "int8-128", "int4", "nf4")
"""What matrices are rounded to: 8 bits, in which they are multiplied, or packed blocks."""
_SMALLER_BLOCKS = {"int8-128": "int8-64"}
"""What is used for a matrix whose inputs do not divide into a format's blocks."""


def quantize(
    network: Network,
    format: str,
    *,
    donate: bool = False,
) -> Network:
    """Return a network whose blocks' matrices are rounded to 8 or 4 bits.

    Embedders, norms, biases and everything outside of the blocks are kept as they are.

    **Arguments:** `network`: a `Flux`, `Chroma` or `T5`; merge adapters before, or attach them
    after. `format`: "int8" or "fp8" (e4m3) with one scale per output, multiplied in 8 bits; or
    "int8-128", "int4" or "nf4", whose scales are for 128, 64 and 64 inputs of an output, and which
    are decoded to be multiplied. Of these, a matrix whose inputs do not divide into such blocks is
    kept; for int8-128, blocks of 64 are tried before. `donate`: free each matrix once it is
    quantized, after which `network` can't be used.
    **Raises:** `ValueError` for another format, or a network without blocks of plain matrices.
    """
    check_quantization(format)
    quantized_names = []

    def quantize_node(path: KeyPath, node: PyTree) -> PyTree:
        name = path_name(path)
        if not isinstance(node, Weight) or not is_rounded(name):
            return node
        fitting = fitting_format(node.shape, format)
        if fitting is None:
            return node
        quantized_names.append(name)
        return _quantize_weight(node, fitting, donate)

    result = jax.tree_util.tree_map_with_path(quantize_node, network, is_leaf=_is_weight)
    if not quantized_names:
        raise ValueError(
            "`quantize(network)` rounds plain matrices of blocks, and a "
            f"{type(network).__name__} has none that {format} takes. Pass a Flux, Chroma or T5."
        )
    return result


def _is_weight(node: PyTree) -> bool:
    return isinstance(node, Weight)


def _quantize_weight(
    weight: Weight,
    format: str,
    donate: bool,
) -> RoundedWeight:
    """Return a stacked weight in fewer bits. **Raises:** `ValueError` if it is not a plain one."""
    if not isinstance(weight, Dense):
        raise ValueError(
            f"`quantize(network)` rounds plain matrices, got a {type(weight).__name__}. Merge "
            "adapters before, and quantize a network once."
        )
    if weight.value.ndim != 3:
        raise ValueError("`quantize(network)` takes stacked blocks. Quantize before `unroll`.")
    # Block by block, so that no whole stack is in memory in float32.
    result = empty_rounded(weight.value.shape, format)
    for block in range(len(weight.value)):
        result = put_block(result, weight.value[block], block)
    if donate:
        # The rounding has to be finished before its source is freed.
        jax.block_until_ready(result)
        weight.value.delete()
    return result


def check_quantization(format: str) -> None:
    """**Raises:** `ValueError` for a format that matrices are not rounded to."""
    if format not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ValueError(f"There is no format {format!r} to quantize to. Choose one of {known}.")


def fitting_format(shape: tuple[int, ...], format: str) -> str | None:
    """Return the format that a matrix is rounded to, None for one that is kept.

    **Arguments:** `shape`: of the matrix, whose rows have to divide into blocks. `format`: one of
    `QUANTIZATIONS`.
    """
    if format in EIGHT_BITS or shape[-1] % PACKED_FORMATS[format].values == 0:
        return format
    smaller = _SMALLER_BLOCKS.get(format)
    return None if smaller is None else fitting_format(shape, smaller)


def empty_rounded(
    shape: tuple[int, ...],
    format: str,
) -> RoundedWeight:
    """Return a stacked weight of zeros, for `put_block` to fill."""
    if format in EIGHT_BITS:
        return QuantizedWeight(jnp.zeros(shape, EIGHT_BITS[format]), jnp.zeros(shape[:-1]))
    packed = PACKED_FORMATS[format]
    row_bytes = shape[-1] // packed.values * packed.nbytes
    return PackedWeight(jnp.zeros((*shape[:-1], row_bytes), jnp.uint8), format)


@partial(jax.jit, donate_argnums=0)
def put_block(
    weight: RoundedWeight,
    block: Array,
    number: int | Int[Array, ""],
) -> RoundedWeight:
    """Return a stacked weight, updated in place, with one block rounded from a plain matrix."""
    if isinstance(weight, PackedWeight):
        rows = pack_rows(block, weight.format)
        return PackedWeight(weight.value.at[number].set(rows), weight.format)
    value, scale = round_rows(block, weight.value.dtype)
    return QuantizedWeight(weight.value.at[number].set(value), weight.scale.at[number].set(scale))
