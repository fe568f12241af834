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
from jax.typing import DTypeLike

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
    """Read a scale and 32 signed bytes."""
    scale = _float16(blocks, 0)
    return scale * _signed(blocks[..., 2:])


def _q4_0(blocks: Blocks) -> Values:
    """Read a scale and 32 codes of 4 bits, of which 8 stands for 0."""
    scale = _float16(blocks, 0)
    codes = _four_bits(blocks[..., 2:])
    return scale * (_float(codes) - 8)


def _q4_1(blocks: Blocks) -> Values:
    """Read a scale, the least value, and 32 codes of 4 bits."""
    scale = _float16(blocks, 0)
    least = _float16(blocks, 2)
    codes = _four_bits(blocks[..., 4:])
    return scale * _float(codes) + least


def _q5_0(blocks: Blocks) -> Values:
    """Read a scale and 32 codes of 5 bits, of which 16 stands for 0."""
    scale = _float16(blocks, 0)
    codes = _five_bits(blocks[..., 2:])
    return scale * (_float(codes) - 16)


def _q5_1(blocks: Blocks) -> Values:
    """Read a scale, the least value, and 32 codes of 5 bits."""
    scale = _float16(blocks, 0)
    least = _float16(blocks, 2)
    codes = _five_bits(blocks[..., 4:])
    return scale * _float(codes) + least


def _five_bits(codes: Bytes) -> Array:
    """Return 32 codes of 5 bits: the fifth bits as 4 bytes, then the lower four of each."""
    places = jnp.arange(8, dtype=jnp.uint8)
    high = codes[..., :4, None] >> places & 1
    low = _four_bits(codes[..., 4:])
    return low | high.reshape(low.shape) << 4


def _iq4_nl(blocks: Blocks) -> Values:
    """Read a scale and 32 codes of 4 bits, whose values are a table's."""
    scale = _float16(blocks, 0)
    codes = _four_bits(blocks[..., 2:])
    return scale * _look_up(codes, _IQ4_CODES)


# The formats with a K have blocks of 256 values. Their parts have scales of a few bits, which are
# multiplied by a float16 of the block.


def _q2_k(blocks: Blocks) -> Values:
    """Read 16 parts, whose scales and offsets have 4 bits and whose codes have 2."""
    part_bytes = blocks[..., :16]
    scales = _float(part_bytes & 15) * _float16(blocks, 80)
    offsets = _float(part_bytes >> 4) * _float16(blocks, 82)
    codes = _two_bits(blocks[..., 16:80], groups=2)
    return _scaled(codes, scales, offsets)


def _q3_k(blocks: Blocks) -> Values:
    """Read 16 parts, whose scales have 6 bits and whose codes have 3.

    The third bits of all codes come first, then the lower two of each, then the lower four bits of
    the scales and their upper two.
    """
    low_scales = _four_bits(blocks[..., 96:104])
    high_scales = _two_bits(blocks[..., 104:108])
    # A scale of 32 stands for 0.
    scales = _float(low_scales | high_scales << 4) - 32
    low = _two_bits(blocks[..., 32:96], groups=2)
    high = _single_bits(blocks[..., :32])
    # A bit that is missing stands for -4.
    codes = _float(low) + 4 * _float(high) - 4
    return _scaled(codes, scales * _float16(blocks, 108))


def _q4_k(blocks: Blocks) -> Values:
    """Read 8 parts, whose scales and offsets have 6 bits and whose codes have 4."""
    scales, offsets = _scales_and_offsets(blocks)
    codes = _four_bits(blocks[..., 16:], groups=4)
    return _scaled(codes, scales, offsets)


def _q5_k(blocks: Blocks) -> Values:
    """Read 8 parts as those of Q4_K, whose codes have a fifth bit in bytes 16 to 47."""
    scales, offsets = _scales_and_offsets(blocks)
    low = _four_bits(blocks[..., 48:], groups=4)
    high = _single_bits(blocks[..., 16:48])
    return _scaled(low | high << 4, scales, offsets)


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
    """Read 16 parts, whose scales are signed bytes and whose codes have 6 bits.

    The lower four bits of all codes come first, then the upper two. 32 stands for 0.
    """
    scales = _signed(blocks[..., 192:208]) * _float16(blocks, 208)
    low = _four_bits(blocks[..., :128], groups=2)
    high = _two_bits(blocks[..., 128:192], groups=2)
    codes = _float(low | high << 4) - 32
    return _scaled(codes, scales)


def _nf4(blocks: Blocks) -> Values:
    """Read a magnitude in float32 and 64 codes of 4 bits, whose values are a table's."""
    magnitude = _float32(blocks, 0)
    codes = _high_first(blocks[..., 4:])
    return magnitude * _look_up(codes, NF4_CODES)


def _int4(blocks: Blocks) -> Values:
    """Read a scale and 64 codes of 4 bits, of which 8 stands for 0."""
    scale = _bfloat16(blocks, 0)
    codes = _high_first(blocks[..., 2:])
    return scale * (_float(codes) - 8)


def _int8(blocks: Blocks) -> Values:
    """Read a scale and signed bytes."""
    scale = _bfloat16(blocks, 0)
    return scale * _signed(blocks[..., 2:])


def _scaled(codes: Array, scales: Array, offsets: Array | None = None) -> Array:
    """Return the values of codes.

    **Arguments:** `scales`: factors, each of equally many codes. `offsets`: what is subtracted then
    from as many, if anything is.
    """
    size = codes.shape[-1] // scales.shape[-1]
    values = _float(codes) * jnp.repeat(scales, size, axis=-1)
    if offsets is None:
        return values
    return values - jnp.repeat(offsets, size, axis=-1)


def _four_bits(bytes: Bytes, groups: int = 1) -> Array:
    """Return the two codes of 4 bits of each byte, in the order of `_fields`."""
    return _fields(bytes, groups, (0, 4), 15)


def _two_bits(bytes: Bytes, groups: int = 1) -> Array:
    """Return the four codes of 2 bits of each byte, in the order of `_fields`."""
    return _fields(bytes, groups, (0, 2, 4, 6), 3)


def _single_bits(bytes: Bytes) -> Array:
    """Return the eight bits of each byte, in the order of `_fields`."""
    return _fields(bytes, 1, range(8), 1)


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
    places = jnp.asarray(tuple(shifts), jnp.uint8)[:, None]
    codes = grouped >> places & mask
    return codes.reshape(*rows, -1)


def _high_first(bytes: Bytes) -> Array:
    """Return two codes of 4 bits for each byte, first the one in its high half."""
    places = jnp.asarray((4, 0), jnp.uint8)
    codes = bytes[..., None] >> places & 15
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
    """Return bytes as integers from -128 to 127, in float32."""
    return _float(jax.lax.bitcast_convert_type(bytes, jnp.int8))


def _float16(blocks: Blocks, start: int) -> Array:
    return _float(_number(blocks, start, jnp.float16))


def _bfloat16(blocks: Blocks, start: int) -> Array:
    return _float(_number(blocks, start, jnp.bfloat16))


def _float32(blocks: Blocks, start: int) -> Array:
    return _number(blocks, start, jnp.float32)


def _number(blocks: Blocks, start: int, dtype: DTypeLike) -> Array:
    """Return the little-endian number that begins at a byte of each block."""
    size = jnp.dtype(dtype).itemsize
    unsigned = jnp.uint16 if size == 2 else jnp.uint32
    bits = jnp.zeros((*blocks.shape[:-1], 1), unsigned)
    for number in range(size):
        byte = blocks[..., start + number, None].astype(unsigned)
        bits = bits | byte << (8 * number)
    return jax.lax.bitcast_convert_type(bits, dtype)


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
    *leading, row_bytes = rows.shape
    count = row_bytes // packed.nbytes
    blocks = rows.reshape(*leading, count, packed.nbytes)
    values = packed.decode(blocks)
    return values.reshape(*leading, count * packed.values)
