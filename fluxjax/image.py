"""Images as PNG files, on the host."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo

from fluxjax.shapes import Image


def to_bytes(image: Image | np.ndarray) -> np.ndarray:
    """Return an image of [-1, 1] as bytes, [height, width, 3]; values outside are clipped."""
    return np.round((np.clip(np.asarray(image, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as float32 in [-1, 1], [height, width, 3]."""
    with PIL.Image.open(path) as file:
        return np.asarray(file.convert("RGB"), np.float32) / 127.5 - 1


def write_png(image: Image | np.ndarray, path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write an image of [-1, 1] as a PNG that carries `metadata` as text.

    **Raises:** `FileExistsError` if the file is there: it is never overwritten. The file appears whole or not at all.
    """
    path, info = Path(path), PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, value)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            PIL.Image.fromarray(to_bytes(image)).save(file, "PNG", pnginfo=info)
        os.chmod(temporary, 0o644)
        os.link(temporary, path)
    finally:
        os.unlink(temporary)


def write_numbered(
    image: Image | np.ndarray, folder: Path, metadata: Mapping[str, str] | None = None, *, stem: str = "flux"
) -> Path:
    """Write `flux_N.png` with the number after the highest there; return its path."""
    taken = [path.stem.removeprefix(f"{stem}_") for path in folder.glob(f"{stem}_*.png")]
    number = max((int(name) for name in taken if name.isdecimal()), default=-1) + 1
    while True:
        path = folder / f"{stem}_{number}.png"
        try:
            write_png(image, path, metadata)
        except FileExistsError:  # written by someone else since
            number += 1
        else:
            return path
