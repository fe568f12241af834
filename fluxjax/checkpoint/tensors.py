"""Tensors that lie in files: their records, and the checks that all formats of files share."""

import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.printable import printable_path, quote_name

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BYTES = np.dtype(np.uint8)
MOST_TENSORS = 20_000
"""Tensors that a file may hold: six times what the largest file of FLUX.1 has. A damaged header
with this many is still refused within a moment."""


@dataclass(frozen=True)
class Tensor(ABC):
    """A tensor in a file. Its header has been read; its values are read when they are used.

    `dtype`: of its values, in which they are loaded unless another dtype is requested.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Number of bytes in the file."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """How the values are stored: a dtype, or the name of a quantization."""

    @abstractmethod
    def view(self) -> np.ndarray:
        """Return the values: memory-mapped if they are stored plainly, else decoded to float32."""

    @property
    def packed_format(self) -> str | None:
        """The format of `PackedWeight` in which a matrix's rows can stay; None if they can't."""
        return None

    def read_packed_rows(self, start: int, out: np.ndarray) -> None:
        """Read rows in the packed format, from row `start` on, into an array of bytes.

        **Raises:** `WeightsError` if the file has become shorter since its header was read.
        """
        raise NotImplementedError(f"{type(self).__name__} has no packed rows.")


@dataclass(frozen=True)
class StoredTensor(Tensor):
    """A tensor stored plainly, from byte `offset` of its file on."""

    offset: int

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return self.size * self.dtype.itemsize

    @property
    def storage(self) -> str:
        """The name of the dtype."""
        return str(self.dtype)

    def view(self) -> np.ndarray:
        """Return the values, memory-mapped."""
        if not self.size:
            return np.empty(self.shape, self.dtype)
        # Copy on write: JAX may reuse memory that it is given, and the file must not change.
        return np.memmap(self.file, self.dtype, "c", self.offset, self.shape)

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Return the part from row `start` to `stop` of the first axis; nothing is read."""
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row_bytes)

    def split(self) -> list["StoredTensor"]:
        """Return one tensor for each row of the first axis, without that axis; nothing is read."""
        tensors = []
        for index in range(self.shape[0]):
            row = self.rows(index, index + 1)
            tensors.append(replace(row, shape=row.shape[1:]))
        return tensors

    def read_into(self, out: np.ndarray) -> None:
        """Read the values into a contiguous array of the same shape and dtype.

        **Raises:** `WeightsError` if the file has become shorter since its header was read.
        """
        out_bytes = out.reshape(-1).view(np.uint8).data
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < self.nbytes:
                count = file.readinto(out_bytes[done:])
                if not count:
                    raise WeightsError(
                        f"{printable_path(self.file)} ends inside a tensor: it became shorter "
                        "while it was read. Download it again."
                    )
                done += count


@dataclass(frozen=True)
class TensorFile:
    """The content of a file's header: the tensors by name, and the metadata."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def check_regular_file(path: Path) -> int:
    """Return a file's size in bytes.

    **Raises:** `WeightsError` for a folder, pipe, socket or device, where opening or reading may
    never end; `FileNotFoundError` if there is no such file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise WeightsError(
            f"{printable_path(path)} is not a regular file, so it is not opened. Remove it, or "
            "pass another file or folder."
        )
    return status.st_size


def check_tensor_end(path: Path, name: str, end: int, size: int) -> None:
    """Check that a tensor lies inside its file.

    **Arguments:** `end`: the byte after the tensor's last one. `size`: of the file, in bytes.
    **Raises:** `WeightsError` if it does not.
    """
    if end > size:
        raise WeightsError(
            f"{printable_path(path)} is truncated: {quote_name(name)} ends at byte {end:,} of "
            f"{size:,}. Download it again."
        )


def check_overlaps(path: Path, spans: Mapping[str, tuple[int, int]]) -> None:
    """Check that no two tensors of a file share bytes.

    **Arguments:** `spans`: offset and number of bytes of each tensor, by name.
    **Raises:** `WeightsError` if two do.
    """
    ordered = sorted((offset, nbytes, name) for name, (offset, nbytes) in spans.items())
    end, previous = 0, ""
    for offset, nbytes, name in ordered:
        if not nbytes:
            continue
        if offset < end:
            names = f"{quote_name(previous)} and {quote_name(name)}"
            raise WeightsError(f"{printable_path(path)}: {names} overlap. Download the file again.")
        end, previous = offset + nbytes, name
