"""Writing safetensors files, one chunk of a tensor at a time."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.disk import explain_full_disk, reserve_space
from fluxjax.checkpoint.safetensors import DTYPES, LENGTH_BYTES, METADATA_KEY

_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_DATA_ALIGNMENT = 64  # bytes; XLA:CPU then uses a memory-mapped tensor without a copy

ReportBytes = Callable[[int], object]
"""A callback that receives the number of bytes that have been written since its last call."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    `chunks`: returns its values in order, in pieces along the first axis or in one piece; it is
    called when the tensor is written.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def from_array(cls, array: np.ndarray) -> "OutputTensor":
        """Return an array as a tensor to write."""
        return cls(array.dtype, array.shape, lambda: [array])


def write_safetensors(
    path: Path,
    tensors: Mapping[str, OutputTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    report: ReportBytes | None = None,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file that appears at `path` complete or not at all.

    **Arguments:** `report`: called with the number of bytes of each chunk. `overwrite`: whether an
    existing file is replaced.
    **Raises:** `WeightsError` if the disk is full; `FileExistsError` if `path` exists, also if it
    was created while the file was written.
    """
    header, order = _header(tensors, metadata)
    total = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with explain_full_disk(path, total), new_file(path, overwrite=overwrite) as file:
        reserve_space(file.fileno(), total)
        file.write(header)
        for name in order:
            write_chunks(file, name, tensors[name], report)


def write_chunks(
    file: BinaryIO, name: str, tensor: OutputTensor, report: ReportBytes | None
) -> None:
    """Write the values of a tensor to an open file. Arguments as for `write_safetensors`."""
    written = 0
    for chunk in tensor.chunks():
        contiguous = np.ascontiguousarray(chunk, tensor.dtype)
        data = contiguous.reshape(-1).view(np.uint8)
        file.write(data.data)
        written += data.size
        if report is not None:
            report(data.size)
    if written != tensor.nbytes:
        raise ValueError(f"{name} has {written} bytes in its chunks, not {tensor.nbytes}.")


def _header(
    tensors: Mapping[str, OutputTensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, Sequence[str]]:
    """Return the header, and the names of the tensors in their order in the file.

    Tensors whose size is a multiple of the alignment come first, so that as many tensors as
    possible are aligned; the header is padded with spaces to end at the alignment too.
    """
    order = sorted(tensors, key=lambda name: tensors[name].nbytes % _DATA_ALIGNMENT != 0)
    table: dict[str, object] = {METADATA_KEY: {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        table[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    padding = -(LENGTH_BYTES + len(text)) % _DATA_ALIGNMENT
    text += b" " * padding
    length = len(text).to_bytes(LENGTH_BYTES, "little")
    return length + text, order
