"""Weights whose values are spread over several tensors of a file: scaled fp8 and int8, mxfp8, nvfp4, bitsandbytes'."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.printable import printable
from fluxjax.checkpoint.safetensors import (
    StoredTensor,
    Tensor,
    TensorFile,
    WeightsError,
    quoted,
    shown,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_E4M3, _E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_BYTES, _INT8 = np.dtype(np.uint8), np.dtype(np.int8)
_FLOATS = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
_MOST_DESCRIPTION = 100_000  # bytes of JSON in a tensor; those that exist have some hundred
_PLAIN = "Use the model's bfloat16, scaled fp8 or GGUF file."

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PackedTensor(Tensor):
    """A weight that is decoded from several tensors whenever it is read. It is loaded as bfloat16 unless told otherwise.

    `kind`: the name of the storage. `parts`: the tensors that hold it. `decode`: their values to float32.
    """

    kind: str
    parts: Mapping[str, StoredTensor]
    decode: Callable[[Arrays], np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def storage(self) -> str:
        return self.kind

    def view(self) -> np.ndarray:
        # Large exponents overflow to infinity, which is told by name once the weight is loaded.
        with np.errstate(over="ignore", invalid="ignore"):
            return self.decode({name: part.view() for name, part in self.parts.items()}).reshape(
                self.shape
            )


def _packed(
    kind: str,
    shape: tuple[int, ...],
    parts: Mapping[str, StoredTensor],
    decode: Callable[[Arrays], np.ndarray],
) -> PackedTensor:
    return PackedTensor(parts["weight"].file, BFLOAT16, shape, kind, parts, decode)


def join(tensors: Mapping[str, Tensor], files: Sequence[TensorFile] = ()) -> dict[str, Tensor]:
    """Return the tensors with weights that are spread over several joined into one each.

    **Arguments:** `files`: where the tensors come from; ComfyUI's files may describe the weights in their metadata.
    **Raises:** `WeightsError` for a part without its weight, parts that do not fit together, or a storage that can't be
    decoded, each by its name.
    """
    return _join_scales(_join_bitsandbytes(tensors), _layers_of(files))


# ComfyUI's and ModelOpt's names.

_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer names
_SECOND, _SMOOTHING, _DESCRIPTION, _MARKER = (
    "weight_scale_2",
    "pre_quant_scale",
    "comfy_quant",
    "scaled_fp8",
)
_PARTS = (*_SCALES, _SECOND, _SMOOTHING)
_BESIDE = {*_PARTS, "scale_input", "input_scale", _MARKER}
_METADATA = "_quantization_metadata"
Layers = Mapping[str, Mapping[str, Any]]
"""What a file says of its quantized layers, by the name of the layer."""


def _layers_of(files: Sequence[TensorFile]) -> Layers:
    """Return the layers that the metadata of ComfyUI's files describes."""
    layers: dict[str, Mapping[str, Any]] = {}
    for file in files:
        if _METADATA not in file.metadata:
            continue
        try:
            found = json.loads(file.metadata[_METADATA])["layers"]
            layers |= {
                name: entry for name, entry in found.items() if isinstance(entry["format"], str)
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{shown(file.path)}: the metadata's {_METADATA} is damaged. Download the file anew."
            ) from error
    return layers


def _last(name: str) -> str:
    """Return what follows the name of a layer, nothing if there is no layer."""
    return name.rpartition(".")[2] if "." in name else ""


def _join_scales(tensors: Mapping[str, Tensor], layers: Layers) -> dict[str, Tensor]:
    """Join weights to their scales; scales of activations and markers are dropped, as nothing here uses them."""
    joined = {
        name: tensor
        for name, tensor in tensors.items()
        if name != _MARKER and _last(name) not in _BESIDE
    }
    described = dict(layers)
    for name in [name for name in joined if name.endswith(f".{_DESCRIPTION}")]:
        described[name.removesuffix(f".{_DESCRIPTION}")] = _description(
            joined.pop(name), name, "format"
        )
    stems = {name.rpartition(".")[0]: None for name in tensors if _last(name) in _PARTS}
    for stem in stems | dict.fromkeys(described):
        parts = {last: tensors[f"{stem}.{last}"] for last in _PARTS if f"{stem}.{last}" in tensors}
        weight = joined.get(f"{stem}.weight")
        if weight is None and not parts:
            continue  # described in the metadata only, as a part of the model that is not in this file
        if _SMOOTHING in parts:
            raise WeightsError(
                f"{shown(parts[_SMOOTHING].file)}: {quoted(stem)} has a {_SMOOTHING}, which fluxjax does not read. "
                + _PLAIN
            )
        joined[f"{stem}.weight"] = _scaled(stem, weight, parts, described.get(stem))
    return joined


def _description(tensor: Tensor, name: str, needed: str) -> Mapping[str, Any]:
    """Return the JSON in a tensor of bytes."""
    damaged = WeightsError(
        f"{shown(tensor.file)}: {quoted(name)} is not a description in JSON. Download the file anew."
    )
    if (
        not isinstance(tensor, StoredTensor)
        or tensor.dtype != _BYTES
        or tensor.nbytes > _MOST_DESCRIPTION
    ):
        raise damaged
    try:
        found = json.loads(tensor.view().tobytes())
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(found, dict) or not isinstance(found.get(needed), str):
        raise damaged
    return found


def _scaled(
    stem: str,
    weight: Tensor | None,
    beside: Mapping[str, Tensor],
    description: Mapping[str, Any] | None,
) -> Tensor:
    """Return a weight joined to its scales. `description`: what the file says of its format, if it does."""
    first = next((beside[last] for last in _SCALES if last in beside), None)
    anything = weight or first or next(iter(beside.values()))
    where = f"{shown(anything.file)}: {quoted(f'{stem}.weight')}"
    if not isinstance(weight, StoredTensor) or all(last in beside for last in _SCALES):
        raise WeightsError(
            f"{where} has scales, and is missing or scaled twice. Download the file anew."
        )
    format = _format(weight, beside) if description is None else description["format"]
    if format in ("float8_e4m3fn", "float8_e5m2") and first is None:
        return weight
    decode = _FORMATS.get(format)
    if (
        decode is None
        or (description or {}).get("convrot")
        or "convrot" in str((description or {}).get("params"))
    ):
        rotated = " with rotated inputs" if format in _FORMATS else ""
        raise WeightsError(
            f"{where} is stored as {printable(format, 100)}{rotated}, which fluxjax can't decode. {_PLAIN}"
        )
    scales = {"scale": first, "second": beside.get(_SECOND)}
    parts = {name: part for name, part in scales.items() if isinstance(part, StoredTensor)}
    found = decode({"weight": weight, **parts})
    if isinstance(found, str):
        sizes = ", ".join(
            f"{name} {part.dtype} {list(part.shape)}"
            for name, part in {"weight": weight, **parts}.items()
        )
        raise WeightsError(f"{where}: {found}, got {printable(sizes)}. {_PLAIN}")
    return found


def _format(weight: StoredTensor, beside: Mapping[str, Tensor]) -> str:
    """Return the format of a weight that the file does not describe: by its dtype and what lies beside it."""
    if weight.dtype in (_E4M3, _E5M2):
        return str(weight.dtype)
    if weight.dtype == _BYTES and _SECOND in beside:
        return "ModelOpt's nvfp4"
    return f"{weight.dtype} with a scale and no description of its format"


Parts = Mapping[str, StoredTensor]
"""The tensors of a weight: `weight`, `scale` and `second`."""


def _by_factor(kind: str, dtype: np.dtype, parts: Parts) -> PackedTensor | str:
    """Join a weight to one factor, or one for each row; return what is wrong where they do not fit."""
    weight, scale = parts["weight"], parts.get("scale")
    fits = scale is not None and scale.dtype in _FLOATS and scale.size in (1, *weight.shape[:1])
    if scale is None or not fits or weight.dtype != dtype or "second" in parts:
        return f"{kind} needs one float scale, or one for each row"
    return _packed(kind, weight.shape, {"weight": weight, "scale": scale}, times_scale)


def times_scale(arrays: Arrays) -> np.ndarray:
    """Return weight * scale in float32, with one scale or one for each row."""
    weight = arrays["weight"]
    return weight.astype(np.float32) * arrays["scale"].astype(np.float32).reshape(
        -1, *(1,) * (weight.ndim - 1)
    )


def _mxfp8(parts: Parts) -> PackedTensor | str:
    weight, scale = parts["weight"], parts.get("scale")
    shape = weight.shape
    if (
        len(shape) != 2
        or weight.dtype != _E4M3
        or shape[1] % 32
        or scale is None
        or scale.dtype not in (_BYTES, _E8M0)
    ):
        return "mxfp8 needs a float8_e4m3fn matrix, and an exponent in 8 bits for each 32 of its columns"
    if scale.size != _tiled_size(shape[0], shape[1] // 32):
        return "mxfp8 needs scales in tiles of 128 rows and 4 blocks"
    return _packed("mxfp8", shape, {"weight": weight, "scale": scale}, decode_mxfp8)


def decode_mxfp8(arrays: Arrays) -> np.ndarray:
    """Return an mxfp8 matrix: blocks of 32 float8_e4m3fn along a row, each times a power of two.

    **Source:** OCP Microscaling Formats 1.0, section 5.2; the order of the scales: cuBLAS, 1D block scaling factors.
    """
    rows, columns = arrays["weight"].shape
    scale = untile(arrays["scale"].view(_E8M0), rows, columns // 32).astype(np.float32)
    return arrays["weight"].astype(np.float32).reshape(rows, -1, 32) * scale[..., None]


def _nvfp4(kind: str, tiled: bool, parts: Parts) -> PackedTensor | str:
    weight, scale, second = parts["weight"], parts.get("scale"), parts.get("second")
    if (
        len(weight.shape) != 2
        or weight.dtype != _BYTES
        or weight.shape[1] % 8
        or scale is None
        or second is None
    ):
        return f"{kind} needs a matrix of bytes, two values each, with a weight_scale and a weight_scale_2"
    rows, blocks = weight.shape[0], weight.shape[1] // 8
    if scale.dtype not in (_BYTES, _E4M3) or second.size != 1 or second.dtype not in _FLOATS:
        return f"{kind} needs a weight_scale of float8_e4m3fn and one float weight_scale_2"
    if scale.size != (_tiled_size(rows, blocks) if tiled else rows * blocks):
        return f"{kind} needs a scale for each 16 columns" + (
            ", in tiles of 128 rows and 4 blocks" if tiled else ""
        )
    shape = (rows, 2 * weight.shape[1])
    return _packed(
        "nvfp4",
        shape,
        {"weight": weight, "scale": scale, "second": second},
        partial(decode_nvfp4, tiled=tiled),
    )


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def decode_nvfp4(arrays: Arrays, *, tiled: bool) -> np.ndarray:
    """Return an nvfp4 matrix: blocks of 16 four-bit floats (e2m1) along a row, each times a float8_e4m3fn, times one float32.

    **Arguments:** `tiled`: ComfyUI's layout, with the first value of a byte in its high half and the scales in cuBLAS' tiles;
    else ModelOpt's, with the first value in the low half and the scales row by row.
    """
    rows, half = arrays["weight"].shape
    scale = arrays["scale"].view(_E4M3)
    scale = untile(scale, rows, half // 8) if tiled else scale.reshape(rows, half // 8)
    factor = arrays["second"].astype(np.float32).reshape(()) * scale.astype(np.float32)
    values = _pairs(_E2M1, high_first=tiled)[arrays["weight"]]
    return values.reshape(rows, -1, 16) * factor[..., None]


def _pairs(codes: np.ndarray, *, high_first: bool) -> np.ndarray:
    """Return the two values of each of the 256 bytes."""
    high, low = codes[np.arange(256) >> 4], codes[np.arange(256) & 15]
    return np.stack([high, low] if high_first else [low, high], axis=-1)


def _tiled_size(rows: int, blocks: int) -> int:
    return -(-rows // 128) * 128 * (-(-blocks // 4) * 4)


def untile(scales: np.ndarray, rows: int, blocks: int) -> np.ndarray:
    """Return scales of blocks in row-major order, from cuBLAS' order for tensor cores: tiles of 128 rows and 4 blocks in
    row-major order; in each, row r and block b lie at 16 (r mod 32) + 4 (r div 32) + b.

    **Source:** cuBLAS documentation, 1D block scaling factors layout.
    """
    tiles = scales.reshape(-(-rows // 128), -(-blocks // 4), 32, 4, 4)
    ordered = tiles.transpose(0, 3, 2, 1, 4).reshape(tiles.shape[0] * 128, -1)
    return ordered[:rows, :blocks]


_FORMATS: Mapping[str, Callable[[Parts], PackedTensor | str]] = {
    "float8_e4m3fn": partial(_by_factor, "float8_e4m3fn scaled", _E4M3),
    "float8_e5m2": partial(_by_factor, "float8_e5m2 scaled", _E5M2),
    "int8_tensorwise": partial(_by_factor, "int8 scaled", _INT8),
    "mxfp8": _mxfp8,
    "nvfp4": partial(_nvfp4, "nvfp4", True),
    "ModelOpt's nvfp4": partial(_nvfp4, "nvfp4 without a description", False),
}


# bitsandbytes' names.

_STATE = ".quant_state.bitsandbytes__"
_FOUR_BITS = ("nf4", "fp4")
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def _join_bitsandbytes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the weights of bitsandbytes' 4 and 8 bits to their statistics."""
    joined = dict(tensors)
    for name in tensors:
        if _STATE in name:
            weight, _, kind = name.partition(_STATE)
            beside = {
                last: joined.pop(f"{weight}.{last}")
                for last in _STATISTICS
                if f"{weight}.{last}" in joined
            }
            joined[weight] = _four_bits(
                weight, kind, {"weight": joined.get(weight), **beside}, joined.pop(name)
            )
        elif name.rpartition(".")[2] == "SCB":
            stem = name.rpartition(".")[0]
            joined[f"{stem}.weight"] = _eight_bits(
                stem, joined.get(f"{stem}.weight"), joined.pop(name)
            )
            _check_row_format(joined.pop(f"{stem}.weight_format", None), stem)
    for name in joined:
        if name.endswith(".weight.absmax"):
            raise WeightsError(
                f"{shown(joined[name].file)}: {quoted(name)} is of bitsandbytes' 4 bits, whose quant_state is missing. "
                "Download the file anew."
            )
    return joined


def _four_bits(name: str, kind: str, parts: Mapping[str, Tensor | None], state: Tensor) -> Tensor:
    described = _description(state, name, "quant_type")
    where = f"{shown(state.file)}: {quoted(name)}"
    if kind not in _FOUR_BITS or described["quant_type"] != kind:
        raise WeightsError(
            f"{where} is bitsandbytes' {printable(kind, 40)}, which fluxjax can't decode. {_PLAIN}"
        )
    stored = {part: tensor for part, tensor in parts.items() if isinstance(tensor, StoredTensor)}
    shape: Any = described.get("shape")
    block: Any = described.get("blocksize")
    nested, offset = described.get("nested_blocksize"), described.get("nested_offset", 0.0)
    numbers = [*shape, block, 1 if nested is None else nested] if isinstance(shape, list) else [0]
    sound = all(type(number) is int and 0 < number < 2**40 for number in numbers) and type(
        offset
    ) in (int, float)
    if not sound or not _four_bits_fit(stored, prod(shape), block, nested):
        raise WeightsError(
            f"{where}: its bytes, statistics and quant_state do not fit together. Download the file anew."
        )
    decode = partial(
        decode_four_bits, size=prod(shape), block=block, nested=nested, offset=float(offset)
    )
    return _packed(kind.upper(), tuple(shape), stored, decode)


def _four_bits_fit(
    parts: Mapping[str, StoredTensor], size: int, block: int, nested: int | None
) -> bool:
    """Return whether all statistics are there, as many as a weight of `size` values needs."""
    if not {"weight", "absmax", "quant_map"} <= parts.keys() or (nested is not None) != (
        "nested_absmax" in parts
    ):
        return False
    blocks, absmax = -(-size // block), parts["absmax"]
    fits = (
        parts["weight"].nbytes == -(-size // 2)
        and absmax.size == blocks
        and parts["quant_map"].size == 16
    )
    floats = [part for name, part in parts.items() if name not in ("weight", "absmax")]
    if nested is None:
        floats.append(absmax)
    else:
        codes = parts.get("nested_quant_map")
        fits = (
            fits and absmax.dtype == _BYTES and parts["nested_absmax"].size == -(-blocks // nested)
        )
        fits = fits and codes is not None and codes.size == 256
    return fits and all(part.dtype in _FLOATS for part in floats)


def decode_four_bits(
    arrays: Arrays, *, size: int, block: int, nested: int | None, offset: float
) -> np.ndarray:
    """Return a weight of bitsandbytes' NF4 or FP4, flat: codes of 4 bits, the first in the high half of a byte, each times the
    largest magnitude of its block; these are of 8 bits themselves where they are nested.

    **Source:** Dettmers et al. 2023 (2305.14314), section 3.
    """
    absmax = arrays["absmax"].reshape(-1)
    if nested is not None:
        codes = arrays["nested_quant_map"].astype(np.float32).reshape(-1)[absmax]
        absmax = _by_blocks(codes, arrays["nested_absmax"].reshape(-1), nested) + np.float32(offset)
    pairs = _pairs(arrays["quant_map"].astype(np.float32).reshape(-1), high_first=True)
    # bitsandbytes stores the bytes under other dtypes too.
    values = pairs[arrays["weight"].reshape(-1).view(np.uint8)].reshape(-1)[:size]
    return _by_blocks(values, absmax, block)


def _by_blocks(values: np.ndarray, factors: np.ndarray, block: int) -> np.ndarray:
    """Return values times the factor of their block; the last block may be shorter."""
    whole = len(values) // block * block
    factors = factors.astype(np.float32)
    values[:whole].reshape(-1, block)[...] *= factors[: whole // block, None]
    values[whole:] *= factors[whole // block :][:1] if whole < len(values) else 1
    return values


def _eight_bits(stem: str, weight: Tensor | None, scale: Tensor) -> Tensor:
    fits = (
        weight is not None
        and len(weight.shape) == 2
        and scale.shape == weight.shape[:1]
        and scale.dtype in _FLOATS
    )
    if not (
        fits
        and isinstance(weight, StoredTensor)
        and isinstance(scale, StoredTensor)
        and weight.dtype == _INT8
    ):
        raise WeightsError(
            f"{shown(scale.file)}: {quoted(f'{stem}.SCB')} needs an int8 matrix of as many rows, {quoted(f'{stem}.weight')}. "
            "Download the file anew."
        )
    return _packed(
        "int8 (bitsandbytes)", weight.shape, {"weight": weight, "scale": scale}, decode_eight_bits
    )


def decode_eight_bits(arrays: Arrays) -> np.ndarray:
    """Return a weight of bitsandbytes' int8: 127 stands for the largest magnitude of a row."""
    # bitsandbytes multiplies by this rounded reciprocal of 127.
    return times_scale(arrays) * np.float32(7.874015718698502e-3)


def _check_row_format(tensor: Tensor | None, stem: str) -> None:
    """**Raises:** `WeightsError` unless the rows of an int8 weight lie as they are, and not in the tiles of old releases."""
    if tensor is None:
        return
    if (
        not isinstance(tensor, StoredTensor)
        or tensor.size != 1
        or tensor.view().astype(np.float32).reshape(()) != 0
    ):
        raise WeightsError(
            f"{shown(tensor.file)}: {quoted(f'{stem}.weight')} is in a tiled int8 format of old bitsandbytes, which "
            f"fluxjax can't decode. {_PLAIN}"
        )
