"""Weights of 8 or 4 bits with scales: scaled fp8 and int8, mxfp8 and nvfp4.

A weight has up to three tensors: "weight" (the values), "scale" (one number, or one for each row or
block) and "global_scale" (one number for the whole weight, where the block scales are 8-bit too).
"""

from collections.abc import Callable, Mapping
from functools import partial

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.packed import (
    BYTES,
    INT8,
    SCALE_DTYPES,
    Arrays,
    PackedTensor,
    StoredParts,
    nibble_pairs,
    packed_tensor,
)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_MXFP8_BLOCK = 32  # values that share a scale
_NVFP4_BLOCK = 16
_NVFP4_BLOCK_BYTES = _NVFP4_BLOCK // 2
_TILE_ROWS, _TILE_BLOCKS = 128, 4
# The values of e2m1, a float of 4 bits, by its code. The highest bit of the code is the sign.
_E2M1_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1 = np.concatenate([_E2M1_POSITIVE, -_E2M1_POSITIVE])

MODELOPT_NVFP4 = "ModelOpt's nvfp4"
"""The name here of ModelOpt's nvfp4, whose files do not describe their format."""


class PartsError(ValueError):
    """The tensors of a weight do not fit its format. The message says what the format needs."""


# Weights with one scale, or one for each row.


def _scaled(name: str, dtype: np.dtype, parts: StoredParts) -> PackedTensor:
    """Combine a weight with one scale, or one for each row.

    **Arguments:** `name`: of the format, for messages. `dtype`: that the weight must have.
    """
    error = PartsError(f"{name} needs one float scale, or one for each row")
    weight = parts["weight"]
    scale = parts.get("scale")
    if scale is None or weight.dtype != dtype or "global_scale" in parts:
        raise error
    sizes = (1, *weight.shape[:1])
    if scale.dtype not in SCALE_DTYPES or scale.size not in sizes:
        raise error
    stored = {"weight": weight, "scale": scale}
    return packed_tensor(name, weight.shape, stored, times_scale)


def times_scale(arrays: Arrays) -> np.ndarray:
    """Return weight * scale in float32, with one scale or one for each row."""
    weight = arrays["weight"].astype(np.float32)
    scale = arrays["scale"].astype(np.float32)
    column = (-1,) + (1,) * (weight.ndim - 1)
    return weight * scale.reshape(column)


# mxfp8.


def _mxfp8(parts: StoredParts) -> PackedTensor:
    """Combine an mxfp8 matrix with its block scales."""
    error = PartsError(
        "mxfp8 needs a float8_e4m3fn matrix, and an 8-bit exponent for each 32 of its columns"
    )
    weight = parts["weight"]
    scale = parts.get("scale")
    if scale is None or scale.dtype not in (BYTES, _E8M0):
        raise error
    if len(weight.shape) != 2 or weight.dtype != E4M3:
        raise error
    rows, columns = weight.shape
    if columns % _MXFP8_BLOCK:
        raise error
    if scale.size != _tiled_size(rows, columns // _MXFP8_BLOCK):
        raise PartsError("mxfp8 needs scales in tiles of 128 rows and 4 blocks")
    stored = {"weight": weight, "scale": scale}
    return packed_tensor("mxfp8", weight.shape, stored, decode_mxfp8)


def decode_mxfp8(arrays: Arrays) -> np.ndarray:
    """Return an mxfp8 matrix: blocks of 32 float8_e4m3fn along a row, each times a power of two.

    **Source:** OCP Microscaling Formats 1.0, section 5.2; the order of the scales: cuBLAS, 1D block
    scaling factors.
    """
    weight = arrays["weight"]
    rows, columns = weight.shape
    exponents = arrays["scale"].view(_E8M0)
    scale = untile(exponents, rows, columns // _MXFP8_BLOCK).astype(np.float32)
    blocks = weight.astype(np.float32).reshape(rows, -1, _MXFP8_BLOCK)
    return blocks * scale[..., None]


# nvfp4.


def _nvfp4(name: str, tiled: bool, parts: StoredParts) -> PackedTensor:
    """Combine an nvfp4 matrix with its block scales and its global scale.

    **Arguments:** `name`: of the format, for messages. `tiled`: see `decode_nvfp4`.
    """
    error = PartsError(
        f"{name} needs a matrix of bytes, two values each, with a weight_scale and a weight_scale_2"
    )
    weight = parts["weight"]
    scale = parts.get("scale")
    global_scale = parts.get("global_scale")
    if scale is None or global_scale is None:
        raise error
    if len(weight.shape) != 2 or weight.dtype != BYTES:
        raise error
    rows, row_bytes = weight.shape
    if row_bytes % _NVFP4_BLOCK_BYTES:
        raise error
    is_number = global_scale.size == 1 and global_scale.dtype in SCALE_DTYPES
    if scale.dtype not in (BYTES, E4M3) or not is_number:
        raise PartsError(f"{name} needs a float8_e4m3fn weight_scale and one float weight_scale_2")
    blocks = row_bytes // _NVFP4_BLOCK_BYTES
    if tiled and scale.size != _tiled_size(rows, blocks):
        raise PartsError(
            f"{name} needs a scale for each 16 columns, in tiles of 128 rows and 4 blocks"
        )
    if not tiled and scale.size != rows * blocks:
        raise PartsError(f"{name} needs a scale for each 16 columns")
    stored = {"weight": weight, "scale": scale, "global_scale": global_scale}
    shape = (rows, 2 * row_bytes)
    decode = partial(decode_nvfp4, tiled=tiled)
    return packed_tensor("nvfp4", shape, stored, decode)


def decode_nvfp4(arrays: Arrays, *, tiled: bool) -> np.ndarray:
    """Return an nvfp4 matrix.

    Blocks of 16 four-bit floats (e2m1) along a row are multiplied by a float8_e4m3fn for the block
    and a float32 for the matrix.

    **Arguments:** `tiled`: True for ComfyUI's layout, with the first value of a byte in its high
    half and the scales in cuBLAS' tiles; False for ModelOpt's, with the first value in the low half
    and the scales row by row.
    """
    rows, row_bytes = arrays["weight"].shape
    blocks = row_bytes // _NVFP4_BLOCK_BYTES
    scale = arrays["scale"].view(E4M3)
    scale = untile(scale, rows, blocks) if tiled else scale.reshape(rows, blocks)
    global_scale = arrays["global_scale"].astype(np.float32).reshape(())
    factor = global_scale * scale.astype(np.float32)
    # Indexing the table of 256 pairs decodes two values of each byte at once.
    pairs = nibble_pairs(_E2M1, high_first=tiled)
    values = pairs[arrays["weight"]]
    return values.reshape(rows, -1, _NVFP4_BLOCK) * factor[..., None]


# The order of block scales for tensor cores.


def _tiled_size(rows: int, blocks: int) -> int:
    """Return how many scales whole tiles hold; the last ones are padded."""
    padded_rows = -(-rows // _TILE_ROWS) * _TILE_ROWS
    padded_blocks = -(-blocks // _TILE_BLOCKS) * _TILE_BLOCKS
    return padded_rows * padded_blocks


def untile(scales: np.ndarray, rows: int, blocks: int) -> np.ndarray:
    """Return block scales in row-major order, from the order in which cuBLAS stores them.

    There, tiles of 128 rows and 4 blocks follow each other in row-major order. In each tile, the
    scale of row r and block b is at 16 (r mod 32) + 4 (r div 32) + b.

    **Arguments:** `scales`: whole tiles. `rows`, `blocks`: the shape without padding.
    **Returns:** an array [rows, blocks].
    **Source:** cuBLAS documentation, 1D block scaling factors layout.
    """
    row_tiles = -(-rows // _TILE_ROWS)
    block_tiles = -(-blocks // _TILE_BLOCKS)
    # Row r of a tile is at [r mod 32, r div 32].
    tiles = scales.reshape(row_tiles, block_tiles, 32, 4, _TILE_BLOCKS)
    ordered = tiles.transpose(0, 3, 2, 1, 4).reshape(row_tiles * _TILE_ROWS, -1)
    return ordered[:rows, :blocks]


FORMATS: Mapping[str, Callable[[StoredParts], PackedTensor]] = {
    "float8_e4m3fn": partial(_scaled, "float8_e4m3fn scaled", E4M3),
    "float8_e5m2": partial(_scaled, "float8_e5m2 scaled", E5M2),
    "int8_tensorwise": partial(_scaled, "int8 scaled", INT8),
    "mxfp8": _mxfp8,
    "nvfp4": partial(_nvfp4, "nvfp4", True),
    MODELOPT_NVFP4: partial(_nvfp4, "nvfp4 without a description", False),
}
"""What combines the tensors of a weight, by ComfyUI's name of the format.

Each raises `PartsError` for tensors that do not fit the format."""
