"""Files of prompts: one JSON object per line, each of which describes one image."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from fluxjax.cli.options import MAX_FLOAT32, MAX_PIXELS, MAX_STEPS
from fluxjax.generate.latents import SEEDS, check_size
from fluxjax.printable import printable

_TEXT_FIELDS = ("prompt", "prompt_2", "negative_prompt", "id", "init_image", "mask")
_WHOLE_NUMBERS = {"seed": (0, SEEDS - 1), "steps": (1, MAX_STEPS)} | dict.fromkeys(
    ("height", "width"), (1, MAX_PIXELS)
)
"""The fields that are whole numbers, each with the least and the largest one."""
_NUMBERS = {"strength": (0, 1), "guidance": (-MAX_FLOAT32, MAX_FLOAT32)}
_FIELDS = (*_TEXT_FIELDS, *_WHOLE_NUMBERS, *_NUMBERS)
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_MAX_ID = 251
"""Characters of an id: file names have at most 255 bytes, and ".png" takes four."""
_MAX_LINE = 10_000_000
"""Bytes of a line."""
_MAX_DIGITS = 1000
"""Digits of a number. Python refuses more than 4300 of them with an error of its own."""
_SHOWN = 60
"""Characters of a text from the file that a message repeats."""


class Line(NamedTuple):
    """A line of a file of prompts.

    `prompt`: for both text encoders. `prompt_2`: for T5 instead, if there is one.
    `negative_prompt`: what the image is guided away from; None for that of the command line.
    `id`: the file name of the image, without its ending. `seed`: of the noise. `number`: of the
    line in the file, from 1. `init_image`, `mask`: paths of the image that is drawn again, and of
    what is repainted of it, from `folder` on. `strength`: how strongly; `height`, `width` (pixels),
    `steps`, `guidance`: of the image; None for those of the command line.
    """

    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    id: str
    seed: int
    number: int = 0
    init_image: str | None = None
    mask: str | None = None
    strength: float | None = None
    folder: Path = Path()
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None

    def texts(self) -> dict[str, str]:
        """Return the texts that are encoded, by field."""
        texts = {"prompt": self.prompt}
        if self.prompt_2 is not None:
            texts["prompt_2"] = self.prompt_2
        if self.negative_prompt is not None:
            texts["negative_prompt"] = self.negative_prompt
        return texts


class _Fields(NamedTuple):
    """The values of a line's JSON object, whose types have been checked."""

    texts: dict[str, str]
    whole: dict[str, int]
    numbers: dict[str, float]


def read_prompts(path: Path | str, *, guided: bool = True) -> tuple[list[Line], list[str]]:
    """Read a file of prompts in UTF-8, with or without a byte-order mark.

    A line is a JSON object with `prompt` and, optionally, `prompt_2`, `negative_prompt`, `id`,
    `seed`, `height`, `width`, `steps`, `guidance`, `init_image`, `mask` and `strength`. `id` and
    `seed` are by default the number of the line, counted from 0. Paths begin at the folder of the
    file. Empty lines are skipped.

    **Arguments:** `path`: the file. `guided`: whether negative prompts are used. If not, a line
    with one is an error.
    **Returns:** the valid lines, and a message about each of the others.
    **Raises:** `OSError` if the file can't be read, `ValueError` if it is in UTF-16 or UTF-32.
    """
    lines: list[Line] = []
    problems: list[str] = []
    # Some file systems do not distinguish capital letters, so two ids must differ without them.
    numbers_by_id: dict[str, int] = {}
    for number, data in enumerate(read_content(Path(path), "--prompts").split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            line = _read_line(data, number)
            if line.init_image is not None:
                line = line._replace(folder=Path(path).parent)
            if line.negative_prompt is not None and not guided:
                raise ValueError("its negative_prompt does nothing at --cfg 1 without --nag")
            earlier = numbers_by_id.get(line.id.lower())
            if earlier is not None:
                raise ValueError(f"its id {line.id!r} is also that of line {earlier}")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
        else:
            numbers_by_id[line.id.lower()] = number
            lines.append(line)
    return lines, problems


def read_content(path: Path, option: str) -> bytes:
    """Return the bytes of a file of lines, without a byte-order mark.

    **Arguments:** `option`: that names the file, for messages.
    **Raises:** `OSError` if it can't be read, `ValueError` if it is no file, or in UTF-16 or -32.
    """
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{option} needs a file, and {path} is not one. Write the lines to a file."
        )
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise ValueError(f"{path} is in UTF-16 or UTF-32. Save it as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_line(data: bytes, number: int) -> Line:
    """Return a line. **Raises:** `ValueError` that says what is wrong with it."""
    fields = _read_fields(data)
    texts = fields.texts
    name = texts.get("id", str(number - 1))
    check_id(name)
    _check_start(fields)
    whole = fields.whole
    if "height" in whole and "width" in whole:
        check_size("its size", whole["height"], whole["width"])
    return Line(
        texts["prompt"],
        texts.get("prompt_2"),
        texts.get("negative_prompt"),
        name,
        whole.get("seed", number - 1),
        number,
        texts.get("init_image"),
        texts.get("mask"),
        fields.numbers.get("strength"),
        height=whole.get("height"),
        width=whole.get("width"),
        steps=whole.get("steps"),
        guidance=fields.numbers.get("guidance"),
    )


def _check_start(fields: _Fields) -> None:
    """**Raises:** `ValueError` for a field that does nothing with an image to start from, or
    without one."""
    has_image = "init_image" in fields.texts
    names = ("height", "width") if has_image else ("mask", "strength")
    for name in names:
        if name in fields.texts or name in fields.whole or name in fields.numbers:
            raise ValueError(
                f"its {name} does nothing {'with' if has_image else 'without'} an init_image"
            )


def check_id(name: str) -> None:
    """**Raises:** `ValueError` for an id that is no file name on all systems."""
    if not _ID.fullmatch(name):
        raise ValueError(
            f"its id '{printable(name, _SHOWN)}' is not a file name of letters, digits, '_', '-' "
            "and '.' that begins with a letter, digit or '_'"
        )
    if len(name) > _MAX_ID:
        raise ValueError(f"its id has {len(name)} characters; a file name has at most {_MAX_ID}")


def _read_fields(data: bytes) -> _Fields:
    """Return the fields of a line's JSON object, after checking their names and types."""
    parsed = parse_json(data)
    if not isinstance(parsed, dict) or "prompt" not in parsed:
        raise ValueError('it is not an object with a prompt; write {"prompt": "a red star"}')
    fields = _Fields({}, {}, {})
    for name, value in parsed.items():
        if name in _TEXT_FIELDS:
            fields.texts[name] = check_text(name, value)
        elif name in _WHOLE_NUMBERS:
            fields.whole[name] = _check_whole(name, value)
        elif name in _NUMBERS:
            fields.numbers[name] = _check_number(name, value)
        else:
            shown = printable(name, _SHOWN)
            raise ValueError(f"it has an unknown field '{shown}'; there are {', '.join(_FIELDS)}")
    return fields


def check_text(name: str, value: object) -> str:
    """Return a field's text. **Raises:** `ValueError` if it is none."""
    if not isinstance(value, str):
        raise ValueError(f"its {name} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can escape one half of a surrogate pair, which is no character.
        shown = printable(value, _SHOWN)
        raise ValueError(f"its {name} contains half a surrogate pair ({shown})") from None
    return value


def _check_whole(name: str, value: object) -> int:
    """Return the value of a field. **Raises:** `ValueError` for no whole number in its range."""
    # In Python True is also an int.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"its {name} is not a whole number")
    least, most = _WHOLE_NUMBERS[name]
    if not least <= value <= most:
        shown = str(value) if abs(value) < 10**30 else "a number of many digits"
        raise ValueError(f"its {name} is not from {least} to {most}, got {shown}")
    return value


def _check_number(name: str, value: object) -> float:
    """Return the value of a field. **Raises:** `ValueError` for no number in its range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"its {name} is not a number")
    least, most = _NUMBERS[name]
    if not least <= value <= most:
        raise ValueError(f"its {name} is not from {least:g} to {most:g}")
    return float(value)


def parse_json(data: bytes) -> object:
    """Return the JSON value of a line. **Raises:** `ValueError` that says what is wrong with it."""
    if len(data) > _MAX_LINE:
        raise ValueError(f"it has {len(data)} bytes; a line has at most {_MAX_LINE}")
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object_without_repetition,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not valid UTF-8 (at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object_without_repetition(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object. Python's parser would take the last of two fields of one name."""
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"it has the field '{printable(name, _SHOWN)}' twice")
        fields[name] = value
    return fields


def _refuse_constant(text: str) -> NoReturn:
    # Python's parser accepts NaN and Infinity, which are not JSON.
    raise ValueError(f"it has {text}, which is not a number in JSON")


def _parse_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def share(lines: Sequence[Line], process: int = 0, processes: int = 1) -> list[Line]:
    """Return the lines that a process draws: each `processes`-th, beginning with its own number."""
    return list(lines[process::processes])


def difference(found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Return how an existing image differs from what a line would draw.

    **Arguments:** `found`: metadata of the image. `wanted`: metadata that the line would write.
    **Returns:** a message, or None if the metadata are equal except for the version of fluxjax and
    how the image was drawn beside others.
    """
    if "prompt" not in found:
        return "there is another file of its name"
    changes = []
    for name in {**wanted, **found}:
        if name not in ("version", "command", "batch") and found.get(name) != wanted.get(name):
            changes.append(f"{name} {_shown(found, name)} instead of {_shown(wanted, name)}")
    if not changes:
        return None
    return f"its image exists with {', '.join(changes[:3])}"


def _shown(metadata: Mapping[str, str], name: str) -> str:
    if name not in metadata:
        return "none"
    return f"'{printable(metadata[name], _SHOWN)}'"
