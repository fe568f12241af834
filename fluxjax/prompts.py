"""Files of prompts: a JSON object a line, shared among processes, each line's image in a file of its own."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_FIELDS: dict[str, type] = {"prompt": str, "prompt_2": str, "negative_prompt": str, "id": str, "seed": int}
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Line(NamedTuple):
    """A line of a file: what to draw, by which seed, and the name of its image without the ending."""

    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    id: str
    seed: int

    def image(self, folder: Path) -> Path:
        """Return where its image belongs."""
        return folder / f"{self.id}.png"


def read_prompts(path: Path | str, *, guided: bool = True) -> tuple[list[Line], list[str]]:
    """Read a file of prompts.

    A line is a JSON object with `prompt`, and, if wanted, `prompt_2`, `negative_prompt`, `id` (by default the line's number
    from 0) and `seed` (the same). Empty lines are passed over. `guided`: whether a negative prompt does anything; else it is
    refused.
    **Returns:** the lines, and what is wrong with the others, each with its number from 1.
    **Raises:** `OSError` if the file can't be read.
    """
    lines, problems = [], []
    taken: dict[str, int] = {}
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = _line(text, number - 1)
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


def _line(text: str, number: int) -> Line:
    try:
        given: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(given, dict) or "prompt" not in given:
        raise ValueError('it is no object with a prompt; write {"prompt": "a red star"}')
    for name, value in given.items():
        if name not in _FIELDS:
            raise ValueError(f"it has an unknown field {name!r}; there are {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
            raise ValueError(f"its {name} is no {'whole number' if _FIELDS[name] is int else 'text'}")
    name = given.get("id", str(number))
    if not _ID.fullmatch(name):
        raise ValueError(f"its id {name!r} is no file name of letters, digits, '_', '-' and '.', which it may not begin with")
    seed = given.get("seed", number)
    if not 0 <= seed < 2**63:
        raise ValueError(f"its seed {seed} is not in [0, 2^63)")
    return Line(given["prompt"], given.get("prompt_2"), given.get("negative_prompt"), name, seed)


def share(lines: Sequence[Line], folder: Path, process: int = 0, processes: int = 1) -> list[Line]:
    """Return the lines of a process, one in `processes`, whose images are not there yet."""
    return [line for line in lines[process::processes] if not line.image(folder).exists()]
