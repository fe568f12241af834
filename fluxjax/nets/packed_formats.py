"""Formats of packed weights: how many bytes hold how many values, and the values that they hold.

A row of a matrix is cut into blocks of equally many values, and the bytes of a block hold its scale
and a code of a few bits for each value. Products of scales and codes are exact in float32, so that
every compiler gets the same values.

**Source:** ggml's block formats (Q8_0 to IQ4_NL); Dettmers et al. 2023 (2305.14314), NF4.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.shapes import Array, Float, UInt8

Blocks = UInt8[Array, "*rows blocks block_bytes"]
Bytes = UInt8[Array, "*rows bytes"]
"""Some bytes of each block, or codes in their place."""
Values = Float[Array, "*rows blocks block_values"]
BlockValues = Callable[[Blocks], Values]
NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of a normal distribution, scaled to [-1, 1]: the values of NF4's codes."""
_IQ4_CODES = (
    *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
    *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)


class PackedFormat(NamedTuple):
    """A format of packed weights.

    `values`, `nbytes`: of a block. `decode`: from the bytes of blocks to their values, in float32.
    `scales`: the first byte of each scale of a block that is a float. `scale_dtype`: of these.
    """

    values: int
    nbytes: int
    decode: BlockValues
    scales: tuple[int, ...]
    scale_dtype: str = "float16"

    @property
    def bits(self) -> float:
        """Bits that a value takes."""
        return 8 * self.nbytes / self.values


def _q8_0(blocks: Blocks) -> Values:
    return _float16(blocks, 0) * _signed(blocks[..., 2:])


def _q4_0(blocks: Blocks) -> Values:
    codes = _fields(blocks[..., 2:], 1, (0, 4), 15)
    return _float16(blocks, 0) * (_float(codes) - 8)


def _q4_1(blocks: Blocks) -> Values:
    codes = _fields(blocks[..., 4:], 1, (0, 4), 15)
    return _float16(blocks, 0) * _float(codes) + _float16(blocks, 2)


def _q5_0(blocks: Blocks) -> Values:
    return _float16(blocks, 0) * (_float(_five_bits(blocks[..., 2:])) - 16)


def _q5_1(blocks: Blocks) -> Values:
    return _float16(blocks, 0) * _float(_five_bits(blocks[..., 4:])) + _float16(blocks, 2)


def _five_bits(codes: Bytes) -> Array:
    """Return 32 codes of 5 bits: the fifth bits as 4 bytes, then the lower four of each."""
    high = codes[..., :4, None] >> jnp.arange(8, dtype=jnp.uint8) & 1
    low = _fields(codes[..., 4:], 1, (0, 4), 15)
    return low | high.reshape(low.shape) << 4


def _iq4_nl(blocks: Blocks) -> Values:
    codes = _fields(blocks[..., 2:], 1, (0, 4), 15)
    return _float16(blocks, 0) * _look_up(codes, _IQ4_CODES)


def _q2_k(blocks: Blocks) -> Values:
    scales = _float(blocks[..., :16] & 15) * _float16(blocks, 80)
    offsets = _float(blocks[..., :16] >> 4) * _float16(blocks, 82)
    codes = _fields(blocks[..., 16:80], 2, (0, 2, 4, 6), 3)
    return _times_scales(codes, scales) - jnp.repeat(offsets, 16, axis=-1)


def _q3_k(blocks: Blocks) -> Values:
    low_scales = _fields(blocks[..., 96:104], 1, (0, 4), 15)
    high_scales = _fields(blocks[..., 104:108], 1, (0, 2, 4, 6), 3)
    scales = _float(low_scales | high_scales << 4) - 32
    low = _fields(blocks[..., 32:96], 2, (0, 2, 4, 6), 3)
    high = _fields(blocks[..., :32], 1, range(8), 1)
    # A bit that is missing stands for -4.
    codes = _float(low) + 4 * _float(high) - 4
    return _times_scales(codes, scales * _float16(blocks, 108))


def _q4_k(blocks: Blocks) -> Values:
    scales, offsets = _scales_and_offsets(blocks)
    codes = _fields(blocks[..., 16:], 4, (0, 4), 15)
    return _times_scales(codes, scales) - jnp.repeat(offsets, 32, axis=-1)


def _q5_k(blocks: Blocks) -> Values:
    scales, offsets = _scales_and_offsets(blocks)
    low = _fields(blocks[..., 48:], 4, (0, 4), 15)
    high = _fields(blocks[..., 16:48], 1, range(8), 1)
    codes = low | high << 4
    return _times_scales(codes, scales) - jnp.repeat(offsets, 32, axis=-1)


def _scales_and_offsets(blocks: Blocks) -> tuple[Values, Values]:
    """Return the eight scales and offsets of a block of Q4_K or Q5_K.

    They are codes of 6 bits, times a scale of their own, in bytes 4 to 15. The first four of each
    are whole; of the others, two bits are the upper ones of the first four's bytes.
    """
    first = blocks[..., None, 4:8]
    second = blocks[..., None, 8:12]
    rest = blocks[..., None, 12:16]
    in_second_half = jnp.arange(2)[:, None] == 1
    scales = jnp.where(in_second_half, rest & 15 | first >> 2 & 48, first & 63)
    offsets = jnp.where(in_second_half, rest >> 4 | second >> 2 & 48, second & 63)
    eight = (*blocks.shape[:-1], 8)
    return (
        _float(scales.reshape(eight)) * _float16(blocks, 0),
        _float(offsets.reshape(eight)) * _float16(blocks, 2),
    )


def _q6_k(blocks: Blocks) -> Values:
    scales = _signed(blocks[..., 192:208]) * _float16(blocks, 208)
    low = _fields(blocks[..., :128], 2, (0, 4), 15)
    high = _fields(blocks[..., 128:192], 2, (0, 2, 4, 6), 3)
    return _times_scales(_float(low | high << 4) - 32, scales)


def _nf4(blocks: Blocks) -> Values:
    return _float32(blocks, 0) * _look_up(_high_first(blocks[..., 4:]), NF4_CODES)


def _int4(blocks: Blocks) -> Values:
    return _bfloat16(blocks, 0) * (_float(_high_first(blocks[..., 2:])) - 8)


def _int8(blocks: Blocks) -> Values:
    return _bfloat16(blocks, 0) * _signed(blocks[..., 2:])


def _times_scales(codes: Array, scales: Array) -> Array:
    """Multiply codes by scales, each of which is of equally many."""
    return _float(codes) * jnp.repeat(scales, codes.shape[-1] // scales.shape[-1], axis=-1)


def _fields(
    bytes: Bytes,
    groups: int,
    shifts: Sequence[int],
    mask: int,
) -> Array:
    """Return the codes in bytes: of each group, the first bits of all bytes, then the next ones.

    **Arguments:** `groups`: of equally many bytes. `shifts`: the lowest bit of each code in a byte.
    `mask`: the bits of a code.
    """
    rows = bytes.shape[:-1]
    grouped = bytes.reshape(*rows, groups, 1, -1)
    codes = grouped >> jnp.asarray(tuple(shifts), jnp.uint8)[:, None] & mask
    return codes.reshape(*rows, -1)


def _high_first(bytes: Bytes) -> Array:
    """Return two codes of 4 bits for each byte, first the one in its high half."""
    codes = bytes[..., None] >> jnp.asarray((4, 0), jnp.uint8) & 15
    return codes.reshape(*bytes.shape[:-1], -1)


def _look_up(codes: Bytes, table: Sequence[float]) -> Array:
    """Return the value of each code of 4 bits, by four choices: not every chip looks up fast."""
    candidates = [jnp.float32(value) for value in table]
    for bit in range(4):
        is_set = (codes >> bit & 1) == 1
        chosen = []
        for even, odd in zip(candidates[::2], candidates[1::2], strict=True):
            chosen.append(jnp.where(is_set, odd, even))
        candidates = chosen
    return candidates[0]


def _float(codes: Array) -> Array:
    return codes.astype(jnp.float32)


def _signed(bytes: Bytes) -> Array:
    return _float(jax.lax.bitcast_convert_type(bytes, jnp.int8))


def _bits(blocks: Blocks, start: int, dtype: str) -> Array:
    """Return the little-endian integer that begins at a byte of each block."""
    unsigned = jnp.zeros((*blocks.shape[:-1], 1), dtype)
    for number in range(unsigned.dtype.itemsize):
        byte = blocks[..., start + number, None].astype(dtype)
        unsigned = unsigned | byte << (8 * number)
    return unsigned


def _float16(blocks: Blocks, start: int) -> Array:
    return _float(jax.lax.bitcast_convert_type(_bits(blocks, start, "uint16"), jnp.float16))


def _bfloat16(blocks: Blocks, start: int) -> Array:
    return _float(jax.lax.bitcast_convert_type(_bits(blocks, start, "uint16"), jnp.bfloat16))


def _float32(blocks: Blocks, start: int) -> Array:
    return jax.lax.bitcast_convert_type(_bits(blocks, start, "uint32"), jnp.float32)


PACKED_FORMATS: Mapping[str, PackedFormat] = {
    "Q8_0": PackedFormat(32, 34, _q8_0, (0,)),
    "Q4_0": PackedFormat(32, 18, _q4_0, (0,)),
    "Q4_1": PackedFormat(32, 20, _q4_1, (0, 2)),
    "Q5_0": PackedFormat(32, 22, _q5_0, (0,)),
    "Q5_1": PackedFormat(32, 24, _q5_1, (0, 2)),
    "IQ4_NL": PackedFormat(32, 18, _iq4_nl, (0,)),
    "Q2_K": PackedFormat(256, 84, _q2_k, (80, 82)),
    "Q3_K": PackedFormat(256, 110, _q3_k, (108,)),
    "Q4_K": PackedFormat(256, 144, _q4_k, (0, 2)),
    "Q5_K": PackedFormat(256, 176, _q5_k, (0, 2)),
    "Q6_K": PackedFormat(256, 210, _q6_k, (208,)),
    "nf4": PackedFormat(64, 36, _nf4, (0,), "float32"),
    "int4": PackedFormat(64, 34, _int4, (0,), "bfloat16"),
    "int8-128": PackedFormat(128, 130, _int8, (0,), "bfloat16"),
    "int8-64": PackedFormat(64, 66, _int8, (0,), "bfloat16"),
}
"""GGUF's block formats by their names there, bitsandbytes' NF4, and those that are made here."""


def decode_rows(
    rows: UInt8[Array, "*rows row_bytes"],
    format: str,
) -> Float[Array, "*rows features"]:
    """Return the values of rows of packed blocks, in float32.

    **Arguments:** `format`: a name in `PACKED_FORMATS`.
    """
    packed = PACKED_FORMATS[format]
    blocks = rows.reshape(*rows.shape[:-1], rows.shape[-1] // packed.nbytes, packed.nbytes)
    values = packed.decode(blocks)
    return values.reshape(*rows.shape[:-1], blocks.shape[-2] * packed.values)
