"""Weights that bitsandbytes stores in 4 or 8 bits.

A 4-bit weight `w` of a layer is stored as these tensors:

- `w`: bytes, of two 4-bit codes each;
- `w.quant_map`: the value of each of the 16 codes;
- `w.absmax`: the largest magnitude of each block of values;
- `w.nested_absmax` and `w.nested_quant_map`: the same for `w.absmax`, if that is quantized too;
- `w.quant_state.bitsandbytes__nf4` (or `__fp4`): bytes of JSON with the shape and the block sizes.

An 8-bit weight has the largest magnitude of each row beside it, under the layer's name and `SCB`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.packed import (
    BYTES,
    INT8,
    SCALE_DTYPES,
    USE_ANOTHER_FILE,
    Arrays,
    PackedRows,
    PackedTensor,
    StoredParts,
    nibble_pairs,
    packed_tensor,
    read_description,
)
from fluxjax.checkpoint.scaled_formats import times_scale
from fluxjax.checkpoint.tensors import StoredTensor, Tensor
from fluxjax.nets.packed_formats import NF4_CODES, PACKED_FORMATS
from fluxjax.printable import printable, printable_path, quote_name

# Of 4 bits: the description of a weight is a tensor, whose name ends in the format's.
_STATE_INFIX = ".quant_state.bitsandbytes__"
_FOUR_BIT_FORMATS = ("nf4", "fp4")
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# Of 8 bits.
_ROW_SCALES = "SCB"
_ROW_FORMAT = "weight_format"
_MOST_SIZE = 2**40


def combine_bitsandbytes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with each 4-bit or 8-bit weight and its statistics combined into one.

    **Raises:** `WeightsError` that names the weight, for tensors that do not fit together, and for
    a format that can't be decoded.
    """
    combined = dict(tensors)
    for name in tensors:
        layer, _, last = name.rpartition(".")
        if _STATE_INFIX in name:
            _combine_four_bits(combined, name)
        elif last == _ROW_SCALES:
            _combine_eight_bits(combined, layer, combined.pop(name))
    for name, tensor in combined.items():
        if name.endswith(".weight.absmax"):
            raise WeightsError(
                f"{printable_path(tensor.file)}: {quote_name(name)} belongs to a 4-bit weight of "
                "bitsandbytes, whose quant_state is missing. Download the file again."
            )
    return combined


# 4 bits.


@dataclass(frozen=True)
class QuantState:
    """What bitsandbytes writes of a 4-bit weight.

    `block`: values that share a scale. `nested_block`: scales that share a scale of their own, None
    if they are not quantized themselves. `offset`: what is added to quantized scales.
    """

    shape: tuple[int, ...]
    block: int
    nested_block: int | None
    offset: float


def _combine_four_bits(tensors: dict[str, Tensor], state_name: str) -> None:
    """Replace a 4-bit weight and what belongs to it by one tensor.

    **Arguments:** `tensors`: changed in place. `state_name`: of the tensor that describes the
    weight.
    """
    name, _, format = state_name.partition(_STATE_INFIX)
    description = tensors.pop(state_name)
    stored: dict[str, Tensor | None] = {"weight": tensors.get(name)}
    for role in _STATISTICS:
        stored[role] = tensors.pop(f"{name}.{role}", None)
    parts: dict[str, StoredTensor] = {}
    for role, tensor in stored.items():
        if isinstance(tensor, StoredTensor):
            parts[role] = tensor
    where = f"{printable_path(description.file)}: {quote_name(name)}"
    fields = read_description(description, name, "quant_type")
    if format not in _FOUR_BIT_FORMATS or fields["quant_type"] != format:
        raise WeightsError(
            f"{where} is bitsandbytes' {printable(format, 40)}, which fluxjax can't decode. "
            f"{USE_ANOTHER_FILE}"
        )
    state = _quant_state(fields)
    if state is None or not _fits(parts, state):
        raise WeightsError(
            f"{where}: its bytes, statistics and quant_state do not fit together. Download the "
            "file again."
        )
    decode = partial(decode_four_bits, state=state)
    rows = PackedRows("nf4", partial(_nf4_rows, state=state)) if _stays(parts, state) else None
    tensors[name] = packed_tensor(format.upper(), state.shape, parts, decode, rows)


def _quant_state(fields: Mapping[str, object]) -> QuantState | None:
    """Return the state that a description gives, None if a value of it can't be right."""
    shape = fields.get("shape")
    block = fields.get("blocksize")
    nested_block = fields.get("nested_blocksize")
    offset = fields.get("nested_offset", 0.0)
    if not isinstance(shape, list) or not _is_size(block):
        return None
    if not all(_is_size(size) for size in shape):
        return None
    if nested_block is not None and not _is_size(nested_block):
        return None
    if type(offset) not in (int, float):
        return None
    return QuantState(tuple(shape), block, nested_block, float(offset))  # type: ignore[arg-type]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < _MOST_SIZE


def _fits(parts: StoredParts, state: QuantState) -> bool:
    """Return whether all statistics of a weight are there, and have its size."""
    if not {"weight", "absmax", "quant_map"} <= parts.keys():
        return False
    size = prod(state.shape)
    blocks = -(-size // state.block)
    if parts["weight"].nbytes != -(-size // 2):
        return False
    if parts["absmax"].size != blocks or parts["quant_map"].size != 16:
        return False
    if not _nested_fits(parts, state.nested_block, blocks):
        return False
    # Quantized scales are bytes; everything else but the weight itself is floats.
    not_floats = ("weight",) if state.nested_block is None else ("weight", "absmax")
    for role, part in parts.items():
        if role not in not_floats and part.dtype not in SCALE_DTYPES:
            return False
    return True


def _nested_fits(parts: StoredParts, nested_block: int | None, blocks: int) -> bool:
    """Return whether quantized scales have their own scales, and others have none."""
    nested_absmax = parts.get("nested_absmax")
    nested_codes = parts.get("nested_quant_map")
    if nested_block is None:
        return nested_absmax is None
    if nested_absmax is None or nested_codes is None:
        return False
    if parts["absmax"].dtype != BYTES or nested_codes.size != 256:
        return False
    return nested_absmax.size == -(-blocks // nested_block)


def decode_four_bits(arrays: Arrays, *, state: QuantState) -> np.ndarray:
    """Return a weight of bitsandbytes' NF4 or FP4, flat.

    Each 4-bit code, the first one in the high half of a byte, stands for a value in [-1, 1], which
    is multiplied by the largest magnitude of its block. These magnitudes may be quantized to 8 bits
    in the same way.

    **Source:** Dettmers et al. 2023 (2305.14314), section 3.
    """
    codes = arrays["quant_map"].astype(np.float32).reshape(-1)
    pairs = nibble_pairs(codes, high_first=True)
    # bitsandbytes stores the bytes under other dtypes too.
    packed = arrays["weight"].reshape(-1).view(np.uint8)
    values = pairs[packed].reshape(-1)[: prod(state.shape)]
    return _times_block_factors(values, _magnitudes(arrays, state), state.block)


def _magnitudes(arrays: Arrays, state: QuantState) -> np.ndarray:
    """Return the largest magnitude of each block of values."""
    absmax = arrays["absmax"].reshape(-1)
    if state.nested_block is None:
        return absmax
    codes = arrays["nested_quant_map"].astype(np.float32).reshape(-1)
    nested_absmax = arrays["nested_absmax"].reshape(-1)
    absmax = _times_block_factors(codes[absmax], nested_absmax, state.nested_block)
    return absmax + np.float32(state.offset)


def _stays(parts: StoredParts, state: QuantState) -> bool:
    """Return whether a weight's rows divide into blocks of NF4 as `PackedWeight` has them."""
    size = PACKED_FORMATS["nf4"].values
    if len(state.shape) != 2 or state.shape[1] % size or state.block % size:
        return False
    codes = parts["quant_map"].view().astype(np.float32).reshape(-1)
    return bool(np.array_equal(codes, np.asarray(NF4_CODES, np.float32)))


def _nf4_rows(arrays: Arrays, *, state: QuantState) -> np.ndarray:
    """Return the rows of a weight as blocks of NF4, each with its magnitude in float32."""
    size = PACKED_FORMATS["nf4"].values
    codes = arrays["weight"].reshape(-1).view(np.uint8).reshape(-1, size // 2)
    # Larger blocks become several of this size.
    magnitudes = np.repeat(_magnitudes(arrays, state), state.block // size)[: len(codes)]
    scales = magnitudes.astype("<f4").view(np.uint8).reshape(-1, 4)
    return np.concatenate([scales, codes], axis=1).reshape(state.shape[0], -1)


def _times_block_factors(values: np.ndarray, factors: np.ndarray, block: int) -> np.ndarray:
    """Multiply values in place by the factor of their block; the last block may be shorter."""
    whole_blocks, rest = divmod(len(values), block)
    end = whole_blocks * block
    factors = factors.astype(np.float32)
    blocks = values[:end].reshape(-1, block)
    blocks *= factors[:whole_blocks, None]
    if rest:
        values[end:] *= factors[whole_blocks]
    return values


# 8 bits.


def _combine_eight_bits(tensors: dict[str, Tensor], layer: str, scale: Tensor) -> None:
    """Replace the 8-bit weight of a layer by one combined with its scales, in place."""
    name = f"{layer}.weight"
    tensors[name] = _eight_bits(layer, tensors.get(name), scale)
    row_format = tensors.pop(f"{layer}.{_ROW_FORMAT}", None)
    if row_format is not None:
        _check_row_format(row_format, layer)


def _eight_bits(layer: str, weight: Tensor | None, scale: Tensor) -> PackedTensor:
    error = WeightsError(
        f"{printable_path(scale.file)}: {quote_name(f'{layer}.{_ROW_SCALES}')} needs an int8 "
        f"matrix with as many rows, {quote_name(f'{layer}.weight')}. Download the file again."
    )
    if not isinstance(weight, StoredTensor) or not isinstance(scale, StoredTensor):
        raise error
    if len(weight.shape) != 2 or scale.shape != weight.shape[:1]:
        raise error
    if weight.dtype != INT8 or scale.dtype not in SCALE_DTYPES:
        raise error
    parts = {"weight": weight, "scale": scale}
    return packed_tensor("int8 (bitsandbytes)", weight.shape, parts, decode_eight_bits)


def decode_eight_bits(arrays: Arrays) -> np.ndarray:
    """Return a weight of bitsandbytes' int8: 127 stands for the largest magnitude of a row."""
    # bitsandbytes multiplies by this rounded reciprocal of 127.
    return times_scale(arrays) * np.float32(7.874015718698502e-3)


def _check_row_format(tensor: Tensor, layer: str) -> None:
    """Check that an int8 weight is stored in row-major order.

    **Raises:** `WeightsError` if it is stored in the tiles of old releases.
    """
    if isinstance(tensor, StoredTensor) and tensor.size == 1:
        code = tensor.view().astype(np.float32).reshape(())
        if code == 0:
            return
    raise WeightsError(
        f"{printable_path(tensor.file)}: {quote_name(f'{layer}.weight')} is in a tiled int8 format "
        f"of old bitsandbytes releases, which fluxjax can't decode. {USE_ANOTHER_FILE}"
    )
