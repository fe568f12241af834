"""Run the programs of the recipes, and keep the pictures that they draw, with few colors."""

import argparse
import re
import tempfile
import time
from contextlib import chdir
from pathlib import Path

import PIL.Image

FOLDER = Path(__file__).resolve().parent / "recipes"
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
COLORS = 24
"""Of a picture: enough for flat scenes, and a third of the bytes."""


def run(page: Path) -> None:
    """Run a page's programs one after another, in a folder that does not outlive them."""
    start = time.monotonic()
    program = "\n".join(PROGRAM.findall(page.read_text()))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        exec(compile(program, page.name, "exec"), {})
        for picture in Path(folder).glob("*.png"):
            image = PIL.Image.open(picture).convert("RGB")
            few = image.quantize(COLORS, dither=PIL.Image.Dither.NONE)
            few.save(FOLDER / picture.name, optimize=True)
    print(f"{page.name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="by default all recipes")
    for page in parser.parse_args().pages or sorted(FOLDER.glob("*.md")):
        run(page.resolve())


if __name__ == "__main__":
    main()
