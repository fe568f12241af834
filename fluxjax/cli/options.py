"""Readers of the command line's values: each returns what a text says, or raises one line that says what is wrong with it."""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fluxjax.checkpoint.printable import printable
from fluxjax.cli.console import complain
from fluxjax.devices.mesh import AXES
from fluxjax.generate.latents import SEEDS
from fluxjax.kernels.block_sizes import PRESETS, BlockSizes

LARGEST = float(np.finfo(np.float32).max)
"""The largest number that the networks can be given."""
MOST_STEPS = 10_000
MOST_PIXELS = 2**16
"""Pixels along a side of an image."""
MOST_IMAGES = 1_000_000
MOST_TOKENS = 2**16
"""Tokens of a prompt, and in a block of attention."""
MOST_DEVICES = 2**20
MOST_RANK = 2**16


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def _wrong(text: str, needed: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"needs {needed}, got {printable(text, 60)!r}")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of a whole number from `least` to `most`."""

    def read(text: str) -> int:
        if (
            re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()) is None
            or not least <= int(text) <= most
        ):
            raise _wrong(text, f"a whole number from {least} to {most}")
        return int(text)

    return read


def finite_number(least: float = -LARGEST, most: float = LARGEST) -> Callable[[str], float]:
    """Return a reader of a number from `least` to `most`, which float32 can hold."""
    bounds = "a finite number" if most == LARGEST else f"a number from {least:g} to {most:g}"
    bounds = bounds if least == -LARGEST or most < LARGEST else f"{bounds} from {least:g} on"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _wrong(text, bounds) from None
        if not least <= value <= most:  # NaN is in no interval
            raise _wrong(text, bounds)
        return value

    return read


def positive_number(text: str) -> float:
    """Read a finite number above 0 that float32 can hold."""
    value = finite_number()(text)
    if value < float(np.finfo(np.float32).tiny):
        raise _wrong(text, "a finite number above 0")
    return value


seed = whole_number(0, SEEDS - 1)
rank = whole_number(1, MOST_RANK)
pixels = whole_number(1, MOST_PIXELS)
images = whole_number(1, MOST_IMAGES)


def any_text(text: str) -> str:
    """Read a text that can be encoded. Where the locale's encoding lacks them, the bytes of a command line come as surrogates;
    they are read as UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"is not valid UTF-8: {printable(text, 60)}") from None


def path(text: str) -> Path:
    """Read a path."""
    if "\0" in text:
        raise _wrong(text, "a path, which holds no NUL character")
    return Path(text)


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a reader of different names with commas between, each one of those known."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"there is no {printable(unknown[0], 60)!r}; choose of {', '.join(known)}"
            )
        return _different(found)

    return read


def _different(found: Sequence[Any]) -> list[Any]:
    twice = [one for one in found if found.count(one) > 1]
    if twice:
        raise argparse.ArgumentTypeError(f"{twice[0]} is given twice; leave one out")
    return list(found)


def step_counts(text: str) -> list[int]:
    """Read different numbers of steps with commas between."""
    read = whole_number(1, MOST_STEPS)
    return _different([read(part) for part in text.split(",")])


def block_sizes(text: str) -> BlockSizes:
    """Read block sizes: tokens of queries, and of keys if they differ, or a preset's name."""
    if text in PRESETS:
        return PRESETS[text]
    parts = text.split(",")
    try:
        sizes = [whole_number(1, MOST_TOKENS)(part) for part in parts]
    except argparse.ArgumentTypeError:
        sizes = []
    if len(sizes) not in (1, 2):
        raise _wrong(
            text,
            f"1536, or 1536,512 (each from 1 to {MOST_TOKENS}), or one of {', '.join(PRESETS)}",
        )
    return BlockSizes(q=sizes[0], kv=sizes[1] if len(sizes) == 2 else None)


def mesh_sizes(text: str) -> dict[str, int]:
    """Read a mesh: axes and their sizes, with commas between."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if re.fullmatch(r"-?[0-9]{1,9}", size) is None or not (
            int(size) == -1 or 1 <= int(size) <= MOST_DEVICES
        ):
            raise _wrong(text, "axes and their sizes, as data=2,fsdp=4, one of which may be -1")
        if axis not in AXES:
            raise argparse.ArgumentTypeError(
                f"there is no axis {printable(axis, 60)!r}; choose of {', '.join(AXES)}"
            )
        if axis in sizes:
            raise argparse.ArgumentTypeError(f"{axis} is given twice; leave one out")
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise _wrong(text, "axes and their sizes, as data=2,fsdp=4, one of which may be -1")
    return sizes


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}


def byte_count(text: str) -> int:
    """Read a size: a number, and kB, MB, GB, TB or nothing after it."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) *([KMGT]?B?)", text.strip().upper())
    size = (
        int(float(found[1]) * _UNITS[found[2]]) if found is not None and found[2] in _UNITS else 0
    )
    if size < 1:
        raise _wrong(text, "a size, as 5GB or 500MB")
    return size


class Adapter(NamedTuple):
    """An adapter as the command line names it: a path, hub:OWNER/REPO/FILE, or tiny:STYLE."""

    name: str
    place: str
    scale: float


def adapter(text: str) -> Adapter:
    """Read [NAME=]FILE[:SCALE]; the file may also be hub:OWNER/REPO/FILE, or tiny:STYLE for one that ships."""
    name, equals, place = text.partition("=")
    if not equals or "/" in name:
        name, place = "", text
    head, colon, last = place.rpartition(":")
    scale = 1.0
    if colon and _is_number(last):  # else it is a colon of the path
        place, scale = head, float(last)
    if not math.isfinite(scale) or abs(scale) > LARGEST:
        raise _wrong(text, "a finite scale after the colon")
    parts = place.removeprefix("hub:").split("/", 2)
    if (
        not place
        or place == "tiny:"
        or "\0" in place
        or (place.startswith("hub:") and (len(parts) < 3 or not all(parts)))
    ):
        raise _wrong(text, "an adapter, as FILE:SCALE or hub:OWNER/REPO/FILE:SCALE")
    return Adapter(name or Path(place).stem.removeprefix("tiny:"), place, scale)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
