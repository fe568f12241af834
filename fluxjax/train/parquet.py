"""Examples in Parquet files: columns of images and captions."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fluxjax.printable import printable_path
from fluxjax.train.examples import AbstractBytes, Found, Record, example_from

_MOST_GROUPS = 2
"""Row groups of a file whose images are kept in memory."""


class ParquetImages:
    """The images of a Parquet file, of which row groups are read as they are needed.

    The last two row groups stay in memory. Threads may read at once.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = import_parquet().ParquetFile(path)
        self._groups: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, group: int, column: str, row: int) -> bytes:
        """Return the content of an image.

        **Arguments:** `row`: within the row group.
        **Raises:** `ValueError` if the file is damaged or the cell holds no image.
        """
        with self._lock:
            values = self._groups.get((group, column))
            if values is None:
                values = self._read_group(group, column)
                self._groups[group, column] = values
                while len(self._groups) > _MOST_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((group, column))
        value = values[row].as_py()
        if isinstance(value, Mapping):  # as Hugging Face's datasets store images
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ValueError(f"its {column} holds no bytes of an image")
        return value

    def _read_group(self, group: int, column: str) -> Any:
        try:
            return self._file.read_row_group(group, [column]).column(column)
        except (OSError, ValueError) as error:  # pyarrow's own errors are among these
            raise _damaged(self.path, error) from None

    def records(self) -> list[tuple[int, int, Record]]:
        """Return each row's group, its place in it, and its columns that are not images."""
        found = []
        columns = [name for name in self._file.schema_arrow.names if not self._is_image(name)]
        for group in range(self._file.metadata.num_row_groups):
            try:
                rows = self._file.read_row_group(group, columns).to_pylist()
            except (OSError, ValueError) as error:
                raise _damaged(self.path, error) from None
            found += [(group, number, row) for number, row in enumerate(rows)]
        return found

    def image_columns(self) -> list[str]:
        """Return the names of the columns that hold images."""
        return [name for name in self._file.schema_arrow.names if self._is_image(name)]

    def _is_image(self, name: str) -> bool:
        """Return whether a column holds files: bytes, or structures with bytes."""
        types = import_types()
        kind = self._file.schema_arrow.field(name).type
        if types.is_struct(kind):
            return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)


@dataclass(frozen=True)
class CellBytes(AbstractBytes):
    """A cell of a column of images."""

    images: ParquetImages
    name: str
    group: int
    column: str
    row: int

    def read(self) -> bytes:
        """Return the content."""
        return self.images.read(self.group, self.column, self.row)


def parquet_examples(path: Path, fields: Mapping[str, str]) -> Found:
    """Return the examples of a Parquet file.

    Images are columns of bytes, or of records with a field `bytes`, as Hugging Face's datasets
    write them.

    **Arguments:** `fields`: as for `field_of`: names of columns.
    **Raises:** `ValueError` for a damaged file, or one without a column of images.
    """
    try:
        images = ParquetImages(path)
    except ImportError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    columns = images.image_columns()
    if not columns:
        raise ValueError(
            f"{printable_path(path)} has no column of images. Store the content of their files as "
            "bytes."
        )

    def open_image(value: Any) -> AbstractBytes:
        if not isinstance(value, CellBytes):
            raise ValueError("an image's column does not hold the content of image files")
        return value

    found: Found = []
    for number, (group, row, record) in enumerate(images.records()):
        name = f"{path.name}:{number}"
        cells = {column: CellBytes(images, name, group, column, row) for column in columns}
        found.append(example_from(name, {**record, **cells}, fields, open_image))
    return found


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{printable_path(path)} can't be read as Parquet: {error}. Download it again."
    )


def import_parquet() -> ModuleType:
    """**Raises:** `ImportError` that names the extra, without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow. Install it with `pip install 'fluxjax[train]'`."
        ) from error
    return pyarrow.parquet


def import_types() -> ModuleType:
    """Return pyarrow's predicates of types. **Raises:** as `import_parquet`."""
    import_parquet()
    import pyarrow.types

    return pyarrow.types
