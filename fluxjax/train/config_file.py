"""The configuration file of a training: TOML."""

import tomllib
from pathlib import Path
from typing import Any

from fluxjax.printable import printable, printable_path


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    **Raises:** `OSError` if it can't be read, `ValueError` if it is not TOML in UTF-8.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and TOMLDecodeError are among these
        raise ValueError(
            f"{printable_path(path)} is not TOML: {printable(str(error))}. Correct it."
        ) from None
