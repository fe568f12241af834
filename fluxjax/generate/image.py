"""Images as files, on the host."""

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

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
_ORIENTATION = 0x0112
"""EXIF's tag of how an image is rotated; from 5 on, its sides are exchanged."""
Content = TypeVar("Content")
"""What is read from an image."""


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own limit of pixels, and notes on odd files
        return _from_file("read_image", path, str(path), _pixels)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode the content of an image file, as `read_image` reads one. Threads may call it at once.

    **Arguments:** `name`: what errors call it.
    **Returns:** float32 in [-1, 1], [height, width, 3].
    **Raises:** `ValueError` as `read_image`.
    """
    return _from_file("decode_image", io.BytesIO(data), name, _pixels)


def stored_size(file: Path | io.BytesIO, name: str) -> tuple[int, int]:
    """Return the height and width of an image file after its rotation; only its header is read.

    **Arguments:** `file`: a path, or content in memory. `name`: what errors call it.
    **Raises:** as `read_image`.
    """
    return _from_file("stored_size", file, name, _rotated_size)


class _TooLargeError(Exception):
    """An image has more pixels than are read."""


def _from_file(
    call: str, file: Path | io.BytesIO, name: str, read: Callable[[PIL.Image.Image], Content]
) -> Content:
    """Return what `read` reads from an opened image; errors are those of `read_image`."""
    PIL.Image.init()
    formats = [known for known in _FORMATS if known in PIL.Image.OPEN]  # a Pillow may lack some
    try:
        with PIL.Image.open(file, formats=formats) as image:
            if image.width * image.height > MOST_PIXELS:
                raise _TooLargeError(
                    f"`{call}` reads at most {MOST_PIXELS} pixels, and {printable(name)} has "
                    f"{image.width}x{image.height}. Make it smaller."
                )
            return read(image)
    except OSError as error:
        if error.errno is not None:  # the file system's
            raise
        raise _unreadable(call, name, error) from error
    except _TooLargeError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # decoders of damaged files raise of many kinds
        raise _unreadable(call, name, error) from error


def _unreadable(call: str, name: str, error: Exception) -> ValueError:
    """Return the error for an image that can't be decoded."""
    reason = printable(str(error) or type(error).__name__)
    if isinstance(error, PIL.UnidentifiedImageError):  # whose text may name an object in memory
        reason = "it is not an image in a known format"
    return ValueError(
        f"`{call}` can't read {printable(name)}: {reason}. Pass a whole image file, as PNG or JPEG."
    )


def _pixels(file: PIL.Image.Image) -> np.ndarray:
    file.load()
    return _values(PIL.ImageOps.exif_transpose(file))


def _rotated_size(file: PIL.Image.Image) -> tuple[int, int]:
    """Return the height and width of an image as it is shown, turned as its EXIF data say."""
    # Not PNG's own method, which decodes the image to find EXIF data after it.
    orientation = PIL.Image.Image.getexif(file).get(_ORIENTATION, 1)
    if orientation >= 5:
        return file.width, file.height
    return file.height, file.width


def _values(image: PIL.Image.Image) -> np.ndarray:
    """Return the colors of an image in [-1, 1], [height, width, 3]; what is transparent is white.

    **Raises:** `ValueError` for levels of which it is not known what is white.
    """
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
    """**Raises:** `ValueError` for metadata that PNG can't hold, or that are no text."""
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
