"""Disk space: reserved before a large file is written, and one clear error if there is none."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxjax.checkpoint.errors import WeightsError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing fails with on a full disk, above a quota, or above the largest size of a file."""


@contextmanager
def explain_full_disk(path: Path, total: int) -> Iterator[None]:
    """Turn the operating system's error for a full disk into one that says what is needed.

    **Arguments:** `path`: what is written in the block. `total`: its size in bytes.
    **Raises:** `WeightsError` if the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise WeightsError(
            f"There is not enough disk space for {path} ({total / 1e9:,.2f} GB): {error.strerror}. "
            "Nothing was left behind. Free some space, or write elsewhere."
        ) from error


def reserve_space(descriptor: int, total: int) -> None:
    """Reserve `total` bytes on the disk for an open file, where the file system can do that."""
    try:
        os.posix_fallocate(descriptor, 0, total)
    except AttributeError:  # not on this platform
        return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
