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
    Parts,
    nibble_pairs,
    packed_tensor,
)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_MXFP8_BLOCK = 32  # values that share a scale
_NVFP4_BLOCK = 16
_TILE_ROWS, _TILE_BLOCKS = 128, 4
# The values of e2m1, a float of 4 bits, by their code.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

MODELOPT_NVFP4 = "ModelOpt's nvfp4"
"""The name here of ModelOpt's nvfp4, whose files do not describe their format."""


class PartsError(ValueError):
    """The tensors of a weight do not fit its format. The message says what the format needs."""


# Weights with one scale, or one for each row.


def _scaled(name: str, dtype: np.dtype, parts: Parts) -> PackedTensor:
    weight, scale = parts["weight"], parts.get("scale")
    error = PartsError(f"{name} needs one float scale, or one for each row")
    if scale is None or weight.dtype != dtype or "global_scale" in parts:
        raise error
    if scale.dtype not in SCALE_DTYPES or scale.size not in (1, *weight.shape[:1]):
        raise error
    return packed_tensor(name, weight.shape, {"weight": weight, "scale": scale}, times_scale)


def times_scale(arrays: Arrays) -> np.ndarray:
    """Return weight * scale in float32, with one scale or one for each row."""
    weight = arrays["weight"]
    column = (-1,) + (1,) * (weight.ndim - 1)
    return weight.astype(np.float32) * arrays["scale"].astype(np.float32).reshape(column)


# mxfp8.


def _mxfp8(parts: Parts) -> PackedTensor:
    weight, scale = parts["weight"], parts.get("scale")
    shape = weight.shape
    is_matrix = len(shape) == 2 and weight.dtype == E4M3 and shape[1] % _MXFP8_BLOCK == 0
    if not is_matrix or scale is None or scale.dtype not in (BYTES, _E8M0):
        raise PartsError(
            "mxfp8 needs a float8_e4m3fn matrix, and an 8-bit exponent for each 32 of its columns"
        )
    if scale.size != _tiled_size(shape[0], shape[1] // _MXFP8_BLOCK):
        raise PartsError("mxfp8 needs scales in tiles of 128 rows and 4 blocks")
    return packed_tensor("mxfp8", shape, {"weight": weight, "scale": scale}, decode_mxfp8)


def decode_mxfp8(arrays: Arrays) -> np.ndarray:
    """Return an mxfp8 matrix: blocks of 32 float8_e4m3fn along a row, each times a power of two.

    **Source:** OCP Microscaling Formats 1.0, section 5.2; the order of the scales: cuBLAS, 1D block
    scaling factors.
    """
    weight = arrays["weight"]
    rows, columns = weight.shape
    scale = untile(arrays["scale"].view(_E8M0), rows, columns // _MXFP8_BLOCK).astype(np.float32)
    blocks = weight.astype(np.float32).reshape(rows, -1, _MXFP8_BLOCK)
    return blocks * scale[..., None]


# nvfp4.


def _nvfp4(name: str, tiled: bool, parts: Parts) -> PackedTensor:
    weight, scale, global_scale = parts["weight"], parts.get("scale"), parts.get("global_scale")
    bytes_per_block = _NVFP4_BLOCK // 2
    is_matrix = len(weight.shape) == 2 and weight.dtype == BYTES
    if not is_matrix or weight.shape[1] % bytes_per_block or scale is None or global_scale is None:
        raise PartsError(
            f"{name} needs a matrix of bytes, two values each, with a weight_scale and a "
            "weight_scale_2"
        )
    is_number = global_scale.size == 1 and global_scale.dtype in SCALE_DTYPES
    if scale.dtype not in (BYTES, E4M3) or not is_number:
        raise PartsError(f"{name} needs a float8_e4m3fn weight_scale and one float weight_scale_2")
    rows, blocks = weight.shape[0], weight.shape[1] // bytes_per_block
    if tiled and scale.size != _tiled_size(rows, blocks):
        raise PartsError(
            f"{name} needs a scale for each 16 columns, in tiles of 128 rows and 4 blocks"
        )
    if not tiled and scale.size != rows * blocks:
        raise PartsError(f"{name} needs a scale for each 16 columns")
    stored = {"weight": weight, "scale": scale, "global_scale": global_scale}
    shape = (rows, 2 * weight.shape[1])
    return packed_tensor("nvfp4", shape, stored, partial(decode_nvfp4, tiled=tiled))


def decode_nvfp4(arrays: Arrays, *, tiled: bool) -> np.ndarray:
    """Return an nvfp4 matrix.

    Blocks of 16 four-bit floats (e2m1) along a row are multiplied by a float8_e4m3fn for the block
    and a float32 for the matrix.

    **Arguments:** `tiled`: True for ComfyUI's layout, with the first value of a byte in its high
    half and the scales in cuBLAS' tiles; False for ModelOpt's, with the first value in the low half
    and the scales row by row.
    """
    rows, row_bytes = arrays["weight"].shape
    blocks = 2 * row_bytes // _NVFP4_BLOCK
    scale = arrays["scale"].view(E4M3)
    scale = untile(scale, rows, blocks) if tiled else scale.reshape(rows, blocks)
    global_scale = arrays["global_scale"].astype(np.float32).reshape(())
    factor = global_scale * scale.astype(np.float32)
    values = nibble_pairs(_E2M1, high_first=tiled)[arrays["weight"]]
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
    row_tiles, block_tiles = -(-rows // _TILE_ROWS), -(-blocks // _TILE_BLOCKS)
    tiles = scales.reshape(row_tiles, block_tiles, 32, 4, _TILE_BLOCKS)
    ordered = tiles.transpose(0, 3, 2, 1, 4).reshape(row_tiles * _TILE_ROWS, -1)
    return ordered[:rows, :blocks]


FORMATS: Mapping[str, Callable[[Parts], PackedTensor]] = {
    "float8_e4m3fn": partial(_scaled, "float8_e4m3fn scaled", E4M3),
    "float8_e5m2": partial(_scaled, "float8_e5m2 scaled", E5M2),
    "int8_tensorwise": partial(_scaled, "int8 scaled", INT8),
    "mxfp8": _mxfp8,
    "nvfp4": partial(_nvfp4, "nvfp4", True),
    MODELOPT_NVFP4: partial(_nvfp4, "nvfp4 without a description", False),
}
"""What combines the tensors of a weight, by ComfyUI's name of the format.

Each raises `PartsError` for tensors that do not fit the format."""
