"""Weights that bitsandbytes stores in 4 bits.

A weight `w` of a layer is stored as these tensors:

- `w`: bytes, of two 4-bit codes each;
- `w.quant_map`: the value of each of the 16 codes;
- `w.absmax`: the largest magnitude of each block of values;
- `w.nested_absmax` and `w.nested_quant_map`: the same for `w.absmax`, if that is quantized too;
- `w.quant_state.bitsandbytes__nf4` (or `__fp4`): bytes of JSON with the shape and the block sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.packed import (
    BYTES,
    SCALE_DTYPES,
    USE_ANOTHER_FILE,
    Arrays,
    PackedRows,
    StoredParts,
    nibble_pairs,
    packed_tensor,
    read_description,
)
from fluxjax.checkpoint.tensors import StoredTensor, Tensor
from fluxjax.nets.packed_formats import NF4_CODES, PACKED_FORMATS
from fluxjax.printable import printable, printable_path, quote_name

STATE_INFIX = ".quant_state.bitsandbytes__"
"""In the name of the tensor that describes a weight, before the name of its format."""
_FORMATS = ("nf4", "fp4")
_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_CODES = 16
"""Codes of 4 bits, each with a value in `quant_map`."""
_NESTED_CODES = 256
"""Codes of quantized magnitudes, which are bytes."""
_MOST_SIZE = 2**40


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


def combine_four_bits(tensors: dict[str, Tensor], state_name: str) -> None:
    """Replace a 4-bit weight and what belongs to it by one tensor.

    **Arguments:** `tensors`: changed in place. `state_name`: of the tensor that describes the
    weight.
    **Raises:** `WeightsError` for a format that can't be decoded, or tensors that do not fit
    together.
    """
    name, _, format = state_name.partition(STATE_INFIX)
    description = tensors.pop(state_name)
    parts = _take_parts(tensors, name)
    where = f"{printable_path(description.file)}: {quote_name(name)}"
    fields = read_description(description, name, "quant_type")
    if format not in _FORMATS or fields["quant_type"] != format:
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
    rows = None
    if _stays(parts, state):
        rows = PackedRows("nf4", partial(_nf4_rows, state=state))
    tensors[name] = packed_tensor(format.upper(), state.shape, parts, decode, rows)


def _take_parts(tensors: dict[str, Tensor], name: str) -> dict[str, StoredTensor]:
    """Return a weight and its statistics by their roles, and take the statistics out.

    **Arguments:** `tensors`: changed in place. `name`: of the weight.
    """
    found: dict[str, Tensor | None] = {"weight": tensors.get(name)}
    for role in _STATISTICS:
        found[role] = tensors.pop(f"{name}.{role}", None)
    parts: dict[str, StoredTensor] = {}
    for role, tensor in found.items():
        if isinstance(tensor, StoredTensor):
            parts[role] = tensor
    return parts


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
    return QuantState(
        shape=tuple(shape),
        block=block,  # type: ignore[arg-type]
        nested_block=nested_block,  # type: ignore[arg-type]
        offset=float(offset),  # type: ignore[arg-type]
    )


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
    if parts["absmax"].size != blocks:
        return False
    if parts["quant_map"].size != _CODES:
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
    if parts["absmax"].dtype != BYTES:
        return False
    if nested_codes.size != _NESTED_CODES:
        return False
    return nested_absmax.size == -(-blocks // nested_block)


def decode_four_bits(arrays: Arrays, *, state: QuantState) -> np.ndarray:
    """Return a weight of bitsandbytes' NF4 or FP4, flat.

    Each 4-bit code, the first one in the high half of a byte, stands for a value in [-1, 1], which
    is multiplied by the largest magnitude of its block. These magnitudes may be quantized to 8 bits
    in the same way.

    **Source:** Dettmers et al. 2023 (2305.14314), section 3.
    """
    codes = _flat_floats(arrays["quant_map"])
    pairs = nibble_pairs(codes, high_first=True)
    values = pairs[_code_bytes(arrays)].reshape(-1)
    # The last byte may hold one code that is not of the weight.
    values = values[: prod(state.shape)]
    return _times_block_factors(values, _magnitudes(arrays, state), state.block)


def _code_bytes(arrays: Arrays) -> np.ndarray:
    """Return the bytes of a weight, each of two codes; files have them under other dtypes too."""
    return arrays["weight"].reshape(-1).view(np.uint8)


def _flat_floats(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).reshape(-1)


def _magnitudes(arrays: Arrays, state: QuantState) -> np.ndarray:
    """Return the largest magnitude of each block of values."""
    absmax = arrays["absmax"].reshape(-1)
    if state.nested_block is None:
        return absmax
    codes = _flat_floats(arrays["nested_quant_map"])
    nested_absmax = arrays["nested_absmax"].reshape(-1)
    magnitudes = _times_block_factors(codes[absmax], nested_absmax, state.nested_block)
    return magnitudes + np.float32(state.offset)


def _stays(parts: StoredParts, state: QuantState) -> bool:
    """Return whether a weight's rows divide into blocks of NF4 as `PackedWeight` has them."""
    size = PACKED_FORMATS["nf4"].values
    if len(state.shape) != 2:
        return False
    if state.shape[1] % size or state.block % size:
        return False
    codes = _flat_floats(parts["quant_map"].view())
    return bool(np.array_equal(codes, np.asarray(NF4_CODES, np.float32)))


def _nf4_rows(arrays: Arrays, *, state: QuantState) -> np.ndarray:
    """Return the rows of a weight as blocks of NF4, each with its magnitude in float32."""
    size = PACKED_FORMATS["nf4"].values
    codes = _code_bytes(arrays).reshape(-1, size // 2)
    # Larger blocks become several of this size.
    magnitudes = np.repeat(_magnitudes(arrays, state), state.block // size)
    magnitudes = magnitudes[: len(codes)].astype("<f4")
    scales = magnitudes.view(np.uint8).reshape(-1, 4)
    blocks = np.concatenate([scales, codes], axis=1)
    return blocks.reshape(state.shape[0], -1)


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
