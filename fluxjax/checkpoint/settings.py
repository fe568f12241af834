"""Settings read from JSON: every value is checked against a rule before it is used."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.json_file import read_json
from fluxjax.printable import printable, printable_path

_LARGEST = 2.0**63
_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "integers": "a list of integers",
    "boolean": "true or false",
    "text": "a string",
}

Value = int | float | bool | str | tuple[int, ...] | None
"""A setting that has been checked."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """The rule for one setting.

    `kind`: "integer", "number" (integers are numbers too, booleans are not), "boolean", "text" or
    "integers" (a list). `least`, `most`: bounds of each number, inclusive. `multiple`: integers
    must be a multiple of it. `choices`: the texts that are allowed, None for any. `optional`:
    whether null is allowed. `required`: whether the file must have the field.
    """

    kind: Literal["integer", "number", "boolean", "text", "integers"]
    least: float = -_LARGEST
    most: float = _LARGEST
    multiple: int = 1
    choices: Collection[str] | None = None
    optional: bool = False
    required: bool = False

    def allows(self, value: object) -> bool:
        """Return whether a value of JSON keeps the rule."""
        if value is None:
            return self.optional
        if self.kind == "integers":
            if not isinstance(value, list):
                return False
            return all(self._allows_integer(item) for item in value)
        if self.kind == "integer":
            return self._allows_integer(value)
        if self.kind == "number":
            return self._allows_number(value)
        if self.kind == "boolean":
            return isinstance(value, bool)
        if not isinstance(value, str):
            return False
        return self.choices is None or value in self.choices

    def _allows_number(self, value: object) -> bool:
        # Booleans are instances of `int`, so `isinstance` would let them pass.
        if type(value) is not int and type(value) is not float:
            return False
        return self.least <= value <= self.most  # false for NaN

    def _allows_integer(self, value: object) -> bool:
        if type(value) is not int or value % self.multiple != 0:
            return False
        return self.least <= value <= self.most

    def describe(self) -> str:
        """Return the rule as the end of a sentence, such as "an integer from 1 to 100"."""
        if self.choices is not None:
            rule = f"one of {', '.join(self.choices)}"
        else:
            rule = _NAMES[self.kind]
            is_numeric = self.kind in ("integer", "number", "integers")
            if is_numeric and self.most < _LARGEST:
                rule += f" from {self.least:g} to {self.most:g}"
            if is_numeric and self.multiple > 1:
                rule += f", a multiple of {self.multiple}"
        if self.optional:
            rule += ", or null"
        return rule


def read_settings_file(
    path: Path, fields: Mapping[str, Field], *, closed: bool = False
) -> dict[str, Any]:
    """Return the settings of a JSON file that fluxjax uses, each checked.

    **Arguments:** `fields`: the rules of the settings to read, by name. `closed`: whether other
    names are an error; if not, they are ignored.
    **Returns:** the settings that the file has, in its order; numbers of kind "number" are floats,
    lists are tuples.
    **Raises:** `WeightsError` that names the file, the field, the rule and the value.
    """
    return check_settings(printable_path(path), read_json(path), fields, closed=closed)


def check_settings(
    place: str, settings: object, fields: Mapping[str, Field], *, closed: bool = False
) -> dict[str, Any]:
    """Check the content of a settings file; otherwise as `read_settings_file`.

    **Arguments:** `place`: where the settings come from, for error messages.
    """
    if not isinstance(settings, dict):
        raise WeightsError(
            f"{place} should hold an object with names and values, got {describe(settings)}. "
            "Download it again."
        )
    if closed:
        _check_names_are_known(place, settings, fields)
    for name, field in fields.items():
        if field.required and name not in settings:
            raise WeightsError(f"{place} lacks the field {name!r}. Download it again.")
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        if name in fields:
            checked[name] = _check_value(place, name, value, fields[name])
    return checked


def _check_names_are_known(
    place: str, settings: Mapping[str, object], fields: Mapping[str, Field]
) -> None:
    """**Raises:** `WeightsError` for a setting that is no field, which would have no effect."""
    for name in settings:
        if name not in fields:
            known = ", ".join(fields)
            raise WeightsError(
                f"{place} has an unknown field, {describe(name)}. Remove it; known fields: {known}."
            )


def _check_value(place: str, name: str, value: Any, field: Field) -> Value:
    """Return a value as the config takes it: lists as tuples, numbers as floats.

    **Raises:** `WeightsError` for a value that the field does not allow.
    """
    if not field.allows(value):
        raise WeightsError(
            f"{place}: {name!r} should be {field.describe()}, got {describe(value)}. Correct it, "
            "or download the file again."
        )
    if isinstance(value, list):
        return tuple(value)
    if field.kind == "number" and value is not None:
        return float(value)
    return value


def describe(value: object) -> str:
    """Return a value of a JSON file as an error message shows it: short, on one line, printable."""
    if isinstance(value, str):
        return printable(repr(value), 60)
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    # Converting a longer integer to digits would take time, and CPython refuses it.
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    return json.dumps(value)
