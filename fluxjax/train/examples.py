"""Training examples as their sources describe them: captions, and images that are not read yet."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from fluxjax.generate.image import stored_size
from fluxjax.printable import printable

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
)
"""How the names of images end."""
NO_CAPTION = "it has no caption"
"""The reason why an image without a caption is left out."""
_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "file_name"),
    "prompt": ("prompt", "caption", "text"),
    "control": ("control",),
    "source": ("source",),
    "mask": ("mask",),
    "weight": ("weight",),
}
"""What the fields of a record may be called, by what they are."""
_PREFIX_BYTES = 2**16
"""Bytes in which most images have their header."""


class AbstractBytes(ABC):
    """The content of an image file, wherever it lies; it is read when it is used."""

    name: str

    @abstractmethod
    def read(self) -> bytes:
        """Return the content. **Raises:** `OSError`, or `ValueError` if it is damaged."""

    def start(self, count: int) -> bytes:
        """Return at most the first `count` bytes."""
        return self.read()[:count]

    def image_size(self) -> tuple[int, int]:
        """Return the height and width of the image, in most cases without reading all of it."""
        with suppress(ValueError):
            return stored_size(io.BytesIO(self.start(_PREFIX_BYTES)), self.name)
        return stored_size(io.BytesIO(self.read()), self.name)


@dataclass(frozen=True)
class FileBytes(AbstractBytes):
    """A file, or `length` bytes of one from byte `offset` on."""

    path: Path
    name: str
    offset: int = 0
    length: int | None = None

    def read(self) -> bytes:
        """Return the content."""
        return self._read(self.length)

    def start(self, count: int) -> bytes:
        """Return the first bytes; the others are not read."""
        return self._read(count if self.length is None else min(count, self.length))

    def _read(self, count: int | None) -> bytes:
        """Read bytes from the beginning.

        **Arguments:** `count`: how many; None for all up to the end of the file.
        **Raises:** `ValueError` if there are fewer than when the example was found.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(-1 if count is None else count)
        if self.length is not None and count == self.length and len(data) < count:
            raise ValueError(
                f"{printable(str(self.path))} became shorter than it was. Copy it again."
            )
        return data


class Example(NamedTuple):
    """An image and what it is trained with.

    `name`: for reports, unique within its source. `control`: edges or depth. `source`: the image
    that an instruction edits. `mask`: white where it is repainted, or where the loss counts.
    `weight`: of its loss. `size`: height and width, if the source says them.
    """

    name: str
    image: AbstractBytes
    caption: str
    control: AbstractBytes | None = None
    source: AbstractBytes | None = None
    mask: AbstractBytes | None = None
    weight: float = 1.0
    size: tuple[int, int] | None = None


class BrokenExample(NamedTuple):
    """An example that is left out, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


Record = Mapping[str, Any]
"""A row of a table of examples: values of JSON, or of Parquet."""
Found = list[Example | BrokenExample]
"""The examples of a source, in its order."""


def check_fields(fields: Mapping[str, str]) -> None:
    """Check that names of fields are given for what examples have.

    **Raises:** `ValueError` for another.
    """
    for role in fields:
        if role not in _NAMES:
            raise ValueError(
                f"`fields` takes names for {', '.join(_NAMES)}, got one for {printable(role)!r}. "
                "Leave it out."
            )


def field_of(record: Record, role: str, fields: Mapping[str, str]) -> Any:
    """Return what a record has for a role, or None.

    **Arguments:** `role`: "image", "prompt", "control", "source", "mask" or "weight". `fields`:
    what the fields are called, by their roles, where it is none of the usual names.
    **Raises:** `ValueError` if the record has several of the usual names.
    """
    if role in fields:
        return record.get(fields[role])
    found = [name for name in _NAMES[role] if record.get(name) is not None]
    if len(found) > 1:
        raise ValueError(
            f"it has {' and '.join(found)}; choose one with fields = {{ {role} = {found[0]!r} }}"
        )
    return record[found[0]] if found else None


def example_from(
    name: str,
    record: Record,
    fields: Mapping[str, str],
    open_image: Callable[[Any], AbstractBytes],
    *,
    image: AbstractBytes | None = None,
) -> Example | BrokenExample:
    """Return the example that a record describes.

    **Arguments:** `open_image`: turns the value of an image's field into its content; raises
    `ValueError` for a value that names none. `image`: the image, if it is not in the record.
    """
    try:
        if image is None:
            value = field_of(record, "image", fields)
            if value is None:
                return BrokenExample(name, "it names no image")
            image = open_image(value)
        caption = field_of(record, "prompt", fields)
        if caption is None:
            return BrokenExample(name, NO_CAPTION)
        if not isinstance(caption, str):
            return BrokenExample(name, f"its caption is {type(caption).__name__}, not text")
        further: dict[str, AbstractBytes] = {}
        for role in ("control", "source", "mask"):
            value = field_of(record, role, fields)
            if value is not None:
                further[role] = open_image(value)
        weight = _weight(field_of(record, "weight", fields))
    except ValueError as error:
        return BrokenExample(name, str(error))
    return Example(name, image, caption.strip(), **further, weight=weight, size=_size(record))


def _weight(value: object) -> float:
    """Return how much an example counts. **Raises:** `ValueError` for a value that is no weight."""
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"its weight is {printable(repr(value))}, not a number")
    if not isfinite(value) or value < 0:
        raise ValueError(f"its weight is {value}, and not finite and at least 0")
    return float(value)


def _size(record: Record) -> tuple[int, int] | None:
    """Return the height and width that a record gives, so that no image is opened for them."""
    height, width = record.get("height"), record.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return None


def split_broken(found: Sequence[Example | BrokenExample]) -> tuple[list[Example], list]:
    """Return the examples, and those that are left out."""
    examples: list[Example] = []
    broken: list[BrokenExample] = []
    for one in found:
        if isinstance(one, Example):
            examples.append(one)
        else:
            broken.append(one)
    return examples, broken
