"""Files of prompts: a JSON object a line, shared among processes, each line's image in a file of its own."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fluxjax.checkpoint.printable import printable
from fluxjax.generate.latents import SEEDS

_FIELDS: dict[str, type] = {
    "prompt": str,
    "prompt_2": str,
    "negative_prompt": str,
    "id": str,
    "seed": int,
}
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LONGEST_ID = 251
"""Characters of an id: file systems have names of up to 255 bytes, four of which are the ending."""
_LONGEST_LINE = 10_000_000
"""Bytes of a line."""


class Line(NamedTuple):
    """A line of a file: what to draw, by which seed, the name of its image without the ending, and its number from 1."""

    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    id: str
    seed: int
    number: int = 0

    def image(self, folder: Path) -> Path:
        """Return where its image belongs."""
        return folder / f"{self.id}.png"

    def texts(self) -> dict[str, str]:
        """Return what is encoded, by the name of the field."""
        given = {
            "prompt": self.prompt,
            "prompt_2": self.prompt_2,
            "negative_prompt": self.negative_prompt,
        }
        return {name: text for name, text in given.items() if text is not None}


def read_prompts(path: Path | str, *, guided: bool = True) -> tuple[list[Line], list[str]]:
    """Read a file of prompts, in UTF-8, with or without a byte-order mark.

    A line is a JSON object with `prompt`, and, if wanted, `prompt_2`, `negative_prompt`, `id` (by default the line's number
    from 0) and `seed` (the same). Empty lines are passed over. `guided`: whether a negative prompt does anything; else it is
    refused.
    **Returns:** the lines, and what is wrong with the others, each with its number from 1.
    **Raises:** `OSError` if the file can't be read, `ValueError` for one in UTF-16 or UTF-32.
    """
    lines, problems = [], []
    taken: dict[str, int] = {}
    for number, data in enumerate(_content(Path(path)).split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            line = _line(data, number)
            if line.negative_prompt is not None and not guided:
                raise ValueError("its negative_prompt does nothing at --cfg 1 without --nag")
            if line.id.lower() in taken:
                raise ValueError(f"its id {line.id!r} is that of line {taken[line.id.lower()]}")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
        else:
            taken[line.id.lower()] = number
            lines.append(line)
    return lines, problems


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError(f"--prompts needs a file, and {path} is none. Write the lines to a file.")
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise ValueError(f"{path} is in UTF-16 or UTF-32. Save it as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _line(data: bytes, number: int) -> Line:
    given = _parsed(data)
    if not isinstance(given, dict) or "prompt" not in given:
        raise ValueError('it is no object with a prompt; write {"prompt": "a red star"}')
    for name, value in given.items():
        _check_field(name, value)
    name = given.get("id", str(number - 1))
    if not _ID.fullmatch(name):
        raise ValueError(
            f"its id '{printable(name, 60)}' is no file name of letters, digits, '_', '-' and '.', which it may not begin with"
        )
    if len(name) > _LONGEST_ID:
        raise ValueError(f"its id has {len(name)} characters; file names take {_LONGEST_ID}")
    seed = given.get("seed", number - 1)
    if not 0 <= seed < SEEDS:
        raise ValueError(
            f"its seed is not in [0, 2^63), got {seed if abs(seed) < 10**30 else 'a number of many digits'}"
        )
    return Line(
        given["prompt"], given.get("prompt_2"), given.get("negative_prompt"), name, seed, number
    )


def _parsed(data: bytes) -> Any:
    """Return the JSON of a line. **Raises:** `ValueError` that says what is wrong with it."""
    if len(data) > _LONGEST_LINE:
        raise ValueError(f"it has {len(data)} bytes; a line has at most {_LONGEST_LINE}")
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_object, parse_constant=_no_number, parse_int=_whole
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not valid UTF-8 (at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the field '{printable(name, 60)}' twice")
        found[name] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it has {text}, which is no number of JSON's")


def _whole(digits: str) -> int:
    if len(digits) > 1000:  # Python refuses more than 4300
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _check_field(name: str, value: Any) -> None:
    if name not in _FIELDS:
        raise ValueError(
            f"it has an unknown field '{printable(name, 60)}'; there are {', '.join(_FIELDS)}"
        )
    if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
        raise ValueError(f"its {name} is no {'whole number' if _FIELDS[name] is int else 'text'}")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"its {name} holds half a surrogate pair ({printable(str(value), 60)}), which is no text"
        ) from None


def share(lines: Sequence[Line], process: int = 0, processes: int = 1) -> list[Line]:
    """Return the lines of a process, one in `processes`."""
    return list(lines[process::processes])


def difference(found: dict[str, str], wanted: dict[str, str]) -> str | None:
    """Return in what an image's metadata differs from what a line would draw, or None if it is the same image.

    The version that wrote it is not compared.
    """
    if "prompt" not in found:
        return "there is another file of its name"
    names = [
        name
        for name in {**wanted, **found}
        if name != "version" and found.get(name) != wanted.get(name)
    ]
    if not names:
        return None
    shown = ", ".join(
        f"{name} {_shown(found, name)} in place of {_shown(wanted, name)}" for name in names[:3]
    )
    return f"its image is there with {shown}"


def _shown(metadata: dict[str, str], name: str) -> str:
    return f"'{printable(metadata[name], 60)}'" if name in metadata else "none"
