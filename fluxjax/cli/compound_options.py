"""Readers of options whose values have parts: sizes by name, regions, adapters."""

import argparse
import math
import pkgutil
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from fluxjax.cli.choices import BLOCK_PRESETS, MESH_AXES
from fluxjax.cli.console import interruptible
from fluxjax.cli.options import (
    MAX_DEVICES,
    MAX_FLOAT32,
    MAX_MARGIN,
    MAX_TOKENS,
    SIDES,
    file_path,
    given_twice,
    is_number,
    positive_number,
    shown_value,
    step_count,
    token_count,
    unicode_text,
    whole_number,
    wrong_value,
)


class BlockSizesReader:
    """A reader of block sizes: tokens of queries and, if they differ, of keys; or a preset's name.

    As for `NameList`, `%(type)s` in an option's help text becomes the names of the presets.
    """

    def __str__(self) -> str:
        return ", ".join(BLOCK_PRESETS)

    def __call__(self, text: str) -> object:
        """Return a `fluxjax.kernels.block_sizes.BlockSizes`, whose module is imported only here."""
        if text in BLOCK_PRESETS:
            return _of_block_sizes("PRESETS")[text]
        try:
            sizes = [token_count(part) for part in text.split(",")]
        except argparse.ArgumentTypeError:
            sizes = []
        if len(sizes) == 1:
            return _of_block_sizes("BlockSizes")(q=sizes[0], kv=None)
        if len(sizes) == 2:
            return _of_block_sizes("BlockSizes")(q=sizes[0], kv=sizes[1])
        needed = f"1536, or 1536,512 (each from 1 to {MAX_TOKENS}), or one of {self}"
        raise wrong_value(text, needed)


def _of_block_sizes(name: str) -> Any:
    return interruptible(pkgutil.resolve_name, f"fluxjax.kernels.block_sizes:{name}")


def mesh_sizes(text: str) -> dict[str, int]:
    """Read the sizes of a mesh's axes, as in "data=2,fsdp=4"; one of them may be -1."""
    needed = "axes and their sizes, as data=2,fsdp=4, one of which may be -1"
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not _is_axis_size(size):
            raise wrong_value(text, needed)
        if axis not in MESH_AXES:
            raise argparse.ArgumentTypeError(
                f"there is no axis {shown_value(axis)}; choose from {', '.join(MESH_AXES)}"
            )
        if axis in sizes:
            raise given_twice(axis)
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise wrong_value(text, needed)
    return sizes


def setting(text: str) -> tuple[str, object]:
    """Read a setting of a configuration, as in "optimizer.learning_rate=1e-4".

    The value is one of TOML; what is none is a text.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or re.fullmatch(r"[A-Za-z_]+(\.[A-Za-z_]+)*", name) is None:
        raise wrong_value(text, "a name and a value, as optimizer.learning_rate=1e-4")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value.strip()


def _is_axis_size(text: str) -> bool:
    if re.fullmatch(r"-?[0-9]{1,9}", text) is None:
        return False
    return int(text) == -1 or 1 <= int(text) <= MAX_DEVICES


def canvas_margins(text: str) -> dict[str, int]:
    """Read the pixels that an image grows by on its sides, as in "left=64,top=128"."""
    sides: dict[str, int] = {}
    for part in text.split(","):
        side, _, count = part.partition("=")
        is_new_side = side in SIDES and side not in sides
        if not is_new_side or re.fullmatch(r"[0-9]{1,9}", count) is None:
            raise wrong_value(text, f"pixels by side ({', '.join(SIDES)}), as left=64,top=128")
        sides[side] = whole_number(1, MAX_MARGIN)(count)
    return sides


class OperatorText(NamedTuple):
    """What has happened to a picture: `kind`, "blur", "downsample" or "mask", with its `value`."""

    kind: str
    value: str


def picture_operator(text: str) -> OperatorText:
    """Read what has happened to a picture: blur:PIXELS, downsample:FACTOR, or mask:FILE."""
    kind, _, value = text.partition(":")
    if not value or kind not in ("blur", "downsample", "mask") or "\0" in value:
        raise wrong_value(text, "blur:PIXELS, downsample:FACTOR, or mask:FILE")
    if kind == "blur":
        positive_number(value)
    if kind == "downsample":
        step_count(value)
    return OperatorText(kind, value)


class ImagePromptFile(NamedTuple):
    """An image prompt as an option names it: its file, and its weight."""

    path: Path
    weight: float


def image_prompt(text: str) -> ImagePromptFile:
    """Read an image prompt, FILE[=WEIGHT]."""
    place, weight = _split_number(text, "=")
    if not _is_float32(weight):
        raise wrong_value(text, "a finite weight after the equals sign")
    if not place:
        raise wrong_value(text, "an image, as FILE=WEIGHT")
    return ImagePromptFile(file_path(place), weight)


def _split_number(text: str, separator: str) -> tuple[str, float]:
    """Return what comes before the last separator, and the number after it.

    What follows may be no number: the separator then belongs to the path, and the number is 1.
    """
    head, found, last = text.rpartition(separator)
    if found and is_number(last):
        return head, float(last)
    return text, 1.0


def _is_float32(number: float) -> bool:
    """Return whether float32 can hold a number, of which NaN and infinity are none."""
    return math.isfinite(number) and abs(number) <= MAX_FLOAT32


class RegionOption(NamedTuple):
    """A part of the images as an option names it.

    `box`: its left, upper, right and lower edge, as fractions of the image. `mask`: its file, in
    place of a box; neither is for the background. `prompt`: its own.
    """

    box: tuple[float, float, float, float] | None
    mask: Path | None
    prompt: str


def region(text: str) -> RegionOption:
    """Read a region, X0,Y0,X1,Y1=PROMPT, FILE=PROMPT, or background=PROMPT."""
    place, equals, prompt = unicode_text(text).partition("=")
    if not equals or not place or not prompt.strip():
        raise wrong_value(text, "a box or a mask and its prompt, as 0,0,0.5,1=PROMPT")
    if place == "background":
        return RegionOption(None, None, prompt)
    edges = place.split(",")
    if not all(map(is_number, edges)):
        return RegionOption(None, file_path(place), prompt)
    if len(edges) != 4:
        raise wrong_value(text, "the four edges of a box, as 0,0,0.5,1=PROMPT")
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
    place, scale = _split_number(place, ":")
    if not _is_float32(scale):
        raise wrong_value(text, "a finite scale after the colon")
    if not _is_adapter_place(place):
        raise wrong_value(text, "an adapter, as FILE:SCALE or hub:OWNER/REPO/FILE:SCALE")
    if not name:
        name = Path(place).stem.removeprefix("tiny:")
    return Adapter(name, place, scale)


def _is_adapter_place(place: str) -> bool:
    """Return whether a text is a path, a hub file with all of its parts, or a shipped adapter."""
    if place in ("", "tiny:") or "\0" in place:
        return False
    if not place.startswith("hub:"):
        return True
    parts = place.removeprefix("hub:").split("/", 2)
    return len(parts) == 3 and all(parts)
