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
    size = PACKED_FORMATS[format].values
    blocks = rows.astype(jnp.float32).reshape(*rows.shape[:-1], rows.shape[-1] // size, size)
    packed = ROUNDED_FORMATS[format](blocks)
    return packed.reshape(*rows.shape[:-1], -1)


def _nf4(blocks: Blocks) -> Bytes:
    """Scale each block to [-1, 1] by its largest magnitude, and take the nearest codes.

    **Source:** Dettmers et al. 2023 (2305.14314), section 3.
    """
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scaled = blocks / _nonzero(scale)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for lower, upper in pairwise(NF4_CODES):
        # Of two codes the upper one is the nearer from their middle on.
        codes = codes + (scaled > (lower + upper) / 2).astype(jnp.uint8)
    return jnp.concatenate([_as_bytes(scale), _pairs(codes)], axis=-1)


def _int4(blocks: Blocks) -> Bytes:
    """Map the number of the largest magnitude to -8, so that both signs' codes are used."""
    smallest, largest = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    extreme = jnp.where(largest > -smallest, largest, smallest)
    scale = (extreme / -8).astype(jnp.bfloat16)
    codes = jnp.round(blocks / _nonzero(scale.astype(jnp.float32))) + 8
    pairs = _pairs(jnp.clip(codes, 0, 15).astype(jnp.uint8))
    return jnp.concatenate([_as_bytes(scale), pairs], axis=-1)


def _int8(blocks: Blocks) -> Bytes:
    """Map the largest magnitude of each block to 127."""
    scale = (jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127).astype(jnp.bfloat16)
    # The scale may have been rounded down.
    codes = jnp.clip(jnp.round(blocks / _nonzero(scale.astype(jnp.float32))), -127, 127)
    return jnp.concatenate([_as_bytes(scale), _as_bytes(codes.astype(jnp.int8))], axis=-1)


ROUNDED_FORMATS: Mapping[str, Callable[[Blocks], Bytes]] = {
    "int8-128": _int8,
    "int8-64": _int8,
    "int4": _int4,
    "nf4": _nf4,
}
"""How blocks of values are rounded to each packed format that is made here."""


def _nonzero(scale: Array) -> Array:
    """Return scales to divide by: blocks of zeros stay zeros."""
    return jnp.where(scale == 0, 1, scale)


def _pairs(codes: Array) -> Array:
    """Return codes of 4 bits as bytes, the first of two in the high half."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def _as_bytes(values: Array) -> Array:
    """Return the little-endian bytes of values along the last axis."""
    if values.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(values, jnp.uint8)
    bytes = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return bytes.reshape(*values.shape[:-1], values.shape[-1] * values.dtype.itemsize)
