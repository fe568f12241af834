"""The same few examples in each format that training reads."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((40, 40), (64, 64), (32, 62), (30, 60), (36, 36))
"""Heights and widths: with size 32, two kinds of proportions."""
CAPTIONS = tuple(f"a red star number {number}" for number in range(len(SIZES)))
WEIGHTS = (1.0, 0.5, 2.0, 1.0, 1.0)
FORMATS = ("folder", "metadata", "jsonl", "tar", "parquet")


def png(number: int, kind: str = "image") -> bytes:
    """Return an image of the example of this number, as a PNG."""
    seed = (number, *kind.encode())
    levels = np.random.default_rng(seed).integers(0, 256, (*SIZES[number], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path) -> Path:
    """Write images with captions in text files."""
    folder.mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(caption + "\n")
    return folder


def write_json(path: Path, names: tuple[str, ...], **further: str) -> Path:
    """Write images and JSON lines.

    **Arguments:** `names`: of the fields of the image and the caption. `further`: kinds of images
    by their fields.
    """
    path.parent.mkdir(parents=True)
    lines = []
    for number, caption in enumerate(CAPTIONS):
        (path.parent / f"{number}.png").write_bytes(png(number))
        line = {names[0]: f"{number}.png", names[1]: caption, "weight": WEIGHTS[number]}
        for field, kind in further.items():
            (path.parent / f"{number}.{kind}.png").write_bytes(png(number, kind))
            line[field] = f"{number}.{kind}.png"
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tar(path: Path) -> Path:
    """Write a tar file as WebDataset does: captions in text files and in JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, caption in enumerate(CAPTIONS):
            if number % 2:
                words = {"txt": caption.encode()}
            else:
                words = {"json": json.dumps({"caption": caption}).encode()}
            for ending, data in {"png": png(number), **words}.items():
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path) -> Path:
    """Write a Parquet file as Hugging Face's datasets do, of two rows in a row group."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in range(len(SIZES))]
    table = pyarrow.table({"image": images, "text": list(CAPTIONS), "weight": list(WEIGHTS)})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def write_examples(folder: Path, kind: str) -> Path:
    """Write the examples in a format; return what training reads."""
    if kind == "folder":
        return write_folder(folder / "folder")
    if kind == "metadata":
        return write_json(folder / "metadata" / "metadata.jsonl", ("file_name", "text")).parent
    if kind == "jsonl":
        return write_json(folder / "jsonl" / "all.jsonl", ("image", "prompt"))
    if kind == "tar":
        return write_tar(folder / "all.tar")
    return write_parquet(folder / "all.parquet")
