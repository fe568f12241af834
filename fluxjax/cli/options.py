"""Readers of the values of options: each converts a text, or says in one line what is wrong."""

import argparse
import itertools
import math
import os
import pkgutil
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from fluxjax.cli.choices import BLOCK_PRESETS, MESH_AXES
from fluxjax.cli.console import complain, interruptible
from fluxjax.printable import printable
from fluxjax.suggestions import suggestion

Value = TypeVar("Value")
OptionGroup = argparse._ActionsContainer
"""A parser, or a group of options in one; argparse has no public name for both."""

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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    What it parses has an attribute `given`: the words of each option that was given, by the name of
    the attribute that the option sets. With `find_problem` as a default, a function of what was
    parsed, the problem that this returns is an error.
    """

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """Parse options, also where words that may be left out follow an option.

        argparse gives such a word, as a prompt, the value None as soon as an option comes, and then
        refuses it.
        """
        self._given: dict[str, list[str]] = {}
        namespace, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.option_strings:
                continue
            if action.nargs == "?" and getattr(namespace, action.dest, "") is None:
                for word in _leading_words(unknown)[:1]:
                    setattr(namespace, action.dest, self._read_word(action, word))
                    unknown.pop(0)
            elif action.nargs == "*":
                words = _leading_words(unknown)
                read = [self._read_word(action, word) for word in words]
                setattr(namespace, action.dest, [*getattr(namespace, action.dest), *read])
                unknown = unknown[len(words) :]
        if not hasattr(namespace, "given"):  # the parser of a command has been here before
            namespace.given = self._given
        return namespace, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        if action.option_strings:
            given = self._given.setdefault(action.dest, [])
            given += option_words(action.option_strings[-1], arg_strings)
        return super()._get_values(action, arg_strings)  # type: ignore[misc]

    def _read_word(self, action: argparse.Action, word: str) -> object:
        assert callable(action.type)
        try:
            return action.type(word)
        except argparse.ArgumentTypeError as error:
            self.error(f"argument {action.metavar or action.dest}: {error}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = suggestion(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}.{near}") from None

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        """Parse all words. One that is left over is an error, with the option that it may be."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = self._option_strings(namespace)
            near = suggestion(unknown[0].partition("=")[0], known)
            self.error(f"unrecognized arguments: {printable(' '.join(unknown))}.{near}")
        problem = getattr(namespace, "find_problem", _no_problem)(namespace)
        if problem is not None:
            namespace.parser.error(problem)
        return namespace

    def _option_strings(self, namespace: argparse.Namespace) -> list[str]:
        """Return the options of the command that was chosen."""
        chosen = getattr(namespace, "parser", self)
        return [name for action in chosen._actions for name in action.option_strings]

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _no_problem(options: argparse.Namespace) -> None:
    return None


def _leading_words(words: Sequence[str]) -> list[str]:
    """Return the words before the first that looks like an option."""
    return list(itertools.takewhile(lambda word: not word.startswith("-"), words))


def option_words(name: str, values: Sequence[str]) -> list[str]:
    """Return the words that give an option these values."""
    if len(values) == 1 and values[0].startswith("-"):  # which would look like an option
        return [f"{name}={values[0]}"]
    return [name, *values]


def _wrong_value(text: str, needed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"needs {needed}, got {printable(text, _SHOWN)!r}")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of a whole number from `least` to `most`, both included."""

    def read(text: str) -> int:
        # At most 30 digits: Python takes quadratic time for long numbers, and refuses very long
        # ones with an error of its own.
        is_number = re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()) is not None
        if not is_number or not least <= int(text) <= most:
            raise _wrong_value(text, f"a whole number from {least} to {most}")
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
            raise _wrong_value(text, needed) from None
        if not least <= value <= most:  # also true of NaN, which compares as False
            raise _wrong_value(text, needed)
        return value

    return read


def positive_number(text: str) -> float:
    """Read a finite number above 0 that float32 can hold."""
    value = finite_number()(text)
    # XLA flushes smaller numbers to 0 on some devices.
    if value < MIN_NORMAL_FLOAT32:
        raise _wrong_value(text, "a finite number above 0")
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
        raise _wrong_value(text, "a path without NUL characters")
    return Path(text)


def png_path(text: str) -> Path:
    """Read the path of a PNG that is written."""
    path = file_path(text)
    if path.suffix.lower() != ".png":
        raise _wrong_value(text, "a name that ends in .png")
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
                    f"there is no {printable(name, _SHOWN)!r}; choose from {self}."
                    f"{suggestion(name, self.known)}"
                )
        return _without_repetition(names)


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
            f"there is no {printable(text, _SHOWN)!r}; choose from {self}, or give a file "
            f"*{self.suffix}.{suggestion(text, self.known)}"
        )


def _without_repetition(values: Sequence[Value]) -> list[Value]:
    """Return the values as a list. **Raises:** `argparse.ArgumentTypeError` if two are equal."""
    for value in values:
        if values.count(value) > 1:
            raise argparse.ArgumentTypeError(f"{value} is given twice; leave one out")
    return list(values)


def seeds(text: str) -> list[int]:
    """Read different seeds that are separated by commas."""
    return _without_repetition([seed(part) for part in text.split(",")])


def aspect(text: str) -> float:
    """Read a ratio of width to height, as 16:9, from 1:8 to 8:1."""
    width, colon, height = text.partition(":")
    is_ratio = bool(colon) and _is_number(width) and _is_number(height)
    if is_ratio and float(width) > 0 and float(height) > 0:
        ratio = float(width) / float(height)
        if 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
            return ratio
    raise _wrong_value(text, f"width:height, as 16:9, from 1:{MAX_ASPECT} to {MAX_ASPECT}:1")


def step_counts(text: str) -> list[int]:
    """Read different numbers of steps that are separated by commas."""
    counts = [step_count(part) for part in text.split(",")]
    return _without_repetition(counts)


class BlockSizesReader:
    """A reader of block sizes: tokens of queries and, if they differ, of keys; or a preset's name.

    As for `NameList`, `%(type)s` in an option's help text becomes the names of the presets.
    """

    def __str__(self) -> str:
        return ", ".join(BLOCK_PRESETS)

    def __call__(self, text: str) -> object:
        """Return a `fluxjax.kernels.block_sizes.BlockSizes`, whose module is imported only here."""
        try:
            sizes = [token_count(part) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            sizes = []
        if len(sizes) in (1, 2):
            block_sizes = interruptible(
                pkgutil.resolve_name, "fluxjax.kernels.block_sizes:BlockSizes"
            )
            return block_sizes(q=sizes[0], kv=sizes[1] if len(sizes) == 2 else None)
        if text in BLOCK_PRESETS:
            presets = interruptible(pkgutil.resolve_name, "fluxjax.kernels.block_sizes:PRESETS")
            return presets[text]
        needed = f"1536, or 1536,512 (each from 1 to {MAX_TOKENS}), or one of {self}"
        raise _wrong_value(text, needed)


def mesh_sizes(text: str) -> dict[str, int]:
    """Read the sizes of a mesh's axes, as in "data=2,fsdp=4"; one of them may be -1."""
    needed = "axes and their sizes, as data=2,fsdp=4, one of which may be -1"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not _is_axis_size(size):
            raise _wrong_value(text, needed)
        if axis not in MESH_AXES:
            raise argparse.ArgumentTypeError(
                f"there is no axis {printable(axis, _SHOWN)!r}; choose from {', '.join(MESH_AXES)}"
            )
        if axis in sizes:
            raise argparse.ArgumentTypeError(f"{axis} is given twice; leave one out")
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise _wrong_value(text, needed)
    return sizes


def setting(text: str) -> tuple[str, object]:
    """Read a setting of a configuration, as in "optimizer.learning_rate=1e-4".

    The value is one of TOML; what is none is a text.
    """
    name, equals, value = text.partition("=")
    if not equals or re.fullmatch(r"[A-Za-z_]+(\.[A-Za-z_]+)*", name.strip()) is None:
        raise _wrong_value(text, "a name and a value, as optimizer.learning_rate=1e-4")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _is_axis_size(text: str) -> bool:
    if re.fullmatch(r"-?[0-9]{1,9}", text) is None:
        return False
    return int(text) == -1 or 1 <= int(text) <= MAX_DEVICES


def canvas_margins(text: str) -> dict[str, int]:
    """Read the pixels that an image grows by on its sides, as in "left=64,top=128"."""
    sides: dict[str, int] = {}
    for part in text.split(","):
        side, _, count = part.partition("=")
        if side not in SIDES or side in sides or re.fullmatch(r"[0-9]{1,9}", count) is None:
            raise _wrong_value(text, f"pixels by side ({', '.join(SIDES)}), as left=64,top=128")
        sides[side] = whole_number(1, MAX_MARGIN)(count)
    return sides


class OperatorText(NamedTuple):
    """What has happened to a picture: `kind`, "blur", "downsample" or "mask", with its `value`."""

    kind: str
    value: str


class LineField(NamedTuple):
    """A field of a line of a file of pictures, in place of an option of the command.

    `option`: the name of the parsed option. `read`: makes its value of a text, as on the command
    line. `is_path`: whether the text is a path, which begins at the folder of the file.
    """

    option: str
    read: Callable[[str], object]
    is_path: bool = False


def picture_operator(text: str) -> OperatorText:
    """Read what has happened to a picture: blur:PIXELS, downsample:FACTOR, or mask:FILE."""
    kind, colon, value = text.partition(":")
    if not colon or not value or kind not in ("blur", "downsample", "mask") or "\0" in value:
        raise _wrong_value(text, "blur:PIXELS, downsample:FACTOR, or mask:FILE")
    if kind == "blur":
        positive_number(value)
    if kind == "downsample":
        step_count(value)
    return OperatorText(kind, value)


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}


def byte_count(text: str) -> int:
    """Read a size in bytes: a number, which kB, MB, GB or TB may follow."""
    pattern = r"([0-9]{1,18}(?:\.[0-9]{1,18})?) *([KMGT]?B?)"
    match = re.fullmatch(pattern, text.strip().upper())
    size = 0
    if match is not None and match[2] in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise _wrong_value(text, "a size, as 5GB or 500MB")
    return size


class ImagePromptFile(NamedTuple):
    """An image prompt as an option names it: its file, and its weight."""

    path: Path
    weight: float


def image_prompt(text: str) -> ImagePromptFile:
    """Read an image prompt, FILE[=WEIGHT]."""
    head, equals, last = text.rpartition("=")
    place, weight = text, 1.0
    if equals and _is_number(last):  # otherwise the equals sign belongs to the path
        place, weight = head, float(last)
    if not math.isfinite(weight) or abs(weight) > MAX_FLOAT32:
        raise _wrong_value(text, "a finite weight after the equals sign")
    if not place:
        raise _wrong_value(text, "an image, as FILE=WEIGHT")
    return ImagePromptFile(file_path(place), weight)


class RegionOption(NamedTuple):
    """A part of the images as an option names it: its box, or its mask's file, or neither for the
    background; and its prompt."""

    box: tuple[float, float, float, float] | None
    mask: Path | None
    prompt: str


def region(text: str) -> RegionOption:
    """Read a region, X0,Y0,X1,Y1=PROMPT, FILE=PROMPT, or background=PROMPT."""
    place, equals, prompt = unicode_text(text).partition("=")
    if not equals or not place or not prompt.strip():
        raise _wrong_value(text, "a box or a mask and its prompt, as 0,0,0.5,1=PROMPT")
    if place == "background":
        return RegionOption(None, None, prompt)
    edges = place.split(",")
    if not all(map(_is_number, edges)):
        return RegionOption(None, file_path(place), prompt)
    if len(edges) != 4:
        raise _wrong_value(text, "the four edges of a box, as 0,0,0.5,1=PROMPT")
    left, top, right, bottom = map(float, edges)
    return RegionOption((left, top, right, bottom), None, prompt)


class Adapter(NamedTuple):
    """An adapter as an option names it.

    `name`: what messages and metadata call it. `place`: a path, "hub:OWNER/REPO/FILE", or
    "tiny:STYLE". `scale`: the factor of its changes.
    """

    name: str
    place: str
    scale: float


def adapter(text: str) -> Adapter:
    """Read an adapter, [NAME=]FILE[:SCALE].

    FILE may also be "hub:OWNER/REPO/FILE", or "tiny:STYLE" for one that ships with fluxjax.
    """
    name, equals, place = text.partition("=")
    if not equals or "/" in name:  # the equals sign, if there is one, belongs to the path
        name, place = "", text
    head, colon, last = place.rpartition(":")
    scale = 1.0
    if colon and _is_number(last):  # otherwise the colon belongs to the path
        place, scale = head, float(last)
    if not math.isfinite(scale) or abs(scale) > MAX_FLOAT32:
        raise _wrong_value(text, "a finite scale after the colon")
    if not _is_adapter_place(place):
        raise _wrong_value(text, "an adapter, as FILE:SCALE or hub:OWNER/REPO/FILE:SCALE")
    if not name:
        name = Path(place).stem.removeprefix("tiny:")
    return Adapter(name, place, scale)


def _is_adapter_place(place: str) -> bool:
    if place in ("", "tiny:") or "\0" in place:
        return False
    if not place.startswith("hub:"):
        return True
    parts = place.removeprefix("hub:").split("/", 2)
    return len(parts) == 3 and all(parts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
