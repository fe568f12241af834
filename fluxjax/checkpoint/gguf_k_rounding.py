"""Blocks of values rounded to Q4_K, whose parts have a scale and an offset of 6 bits each."""

from typing import NamedTuple

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


class _SixBits(NamedTuple):
    """Numbers rounded to 6 bits: the float16 of each block that scales them, and their codes."""

    half: Float[Array, " blocks"]
    codes: OfParts

    @property
    def values(self) -> OfParts:
        """The numbers that the codes stand for."""
        return self.half.astype(jnp.float32)[:, None] * self.codes

    @property
    def code_bytes(self) -> UInt8[Array, "blocks parts"]:
        return self.codes.astype(jnp.uint8)


class _Fit(NamedTuple):
    """A scale and an offset of each part, and the weighted error of the values that they give."""

    scale: OfParts
    offset: OfParts
    error: OfParts


def q4_k_blocks(blocks: np.ndarray) -> np.ndarray:
    """Return blocks of Q4_K.

    **Arguments:** `blocks`: [blocks, 256], in float32.
    **Returns:** bytes, [blocks, 144].
    """
    return np.asarray(_q4_k_blocks(jnp.asarray(blocks)))


@jax.jit
def _q4_k_blocks(blocks: Float[Array, "blocks 256"]) -> UInt8[Array, "blocks 144"]:
    """Return the float16 of the scales and of the offsets, the codes of both, then the values'."""
    parts = blocks.reshape(-1, _PARTS, _PART)
    scales, offsets = _fitted(parts)
    # Both are themselves rounded to 6 bits, with one float16 for each kind.
    scale = _six_bits(scales)
    offset = _six_bits(offsets)
    codes = _codes_of(parts, scale.values, offset.values)
    # The bytes of each two parts hold the codes of the first in their low halves.
    pairs = codes.reshape(-1, _PARTS // 2, 2, _PART)
    nibbles = pairs[:, :, 0] | pairs[:, :, 1] << 4
    fields = [
        _half_bytes(scale.half),
        _half_bytes(offset.half),
        _packed_scales(scale.code_bytes, offset.code_bytes),
        nibbles.reshape(len(blocks), -1),
    ]
    return jnp.concatenate(fields, axis=-1)


def _codes_of(
    parts: Parts, scales: OfParts, offsets: OfParts
) -> UInt8[Array, "blocks parts values"]:
    """Return the codes from 0 to 15 that values are rounded to."""
    divisor = jnp.where(scales == 0, 1, scales)[..., None]
    shifted = parts + offsets[..., None]
    codes = jnp.round(shifted / divisor)
    return jnp.clip(codes, 0, _LARGEST_CODE).astype(jnp.uint8)


def _fitted(parts: Parts) -> tuple[OfParts, OfParts]:
    """Return scale and offset of each part: values are about scale * code - offset.

    For each of several scales the codes are rounded, and the scale and offset that fit them best
    are computed, with weights that grow with the values. The best of all is kept.

    **Source:** ggml's search for Q4_K (`make_qkx2_quants`).
    """
    mean_square = jnp.mean(parts**2, axis=-1, keepdims=True)
    weights = jnp.sqrt(mean_square) + jnp.abs(parts)
    # The offset is subtracted, and can't be negative.
    lowest = jnp.minimum(parts.min(-1, keepdims=True), 0)
    span = parts.max(-1, keepdims=True) - lowest
    span = jnp.where(span > 0, span, 1)

    def codes_at(inverse: Array) -> Parts:
        """Return the codes at 1 / scale."""
        codes = jnp.round(inverse * (parts - lowest))
        return jnp.clip(codes, 0, _LARGEST_CODE)

    def fit_of(scale: OfParts, offset: OfParts, codes: Parts) -> _Fit:
        values = scale[..., None] * codes - offset[..., None]
        error = jnp.sum(weights * (values - parts) ** 2, axis=-1)
        return _Fit(scale, offset, error)

    def keep_better(number: Array, best: _Fit) -> _Fit:
        """Return the better one of a fit and of that of the candidate of a number."""
        levels = _LARGEST_CODE - 1 + 0.1 * number.astype(jnp.float32)
        codes = codes_at(levels / span)
        scale, offset = _least_squares(parts, codes, weights)
        candidate = fit_of(scale, offset, codes)
        is_better = candidate.error < best.error
        return jax.tree.map(lambda new, old: jnp.where(is_better, new, old), candidate, best)

    first = fit_of(
        span[..., 0] / _LARGEST_CODE,
        -lowest[..., 0],
        codes_at(_LARGEST_CODE / span),
    )
    best = jax.lax.fori_loop(0, _CANDIDATES, keep_better, first)
    return best.scale, best.offset


def _least_squares(parts: Parts, codes: Parts, weights: Parts) -> tuple[OfParts, OfParts]:
    """Return the scale and the offset, of which none is negative, that fit codes best.

    They solve the two normal equations of the weighted error; the determinant is 0 where all codes
    of a part are equal, and the part then gets a scale of 0.
    """
    weighted_codes = weights * codes
    total = jnp.sum(weights, axis=-1)
    of_codes = jnp.sum(weighted_codes, axis=-1)
    of_squares = jnp.sum(weights * codes**2, axis=-1)
    of_values = jnp.sum(weights * parts, axis=-1)
    of_products = jnp.sum(weighted_codes * parts, axis=-1)
    determinant = total * of_squares - of_codes**2
    solvable = determinant > 0
    divisor = jnp.where(solvable, determinant, 1)
    scale = (total * of_products - of_codes * of_values) / divisor
    offset = (of_codes * of_products - of_squares * of_values) / divisor
    # Without an offset, the scale alone is fitted.
    alone = of_products / jnp.where(of_squares > 0, of_squares, 1)
    scale = jnp.where(offset < 0, alone, scale)
    scale = jnp.where(solvable & (scale > 0), scale, 0)
    offset = jnp.where(solvable, jnp.maximum(offset, 0), 0)
    return scale, offset


def _six_bits(numbers: OfParts) -> _SixBits:
    """Round the numbers of each block to 6-bit codes; its largest number gets the code 63."""
    largest = numbers.max(-1, keepdims=True)
    inverse = _LARGEST_SCALE / jnp.where(largest > 0, largest, 1)
    codes = jnp.round(inverse * numbers)
    half = (largest[:, 0] / _LARGEST_SCALE).astype(jnp.float16)
    return _SixBits(half, jnp.clip(codes, 0, _LARGEST_SCALE))


def _packed_scales(
    scales: UInt8[Array, "blocks 8"],
    offsets: UInt8[Array, "blocks 8"],
) -> UInt8[Array, "blocks 12"]:
    """Return the codes of the scales and offsets as 12 bytes.

    The first four of each are whole, and above them lie the upper two bits of the last four.
    """
    last_scales = scales[:, 4:]
    last_offsets = offsets[:, 4:]
    first = scales[:, :4] | last_scales >> 4 << 6
    second = offsets[:, :4] | last_offsets >> 4 << 6
    third = last_scales & 15 | (last_offsets & 15) << 4
    return jnp.concatenate([first, second, third], axis=-1)


def _half_bytes(half: Float[Array, " blocks"]) -> UInt8[Array, "blocks 2"]:
    """Return the two bytes of each float16, the lower one first."""
    return jax.lax.bitcast_convert_type(half, jnp.uint8)
