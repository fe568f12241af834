"""Run the commands and programs of the how-to pages, and keep the pictures that they draw."""

import argparse
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

import numpy as np
import PIL.Image

from fluxjax.cli.main import main as run_command

FOLDER = Path(__file__).resolve().parent / "howto"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.S | re.M)
COLORS = 64
"""Of a picture: enough for flat scenes, and a third of the bytes."""
WIDEST = 800
"""Pixels of a picture along its longer side."""
GAP = 6
"""White pixels between two images that are shown side by side."""
ROWS = {
    "several": [f"flux_{number}.png" for number in range(4)],
    "sampler": ["compare_0.png"],
    "negative": ["flux_0.png", "cfg/flux_0.png", "nag/flux_0.png"],
    "style": ["kraft/flux_0.png", "chalk/flux_0.png", "both/flux_0.png"],
    "change": ["flux_0.png", "edit_0.png", "green/edit_0.png"],
    "part": ["flux_0.png", "fill_0.png", "inpainted/flux_0.png"],
    "extend": ["flux_0.png", "outpaint_0.png"],
    "edges": ["flux_0.png", "followed/flux_0.png"],
    "regions": ["flux_0.png", "halves/flux_0.png"],
    "restore": ["flux_0.png", "small.png", "restore_0.png"],
}
"""The images of each page's picture, from left to right."""


def run(page: Path) -> None:
    """Run the blocks of a page in their order, in the current folder."""
    names: dict = {}
    for kind, text in BLOCK.findall(page.read_text()):
        if kind == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            run_command(shlex.split(line)[1:])


def row_of(paths: Sequence[Path]) -> PIL.Image.Image:
    """Return images beside each other; smaller ones are enlarged to the height of the first."""
    images = [PIL.Image.open(path).convert("RGB") for path in paths]
    height = images[0].height
    scaled = [
        image.resize((image.width * height // image.height, height), PIL.Image.Resampling.NEAREST)
        for image in images
    ]
    gap = np.full((height, GAP, 3), 255, np.uint8)
    parts = [gap]
    for image in scaled:
        parts += [np.asarray(image), gap]
    return PIL.Image.fromarray(np.concatenate(parts[1:-1], axis=1))


def with_few_colors(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an image of a palette, whose colors are far apart at first, and then means."""
    method = PIL.Image.Quantize.MAXCOVERAGE  # a small object counts as much as the background
    return image.quantize(COLORS, method, kmeans=4, dither=PIL.Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    # argparse compares the empty list of no pages with the choices as well.
    parser.add_argument("pages", nargs="*", choices=[*ROWS, []], help="by default all")
    for name in parser.parse_args().pages or ROWS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            run(FOLDER / f"{name}.md")
            row = row_of([Path(folder) / path for path in ROWS[name]])
        row.thumbnail((WIDEST, WIDEST))
        few = with_few_colors(row)
        few.save(FOLDER / f"{name}.png", optimize=True)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
