"""Whether files in the hub's cache are undamaged: compared with the checksums of the hub."""

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from tqdm import tqdm

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.printable import printable_path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA1_DIGITS = 40
_CHUNK_BYTES = 16 * 2**20
_PROGRESS_BYTES = 100_000_000  # larger files take a second or more, so a progress bar is shown


def is_undamaged(path: Path) -> bool:
    """Return whether a file of the cache has the content that the hub has.

    In the cache, a file is a symbolic link to another file that is named after its checksum:
    SHA-256, or git's SHA-1 for small files. Without such a link (as on Windows), only the header of
    a safetensors file is checked against its size.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    if _SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name):
        return _checksum(path, of_git=len(name) == _SHA1_DIGITS) == name
    if path.suffix != ".safetensors":
        return True
    with suppress(WeightsError):
        read_header(path)
        return True
    return False


def check_folder_undamaged(root: Path, patterns: Sequence[str]) -> None:
    """Check the files below a folder of the cache when the hub can't be reached.

    **Arguments:** `patterns`: of paths below `root`, see `matches_any`; other files are ignored.
    **Raises:** `WeightsError` that names a damaged file.
    """
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and matches_any(name, patterns) and not is_undamaged(path):
            raise WeightsError(
                f"{printable_path(path)} is damaged, and the hub can't be reached to download it "
                "again. Check the network, and try again."
            )


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a path matches one of the patterns, in which * stands for any characters."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _checksum(path: Path, of_git: bool) -> str:
    """Return the checksum of a file in hexadecimal: git's SHA-1, else SHA-256."""
    size = path.stat().st_size
    if of_git:
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    progress = tqdm(
        total=size,
        desc=f"Verifying {path.name}",
        unit="B",
        unit_scale=True,
        disable=size < _PROGRESS_BYTES,
    )
    with open(path, "rb") as file, progress:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()
