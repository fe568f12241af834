"""Images that are drawn again, as lines of prompts name them: read, described, made ready."""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fluxjax.cli.output import encodable
from fluxjax.cli.prompts import Line
from fluxjax.generate.image import read_image
from fluxjax.generate.image_to_image import Repaint, Start
from fluxjax.generate.masks import cell_mask, pad_image, padded_size, paste_kept, read_mask
from fluxjax.shapes import Array, Float, Times

_DIGEST = 12
"""Hexadecimal digits of a file's SHA-256 that metadata have."""


def start_of_options(options: argparse.Namespace) -> Repaint:
    """Return how strongly images are drawn again by the options, without a mask."""
    if options.start_time is not None:
        return Repaint(strength=options.start_time, rule="time", repeats=options.repeats)
    if options.strength is not None:
        return Repaint(strength=options.strength, repeats=options.repeats)
    return Repaint(repeats=options.repeats)


class StartFacts(NamedTuple):
    """What is known of a line's image without its pixels.

    `height`, `width`: in pixels. `description`: what metadata say of it. `repaint`: how strongly it
    is drawn again, without its mask. `has_mask`: whether it has one.
    """

    height: int
    width: int
    description: dict[str, str]
    repaint: Repaint
    has_mask: bool

    @property
    def padded(self) -> tuple[int, int]:
        """The height and width at which it is drawn."""
        return padded_size(self.height, self.width)


class StartImage(NamedTuple):
    """A line's image: its pixels in [-1, 1], the mask in [0, 1] of what is repainted, if any."""

    image: np.ndarray
    mask: np.ndarray | None

    def padded_image(self) -> Float[Array, "height width 3"]:
        """Return the image at the size at which it is drawn."""
        return pad_image(jnp.asarray(self.image))

    def cells(self) -> Float[Array, "rows columns"] | None:
        """Return how strongly each latent cell is repainted; None if all are alike."""
        if self.mask is None:
            return None
        return cell_mask(pad_image(jnp.asarray(self.mask)))

    def finish(self, drawn: np.ndarray) -> np.ndarray:
        """Return a drawn image at the size of this one, with this one's pixels where they stay."""
        height, width = self.image.shape[:2]
        cropped = drawn[:height, :width]
        if self.mask is None:
            return cropped
        kept, mask = jnp.asarray(self.image), jnp.asarray(self.mask)
        return np.asarray(paste_kept(jnp.asarray(cropped), kept, mask))


def read_start(line: Line) -> StartImage | None:
    """Read the image and the mask that a line names, if it names any.

    **Raises:** as `read_image` and `read_mask`.
    """
    if line.init_image is None:
        return None
    image = read_image(line.folder / line.init_image)
    mask = None
    if line.mask is not None:
        mask = read_mask(line.folder / line.mask, size=image.shape[:2])
    return StartImage(image, mask)


def start_facts(
    line: Line, repaint: Repaint, timer: Callable[[int, int], Times]
) -> StartFacts | None:
    """Return what is known of a line's image, after reading it once.

    **Arguments:** `repaint`: the one of the command line. `timer`: the times for a size.
    **Raises:** as `read_start`.
    """
    loaded = read_start(line)
    if loaded is None or line.init_image is None:
        return None
    if line.strength is not None:
        repaint = replace(repaint, strength=line.strength, rule="steps")
    height, width = loaded.image.shape[:2]
    description = {"init_image": describe_file(line.folder / line.init_image)}
    name = "start_time" if repaint.rule == "time" else "strength"
    description[name] = f"{repaint.strength:g}"
    start = repaint.start_of(timer(*padded_size(height, width)))
    description["start"] = f"t {start.time:.4f}, {start.steps} steps"
    if line.mask is not None:
        description["mask"] = describe_file(line.folder / line.mask)
    if repaint.repeats > 1:
        description["repeats"] = str(repaint.repeats)
    description["size"] = f"{width}x{height}"
    return StartFacts(height, width, description, repaint, line.mask is not None)


def describe_file(path: Path) -> str:
    """Return a file's name and the first digits of its SHA-256, for metadata."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGEST]
    return f"{encodable(path.name)}, sha256 {digest}"


def describe_start(repaint: Repaint, start: Start) -> str:
    """Return a line that says when drawing starts."""
    strength = f"strength {repaint.strength:g} starts"
    if repaint.rule == "time":
        strength = "drawing starts"
    steps = len(start.times) - 1
    return f"{strength} at t = {start.time:.3f} and takes {start.steps} of {steps} steps"
