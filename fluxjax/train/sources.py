"""Where examples lie: folders, JSON lines, tar files and Parquet files, by what is found there."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from fluxjax.printable import printable_path
from fluxjax.train.examples import IMAGE_SUFFIXES, Found, check_fields
from fluxjax.train.folders import folder_examples, json_examples
from fluxjax.train.parquet import parquet_examples
from fluxjax.train.tars import tar_examples

METADATA_FILE = "metadata.jsonl"
"""The file of a folder in Hugging Face's layout that has the captions of its images."""
_KINDS = (".jsonl", ".tar", ".parquet")


def find_examples(places: Sequence[str | Path], fields: Mapping[str, str]) -> Found:
    """Return the examples at some places, in order; their images are not read.

    **Arguments:** `places`: each a folder, a `.jsonl`, `.tar` or `.parquet` file, or a pattern such
    as `shards/*.tar`. `fields`: as for `field_of`.
    **Raises:** `FileNotFoundError` for a place where nothing is, `ValueError` for one that holds no
    examples, and for damaged files.
    """
    check_fields(fields)
    if not places:
        raise ValueError("Training needs data. Name a folder or files of examples.")
    found: Found = []
    for place in places:
        for path in _paths(str(place)):
            found += _examples_at(path, fields)
    return found


def _paths(place: str) -> list[Path]:
    """Return the paths that a place names, which may be a pattern, as data/*.tar.

    **Raises:** `FileNotFoundError` for none.
    """
    path = Path(place)
    if path.exists():
        return [path]
    matches = sorted(glob.glob(place, recursive=True))
    if not matches:
        raise FileNotFoundError(
            f"There is nothing at {printable_path(path)}. Check the path of the data."
        )
    return [Path(match) for match in matches]


def _examples_at(path: Path, fields: Mapping[str, str]) -> Found:
    """Return the examples of a folder or of a file, by what it is.

    **Raises:** `ValueError` for a file of another kind.
    """
    if path.is_dir():
        return _examples_in(path, fields)
    if path.suffix == ".jsonl":
        return json_examples(path, fields)
    if path.suffix == ".tar":
        return tar_examples(path, fields)
    if path.suffix == ".parquet":
        return parquet_examples(path, fields)
    raise ValueError(
        f"Data are a folder or {', '.join(_KINDS)} files, and {printable_path(path)} is neither. "
        "Decompress a compressed file first."
    )


def _examples_in(folder: Path, fields: Mapping[str, str]) -> Found:
    """Return the examples of a folder: of its metadata, of its images, or of its shards.

    **Raises:** `ValueError` for a folder of both images and shards, or of neither.
    """
    if (folder / METADATA_FILE).is_file():
        return json_examples(folder / METADATA_FILE, fields)
    files = _files_below(folder)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    shards = [path for path in files if path.suffix in (".tar", ".parquet")]
    if images and shards:
        raise ValueError(
            f"{printable_path(folder)} holds images, and {shards[0].suffix} files as well. Name "
            f"the one or the other: {printable_path(folder)}/*{shards[0].suffix} are the latter."
        )
    if not images and not shards:
        raise ValueError(
            f"There are no examples in {printable_path(folder)}. Put images with captions there, "
            f"as a.png with a.txt, or {', '.join(_KINDS[1:])} files."
        )
    if images:
        return folder_examples(folder, images)
    found: Found = []
    for path in shards:
        found += _examples_at(path, fields)
    return found


def _files_below(folder: Path) -> list[Path]:
    """Return the files of a folder and of those in it, without hidden ones, in order."""
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            files.append(path)
    return files
