"""Matrices rounded to GGUF's block formats, byte by byte as ggml's reference code has them.

Q8_0, Q4_0 and Q5_0 are computed by NumPy: a compiler may fuse a product and a sum into one
rounding, and so choose another code where a value is halfway between two.
"""

from collections.abc import Callable, Mapping

import numpy as np

from fluxjax.checkpoint.gguf_k_rounding import q4_k_blocks
from fluxjax.nets.packed_formats import PACKED_FORMATS

RoundBlocks = Callable[[np.ndarray], np.ndarray]
"""From values [blocks, values] in float32 to bytes [blocks, bytes]."""
_CHUNK_VALUES = 4_194_304  # rounded at a time; it bounds the memory of temporary arrays


def round_to_gguf(values: np.ndarray, format: str) -> np.ndarray:
    """Return a matrix as rows of blocks.

    **Arguments:** `values`: [rows, columns] in float32, with columns that divide into blocks.
    `format`: one of `GGUF_ROUNDINGS`.
    **Returns:** bytes, [rows, bytes of a row].
    """
    packed = PACKED_FORMATS[format]
    blocks = values.reshape(-1, packed.values)
    out = np.empty((len(blocks), packed.nbytes), np.uint8)
    step = _CHUNK_VALUES // packed.values
    for start in range(0, len(blocks), step):
        chunk = slice(start, start + step)
        out[chunk] = GGUF_ROUNDINGS[format](blocks[chunk])
    return out.reshape(len(values), -1)


def _q8_0_blocks(blocks: np.ndarray) -> np.ndarray:
    """Map the largest magnitude to 127; halves are rounded away from zero."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    rounded_up = np.floor(2 * (magnitude - whole))  # 1 from a half on
    codes = np.sign(scaled) * (whole + rounded_up)
    code_bytes = codes.astype(np.int8).view(np.uint8)
    return _joined(_half_bytes(scale), code_bytes)


def _q4_0_blocks(blocks: np.ndarray) -> np.ndarray:
    """Map the number of the largest magnitude to -8."""
    scale, codes = _signed_codes(blocks, 8)
    return _joined(_half_bytes(scale), _low_half_first(codes))


def _q5_0_blocks(blocks: np.ndarray) -> np.ndarray:
    """Map the number of the largest magnitude to -16; the fifth bits are apart."""
    scale, codes = _signed_codes(blocks, 16)
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    low = _low_half_first(codes & 15)
    return _joined(_half_bytes(scale), high, low)


def _signed_codes(blocks: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of each block, and the codes from 0 to 2 `most` - 1 of its values.

    The value of the largest magnitude gets the code 0, which stands for -`most`.
    """
    place = np.abs(blocks).argmax(axis=1, keepdims=True)
    extreme = np.take_along_axis(blocks, place, axis=1)
    scale = extreme / np.float32(-most)
    shifted = blocks * _inverse(scale) + np.float32(most + 0.5)
    codes = np.trunc(shifted).astype(np.uint8)
    return scale, codes.clip(0, 2 * most - 1)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """Return 1 / scale, and 0 for 0."""
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _low_half_first(codes: np.ndarray) -> np.ndarray:
    """Return bytes with the first half of the codes in their low halves, the others above."""
    low, high = np.split(codes, 2, axis=1)
    return low | high << 4


def _joined(*fields: np.ndarray) -> np.ndarray:
    """Return the fields of each block's bytes, one after another."""
    return np.concatenate(fields, axis=1)


def _half_bytes(scale: np.ndarray) -> np.ndarray:
    """Return each scale as the two bytes of a float16."""
    # What float16 can't hold is infinite, and reported when the tensor is written.
    with np.errstate(over="ignore"):
        return scale.astype("<f2").view(np.uint8)


GGUF_ROUNDINGS: Mapping[str, RoundBlocks] = {
    "Q8_0": _q8_0_blocks,
    "Q5_0": _q5_0_blocks,
    "Q4_K": q4_k_blocks,
    "Q4_0": _q4_0_blocks,
}
"""How blocks of values are rounded to each of GGUF's formats that is written."""
