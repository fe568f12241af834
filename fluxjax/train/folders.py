"""Examples in folders of images and in JSON lines."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxjax.printable import printable, printable_path
from fluxjax.train.examples import (
    NO_CAPTION,
    AbstractBytes,
    BrokenExample,
    Example,
    FileBytes,
    Found,
    example_from,
)


def folder_examples(folder: Path, images: list[Path]) -> Found:
    """Return the images of a folder, each with the caption in the text file of the same stem.

    **Arguments:** `images`: paths below the folder, in order.
    """
    return [_captioned(path, path.relative_to(folder).as_posix()) for path in images]


def _captioned(path: Path, name: str) -> Example | BrokenExample:
    """Return the example of an image and of the text file beside it, or why it can't be used."""
    text = path.with_suffix(".txt")
    try:
        caption = text.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return BrokenExample(name, NO_CAPTION)
    except (OSError, UnicodeDecodeError) as error:
        return BrokenExample(name, f"its caption {text.name} can't be read: {error}")
    return Example(name, FileBytes(path, name), caption)


def json_examples(path: Path, fields: Mapping[str, str]) -> Found:
    """Return the examples of a file of JSON lines; paths in it begin at its folder.

    **Arguments:** `fields`: as for `field_of`.
    **Raises:** `OSError` if the file can't be read, `ValueError` if it is not text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable_path(path)} is not text in UTF-8: {error}. Write it as UTF-8."
        ) from None

    def open_image(value: Any) -> AbstractBytes:
        if not isinstance(value, str):
            raise ValueError(f"an image is {printable(repr(value))}, not a path")
        return FileBytes(path.parent / value, value)

    found: Found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_example_of_line(f"{path.name}:{number}", line, fields, open_image))
    return found


def _example_of_line(
    name: str, line: str, fields: Mapping[str, str], open_image: Any
) -> Example | BrokenExample:
    """Return the example of a line of JSON, or why it can't be used."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenExample(name, f"it is not JSON: {error}")
    if not isinstance(record, dict):
        return BrokenExample(name, "it is not an object of JSON, as {...}")
    return example_from(name, record, fields, open_image)
