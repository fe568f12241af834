"""Names of images by a pattern, as of --output: out/{prompt}_{seed}.png."""

import argparse
import re
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fluxjax.cli.options import file_path
from fluxjax.printable import printable
from fluxjax.suggestions import suggestion

FIELDS: Mapping[str, str | int] = {
    "prompt": "a-red-star",
    "seed": 0,
    "index": 0,
    "image": 0,
    "id": "0",
    "model": "tiny",
    "steps": 1,
    "width": 16,
    "height": 16,
}
"""The fields of a pattern, each with a value of its type.

`index`: the number of the image in the run, or of its line in the file, from 0. `image`: its number
among those of its seed. `id`: of its line, else its index.
"""
_TEXTS = ("prompt", "model")
"""Fields whose values may hold any characters, and are made parts of names."""
_MOST_BYTES = 100
"""Bytes of a prompt or of a model's name in a file's name, which has at most 255."""


class OutputPattern(NamedTuple):
    """A path in which fields in braces are filled in for each image."""

    text: str

    def path(self, values: Mapping[str, str | int]) -> Path:
        """Return the path of an image. `values`: of all `FIELDS`."""
        texts = {name: name_part(str(values[name])) for name in _TEXTS}
        return Path(self.text.format(**{**values, **texts}))


def output_pattern(text: str) -> OutputPattern:
    """Read a pattern of --output.

    **Raises:** `argparse.ArgumentTypeError` for an unknown field, or a name that is not of a PNG.
    """
    file_path(text)
    shown = printable(text, 60)
    try:
        for _, name, _, conversion in string.Formatter().parse(text):
            if name is not None and (name not in FIELDS or conversion is not None):
                raise argparse.ArgumentTypeError(
                    f"there is no field {{{printable(name, 60)}}}; choose from "
                    f"{', '.join(FIELDS)}.{suggestion(name, FIELDS)}"
                )
        example = OutputPattern(text).path(FIELDS)
    except (ValueError, IndexError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{shown!r} is not a pattern: {error}") from None
    if example.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"needs a name that ends in .png, got {shown!r}")
    return OutputPattern(text)


def name_part(text: str) -> str:
    """Return a text as a part of a file's name: its letters and digits, in lower case, with hyphens
    between them."""
    name = re.sub(r"[^\w.]+|_+", "-", text.lower()).strip("-.")
    return name.encode()[:_MOST_BYTES].decode(errors="ignore").strip("-.") or "empty"


def repeated_path(paths: Iterable[Path]) -> Path | None:
    """Return a path that two images would have; None if all differ.

    Capital letters make no difference: some file systems do not distinguish them.
    """
    seen: set[str] = set()
    for path in paths:
        name = str(path).lower()
        if name in seen:
            return path
        seen.add(name)
    return None
