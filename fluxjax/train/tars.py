"""Examples in tar files as WebDataset writes them: the files of one key are one example."""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from fluxjax.printable import printable, printable_path
from fluxjax.train.examples import (
    IMAGE_SUFFIXES,
    NO_CAPTION,
    AbstractBytes,
    BrokenExample,
    Example,
    FileBytes,
    Found,
    example_from,
)

_BLOCK = 512
Members = dict[str, FileBytes]
"""The files of one key, by their endings."""


def tar_examples(path: Path, fields: Mapping[str, str]) -> Found:
    """Return the examples of a tar file; it is indexed once, and nothing is extracted.

    A file's key is its path up to the first dot of its name. Each key has an image as `KEY.jpg`,
    and its caption in `KEY.txt` or in a field of `KEY.json`. `KEY.control.png`, `KEY.source.png`
    and `KEY.mask.png` are further images.

    **Arguments:** `fields`: as for `field_of`, in the JSON.
    **Raises:** `ValueError` for a file that is damaged, compressed, or not a tar file.
    """
    groups = _index(path)
    found: Found = []
    for key, members in groups.items():
        found.append(_example_of_members(f"{path.name}/{key}", members, fields))
    return found


def _index(path: Path) -> dict[str, Members]:
    """Return where the files in a tar file lie, by their keys."""
    groups: dict[str, Members] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    _add_member(groups, path, member)
            end = archive.offset
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from None
    # tarfile takes a damaged header for the end.
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(_BLOCK)
    if rest.strip(b"\0"):
        raise _damaged(path, f"there is no header at byte {end:,}")
    return groups


def _add_member(groups: dict[str, Members], path: Path, member: tarfile.TarInfo) -> None:
    folder, slash, file = member.name.rpartition("/")
    stem, _, ending = file.partition(".")
    if not stem:  # hidden files, as macOS adds them
        return
    members = groups.setdefault(folder + slash + stem, {})
    if ending.lower() in members:
        raise ValueError(
            f"{printable_path(path)} holds {printable(member.name)!r} twice. Write it again."
        )
    name = f"{path.name}/{member.name}"
    members[ending.lower()] = FileBytes(path, name, member.offset_data, member.size)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{printable_path(path)} is damaged, or not an uncompressed tar file: {reason}. "
        "Copy it again, or decompress it."
    )


def _example_of_members(
    name: str, members: Members, fields: Mapping[str, str]
) -> Example | BrokenExample:
    """Return the example of the members of a tar file with one key, or why it can't be used.

    **Arguments:** `name`: of the example. `members`: by what follows the key in their names.
    """
    images = _images(members)
    if "" not in images:
        return BrokenExample(name, "it has no image")
    try:
        record = _record(members)
        if "txt" in members:
            # The text file wins: JSON beside it often holds the caption of its origin as well.
            prompt = fields.get("prompt", "prompt")
            record = {prompt: members["txt"].read().decode()}
        elif not record:
            return BrokenExample(name, NO_CAPTION)
    except (OSError, ValueError) as error:
        return BrokenExample(name, f"its caption can't be read: {error}")

    def open_image(value: AbstractBytes) -> AbstractBytes:
        if not isinstance(value, AbstractBytes):
            raise ValueError("an image lies beside the JSON in a tar file, as KEY.control.png")
        return value

    for role, image in images.items():
        if role:
            record[fields.get(role, role)] = image
    return example_from(name, record, fields, open_image, image=images[""])


def _images(members: Members) -> dict[str, FileBytes]:
    """Return the images of a key by their roles; the example's own has the role ""."""
    images: dict[str, FileBytes] = {}
    for ending, member in members.items():
        role, _, suffix = ending.rpartition(".")
        if f".{suffix}" in IMAGE_SUFFIXES and role in ("", "control", "source", "mask"):
            images.setdefault(role, member)
    return images


def _record(members: Members) -> dict:
    if "json" not in members:
        return {}
    record = json.loads(members["json"].read())
    if not isinstance(record, dict):
        raise ValueError("its JSON is not an object, as {...}")
    return record
