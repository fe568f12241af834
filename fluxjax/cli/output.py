"""The folder that images are written to, and text that a file's metadata can hold."""

import os
from pathlib import Path


def writable(folder: Path, option: str = "--output-dir") -> Path:
    """Create a folder if it does not exist, and check that files can be written to it.

    **Arguments:** `option`: that names it, for messages.
    **Returns:** the folder.
    **Raises:** `ValueError` if it can't be created or written to.
    """
    remedy = "Choose a folder that you may write to."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.absolute()  # raises for a relative path if the current folder was deleted
    except OSError as error:
        raise ValueError(f"{option} {folder} can't be made ({error.strerror}). {remedy}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {folder} is not writable. {remedy}")
    return folder


def encodable(name: str) -> str:
    """Return a path as text; bytes of it that are not valid UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
