"""Files of the model hub in its local cache: waits are bounded, the server's answers checked, contents verified."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.printable import printable
from fluxjax.checkpoint.safetensors import read_header

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASHES = {64: re.compile(r"[0-9a-f]{64}"), 40: _COMMIT}
# Headers that the hub's client makes names of files and folders of.
_NAMES_OF_FILES = ("etag", "x-linked-etag", "x-repo-commit", "x-xet-hash")
_FILE_NAME = re.compile(r"[0-9A-Za-z_+=-][0-9A-Za-z_+=.-]{0,199}")
_PARTIAL = re.compile(r"(.+)\.[0-9a-f]{8}\.incomplete")
_CHUNK = 16 * 2**20


def fetch_folder(repository: str, patterns: Sequence[str], *, verify: bool) -> Path:
    """Download the files of a repository whose paths match a pattern, those that are not in the cache, one after the other.

    A connection that is cut is taken up again where it ended; a file that a stopped run left half begins anew. The cache's
    reference to the newest version moves when all of its files have come.

    **Arguments:** `verify`: whether files that are there already are compared with their checksums, and fetched anew if they
    differ; what has just come always is.
    **Returns:** the folder that holds them.
    **Raises:** `WeightsError` for an answer that would place a file outside of the cache, or a file that comes damaged; the
    errors of `huggingface_hub`.
    """

    def wanted(names: Sequence[Any]) -> list[str]:
        return [name for name in names if _matches(str(name), patterns)]

    return _fetch(repository, wanted, verify)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def fetch_file(repository: str, file: str) -> Path:
    """Download one file of a repository unless it is in the cache, and verify it. Errors as for `fetch_folder`."""
    return _fetch(repository, lambda _: [file], True) / file


def cached_folder(repository: str, patterns: list[str] | None = None) -> Path:
    """Return the folder of the cache that holds a repository, without asking the server."""
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    _check_inside(root, _repository_folder(repository))
    return root


def cached_file(repository: str, file: str) -> Path | None:
    """Return a file of the newest version in the cache, without asking the server, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    if not isinstance(found, str):  # or a mark of a file that the repository lacks
        return None
    _check_inside(Path(found), _repository_folder(repository))
    return Path(found)


def _fetch(repository: str, choose: Callable[[Sequence[Any]], list[str]], verify: bool) -> Path:
    """Download the files that `choose` takes of all paths. **Returns:** the folder of that version."""
    from huggingface_hub import HfApi, constants

    folder = _repository_folder(repository)
    _remove_abandoned(folder)
    with _guarded_client():
        info = HfApi().model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise _hostile(repository, "version", info.sha)
        names = choose([sibling.rfilename for sibling in info.siblings or []])
        for name in names:
            if not _is_inside_name(name):
                raise _hostile(repository, "file's path", name)
        root = folder / "snapshots" / info.sha
        absent = not all((root / name).exists() for name in names)
        for name in tqdm(names, desc=f"Fetching {repository}", unit="file", disable=not absent):
            _fetch_one(repository, name, info.sha, verify)
    reference = folder / "refs" / constants.DEFAULT_REVISION
    if names and not (reference.is_file() and reference.read_bytes() == info.sha.encode()):
        with new_file(reference, overwrite=True) as file:
            file.write(info.sha.encode())
    return root


def _fetch_one(repository: str, name: str, commit: str, verify: bool) -> None:
    """Download a file of one version, and once more if it is damaged."""
    from huggingface_hub import constants, hf_hub_download

    folder = _repository_folder(repository)
    expected = folder / "snapshots" / commit / name
    there = expected.exists()
    for _ in range(2):
        path = Path(
            hf_hub_download(
                repository, name, revision=commit, etag_timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        )
        if path.resolve() != expected.resolve():
            raise _hostile(repository, "version", path.parent.name)
        _check_inside(expected, folder)
        if (there and not verify) or is_whole(expected):
            return
        there = False
        _remove(expected)
    raise WeightsError(
        f"{printable(name)} of {repository} comes damaged from the hub. Try again, or check HF_ENDPOINT."
    )


def _repository_folder(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / repo_folder_name(
        repo_id=repository, repo_type="model"
    )


def _is_inside_name(name: Any) -> bool:
    """Whether a path of a repository stays inside of it on every system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not set(name) & set('\\:*?"<>|')
        and not {"", ".", ".."} & set(name.split("/"))
    )


def _check_inside(path: Path, folder: Path) -> None:
    """**Raises:** `WeightsError` if a path of the cache leads out of it. A user may have moved the cache, the repository's
    folder or its `blobs` to another disk and left a link."""
    place = path.resolve()
    if not any(
        place.is_relative_to(room.resolve()) for room in (folder.parent, folder, folder / "blobs")
    ):
        raise WeightsError(
            f"{path} leads out of the hub's cache, to {place}. Remove {folder}, and download it anew."
        )


def _hostile(repository: str, what: str, value: Any) -> WeightsError:
    return WeightsError(
        f"The hub's answer for {repository} names a {what} that can't be one: {printable(repr(value))}. Nothing was written "
        "there. Check HF_ENDPOINT, and whether you trust this server."
    )


@contextmanager
def _guarded_client() -> Iterator[None]:
    """Give the hub's client a limit to each wait, and a check of what it would make file names of; it has neither."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY  # there is no public way to ask for it

    def make() -> Any:
        client = before()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", ()), _limit_wait],
            "response": [*hooks.get("response", ()), _check_headers],
        }
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(before)


def _limit_wait(request: Any) -> None:
    """Limit how long a request waits for a connection and for each piece of the answer, in seconds."""
    from huggingface_hub import constants

    limit = (
        constants.HF_HUB_ETAG_TIMEOUT
        if request.method == "HEAD"
        else constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    waits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        step: limit if waits.get(step) is None else min(waits[step], limit)
        for step in ("connect", "read", "write", "pool")
    }


def _check_headers(response: Any) -> None:
    if response.request.method != "HEAD":
        return
    for header in _NAMES_OF_FILES:
        value = response.headers.get(header)
        if value is not None and not _FILE_NAME.fullmatch(value.removeprefix("W/").strip('"')):
            raise _hostile(response.request.url.host, header, value)


def is_whole(path: Path) -> bool:
    """Whether a file of the cache is what the hub has: its checksum is the name of what it links to, SHA-256 or, for small
    files, git's SHA-1. Without a link (as on Windows) or such a name, the header of weights is checked against the size."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    if len(name) in _HASHES and _HASHES[len(name)].fullmatch(name):
        return _checksum(path, len(name)) == name
    if path.suffix != ".safetensors":
        return True
    with suppress(WeightsError):
        read_header(path)
        return True
    return False


def check_whole(root: Path, patterns: Sequence[str]) -> None:
    """**Raises:** `WeightsError` for a damaged file below a folder of the cache whose path there matches a pattern. Called when
    the hub can't be reached to fetch it anew."""
    for path in sorted(root.rglob("*")):
        if (
            path.is_file()
            and _matches(path.relative_to(root).as_posix(), patterns)
            and not is_whole(path)
        ):
            raise WeightsError(
                f"{printable(str(path))} is damaged, and the hub can't be reached to download it anew."
            )


def _checksum(path: Path, digits: int) -> str:
    size = path.stat().st_size
    digest = (
        hashlib.sha256()
        if digits == 64
        else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    )
    about = {
        "desc": f"Verifying {path.name}",
        "unit": "B",
        "unit_scale": True,
        "disable": size < 100_000_000,
    }
    with open(path, "rb") as file, tqdm(total=size, **about) as bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Remove a file of the cache, and what it links to."""
    if path.is_symlink():
        (path.parent / os.readlink(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove the parts of files that killed runs left. The hub's client holds a lock of the file's name while it writes; it
    gives each run a name of its own, so what is left serves no later run."""
    if fcntl is None:
        return
    for path in (folder / "blobs").glob("*.incomplete"):
        found = _PARTIAL.fullmatch(path.name)
        if found is None:  # of an older client, which goes on with it
            continue
        lock = folder.parent / ".locks" / folder.name / f"{found[1]}.lock"
        with suppress(OSError), open(lock, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the writer lives
            path.unlink()
