"""New files and folders: written under a temporary name, then given their own name, so that they appear whole or not at all."""

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
except (
    ImportError
):  # Windows has no advisory locks of this kind: what a killed process leaves there stays
    fcntl = None  # type: ignore[assignment]

_NO_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EMLINK,
    errno.EACCES,
}
_LONGEST_STEM = 100  # bytes of the final name in a temporary one, so that this is not too long for the file system


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when the block ends, and leaves nothing behind if an error ends it.

    The temporary file lies beside `path`, has a random name, is created exclusively (so never through a link), and has the
    mode that the process's umask gives. It is locked while it is written: a later call for the same `path` removes the
    temporary files of processes that were killed, and only those.

    **Arguments:** `overwrite`: whether the file takes the place of an existing one.
    **Raises:** `FileExistsError` if there is something at `path`, also if it has appeared since the block began.
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
                _move_to_free_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder that gets its name when the block ends, and is removed if an error ends it. An empty folder at
    `path` gives way.

    **Raises:** `FileExistsError` if there is something else at `path`, also if it has appeared since the block began.
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
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
                raise
            raise _taken(path) from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: Path) -> None:
    """**Raises:** `FileExistsError` if there is something at a path; a link that leads nowhere is something, an empty folder is
    not."""
    if (
        path.is_symlink()
        or path.is_file()
        or (path.exists() and not (path.is_dir() and not any(path.iterdir())))
    ):
        raise _taken(path)


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(
        f"There is something at {path} already. Remove it, or choose another destination."
    )


def _stem(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:_LONGEST_STEM])


Descriptor = TypeVar("Descriptor", bound=int | None)


def _make_temporary(path: Path, create: Callable[[Path], Descriptor]) -> tuple[Path, Descriptor]:
    """Create a file or folder beside `path` and lock it; return it with its open descriptor."""
    while True:
        temporary = path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.part")
        descriptor = create(temporary)
        if fcntl is None or descriptor is None:
            return temporary, descriptor
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for abandoned.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                return temporary, descriptor
        os.close(descriptor)


def _create_file(path: Path) -> int:
    flags = (
        os.O_RDWR
        | os.O_CREAT
        | os.O_EXCL
        | getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_BINARY", 0)
    )
    return os.open(path, flags, 0o666)


def _create_folder(path: Path) -> int | None:
    path.mkdir()
    return None if fcntl is None else os.open(path, os.O_RDONLY)  # Windows opens no folders


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders for `path` that no living process has locked."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{16}}\.part")
    with suppress(OSError):
        for found in path.parent.iterdir():
            if pattern.fullmatch(found.name) and not found.is_symlink():
                with suppress(OSError):
                    _remove_if_unlocked(found)


def _remove_if_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its writer lives
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _move_to_free_name(temporary: Path, path: Path) -> None:
    """Give a file its name, which nothing may have. A hard link does that in one step; where the file system has none, the name
    is first taken by an empty file that only this process can have made."""
    try:
        os.link(temporary, path, follow_symlinks=False)
        return
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError as error:
        raise _taken(path) from error
    try:
        os.replace(temporary, path)
    except BaseException:
        path.unlink()
        raise
