"""Images as files, on the host."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.PngImagePlugin import PngInfo

from fluxjax.checkpoint.atomic import check_free, new_file
from fluxjax.printable import printable
from fluxjax.shapes import Image

_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
MOST_PIXELS = 2**27
"""Pixels of an image that is read: 134 million, 1.5 GiB as float32."""
_LONGEST_KEY = 79
"""Characters of a PNG's keyword."""


def to_bytes(image: Image | np.ndarray) -> np.ndarray:
    """Return an image of [-1, 1] as bytes, [height, width, 3]; values outside are clipped."""
    clipped = np.clip(np.asarray(image, np.float32), -1, 1)
    return np.round((clipped + 1) * 127.5).astype(np.uint8)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file: PNG, JPEG, WebP, AVIF, GIF (its first frame), BMP, TIFF or PPM.

    It is rotated as its EXIF orientation says, transparent pixels are blended with white, 16-bit
    gray keeps its levels, and other color models become RGB.

    **Returns:** float32 in [-1, 1], [height, width, 3].
    **Raises:** `ValueError` for a file that is not such an image, is damaged, or has more than 2^27
    pixels; `OSError` for one that can't be opened.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(
            f"`read_image(path)` needs a file, and {printable(str(path))} is not one. "
            "Pass an image file."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit of pixels, and notes on odd files
            return _read(path)
    except OSError as error:
        if error.errno is not None:  # the file system's
            raise
        raise _unreadable(path, error) from error
    except _TooLargeError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # decoders of damaged files raise of many kinds
        raise _unreadable(path, error) from error


class _TooLargeError(Exception):
    """An image has more pixels than are read."""


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = printable(str(error) or type(error).__name__)
    return ValueError(
        f"`read_image` can't read {printable(str(path))}: {reason}. "
        "Pass a whole image file, as PNG or JPEG."
    )


def _read(path: Path) -> np.ndarray:
    PIL.Image.init()
    formats = [name for name in _FORMATS if name in PIL.Image.OPEN]  # a Pillow may lack some
    with PIL.Image.open(path, formats=formats) as file:
        if file.width * file.height > MOST_PIXELS:
            raise _TooLargeError(
                f"`read_image` reads at most {MOST_PIXELS} pixels, and {printable(str(path))} has "
                f"{file.width}x{file.height}. "
                "Make it smaller."
            )
        file.load()
        return _values(PIL.ImageOps.exif_transpose(file))


def _values(image: PIL.Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # gray of 16 bits, which `convert` would cut to 8
        levels = np.asarray(image).astype(np.float32)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                "its gray levels are of 32 bits, of which it is not known what is white"
            )
        return np.repeat(levels[..., None] / 32767.5 - 1, 3, axis=-1)
    if image.mode == "F":
        raise ValueError(
            "its values are floating-point numbers, of which it is not known what is white"
        )
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
    values = np.asarray(image.convert("RGBA"), np.float32) / 255
    color, alpha = values[..., :3], values[..., 3:]
    return 2 * (color * alpha + 1 - alpha) - 1


def write_png(
    image: Image | np.ndarray | Any,
    path: Path | str,
    metadata: Mapping[Any, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write an image of [-1, 1] as a PNG that carries `metadata` as text.

    The file appears whole or not at all.

    **Arguments:** `image`: floats, [height, width, 3]; values outside of [-1, 1] are clipped.
    `path`: ends in .png. `metadata`: text by its name. `overwrite`: whether the file takes the
    place of an existing one.
    **Raises:** `FileExistsError` if there is a file, before anything else is done; `ValueError` for
    another ending, another shape or dtype, values that are not finite, and metadata that is not
    text.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(
            f"`write_png(path)` needs a name that ends in .png, got {printable(path.name)!r}. "
            "Choose one."
        )
    if not overwrite:
        check_free(path)
    elif path.is_dir():
        raise IsADirectoryError(
            f"`write_png(path)` needs a file, and {path} is a folder. Choose another name."
        )
    values, info = _checked(image), _text_chunks(metadata or {})
    with new_file(path, overwrite=overwrite) as file:
        PIL.Image.fromarray(to_bytes(values)).save(file, "PNG", pnginfo=info)


def _checked(image: Any) -> np.ndarray:
    """Return an image as an array.

    **Raises:** `ValueError` if it is none of [height, width, 3] with finite floats.
    """
    values = np.asarray(image)
    if values.ndim != 3 or values.shape[-1] != 3 or 0 in values.shape:
        hint = " Write the images of a batch one by one." if values.ndim == 4 else ""
        hint = " Move the channels last." if values.ndim == 3 and values.shape[0] == 3 else hint
        raise ValueError(
            f"`write_png(image)` needs one image, [height, width, 3], got "
            f"{list(values.shape)}.{hint}"
        )
    if values.dtype.kind not in "fV":  # V: bfloat16 and its like
        raise ValueError(
            f"`write_png(image)` needs floats in [-1, 1], got {values.dtype}. "
            "Pass bytes / 127.5 - 1."
        )
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(
            "`write_png(image)` needs finite numbers, got NaN or infinity in it. "
            "Look where they come from."
        )
    return values


def _text_chunks(metadata: Mapping[Any, Any]) -> PngInfo:
    info = PngInfo()
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(
                f"`write_png(metadata)` needs text, got {name!r}: {value!r}. Pass str of it."
            )
        if not (1 <= len(name) <= _LONGEST_KEY and name.isascii() and name.isprintable()):
            raise ValueError(
                f"`write_png(metadata)` needs names of 1 to {_LONGEST_KEY} printable ASCII "
                f"characters, got {printable(name)!r}."
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                "`write_png(metadata)` needs text that UTF-8 can encode, got "
                f"{printable(value)!r} as {name}. "
                "Remove its lone surrogates."
            ) from None
        info.add_itxt(name, value)
    return info


def read_metadata(path: Path) -> dict[str, str]:
    """Return a PNG's text; of a file that can't be read as one, nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(path, formats=["PNG"]) as file:
                file.load()  # type: ignore[no-untyped-call]
                text = file.text  # type: ignore[attr-defined]
                return {str(name): str(value) for name, value in text.items()}
    except Exception:  # damaged files raise of many kinds
        return {}


def write_numbered(
    image: Image | np.ndarray,
    folder: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    stem: str = "flux",
) -> Path:
    """Write `flux_N.png` with the number after the highest there; return its path."""
    number = next_number(folder, stem, (".png",))
    while True:
        path = folder / f"{stem}_{number}.png"
        try:
            write_png(image, path, metadata)
        except FileExistsError:  # written by someone else since
            number += 1
        else:
            return path


def next_number(folder: Path, stem: str, endings: tuple[str, ...]) -> int:
    """Return the number after the highest N of the files `STEM_N` with these endings."""
    files = [path for path in folder.glob(f"{stem}_*") if path.suffix in endings]
    taken = [path.stem.removeprefix(f"{stem}_") for path in files]
    return max((int(name) for name in taken if name.isdecimal() and len(name) < 19), default=-1) + 1
