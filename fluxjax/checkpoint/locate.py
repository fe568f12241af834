"""A model's name, hub id or path to the folder or file where it lies."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.hub import cached_file, cached_folder, check_whole, fetch_file, fetch_folder
from fluxjax.checkpoint.safetensors import WeightsError
from fluxjax.zoo import ZOO


def locate(source: str | Path, part: str) -> Path:
    """Return where one part of a model lies: its own folder or file, or those of the whole; downloaded if need be.

    **Raises:** `FileNotFoundError` for no such source, and what `download` raises.
    """
    path = find(source, [part])
    return path / part if (path / part).is_dir() else path


def find(source: str | Path, parts: Iterable[str], *, cached: bool = False) -> Path:
    """Return the folder or file that a source is: a path, or a name whose parts are downloaded, or with `cached` only looked
    for in the hub's cache. Errors as for `locate`."""
    entry, path = ZOO.get(str(source)), Path(source)
    if entry is not None and entry.repository is None:
        return tiny_folder()
    if entry is None and path.exists():
        return path
    if entry is not None or _is_repository(str(source)):
        return download(str(source), parts, cached=cached, verify=False)
    raise FileNotFoundError(
        f"There is no {str(source)!r}. Pass a known model ({', '.join(ZOO)}), a model's folder, a .safetensors or .gguf file, "
        "or a hub id."
    )


def _is_repository(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


PACKAGE = Path(__file__).parent.parent
WHOLE = (
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "vae",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
"""The folders of a diffusers checkpoint that fluxjax reads."""


def download(
    name: str, parts: Iterable[str] = WHOLE, *, cached: bool = False, verify: bool = True
) -> Path:
    """Download the folders of a model that fluxjax reads into the hub's cache, those files that are not there or damaged.

    A connection that is cut is taken up again where it ended. A run that is stopped keeps the files that have come whole.

    **Arguments:** `name`: a zoo name or a hub id in the diffusers layout. `parts`: of its folders. `cached`: take
    what is in the cache, and ask nobody. `verify`: compare files that are in the cache with their checksums (dev's 34 GB take
    about a minute), and fetch those anew that differ.
    **Returns:** the folder that holds them.
    **Raises:** `WeightsError` for a gated repository, or answers that would place a file outside of the cache;
    `FileNotFoundError` for none of that name or layout, `ConnectionError` without a network; each says what to do.
    """
    entry = ZOO.get(name)
    if entry is not None and entry.repository is None:
        return tiny_folder()
    repository = name if entry is None else entry.repository
    if repository is None or not _is_repository(repository):
        raise FileNotFoundError(
            f"No model {name!r} to download. Pass one of {', '.join(ZOO)}, or a hub id (owner/name)."
        )
    parts = list(parts)
    patterns = ["model_index.json"] + [
        f"{part}/{end}" for part in parts for end in ("*.safetensors", "*.json", "*.txt", "*.model")
    ]
    with _hub_errors(name, repository, cached):
        root, asked = _folder_of(repository, patterns, cached, verify)
    missing = [part for part in parts if not (root / part).is_dir()]
    if missing and asked:
        raise FileNotFoundError(
            f"{repository} holds no {missing[0]} folder. Pass a repository in the diffusers layout."
        )
    if missing and not cached:
        raise ConnectionError(
            f"{repository} is not whole in the cache: {missing[0]} is missing. Check the network, and try again."
        )
    return root


def _folder_of(
    repository: str, patterns: list[str], cached: bool, verify: bool
) -> tuple[Path, bool]:
    """Return the folder of a repository in the cache, and whether the hub was asked for what is missing: if it can't be
    reached, what is there is taken."""
    if cached:
        return cached_folder(repository, patterns), False
    try:
        return fetch_folder(repository, patterns, verify=verify), True
    except WeightsError:
        raise
    except Exception as error:  # the network's errors are of several libraries
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's
        try:
            root = cached_folder(repository, patterns)
        except Exception:
            raise error from None
        if verify:
            check_whole(root, patterns)
        return root, False


def download_file(repository: str, file: str) -> Path:
    """Download one file of a repository into the hub's cache, unless it is there and whole. Errors as for `download`."""
    with _hub_errors(repository, repository, cached=False):
        try:
            return fetch_file(repository, file)
        except WeightsError:
            raise
        except Exception:  # the network's errors are of several libraries
            found = cached_file(repository, file)
            if found is None:
                raise
            check_whole(found.parent, [found.name])
            return found


@contextmanager
def _hub_errors(name: str, repository: str, cached: bool) -> Iterator[None]:
    """Turn the hub's errors into ones that say what to do."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"{ENDPOINT}/{repository}"
    try:
        yield
    except WeightsError:
        raise
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository} is gated: accept its licence at {page}, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no model at {page}, or it is private and needs `hf auth login`."
        ) from error
    except Exception as error:  # the network's errors are of several libraries
        if cached:
            raise FileNotFoundError(
                f"{repository} is not in the hub's cache. Run `fluxjax download {name}` first."
            ) from error
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"{page} does not hold that file: see its list of files."
            ) from error
        raise _download_error(repository, page, error) from error


def _download_error(repository: str, page: str, error: Exception) -> Exception:
    """Say what to do about a download that failed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeightsError(
            f"No room for {repository} in the hub's cache. Free some, or set HF_HOME to a larger disk."
        )
    causes: list[Any] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    status = next(
        (
            cause.response.status_code
            for cause in causes
            if getattr(cause, "response", None) is not None
        ),
        None,
    )
    if status in (401, 403):
        return WeightsError(
            f"{page} refuses this login ({status}). Log in with `hf auth login`, with access to {repository}."
        )
    return ConnectionError(
        f"{repository} is not whole in the cache and can't be downloaded: {error}. Check the network and run it again: files "
        "that have come whole are kept."
    )


def tiny_folder() -> Path:
    """Return where the model that ships with the package lies: inside it, or beside it in a checkout."""
    inside = PACKAGE / "weights" / "tiny"
    return inside if inside.is_dir() else PACKAGE.parent / "weights" / "tiny"


def shipped_lora(name: str) -> Path:
    """Return an adapter that ships with the tiny model. **Raises:** `FileNotFoundError` for none of that name."""
    folder = tiny_folder() / "loras"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.safetensors")))
        raise FileNotFoundError(
            f"No adapter {name!r} ships with the tiny model. There are: {known}."
        )
    return path
