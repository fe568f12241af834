"""JSON files of settings: read as UTF-8 within bounds, and every value checked before it is used."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.printable import printable

_MOST_BYTES = 4_000_000
_LARGEST = 2.0**63


@dataclass(frozen=True, kw_only=True)
class Field:
    """What a value of a settings file may be.

    `kind`: "integer", "number" (integers are numbers too, booleans are not), "boolean", "text" or "integers" (a list).
    `least`, `most`: bounds of each number; `multiple`: what an integer is a multiple of; `choices`: the texts that are
    allowed, None for any. `optional`: whether null is allowed. `required`: whether the file must have the field.
    """

    kind: Literal["integer", "number", "boolean", "text", "integers"]
    least: float = -_LARGEST
    most: float = _LARGEST
    multiple: int = 1
    choices: Collection[str] | None = None
    optional: bool = False
    required: bool = False

    def allows(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.kind == "integers":
            return isinstance(value, list) and all(self._allows_integer(entry) for entry in value)
        if self.kind == "integer":
            return self._allows_integer(value)
        if self.kind == "number":
            return type(value) in (int, float) and self.least <= value <= self.most  # false for NaN
        if self.kind == "boolean":
            return isinstance(value, bool)
        return isinstance(value, str) and (self.choices is None or value in self.choices)

    def _allows_integer(self, value: Any) -> bool:
        return (
            type(value) is int and self.least <= value <= self.most and value % self.multiple == 0
        )

    def describe(self) -> str:
        """Return the rule as the end of a sentence, such as "an integer from 1 to 100"."""
        if self.choices is not None:
            rule = f"one of {', '.join(self.choices)}"
        elif self.kind in ("boolean", "text"):
            rule = "true or false" if self.kind == "boolean" else "a text"
        else:
            rule = {
                "integer": "an integer",
                "number": "a number",
                "integers": "a list of integers",
            }[self.kind]
            rule += f" from {self.least:g} to {self.most:g}" if self.most < _LARGEST else ""
            rule += f", a multiple of {self.multiple}" if self.multiple > 1 else ""
        return rule + (", or null" if self.optional else "")


def read_json(path: Path, *, most_bytes: int = _MOST_BYTES) -> Any:
    """Return what a JSON file holds. A byte order mark is allowed; NaN, infinity and repeated names are not.

    **Raises:** `WeightsError` for a file that is too large, or not JSON in UTF-8; `OSError` for one that can't be opened.
    """
    place = printable(str(path), 1000)
    if not path.is_file():  # a pipe would wait for its writer
        raise FileNotFoundError(f"{place} is missing, or not a file. Download it anew.")
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise WeightsError(
            f"{place} is larger than the {most_bytes:,} bytes that such a file may have. Download it anew."
        )
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_repetition,
        )
    except RecursionError as error:
        raise WeightsError(
            f"{place} can't be read: its lists are nested too deeply. Download it anew."
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"{place} is not JSON in UTF-8 ({printable(str(error))}). Download it anew."
        ) from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} comes twice")
            seen.add(name)
    return table


def read_settings(
    path: Path, fields: Mapping[str, Field], *, closed: bool = False
) -> dict[str, Any]:
    """Return the fields of a JSON file that fluxjax uses, each checked.

    **Arguments:** `fields`: what is read, by name. `closed`: whether other names are refused; else they are left out.
    **Returns:** the fields that the file has, in its order; numbers of kind "number" as floats, lists as tuples.
    **Raises:** `WeightsError` that names the file, the field, what is allowed and what came.
    """
    return check_settings(printable(str(path), 1000), read_json(path), fields, closed=closed)


def check_settings(
    place: str, settings: Any, fields: Mapping[str, Field], *, closed: bool = False
) -> dict[str, Any]:
    """Check settings that are read already, as `read_settings` does. `place`: where they are from, for the message."""
    if not isinstance(settings, dict):
        raise WeightsError(
            f"{place} should hold an object with names and values, got {describe(settings)}. Download it anew."
        )
    unknown = [name for name in settings if name not in fields]
    if closed and unknown:
        known = ", ".join(fields)
        raise WeightsError(
            f"{place} has an unknown field, {describe(unknown[0])}. Remove it; the known ones are {known}."
        )
    missing = [name for name, field in fields.items() if field.required and name not in settings]
    if missing:
        raise WeightsError(f"{place} lacks the field {missing[0]!r}. Download it anew.")
    return {
        name: _checked(place, name, value, fields[name])
        for name, value in settings.items()
        if name in fields
    }


def _checked(place: str, name: str, value: Any, field: Field) -> Any:
    if not field.allows(value):
        raise WeightsError(
            f"{place}: {name!r} should be {field.describe()}, got {describe(value)}. Correct it, or download the file anew."
        )
    if isinstance(value, list):
        return tuple(value)
    return float(value) if field.kind == "number" and value is not None else value


def describe(value: Any) -> str:
    """Return a value of a JSON file as an error shows it: short, on one line, and safe to print."""
    if isinstance(value, str):
        return printable(repr(value), 60)
    if isinstance(value, list | dict):
        return ("a list" if isinstance(value, list) else "an object") + f" of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    return json.dumps(value)
