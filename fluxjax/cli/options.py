"""Readers of options' values: each converts a text, or says in one line what is wrong."""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from fluxjax.printable import printable
from fluxjax.suggestions import suggestion

Value = TypeVar("Value")

MAX_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
"""The largest finite float32: networks can be given no larger number."""
MIN_NORMAL_FLOAT32 = 2.0**-126
"""The smallest positive float32 of full precision."""
MAX_SEED = 2**63 - 1
MAX_STEPS = 10_000
PREVIEW_STEPS = 4
"""Steps between two previews."""
MAX_PIXELS = 2**16
"""Pixels along a side of an image."""
MAX_ASPECT = 8
"""The longer side of an image over the shorter one."""
MAX_MARGIN = 2**15
"""Pixels that an image grows by on a side."""
SIDES = ("left", "right", "top", "bottom")
MAX_IMAGES = 1_000_000
MAX_TOKENS = 2**16
"""Tokens of a prompt, and in a block of attention."""
MAX_DEVICES = 2**20
MAX_RANK = 2**16
_SHOWN = 60
"""Characters of a wrong value that an error message repeats."""


class LineField(NamedTuple):
    """A field of a line of a file of pictures, in place of an option of the command.

    `option`: the name of the parsed option. `read`: makes its value of a text, as on the command
    line. `is_path`: whether the text is a path, which begins at the folder of the file.
    """

    option: str
    read: Callable[[str], object]
    is_path: bool = False


def wrong_value(text: str, needed: str) -> argparse.ArgumentTypeError:
    """Return the error of a value that can't be read.

    **Arguments:** `needed`: what the option needs, in words.
    """
    return argparse.ArgumentTypeError(f"needs {needed}, got {shown_value(text)}")


def shown_value(text: str) -> str:
    """Return a wrong value as an error message shows it: quoted, and cut if it is long."""
    return repr(printable(text, _SHOWN))


def is_number(text: str) -> bool:
    """Return whether a text is a number, which may be infinite or NaN."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of a whole number from `least` to `most`, both included.

    The reader raises `argparse.ArgumentTypeError` for anything else.
    """

    def read(text: str) -> int:
        # At most 30 digits: Python takes quadratic time for long numbers, and refuses very long
        # ones with an error of its own.
        is_number = re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()) is not None
        if not is_number or not least <= int(text) <= most:
            raise wrong_value(text, f"a whole number from {least} to {most}")
        return int(text)

    return read


def finite_number(least: float = -MAX_FLOAT32, most: float = MAX_FLOAT32) -> Callable[[str], float]:
    """Return a reader of a number from `least` to `most`, both included, that float32 can hold."""
    if most < MAX_FLOAT32:
        needed = f"a number from {least:g} to {most:g}"
    elif least > -MAX_FLOAT32:
        needed = f"a finite number from {least:g} on"
    else:
        needed = "a finite number"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise wrong_value(text, needed) from None
        if not least <= value <= most:  # also true of NaN, which compares as False
            raise wrong_value(text, needed)
        return value

    return read


def positive_number(text: str) -> float:
    """Read a finite number above 0 that float32 can hold."""
    value = finite_number()(text)
    # XLA flushes smaller numbers to 0 on some devices.
    if value < MIN_NORMAL_FLOAT32:
        raise wrong_value(text, "a finite number above 0")
    return value


seed = whole_number(0, MAX_SEED)
image_number = whole_number(0, MAX_IMAGES)
step_count = whole_number(1, MAX_STEPS)
pixel_count = whole_number(1, MAX_PIXELS)
image_count = whole_number(1, MAX_IMAGES)
token_count = whole_number(1, MAX_TOKENS)
lora_rank = whole_number(1, MAX_RANK)


def unicode_text(text: str) -> str:
    """Read a text that can be encoded as UTF-8.

    Python decodes the command line by the locale's encoding, and represents bytes which that
    encoding lacks as surrogates. Such bytes are read as UTF-8 here.

    **Raises:** `argparse.ArgumentTypeError` for bytes that are none of UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        pass
    else:
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"is not valid UTF-8: {printable(text, _SHOWN)}") from None


def file_path(text: str) -> Path:
    """Read the path of a file or folder."""
    if "\0" in text:
        raise wrong_value(text, "a path without NUL characters")
    return Path(text)


def png_path(text: str) -> Path:
    """Read the path of a PNG that is written."""
    path = file_path(text)
    if path.suffix.lower() != ".png":
        raise wrong_value(text, "a name that ends in .png")
    return path


class NameList:
    """A reader of different names that are separated by commas.

    argparse fills the attributes of an option into its help text; `%(type)s` there becomes the
    names, which are then looked up only if the help is printed.

    **Arguments:** `known`: the names that are accepted.
    """

    def __init__(self, known: Iterable[str]):
        self.known = known

    def __str__(self) -> str:
        return ", ".join(self.known)

    def __call__(self, text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in self.known:
                raise argparse.ArgumentTypeError(
                    f"there is no {shown_value(name)}; choose from {self}."
                    f"{suggestion(name, self.known)}"
                )
        return without_repetition(names)


class NameOrFile:
    """A reader of one name, or of a path that ends in a suffix. Help as of `NameList`.

    **Arguments:** `known`: the names that are accepted. `suffix`: of the files, such as ".json".
    `default`: one of the names; it is accepted without looking them up.
    """

    def __init__(self, known: Iterable[str], suffix: str, default: str):
        self.known = known
        self.suffix = suffix
        self.default = default

    def __str__(self) -> str:
        return ", ".join(self.known)

    def __call__(self, text: str) -> str:
        if text == self.default or text.endswith(self.suffix) or text in self.known:
            return text
        raise argparse.ArgumentTypeError(
            f"there is no {shown_value(text)}; choose from {self}, or give a file "
            f"*{self.suffix}.{suggestion(text, self.known)}"
        )


def without_repetition(values: Sequence[Value]) -> list[Value]:
    """Return the values as a list. **Raises:** `argparse.ArgumentTypeError` if two are equal."""
    for value in values:
        if values.count(value) > 1:
            raise given_twice(value)
    return list(values)


def given_twice(value: object) -> argparse.ArgumentTypeError:
    """Return the error of a value that an option has two times."""
    return argparse.ArgumentTypeError(f"{value} is given twice; leave one out")


def seeds(text: str) -> list[int]:
    """Read different seeds that are separated by commas."""
    return without_repetition([seed(part) for part in text.split(",")])


def aspect(text: str) -> float:
    """Read a ratio of width to height, as 16:9, from 1:8 to 8:1."""
    width, _, height = text.partition(":")
    if is_number(width) and is_number(height):
        sides = float(width), float(height)
        if min(sides) > 0:
            ratio = sides[0] / sides[1]
            if 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
                return ratio
    raise wrong_value(text, f"width:height, as 16:9, from 1:{MAX_ASPECT} to {MAX_ASPECT}:1")


def step_counts(text: str) -> list[int]:
    """Read different numbers of steps that are separated by commas."""
    counts = [step_count(part) for part in text.split(",")]
    return without_repetition(counts)


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}


def byte_count(text: str) -> int:
    """Read a size in bytes: a number, which kB, MB, GB or TB may follow."""
    pattern = r"([0-9]{1,18}(?:\.[0-9]{1,18})?) *([KMGT]?B?)"
    match = re.fullmatch(pattern, text.strip().upper())
    size = 0
    if match is not None and match[2] in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise wrong_value(text, "a size, as 5GB or 500MB")
    return size
