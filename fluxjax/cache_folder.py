"""Where fluxjax keeps what it can make again: compiled programs, results of checks."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the user's folder for fluxjax's caches, or None for a user without a home."""
    cache_home = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(cache_home or Path.home() / ".cache")
    except RuntimeError:  # there is no home folder
        return None
    return base / "fluxjax"
