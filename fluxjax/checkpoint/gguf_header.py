"""The header of a GGUF file, read within bounds: numbers, strings, metadata and tensor entries.

The `gguf` package has a reader too, but that one does not end on some damaged files.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.tensors import MOST_TENSORS, check_regular_file
from fluxjax.printable import printable_path

GGUF_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_AXES = 4
_MOST_ITEMS = 1_000_000  # metadata entries and strings in arrays; a tokenizer has some 100,000
_MOST_STRING_BYTES = 20_000_000
# The least that each of these takes in a header, to refuse absurd counts before reading.
_LEAST_PAIR_BYTES = 13
_LEAST_TENSOR_BYTES = 24
_LEAST_STRING_BYTES = 8
# GGUF's codes of the types of metadata, and `struct`'s codes of the scalar ones.
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

Scalar = int | float | bool


@dataclass(frozen=True)
class GgufEntry:
    """A tensor as the header describes it.

    `type_code`: GGUF's number of its block format. `shape`: in row-major order. `offset`: in bytes,
    from the start of the data.
    """

    name: str
    type_code: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """The content of a header. `metadata`: arrays are None. `data_start`: a byte of the file."""

    metadata: dict[str, Scalar | str | None]
    entries: list[GgufEntry]
    data_start: int
    file_size: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the content of a GGUF file's header.

    **Raises:** `WeightsError` for another format or version, and a truncated or damaged header.
    **Source:** the GGUF specification, version 3.
    """
    size = check_regular_file(path)
    with open(path, "rb") as file:
        reader = _Reader(path, file, size)
        reader.check_magic()
        version = reader.uint32()
        tensor_count, pair_count = reader.uint64(), reader.uint64()
        if version not in _VERSIONS:
            raise WeightsError(
                f"{printable_path(path)} is GGUF of version {version}; fluxjax reads 2 and 3. "
                "Convert it with llama.cpp's tools."
            )
        least_bytes = tensor_count * _LEAST_TENSOR_BYTES + pair_count * _LEAST_PAIR_BYTES
        if least_bytes > size or tensor_count > MOST_TENSORS:
            raise reader.damaged()
        reader.count_items(pair_count)
        metadata: dict[str, Scalar | str | None] = {}
        for _ in range(pair_count):
            key = reader.string()
            metadata[key] = reader.value(reader.uint32())
        entries = [reader.entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise reader.damaged()
        data_start = -(-file.tell() // alignment) * alignment
    return GgufHeader(metadata, entries, data_start, size)


class _Reader:
    """Reads the values of a GGUF header, and never beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self._path = path
        self._file = file
        self._size = size
        self._items = 0

    def damaged(self) -> WeightsError:
        """Return the error for a header that can't be right."""
        return WeightsError(
            f"{printable_path(self._path)} is truncated or damaged within its header. Download it "
            "again."
        )

    def count_items(self, items: int) -> None:
        """Count metadata entries and strings, and refuse more of them than any model has."""
        self._items += items
        if self._items > _MOST_ITEMS:
            raise self.damaged()

    def check_magic(self) -> None:
        """Read the four bytes that begin each GGUF file."""
        if self._bytes(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise WeightsError(f"{printable_path(self._path)} is not a GGUF file.")

    def scalar(self, code: str) -> Scalar:
        """Return a number or a bool.

        **Arguments:** `code`: its type as `struct` names it.
        """
        little_endian = f"<{code}"
        (value,) = struct.unpack(little_endian, self._bytes(struct.calcsize(little_endian)))
        return value

    def uint32(self) -> int:
        """Return an unsigned integer of 32 bits."""
        return int.from_bytes(self._bytes(4), "little")

    def uint64(self) -> int:
        """Return an unsigned integer of 64 bits."""
        return int.from_bytes(self._bytes(8), "little")

    def string(self) -> str:
        """Return a string of UTF-8."""
        try:
            return self._bytes(self.uint64()).decode()
        except UnicodeDecodeError as error:
            raise self.damaged() from error

    def value(self, type_code: int) -> Scalar | str | None:
        """Return a scalar or a string of the metadata; arrays are skipped and None."""
        if type_code in _SCALARS:
            return self.scalar(_SCALARS[type_code])
        if type_code == _STRING:
            return self.string()
        if type_code != _ARRAY:
            raise self.damaged()
        item_code, count = self.uint32(), self.uint64()
        if item_code in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[item_code]}"))
        elif item_code == _STRING:
            self._skip_strings(count)
        else:
            raise self.damaged()
        return None

    def entry(self) -> GgufEntry:
        """Return the description of a tensor."""
        name, axes = self.string(), self.uint32()
        if axes > _MOST_AXES:
            raise self.damaged()
        # GGUF lists the fastest-varying axis first.
        sizes = [self.uint64() for _ in range(axes)]
        shape = tuple(reversed(sizes))
        return GgufEntry(name, self.uint32(), shape, self.uint64())

    def _bytes(self, count: int) -> bytes:
        """Read exactly so many bytes. **Raises:** `WeightsError` if the file has fewer."""
        left = self._size - self._file.tell()
        if count > min(_MOST_STRING_BYTES, left):
            raise self.damaged()
        content = self._file.read(count)
        if len(content) < count:  # the file became shorter meanwhile
            raise self.damaged()
        return content

    def _skip(self, count: int) -> None:
        if count > self._left():
            raise self.damaged()
        self._file.seek(count, 1)

    def _skip_strings(self, count: int) -> None:
        if count * _LEAST_STRING_BYTES > self._left():
            raise self.damaged()
        self.count_items(count)
        for _ in range(count):
            self._skip(self.uint64())

    def _left(self) -> int:
        return self._size - self._file.tell()
