"""GGUF files: headers checked, and weights in its block formats decoded as they are read."""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.packed import BFLOAT16
from fluxjax.checkpoint.safetensors import (
    MOST_TENSORS,
    StoredTensor,
    Tensor,
    TensorFile,
    WeightsError,
    check_end,
    check_overlaps,
    check_regular,
    quoted,
    shown,
)

GGUF_MAGIC = b"GGUF"
_MOST_ITEMS = 1_000_000  # metadata entries and texts in arrays; a tokenizer has some 100,000
_MOST_TEXT = 20_000_000  # bytes
_PAIR_BYTES, _TENSOR_BYTES, _TEXT_BYTES = 13, 24, 8  # the least that each takes in a header
_CHUNK = 4_194_304  # elements decoded at a time


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """A tensor in one of GGUF's block formats. It is loaded as bfloat16 unless told otherwise."""

    kind: str
    offset: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    @property
    def storage(self) -> str:
        return self.kind

    def view(self) -> np.ndarray:
        gguf = _gguf()
        rows = prod(self.shape[:-1])
        if not rows:
            return np.empty(self.shape, np.float32)
        packed = np.memmap(self.file, np.uint8, "r", self.offset, (rows, self.row_bytes))
        out = np.empty((rows, self.shape[-1]), np.float32)
        step = max(1, _CHUNK // self.shape[-1])
        for start in range(0, rows, step):
            part = slice(start, start + step)
            out[part] = gguf.quants.dequantize(packed[part], gguf.GGMLQuantizationType[self.kind])
        return out.reshape(self.shape)


_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


def read_gguf(path: Path) -> TensorFile:
    """Return what a GGUF file holds, having checked that all of it is there; only text is kept of its metadata.

    The header is read here rather than by the `gguf` package, whose reader does not end on some damaged files.
    **Raises:** `WeightsError` for a truncated or damaged file, a format that can't be decoded, or without `gguf`.
    **Source:** the GGUF specification, version 3.
    """
    _gguf()
    size = check_regular(path)
    with open(path, "rb") as file:
        reader = _Reader(path, file, size)
        version, tensor_count, pair_count = reader.header()
        if version not in (2, 3):
            raise WeightsError(
                f"{shown(path)} is GGUF of version {version}; fluxjax reads 2 and 3. Convert it with llama.cpp's tools."
            )
        if (
            tensor_count * _TENSOR_BYTES + pair_count * _PAIR_BYTES > size
            or tensor_count > MOST_TENSORS
        ):
            raise reader.damaged()
        reader.count(pair_count)
        pairs = [(reader.text(), reader.value(reader.number("I"))) for _ in range(pair_count)]
        entries = [reader.entry() for _ in range(tensor_count)]
        metadata = dict(pairs)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise reader.damaged()
        start = -(-file.tell() // alignment) * alignment
    tensors = {
        name: _tensor(path, name, kind, shape, start + offset, size)
        for name, kind, shape, offset in entries
    }
    if len(tensors) < len(entries):
        raise WeightsError(
            f"{shown(path)}: the header names a tensor twice. Download the file anew."
        )
    check_overlaps(path, tensors)
    return TensorFile(
        path, tensors, {name: value for name, value in pairs if isinstance(value, str)}
    )


def _tensor(
    path: Path, name: str, code: int, shape: tuple[int, ...], offset: int, size: int
) -> Tensor:
    gguf = _gguf()
    kinds = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    kind = kinds.get(code)
    if kind is None:
        raise WeightsError(
            f"{shown(path)}: {quoted(name)} has a type, {code}, that the installed gguf does not know. Update gguf."
        )
    tensor: Tensor
    if kind.name in _PLAIN:
        tensor = StoredTensor(path, np.dtype(_PLAIN[kind.name]), shape, offset)
    else:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or not shape[-1] or shape[-1] % block:
            raise WeightsError(
                f"{shown(path)}: {quoted(name)} of shape {list(shape)} does not divide into {kind.name}'s blocks of {block}."
            )
        if kind not in gguf.quants._type_traits:
            raise WeightsError(
                f"{shown(path)}: {quoted(name)} is {kind.name}, which gguf can't decode. Use another quantization's file."
            )
        tensor = GgufTensor(
            path, BFLOAT16, shape, kind.name, offset, shape[-1] // block * block_bytes
        )
    check_end(path, name, offset + tensor.nbytes, size)
    return tensor


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise WeightsError(
            "GGUF files need the gguf package: pip install 'fluxjax[gguf]'."
        ) from error
    return gguf


class _Reader:
    """The numbers and texts of a GGUF header, never beyond the file's end."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        self.items = 0

    def count(self, items: int) -> None:
        """Count metadata entries and texts. **Raises:** `WeightsError` when there are more than any model has."""
        self.items += items
        if self.items > _MOST_ITEMS:
            raise self.damaged()

    def damaged(self) -> WeightsError:
        return WeightsError(
            f"{shown(self.path)} is truncated or damaged within its header. Download it anew."
        )

    def take(self, count: int) -> bytes:
        if count > min(_MOST_TEXT, self.size - self.file.tell()):
            raise self.damaged()
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged() from error

    def header(self) -> tuple[int, int, int]:
        if self.take(4) != GGUF_MAGIC:
            raise WeightsError(f"{shown(self.path)} is not a GGUF file.")
        return self.number("I"), self.number("Q"), self.number("Q")

    def value(self, kind: int) -> Any:
        """Return a number or a text; arrays are passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.damaged()
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            if count * _TEXT_BYTES > self.size - self.file.tell():
                raise self.damaged()
            self.count(count)
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise self.damaged()
        return None

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self.damaged()
        self.file.seek(count, 1)

    def entry(self) -> tuple[str, int, tuple[int, ...], int]:
        """Return a tensor's name, type, shape in row-major order, and offset."""
        name, axes = self.text(), self.number("I")
        if axes > 4:
            raise self.damaged()
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return name, self.number("I"), shape, self.number("Q")
