"""Tensors of GGUF files: those in block formats are decoded as they are read."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.gguf_header import GgufEntry, read_gguf_header
from fluxjax.checkpoint.tensors import (
    BFLOAT16,
    BYTES,
    StoredTensor,
    Tensor,
    TensorFile,
    check_overlaps,
    check_tensor_end,
)
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.printable import printable_path, quote_name

_PLAIN_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_CHUNK_SIZE = 4_194_304  # values decoded at a time; it bounds the memory of temporary arrays


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """A tensor in one of GGUF's block formats, decoded to bfloat16 unless requested otherwise.

    `format`: the name of the block format. `offset`: its first byte in the file. `row_bytes`: bytes
    of the blocks of one row.
    """

    format: str
    offset: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def storage(self) -> str:
        """The name of the block format."""
        return self.format

    @property
    def packed_format(self) -> str | None:
        """The block format, if matrices are multiplied in it; else None."""
        return self.format if self.format in PACKED_FORMATS and len(self.shape) == 2 else None

    def read_packed_rows(self, start: int, out: np.ndarray) -> None:
        """Read the blocks of rows, from row `start` on, into an array of bytes."""
        all_rows = (prod(self.shape[:-1]), self.row_bytes)
        blocks = StoredTensor(self.file, BYTES, all_rows, self.offset)
        blocks.rows(start, start + len(out)).read_into(out)

    def view(self) -> np.ndarray:
        """Return the values, decoded to float32."""
        gguf = _import_gguf()
        block_format = gguf.GGMLQuantizationType[self.format]
        rows = prod(self.shape[:-1])
        columns = self.shape[-1]
        if not rows:
            return np.empty(self.shape, np.float32)
        packed = np.memmap(self.file, np.uint8, "r", self.offset, (rows, self.row_bytes))
        out = np.empty((rows, columns), np.float32)
        step = max(1, _CHUNK_SIZE // columns)
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            out[chunk] = gguf.quants.dequantize(packed[chunk], block_format)
        return out.reshape(self.shape)


def read_gguf(path: Path) -> TensorFile:
    """Return the tensors and the metadata of a GGUF file, checked against the size of the file.

    Only strings are kept of the metadata.

    **Raises:** `WeightsError` for a truncated or damaged file, for a format that can't be decoded,
    and if the `gguf` package is not installed.
    """
    _import_gguf()
    header = read_gguf_header(path)
    tensors: dict[str, GgufTensor | StoredTensor] = {}
    for entry in header.entries:
        tensor = _tensor(path, entry, header.data_start)
        check_tensor_end(path, entry.name, tensor.offset + tensor.nbytes, header.file_size)
        tensors[entry.name] = tensor
    if len(tensors) < len(header.entries):
        raise WeightsError(
            f"{printable_path(path)}: the header names a tensor twice. Download the file again."
        )
    check_overlaps(path, {name: (one.offset, one.nbytes) for name, one in tensors.items()})
    metadata: dict[str, str] = {}
    for key, value in header.metadata.items():
        if isinstance(value, str):
            metadata[key] = value
    return TensorFile(path, tensors, metadata)


def _tensor(path: Path, entry: GgufEntry, data_start: int) -> GgufTensor | StoredTensor:
    """Return the tensor that an entry of the header describes."""
    gguf = _import_gguf()
    try:
        block_format = gguf.GGMLQuantizationType(entry.type_code)
    except ValueError as error:
        raise WeightsError(
            f"{printable_path(path)}: {quote_name(entry.name)} has a type, {entry.type_code}, that "
            "the installed gguf does not know. Update gguf."
        ) from error
    shape = entry.shape
    offset = data_start + entry.offset
    if block_format.name in _PLAIN_DTYPES:
        dtype = np.dtype(_PLAIN_DTYPES[block_format.name])
        return StoredTensor(path, dtype, shape, offset)
    where = f"{printable_path(path)}: {quote_name(entry.name)}"
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[block_format]
    if not shape or not shape[-1] or shape[-1] % block_size:
        raise WeightsError(
            f"{where} of shape {list(shape)} does not divide into {block_format.name}'s blocks of "
            f"{block_size}. Download the file again."
        )
    # There is no public way to ask which formats the package decodes.
    if block_format not in gguf.quants._type_traits:
        raise WeightsError(
            f"{where} is {block_format.name}, which gguf can't decode. Use a file of another "
            "quantization."
        )
    row_bytes = shape[-1] // block_size * block_bytes
    return GgufTensor(path, BFLOAT16, shape, block_format.name, offset, row_bytes)


def _import_gguf() -> ModuleType:
    """Return the `gguf` package, which is optional."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise WeightsError(
            "GGUF files need the gguf package: pip install 'fluxjax[gguf]'."
        ) from error
    return gguf
