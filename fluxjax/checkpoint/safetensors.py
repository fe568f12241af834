"""Safetensors files: headers checked, tensors read into their place, files written whole or not at all."""

import errno
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.printable import printable
from fluxjax.checkpoint.settings import read_json

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,  # the scales of mxfp8
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_MOST_HEADER = 50_000_000  # bytes; FLUX.1's files have 200,000 at most
MOST_TENSORS = 20_000
"""Tensors that a file may hold: six times what any of FLUX.1's has, few enough that a damaged header is told in a moment."""
_MOST_INDEX = 20_000_000  # bytes
_MOST_AXES = 32  # NumPy's own limit is 64
_DATA_ALIGNMENT = 64  # so that XLA:CPU can use a mapped tensor where it lies


@dataclass(frozen=True)
class Tensor(ABC):
    """A tensor of a file. `dtype`: of its values, and what they are loaded as unless told otherwise."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes in the file."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """How it is stored: a dtype, or the name of a quantization."""

    @abstractmethod
    def view(self) -> np.ndarray:
        """Return its values, float32 where they are decoded; what is stored as it is, is mapped and read when used."""


@dataclass(frozen=True)
class StoredTensor(Tensor):
    """A tensor stored as itself, from byte `offset` of its file."""

    offset: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def storage(self) -> str:
        return str(self.dtype)

    def view(self) -> np.ndarray:
        if not self.size:
            return np.empty(self.shape, self.dtype)
        # Copy on write: whoever is given the memory may reuse it, the file stays as it is.
        return np.memmap(self.file, self.dtype, "c", self.offset, self.shape)

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Return some of its rows, unread."""
        width = prod(self.shape[1:]) * self.dtype.itemsize
        return replace(
            self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * width
        )

    def split(self) -> list["StoredTensor"]:
        """Return it without its first axis, an element each, unread."""
        return [
            replace(row, shape=row.shape[1:])
            for row in (self.rows(i, i + 1) for i in range(self.shape[0]))
        ]

    def read_into(self, out: np.ndarray) -> None:
        """Read it into a contiguous array of its shape and dtype."""
        view = out.reshape(-1).view(np.uint8).data
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise WeightsError(
                        f"{self.file} ends inside a tensor: it shrank while it was read. Download it anew."
                    )
                done += count


@dataclass(frozen=True)
class TensorFile:
    """What a file's header says: its tensors by name, and its metadata."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def shown(path: Path) -> str:
    """Return a path for a message: names in a folder come from whoever made it."""
    return printable(str(path), 1000)


def check_regular(path: Path) -> int:
    """Return a file's size. **Raises:** `WeightsError` for a folder, a pipe, a socket or a device, of which opening or reading
    may never end; `FileNotFoundError` for no such file."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise WeightsError(
            f"{shown(path)} is not a regular file, so it is not opened. Remove it, or pass another file or folder."
        )
    return found.st_size


def read_header(path: Path) -> TensorFile:
    """Return what a safetensors file holds, having checked that all of it is there.

    **Raises:** `WeightsError` for a pickle, another kind of file, a truncated or a damaged one.
    """
    size, where = check_regular(path), shown(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length, brace = int.from_bytes(start, "little"), file.read(1)
        # A header's length may begin with the same bytes, but then its brace follows.
        if brace != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise WeightsError(_pickle_message(path))
        if len(start) < 8 or not 2 <= length <= _MOST_HEADER:
            raise WeightsError(
                f"{where} is not a safetensors file. Pass a .safetensors or .gguf file, or a model's folder."
            )
        if length > size - 8:
            raise WeightsError(
                f"{where} is truncated within its header ({size:,} bytes). Download it anew."
            )
        header = _parse(path, brace + file.read(length - 1))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise WeightsError(f"{where}: the header's metadata is damaged. Download the file anew.")
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    check_overlaps(path, tensors)
    return TensorFile(path, tensors, metadata)


def _pickle_message(path: Path) -> str:
    code = (
        "import sys, torch, safetensors.torch as s; "
        "s.save_file({k: v.clone(memory_format=torch.contiguous_format) "
        "for k, v in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"
    )
    return (
        f"{shown(path)} is a pickle (a torch checkpoint), which can run any code when it is read, so fluxjax does not. Use the "
        f"model's .safetensors file, or convert it where torch is installed: python -c '{code}' {shown(Path(path.name))} "
        "model.safetensors"
    )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    too_many = WeightsError(
        f"{shown(path)}: the header names more than {MOST_TENSORS:,} tensors, so it is not FLUX.1's."
    )
    if text.count(b'"data_offsets"') > MOST_TENSORS:  # before time is spent on them
        raise too_many

    try:
        header = json.loads(text, object_pairs_hook=partial(_unique, path))
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise WeightsError(
            f"{shown(path)} is not a safetensors file: its header is not JSON ({reason})."
        ) from error
    if not isinstance(header, dict):
        raise WeightsError(
            f"{shown(path)} is not a safetensors file: its header is not a table of tensors."
        )
    if len(header) > MOST_TENSORS + 1:  # a name with escaped letters is not counted above
        raise too_many
    return header


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise WeightsError(
            f"{shown(path)}: the header names {quoted(_first_repeated(pairs))} twice. Download the file anew."
        )
    return table


def _first_repeated(pairs: Iterable[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    return ""


def quoted(name: str) -> str:
    """Return a name from a file in quotes, with what does not print escaped, and cut if it is long."""
    return repr(name if len(name) <= 200 else name[:199] + "…")


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = (
            all(type(n) is int and 0 <= n < 2**63 for n in (*shape, first, last))
            and len(shape) <= _MOST_AXES
        )
        known = code in DTYPES
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged_entry(path, name) from error
    if not known:
        raise WeightsError(
            f"{shown(path)}: {quoted(name)} has dtype {printable(str(code), 30)}, which fluxjax does not read. "
            f"Known: {', '.join(DTYPES)}."
        )
    if not whole:
        raise _damaged_entry(path, name)
    tensor = StoredTensor(path, np.dtype(DTYPES[code]), shape, start + first)
    if tensor.nbytes != last - first:
        shape_told = printable(str(list(shape)))
        raise WeightsError(
            f"{shown(path)}: {quoted(name)} of shape {shape_told} does not fit its offsets. Download the file anew."
        )
    check_end(path, name, start + last, size)
    return tensor


def _damaged_entry(path: Path, name: str) -> WeightsError:
    return WeightsError(
        f"{shown(path)}: the header's entry for {quoted(name)} is damaged. Download the file anew."
    )


def check_end(path: Path, name: str, end: int, size: int) -> None:
    """**Raises:** `WeightsError` if a tensor ends beyond its file."""
    if end > size:
        raise WeightsError(
            f"{shown(path)} is truncated: {quoted(name)} ends at byte {end:,} of {size:,}. Download it anew."
        )


def check_overlaps(path: Path, tensors: Mapping[str, Any]) -> None:
    """**Raises:** `WeightsError` if two tensors share bytes."""
    spans = sorted((tensor.offset, tensor.nbytes, name) for name, tensor in tensors.items())
    end, before = 0, ""
    for offset, size, name in spans:
        if size and offset < end:
            pair = f"{quoted(before)} and {quoted(name)}"
            raise WeightsError(f"{shown(path)}: {pair} overlap. Download the file anew.")
        if size:
            end, before = offset + size, name


def read_index(index: Path) -> list[Path]:
    """Return the files that an index of shards names.

    **Raises:** `WeightsError` if it is damaged, names no file, a file is missing, or one lies outside the index's folder.
    """
    content, where = read_json(index, most_bytes=_MOST_INDEX), shown(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(name, str) for name in table.values())
    ):
        raise WeightsError(
            f"{where} is no index of shards: it has no weight_map of names. Download it anew."
        )
    names = sorted(set(table.values()))
    outside = [name for name in names if Path(name).name != name or name == ".."]
    if outside:
        raise WeightsError(
            f"{where} names a path outside its folder, {quoted(outside[0])}. Download the folder anew."
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{where} names {shown(index.parent / missing[0])}, which is missing. Download the folder anew."
        )
    return [index.parent / name for name in names]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written. `chunks`: its values in order, in pieces along the first axis or whole."""

    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, array: np.ndarray) -> "OutputTensor":
        return cls(array.dtype, array.shape, lambda: [array])


def write(
    path: Path,
    tensors: Mapping[str, OutputTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    report: Callable[[int], Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file under a temporary name and then give it its own, so that it appears whole or not at all.

    **Arguments:** `report`: called with the number of bytes of each piece. `overwrite`: whether the file takes the place of
    an existing one.
    **Raises:** `WeightsError` if the disk is full; `FileExistsError` if there is something at `path`, also if it has appeared
    while the file was written.
    """
    header, order = _header(tensors, metadata)
    total = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    with disk_errors(path, total), new_file(path, overwrite=overwrite) as file:
        _reserve(file.fileno(), total)
        file.write(header)
        for name in order:
            wanted, written = tensors[name].nbytes, 0
            for chunk in tensors[name].chunks():
                data = np.ascontiguousarray(chunk, tensors[name].dtype).reshape(-1).view(np.uint8)
                file.write(data.data)
                written += data.size
                if report is not None:
                    report(data.size)
            if written != wanted:
                raise ValueError(f"{name} came with {written} bytes, not {wanted}.")


def _header(
    tensors: Mapping[str, OutputTensor], metadata: Mapping[str, str] | None
) -> tuple[bytes, Sequence[str]]:
    """Return the header, and the tensors' order in the file: those that keep the next one aligned come first."""
    order = sorted(tensors, key=lambda name: tensors[name].nbytes % _DATA_ALIGNMENT != 0)
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        span = (offset, offset := offset + tensor.nbytes)
        table[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, order


def _reserve(descriptor: int, total: int) -> None:
    """Take the room on disk at once, where the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, total)
    except AttributeError:  # not on this platform
        return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


@contextmanager
def disk_errors(path: Path, total: int) -> Iterator[None]:
    """Turn a full disk into a `WeightsError` that says what is needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise WeightsError(
            f"No room for {path} ({total / 1e9:,.2f} GB): {error.strerror}. Nothing was left behind. "
            "Free some, or write elsewhere."
        ) from error
