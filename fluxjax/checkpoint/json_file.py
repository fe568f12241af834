"""Reading a JSON file from an untrusted source: bounded in size, strict, in UTF-8."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.printable import printable, printable_path

_MOST_BYTES = 4_000_000


def read_json(path: Path, *, most_bytes: int = _MOST_BYTES) -> Any:
    """Return the content of a JSON file.

    A byte order mark is allowed; NaN, infinity and repeated names in an object are not.

    **Arguments:** `most_bytes`: the largest size of the file.
    **Raises:** `WeightsError` for a file that is too large, or not JSON in UTF-8;
    `FileNotFoundError` for a missing file, or something that is not a file; `OSError` for a file
    that can't be opened.
    """
    where = printable_path(path)
    if not path.is_file():  # opening a pipe would wait for its writer
        raise FileNotFoundError(f"{where} is missing, or not a file. Download it again.")
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise WeightsError(
            f"{where} is larger than the {most_bytes:,} bytes that such a file may have. "
            "Download it again."
        )
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            parse_float=_parse_finite,
            object_pairs_hook=_refuse_repeated_names,
        )
    except RecursionError as error:
        raise WeightsError(
            f"{where} can't be read: its lists are nested too deeply. Download it again."
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"{where} is not JSON in UTF-8 ({printable(str(error))}). Download it again."
        ) from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _refuse_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs. **Raises:** `ValueError` for a name that comes twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"{first_repeated_name(pairs)!r} comes twice")
    return table


def first_repeated_name(pairs: Sequence[tuple[str, object]]) -> str:
    """Return the first name that an object of JSON gives twice.

    **Arguments:** `pairs`: its names and values in order, as `json` passes them to
    `object_pairs_hook`; one name is repeated.
    """
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            return name
        names.add(name)
    raise AssertionError("no name is repeated")
