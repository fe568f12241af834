"""Files of pictures: one JSON object per line, each of which describes one picture to draw from."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fluxjax.cli.compound_options import OperatorText
from fluxjax.cli.options import LineField
from fluxjax.cli.prompts import check_id, check_text, parse_json, read_content
from fluxjax.printable import printable

_SHOWN = 60
"""Characters of a text from the file that a message repeats."""


class PictureLine(NamedTuple):
    """A line of a file of pictures.

    `number`: of the line in the file, from 1. `id`: the name of the written image, without its
    ending. `options`: those of the command, with the line's own in their place.
    """

    number: int
    id: str
    options: argparse.Namespace


def read_picture_lines(options: argparse.Namespace) -> tuple[list[PictureLine], list[str]]:
    """Read the file `options.pictures`.

    A line is an object with `picture` and, optionally, `prompt`, `id`, `seed` and the fields of the
    command, `options.line_fields`. `id` and `seed` are by default the number of the line, counted
    from 0.

    **Returns:** the valid lines, and a message about each of the others.
    **Raises:** `OSError` if the file can't be read, `ValueError` if it is in UTF-16 or UTF-32.
    """
    lines: list[PictureLine] = []
    problems: list[str] = []
    # Some file systems do not distinguish capital letters, so two ids must differ without them.
    numbers_by_id: dict[str, int] = {}
    content = read_content(options.pictures, "--pictures")
    for number, data in enumerate(content.split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            line = _read_line(data, number, options)
            earlier = numbers_by_id.get(line.id.lower())
            if earlier is not None:
                raise ValueError(f"its id {line.id!r} is also that of line {earlier}")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
        else:
            numbers_by_id[line.id.lower()] = number
            lines.append(line)
    return lines, problems


def _read_line(data: bytes, number: int, options: argparse.Namespace) -> PictureLine:
    """Read a line of a file: an object with a picture, and options in place of the command's.

    **Arguments:** `number`: of the line, from 1. Its seed and its name count from 0.
    **Raises:** `ValueError` that says what is wrong with the line.
    """
    parsed = parse_json(data)
    if not isinstance(parsed, dict) or "picture" not in parsed:
        raise ValueError('it is not an object with a picture; write {"picture": "cat.png"}')
    fields: Mapping[str, LineField] = options.line_fields
    name = str(number - 1)
    values: dict[str, object] = {"seed": number - 1, "pictures": None}
    for key, value in parsed.items():
        if key == "id":
            name = check_text(key, value)
        elif key in fields:
            values[fields[key].option] = _read_field(key, value, fields[key], options)
        else:
            shown = printable(key, _SHOWN)
            known = ", ".join(["id", *fields])
            raise ValueError(f"it has an unknown field '{shown}'; there are {known}")
    check_id(name)
    return PictureLine(number, name, argparse.Namespace(**{**vars(options), **values}))


def _read_field(key: str, value: object, field: LineField, options: argparse.Namespace) -> object:
    """Return the value of an option. **Raises:** `ValueError` if it would be refused there."""
    # In Python True is also an int.
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
    else:
        text = check_text(key, value)
    folder = Path(options.pictures).parent
    if field.is_path:
        text = str(folder / text)
    try:
        read = field.read(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"its {key} is not valid: {error}") from None
    if isinstance(read, OperatorText) and read.kind == "mask":
        return read._replace(value=str(folder / read.value))
    return read
