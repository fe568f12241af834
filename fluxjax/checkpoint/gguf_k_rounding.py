"""Blocks of values rounded to Q4_K, whose parts have a scale and an offset of 6 bits each."""

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.shapes import Array, Float, UInt8

_PARTS, _PART = 8, 32
"""The parts of a block, and the values of each."""
_LARGEST_CODE, _LARGEST_SCALE = 15, 63
_CANDIDATES = 21
"""Scales that are tried for each part."""

Parts = Float[Array, "blocks parts values"]
OfParts = Float[Array, "blocks parts"]


def q4_k_blocks(blocks: np.ndarray) -> np.ndarray:
    """Return blocks of Q4_K.

    **Arguments:** `blocks`: [blocks, 256], in float32.
    **Returns:** bytes, [blocks, 144].
    """
    return np.asarray(_q4_k_blocks(jnp.asarray(blocks)))


@jax.jit
def _q4_k_blocks(blocks: Float[Array, "blocks 256"]) -> UInt8[Array, "blocks 144"]:
    parts = blocks.reshape(-1, _PARTS, _PART)
    scales, offsets = _fitted(parts)
    # Both are themselves rounded to 6 bits, with one float16 for each kind.
    half_scale, scale_codes = _six_bits(scales)
    half_offset, offset_codes = _six_bits(offsets)
    scales = half_scale.astype(jnp.float32)[:, None] * scale_codes
    offsets = half_offset.astype(jnp.float32)[:, None] * offset_codes
    divisor = jnp.where(scales == 0, 1, scales)[..., None]
    codes = jnp.round((parts + offsets[..., None]) / divisor)
    codes = jnp.clip(codes, 0, _LARGEST_CODE).astype(jnp.uint8)
    pairs = codes.reshape(-1, _PARTS // 2, 2, _PART)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    fields = [
        _half_bytes(half_scale),
        _half_bytes(half_offset),
        _packed_scales(scale_codes.astype(jnp.uint8), offset_codes.astype(jnp.uint8)),
        nibbles.reshape(len(blocks), -1),
    ]
    return jnp.concatenate(fields, axis=-1)


def _fitted(parts: Parts) -> tuple[OfParts, OfParts]:
    """Return scale and offset of each part: values are about scale * code - offset.

    For each of several scales the codes are rounded, and the scale and offset that fit them best
    are computed, with weights that grow with the values. The best of all is kept.

    **Source:** ggml's search for Q4_K (`make_qkx2_quants`).
    """
    weights = jnp.sqrt(jnp.mean(parts**2, axis=-1, keepdims=True)) + jnp.abs(parts)
    # The offset is subtracted, and can't be negative.
    lowest = jnp.minimum(parts.min(-1, keepdims=True), 0)
    span = parts.max(-1, keepdims=True) - lowest
    span = jnp.where(span > 0, span, 1)
    best = (span[..., 0] / _LARGEST_CODE, -lowest[..., 0])

    def error_of(scale: OfParts, offset: OfParts, codes: Parts) -> OfParts:
        difference = scale[..., None] * codes - offset[..., None] - parts
        return jnp.sum(weights * difference**2, axis=-1)

    def codes_at(inverse: Array) -> Parts:
        return jnp.clip(jnp.round(inverse * (parts - lowest)), 0, _LARGEST_CODE)

    def step(number: Array, state: tuple[OfParts, OfParts, OfParts]) -> tuple:
        scale, offset, error = state
        levels = _LARGEST_CODE - 1 + 0.1 * number.astype(jnp.float32)
        codes = codes_at(levels / span)
        new_scale, new_offset = _least_squares(parts, codes, weights)
        new_error = error_of(new_scale, new_offset, codes)
        is_better = new_error < error
        return (
            jnp.where(is_better, new_scale, scale),
            jnp.where(is_better, new_offset, offset),
            jnp.where(is_better, new_error, error),
        )

    start = (*best, error_of(*best, codes_at(_LARGEST_CODE / span)))
    scale, offset, _ = jax.lax.fori_loop(0, _CANDIDATES, step, start)
    return scale, offset


def _least_squares(parts: Parts, codes: Parts, weights: Parts) -> tuple[OfParts, OfParts]:
    """Return the scale and the offset, of which none is negative, that fit codes best."""
    total = jnp.sum(weights, axis=-1)
    of_codes = jnp.sum(weights * codes, axis=-1)
    of_squares = jnp.sum(weights * codes**2, axis=-1)
    of_values = jnp.sum(weights * parts, axis=-1)
    of_products = jnp.sum(weights * codes * parts, axis=-1)
    determinant = total * of_squares - of_codes**2
    solvable = determinant > 0
    divisor = jnp.where(solvable, determinant, 1)
    scale = (total * of_products - of_codes * of_values) / divisor
    offset = (of_codes * of_products - of_squares * of_values) / divisor
    # Without an offset, the scale alone is fitted.
    alone = of_products / jnp.where(of_squares > 0, of_squares, 1)
    scale = jnp.where(offset < 0, alone, scale)
    scale = jnp.where(solvable & (scale > 0), scale, 0)
    return scale, jnp.where(solvable, jnp.maximum(offset, 0), 0)


def _six_bits(numbers: OfParts) -> tuple[Float[Array, " blocks"], OfParts]:
    """Return numbers as codes of 6 bits, and the float16 of each block that scales them."""
    largest = numbers.max(-1, keepdims=True)
    codes = jnp.round(_LARGEST_SCALE / jnp.where(largest > 0, largest, 1) * numbers)
    half = (largest[:, 0] / _LARGEST_SCALE).astype(jnp.float16)
    return half, jnp.clip(codes, 0, _LARGEST_SCALE)


def _packed_scales(
    scales: UInt8[Array, "blocks 8"],
    offsets: UInt8[Array, "blocks 8"],
) -> UInt8[Array, "blocks 12"]:
    """Return the codes of the scales and offsets as 12 bytes.

    The first four of each are whole, and above them lie the upper two bits of the last four.
    """
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = offsets[:, :4] | offsets[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4
    return jnp.concatenate([first, second, third], axis=-1)


def _half_bytes(half: Float[Array, " blocks"]) -> UInt8[Array, "blocks 2"]:
    return jax.lax.bitcast_convert_type(half, jnp.uint8)
