"""New files and folders that appear complete or not at all.

They are written under a temporary name and renamed when they are complete.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

try:
    import fcntl
except ImportError:
    # Windows has no advisory locks of this kind, so what a killed process leaves there stays.
    fcntl = None  # type: ignore[assignment]

# What `os.link` fails with on file systems that have no hard links.
_NO_HARD_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EMLINK,
    errno.EACCES,
}
# What `os.rename` of a folder fails with where something other than an empty folder is.
_NOT_AN_EMPTY_FOLDER = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
# Bytes of the final name that a temporary name repeats; file systems allow 255 in all.
_LONGEST_STEM = 100


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that is renamed to `path` when the block ends without an error.

    An error in the block leaves nothing behind. The temporary file lies beside `path`, has a random
    name, is created exclusively (so never through a symbolic link), and gets the mode that the
    process's umask gives. It is locked while it is written: a later call for the same `path`
    removes the temporary files of processes that were killed, and only those.

    **Arguments:** `overwrite`: whether an existing file is replaced.
    **Raises:** `FileExistsError` if `path` exists, also if it was created since the block began.
    """
    if not overwrite:
        check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary, descriptor = _make_temporary(path, _create_file)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            if overwrite:
                os.replace(temporary, path)
            else:
                _rename_to_free_path(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder that is renamed to `path` when the block ends without an error.

    An error in the block removes the folder. An empty folder at `path` is replaced.

    **Raises:** `FileExistsError` if anything else is at `path`, also if it was created since the
    block began.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary, descriptor = _make_temporary(path, _create_folder)
    try:
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in _NOT_AN_EMPTY_FOLDER:
                raise
            raise _exists_error(path) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: Path) -> None:
    """Check that nothing is at a path; an empty folder counts as nothing.

    **Raises:** `FileExistsError` for a file, a folder that is not empty, or a symbolic link, also
    one that leads nowhere.
    """
    if path.is_symlink() or path.is_file():
        raise _exists_error(path)
    if path.exists() and not _is_empty_folder(path):
        raise _exists_error(path)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _exists_error(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} already exists. Remove it, or choose another destination.")


def _stem(path: Path) -> str:
    """Return the part of the final name that temporary names repeat."""
    return os.fsdecode(os.fsencode(path.name)[:_LONGEST_STEM])


Descriptor = TypeVar("Descriptor", bound=int | None)
"""An open file descriptor, or None where a folder can't be opened."""


def _make_temporary(path: Path, create: Callable[[Path], Descriptor]) -> tuple[Path, Descriptor]:
    """Create a file or folder beside `path`, lock it, and return it with its open descriptor."""
    while True:
        temporary = path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.part")
        descriptor = create(temporary)
        if fcntl is None or descriptor is None:
            return temporary, descriptor
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before it was locked, another process may have removed it as abandoned.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                return temporary, descriptor
        os.close(descriptor)


def _create_file(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    # Neither flag exists on every platform.
    flags |= getattr(os, "O_NOFOLLOW", 0)
    flags |= getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)


def _create_folder(path: Path) -> int | None:
    path.mkdir()
    if fcntl is None:
        return None  # Windows opens no folders
    return os.open(path, os.O_RDONLY)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders for `path` that no living process has locked."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{16}}\.part")
    with suppress(OSError):
        for temporary in path.parent.iterdir():
            if pattern.fullmatch(temporary.name) and not temporary.is_symlink():
                with suppress(OSError):
                    _remove_if_unlocked(temporary)


def _remove_if_unlocked(path: Path) -> None:
    """Remove a temporary file or folder whose writer has ended.

    **Raises:** `OSError` while its writer lives, which holds a lock on it.
    """
    # Not blocking: something under this name could be a pipe, and opening it would wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its writer lives
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _rename_to_free_path(temporary: Path, path: Path) -> None:
    """Rename a file, and fail if the new path exists; `os.rename` would replace what is there.

    A hard link does that in one step. Where the file system has none, the path is first claimed by
    an empty file, which is created exclusively, and that file is then replaced.
    """
    try:
        os.link(temporary, path, follow_symlinks=False)
        return
    except FileExistsError as error:
        raise _exists_error(path) from error
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError as error:
        raise _exists_error(path) from error
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink()
        raise
