"""A weight that several tensors of a file store together, decoded when it is read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.tensors import BFLOAT16, BYTES, StoredTensor, Tensor
from fluxjax.printable import printable_path, quote_name

SCALE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
"""The dtypes of scales."""
INT8 = np.dtype(np.int8)
USE_ANOTHER_FILE = "Use the model's bfloat16, scaled fp8 or GGUF file."
_MOST_DESCRIPTION_BYTES = 100_000  # the JSON in a tensor; those that exist have some hundred

Arrays = Mapping[str, np.ndarray]
"""The values of the tensors that store a weight, by their role: "weight", "scale", …"""
StoredParts = Mapping[str, StoredTensor]
"""The tensors that store a weight, by their role."""
Decoder = Callable[[Arrays], np.ndarray]
"""Computes the values of a weight in float32; they may come flat."""


@dataclass(frozen=True)
class PackedRows:
    """A weight's rows in a format of `PackedWeight`.

    `format`: of these. `pack`: returns all rows as bytes from the values of the stored tensors.
    """

    format: str
    pack: Callable[[Arrays], np.ndarray]


@dataclass(frozen=True)
class PackedTensor(Tensor):
    """A weight decoded from several tensors, loaded as bfloat16 unless requested otherwise.

    `format`: the name of the storage format. `parts`: the tensors that store the weight. `decode`:
    computes the weight from their values, every time that it is read. `rows`: how it stays packed;
    None if it can't.
    """

    format: str
    parts: StoredParts
    decode: Decoder
    rows: PackedRows | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes of all parts in the file."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def storage(self) -> str:
        """The name of the storage format."""
        return self.format

    def view(self) -> np.ndarray:
        """Return the values, decoded to float32."""
        arrays = self._arrays()
        # Large exponents overflow to infinity. An error names the weight once it is loaded.
        with np.errstate(over="ignore", invalid="ignore"):
            return self.decode(arrays).reshape(self.shape)

    def _arrays(self) -> Arrays:
        return {role: part.view() for role, part in self.parts.items()}

    @property
    def packed_format(self) -> str | None:
        """The format in which the rows can stay; None if they can't."""
        return None if self.rows is None else self.rows.format

    def read_packed_rows(self, start: int, out: np.ndarray) -> None:
        """Write rows in the packed format, from row `start` on, into an array of bytes."""
        if self.rows is None:
            raise NotImplementedError(f"{self.format} has no packed rows.")
        out[...] = self.rows.pack(self._arrays())[start : start + len(out)]


def packed_tensor(
    format: str,
    shape: tuple[int, ...],
    parts: StoredParts,
    decode: Decoder,
    rows: PackedRows | None = None,
) -> PackedTensor:
    """Return a weight stored in `parts`, one of which has the role "weight"."""
    return PackedTensor(parts["weight"].file, BFLOAT16, shape, format, parts, decode, rows)


def read_description(tensor: Tensor, name: str, required: str) -> Mapping[str, Any]:
    """Return the JSON object that a tensor of bytes holds.

    **Arguments:** `name`: of the tensor. `required`: a field that the object must have, a string.
    **Raises:** `WeightsError` if the tensor holds anything else.
    """
    damaged = WeightsError(
        f"{printable_path(tensor.file)}: {quote_name(name)} is not a description in JSON. Download "
        "the file again."
    )
    if not isinstance(tensor, StoredTensor) or tensor.dtype != BYTES:
        raise damaged
    if tensor.nbytes > _MOST_DESCRIPTION_BYTES:
        raise damaged
    try:
        description = json.loads(tensor.view().tobytes())
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(description, dict) or not isinstance(description.get(required), str):
        raise damaged
    return description


def nibble_pairs(codes: np.ndarray, *, high_first: bool) -> np.ndarray:
    """Return the two values that each of the 256 bytes stands for.

    **Arguments:** `codes`: the value of each of the 16 nibbles. `high_first`: whether the high half
    of a byte is the first of its two values.
    **Returns:** an array [256, 2].
    """
    byte = np.arange(256)
    high, low = codes[byte >> 4], codes[byte & 15]
    pair = [high, low] if high_first else [low, high]
    return np.stack(pair, axis=-1)
