"""Rows of a plain matrix rounded to the packed formats that are made here."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import jax
import jax.numpy as jnp

from fluxjax.nets.packed_formats import NF4_CODES, PACKED_FORMATS
from fluxjax.shapes import Array, Float, UInt8

Blocks = Float[Array, "*rows blocks block_values"]
Bytes = UInt8[Array, "*rows blocks block_bytes"]


def pack_rows(
    rows: Float[Array, "*rows features"],
    format: str,
) -> UInt8[Array, "*rows row_bytes"]:
    """Round rows to a packed format.

    **Arguments:** `rows`: of a multiple of the format's block. `format`: one of `ROUNDED_FORMATS`.
    **Returns:** the bytes of the rows.
    """
    *leading, features = rows.shape
    size = PACKED_FORMATS[format].values
    blocks = rows.astype(jnp.float32).reshape(*leading, features // size, size)
    packed = ROUNDED_FORMATS[format](blocks)
    return packed.reshape(*leading, -1)


def _nf4(blocks: Blocks) -> Bytes:
    """Scale each block to [-1, 1] by its largest magnitude, and take the nearest codes.

    **Source:** Dettmers et al. 2023 (2305.14314), section 3.
    """
    scale = _largest_magnitude(blocks)
    scaled = blocks / _nonzero(scale)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for lower, upper in pairwise(NF4_CODES):
        # Of two codes the upper one is the nearer from their middle on.
        is_above = scaled > (lower + upper) / 2
        codes = codes + is_above.astype(jnp.uint8)
    return _joined(scale, _pairs(codes))


def _int4(blocks: Blocks) -> Bytes:
    """Map the number of the largest magnitude to -8, so that both signs' codes are used."""
    smallest = blocks.min(-1, keepdims=True)
    largest = blocks.max(-1, keepdims=True)
    extreme = jnp.where(largest > -smallest, largest, smallest)
    scale = (extreme / -8).astype(jnp.bfloat16)
    codes = _rounded(blocks, scale) + 8
    codes = jnp.clip(codes, 0, 15).astype(jnp.uint8)
    return _joined(scale, _pairs(codes))


def _int8(blocks: Blocks) -> Bytes:
    """Map the largest magnitude of each block to 127."""
    scale = (_largest_magnitude(blocks) / 127).astype(jnp.bfloat16)
    # The scale may have been rounded down.
    codes = jnp.clip(_rounded(blocks, scale), -127, 127)
    return _joined(scale, codes.astype(jnp.int8))


ROUNDED_FORMATS: Mapping[str, Callable[[Blocks], Bytes]] = {
    "int8-128": _int8,
    "int8-64": _int8,
    "int4": _int4,
    "nf4": _nf4,
}
"""How blocks of values are rounded to each packed format that is made here."""


def _largest_magnitude(blocks: Blocks) -> Array:
    return jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)


def _rounded(blocks: Blocks, scale: Array) -> Array:
    """Return the whole numbers that are next to values / scale."""
    divisor = _nonzero(scale.astype(jnp.float32))
    return jnp.round(blocks / divisor)


def _nonzero(scale: Array) -> Array:
    """Return scales to divide by: blocks of zeros stay zeros."""
    return jnp.where(scale == 0, 1, scale)


def _pairs(codes: Array) -> Array:
    """Return codes of 4 bits as bytes, the first of two in the high half."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def _joined(scale: Array, codes: Array) -> Bytes:
    """Return the bytes of each block: those of its scale, then those of its codes."""
    return jnp.concatenate([_as_bytes(scale), _as_bytes(codes)], axis=-1)


def _as_bytes(values: Array) -> Array:
    """Return the little-endian bytes of values along the last axis."""
    bytes = jax.lax.bitcast_convert_type(values, jnp.uint8)
    *leading, count = values.shape
    return bytes.reshape(*leading, count * values.dtype.itemsize)
