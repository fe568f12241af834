"""A folder of pictures with captions, as a training reads."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(folder: Path, count: int, side: int) -> None:
    """Write `count` square pictures of random levels, each with a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        levels = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red star")
