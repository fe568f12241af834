"""Files of model repositories on the Hugging Face hub, in its local cache.

The hub's client downloads them. Here, every wait is bounded, the server's answers are checked
before a file is placed, and the content of each file is verified.
"""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.checksums import is_undamaged, matches_any
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.hub_client import guarded_client, hostile_answer
from fluxjax.printable import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PARTIAL_DOWNLOAD = re.compile(r"(.+)\.[0-9a-f]{8}\.incomplete")
_UNSAFE_CHARACTERS = frozenset('\\:*?"<>|')  # on Windows


def fetch_folder(repository: str, patterns: Sequence[str], *, verify: bool) -> Path:
    """Download the files of a repository whose paths match a pattern, unless the cache has them.

    A connection that breaks is resumed where it ended; a file that a killed process left incomplete
    is downloaded from its beginning. The cache's reference to the newest version changes when all
    files are complete.

    **Arguments:** `repository`: a hub id, owner/name. `patterns`: see `matches_any`. `verify`:
    whether files that are in the cache already are compared with their checksums, and downloaded
    again if they differ. New files always are.
    **Returns:** the folder of the newest version in the cache.
    **Raises:** `WeightsError` for an answer that would place a file outside of the cache, or for a
    file that arrives damaged; the errors of `huggingface_hub`.
    """

    def choose(names: Sequence[str]) -> list[str]:
        return [name for name in names if matches_any(str(name), patterns)]

    return _fetch(repository, choose, verify)


def fetch_file(repository: str, file: str) -> Path:
    """Download one file of a repository unless the cache has it, and verify it.

    **Returns:** the file in the cache.
    **Raises:** as `fetch_folder`.
    """
    return _fetch(repository, lambda names: [file], True) / file


def cached_folder(repository: str, patterns: list[str] | None = None) -> Path:
    """Return the folder of the cache that holds a repository, without a request to the server.

    **Raises:** `WeightsError` if it leads out of the cache; the errors of `huggingface_hub`.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    _check_inside_cache(folder, _repository_folder(repository))
    return folder


def cached_file(repository: str, file: str) -> Path | None:
    """Return a file of the newest version in the cache, without a request to the server.

    **Returns:** None if the cache does not hold it.
    **Raises:** `WeightsError` if it leads out of the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file)
    if not isinstance(path, str):  # None, or a mark that the repository has no such file
        return None
    _check_inside_cache(Path(path), _repository_folder(repository))
    return Path(path)


def _fetch(repository: str, choose: Callable[[Sequence[str]], list[str]], verify: bool) -> Path:
    """Download files of the newest version, and return its folder in the cache.

    **Arguments:** `choose`: returns the files to download, of all paths in the repository.
    """
    from huggingface_hub import HfApi, constants

    folder = _repository_folder(repository)
    _remove_abandoned_downloads(folder)
    with guarded_client():
        info = HfApi().model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit = info.sha
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise hostile_answer(repository, "version", commit)
        names = choose([sibling.rfilename for sibling in info.siblings or []])
        for name in names:
            if not _stays_inside(name):
                raise hostile_answer(repository, "path of a file", name)
        version = folder / "snapshots" / commit
        is_complete = all((version / name).exists() for name in names)
        progress = tqdm(names, desc=f"Fetching {repository}", unit="file", disable=is_complete)
        for name in progress:
            _fetch_one(repository, name, commit, verify)
    if names:
        _set_reference(folder / "refs" / constants.DEFAULT_REVISION, commit)
    return version


def _fetch_one(repository: str, name: str, commit: str, verify: bool) -> None:
    """Download one file of a version, and a second time if it arrives damaged."""
    from huggingface_hub import constants, hf_hub_download

    folder = _repository_folder(repository)
    expected = folder / "snapshots" / commit / name
    was_cached = expected.exists()
    for _ in range(2):
        answer = hf_hub_download(
            repository, name, revision=commit, etag_timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        path = Path(answer)
        if path.resolve() != expected.resolve():
            raise hostile_answer(repository, "version", path.parent.name)
        _check_inside_cache(expected, folder)
        if was_cached and not verify:
            return
        if is_undamaged(expected):
            return
        was_cached = False
        _remove_with_target(expected)
    raise WeightsError(
        f"{printable(name)} of {repository} arrives damaged from the hub. Try again, or check "
        "HF_ENDPOINT."
    )


def _set_reference(path: Path, commit: str) -> None:
    """Make a version the newest one of the cache."""
    content = commit.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    with new_file(path, overwrite=True) as file:
        file.write(content)


def _repository_folder(repository: str) -> Path:
    """Return the folder of the cache for all versions of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=repository, repo_type="model")


def _stays_inside(name: object) -> bool:
    """Return whether a path in a repository stays inside of its folder on every system."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    if not _UNSAFE_CHARACTERS.isdisjoint(name):
        return False
    return {"", ".", ".."}.isdisjoint(name.split("/"))


def _check_inside_cache(path: Path, folder: Path) -> None:
    """Check that a path of the cache does not lead out of it.

    A user may have moved the cache, the repository's folder or its `blobs` to another disk and left
    a symbolic link, so each of these may hold the file.

    **Arguments:** `folder`: the repository's.
    **Raises:** `WeightsError` if it does.
    """
    target = path.resolve()
    for allowed in (folder.parent, folder, folder / "blobs"):
        if target.is_relative_to(allowed.resolve()):
            return
    raise WeightsError(
        f"{path} leads out of the hub's cache, to {target}. Remove {folder}, and download it again."
    )


def _remove_with_target(path: Path) -> None:
    """Remove a file of the cache, and the file that it links to."""
    if path.is_symlink():
        target = path.parent / os.readlink(path)
        target.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _remove_abandoned_downloads(folder: Path) -> None:
    """Remove the incomplete files that killed processes left.

    The hub's client locks a file named after the download while it writes. Each process writes
    under a name of its own, so no later process can continue with what is left.
    """
    if fcntl is None:
        return
    for path in (folder / "blobs").glob("*.incomplete"):
        match = _PARTIAL_DOWNLOAD.fullmatch(path.name)
        if match is None:  # of an older client, which does continue with it
            continue
        lock = folder.parent / ".locks" / folder.name / f"{match[1]}.lock"
        with suppress(OSError), open(lock, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the writer lives
            path.unlink()
