"""A comparison of samplers as one labelled picture, with an enlarged part of each image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from fluxjax.generate.compare import Run
from fluxjax.generate.image import to_bytes

_MARGIN = 6
"""Pixels between the images of a grid."""
_TEXT = 13
"""Pixels of a line of text."""
_CROP = 4
"""The enlarged part of an image has this fraction of its sides."""
_LEAST_WIDTH = 256
"""Pixels that an image is enlarged to at least."""


class _Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def box(self, scale: int) -> tuple[int, int, int, int]:
        """Return the left, upper, right and lower edge in an image that is enlarged."""
        right, bottom = self.left + self.width, self.top + self.height
        return self.left * scale, self.top * scale, right * scale, bottom * scale


def comparison_grid(
    runs: Sequence[Run], images: Sequence[np.ndarray], *, scale: int | None = None
) -> PIL.Image.Image:
    """Return the images as one labelled picture.

    There is a row for each timer and integrator and a column for each number of steps, with the
    reference above. Beside each image is the part that differs most from the reference over all
    runs, a quarter of each side, enlarged.

    **Arguments:** `runs`, `images`: from `compare`. `scale`: pixels of the picture to one of an
    image; by default as many as make an image at least 256 wide.
    """
    height, width = images[0].shape[:2]
    if scale is None:
        scale = -(-_LEAST_WIDTH // width)
    rows = list(dict.fromkeys((run.timer, run.integrator) for run in runs))
    columns = list(dict.fromkeys(run.steps for run in runs))
    cell_width = 2 * width * scale + 2 * _MARGIN
    cell_height = height * scale + 2 * _TEXT + _MARGIN
    grid_width = len(columns) * cell_width + _MARGIN
    grid_height = (len(rows) + 1) * cell_height + _MARGIN
    picture = PIL.Image.new("RGB", (grid_width, grid_height), "white")
    font = ImageFont.load_default(_TEXT - 2)
    window = _most_different(images, height // _CROP, width // _CROP)

    def place(row: int, column: int, image: np.ndarray, label: str) -> None:
        """Paste an image, its part beside it, and its label below both."""
        x = _MARGIN + column * cell_width
        y = _MARGIN + row * cell_height
        whole, part = _framed_and_part(image, window, scale)
        picture.paste(whole, (x, y))
        picture.paste(part, (x + whole.width + _MARGIN, y))
        below = (x, y + whole.height)
        ImageDraw.Draw(picture).text(below, label, fill="black", font=font)

    place(0, 0, images[0], "reference")
    for run, image in zip(runs, images[1:], strict=True):
        row = 1 + rows.index((run.timer, run.integrator))
        column = columns.index(run.steps)
        place(row, column, image, _label(run))
    return picture


def _label(run: Run) -> str:
    """Return the two lines below an image."""
    return (
        f"{run.timer}, {run.integrator}, {run.steps} steps\n"
        f"{run.evaluations} evaluations, distance {run.distance:.3g}"
    )


def _framed_and_part(
    image: np.ndarray, window: _Window, scale: int
) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """Return an image enlarged, with the part framed, and the part at the same size."""
    height, width = image.shape[:2]
    nearest = PIL.Image.Resampling.NEAREST
    plain = PIL.Image.fromarray(to_bytes(image))
    whole = plain.resize((width * scale, height * scale), nearest)
    left, top, right, bottom = window.box(scale)
    part = whole.crop((left, top, right, bottom)).resize(whole.size, nearest)
    # The last pixels of a rectangle belong to it.
    frame = (left, top, right - 1, bottom - 1)
    ImageDraw.Draw(whole).rectangle(frame, outline="red")
    return whole, part


def _most_different(images: Sequence[np.ndarray], height: int, width: int) -> _Window:
    """Return the window in which images differ most from the first."""
    reference, *others = images
    error = np.zeros(reference.shape[:2], np.float64)
    for image in others:
        error += np.square(image - reference).sum(-1)
    # A window's sum is a difference of four sums from the top left corner of the image.
    sums = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    windows = sums[height:, width:] - sums[:-height, width:]
    windows = windows - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(np.argmax(windows), windows.shape)
    return _Window(int(top), int(left), height, width)
