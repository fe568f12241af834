"""From a model's name, hub id or path to the folder or file that holds it."""

from collections.abc import Iterable
from pathlib import Path

from fluxjax.checkpoint.checksums import check_folder_undamaged
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.folders import MODEL_INDEX_FILE
from fluxjax.checkpoint.hub import cached_file, cached_folder, fetch_file, fetch_folder
from fluxjax.checkpoint.hub_errors import explain_hub_errors
from fluxjax.checkpoint.json_file import read_json
from fluxjax.checkpoint.shipped import tiny_folder
from fluxjax.suggestions import suggestion
from fluxjax.zoo import FAMILIES, FLUX1, ZOO, Family, family_of, named_model

_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model")
"""The files of a folder that are downloaded; others are the same weights in other formats."""


def find_part(source: str | Path, folder: str) -> Path:
    """Return where one part of a model lies, downloaded if it is not in the cache.

    **Arguments:** `source`: as for `find_source`. `folder`: of the part, in the diffusers layout.
    **Returns:** that folder if the source has it, else the whole source.
    **Raises:** as `find_source`.
    """
    path = find_source(source, [folder])
    if (path / folder).is_dir():
        return path / folder
    return path


def find_source(source: str | Path, folders: Iterable[str], *, cached: bool = False) -> Path:
    """Return the folder or file that holds a model.

    **Arguments:** `source`: a path, a name of the zoo, or a hub id. `folders`: what is downloaded
    of a model on the hub. `cached`: only look in the hub's cache.
    **Raises:** `FileNotFoundError` if there is no such source, and what `download` raises.
    """
    name, path = str(source), Path(source)
    if _is_shipped(name):
        return tiny_folder()
    if name not in ZOO and path.exists():
        return path
    if name in ZOO or _is_hub_id(name):
        return download(name, folders, cached=cached, verify=False)
    raise FileNotFoundError(
        f"There is no {name!r}. Pass a known model ({', '.join(ZOO)}), a model's folder, a "
        f".safetensors or .gguf file, or a hub id.{suggestion(name, ZOO)}"
    )


def _is_shipped(name: str) -> bool:
    """Return whether a name is that of the model that ships with the package."""
    return name in ZOO and ZOO[name].repository is None


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def download(
    name: str,
    parts: Iterable[str] | None = None,
    *,
    cached: bool = False,
    verify: bool = True,
) -> Path:
    """Download a model into the hub's cache: those files that are missing or damaged there.

    A connection that breaks is resumed where it ended. When a download is stopped, the files that
    are complete are kept.

    **Arguments:** `name`: a name of the zoo, or a hub id of a repository in the diffusers layout.
    `parts`: the folders to download, "" for all that is in the repository; None for all that a
    model of its family has. `cached`: return what is in the cache, without a request to the hub.
    `verify`: compare files that are in the cache with their checksums, and download those again
    that differ (dev's 34 GB take about a minute).
    **Returns:** the folder that holds them.
    **Raises:** `WeightsError` for a gated repository, or answers that would place a file outside of
    the cache; `FileNotFoundError` if there is no such repository, or it has another layout;
    `ConnectionError` without a network. Each says what to do.
    """
    if _is_shipped(name):
        return tiny_folder()
    repository = ZOO[name].repository if name in ZOO else name
    if repository is None or not _is_hub_id(repository):
        raise FileNotFoundError(
            f"No model {name!r} to download. Pass one of {', '.join(ZOO)}, or a hub id "
            "(owner/name)."
        )
    if parts is None and named_model(name) is None:
        index = download(name, [], cached=cached, verify=verify)
        parts = family_of_index(index).folders
    parts = list(family_of(name).folders if parts is None else parts)
    patterns = [MODEL_INDEX_FILE]
    for part in parts:
        place = f"{part}/" if part else ""
        patterns += [place + pattern for pattern in _DOWNLOADED]
    with explain_hub_errors(name, repository, cached):
        folder, was_requested = _repository_files(repository, patterns, cached, verify)
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing and was_requested:
        raise FileNotFoundError(
            f"{repository} has no folder {missing[0]}. Pass a repository in the diffusers layout."
        )
    if missing and not cached:
        raise ConnectionError(
            f"{repository} is not complete in the cache: {missing[0]} is missing, and the hub "
            "can't be reached. Check the network, and try again."
        )
    return folder


def family_of_index(folder: Path) -> Family:
    """Return the family that the index in a model's folder names; FLUX.1 if it names none."""
    index = folder / MODEL_INDEX_FILE
    if index.is_file():
        described = read_json(index)
        for family in FAMILIES:
            if isinstance(described, dict) and described.get("_class_name") == family.pipeline:
                return family
    return FLUX1


def _repository_files(
    repository: str, patterns: list[str], cached: bool, verify: bool
) -> tuple[Path, bool]:
    """Return the folder of a repository in the cache, and whether the hub was reached.

    If the hub can't be reached, the files of the cache are used.
    """
    if cached:
        return cached_folder(repository, patterns), False
    try:
        return fetch_folder(repository, patterns, verify=verify), True
    except WeightsError:
        raise
    except Exception as error:  # several libraries raise network errors
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        try:
            folder = cached_folder(repository, patterns)
        except Exception:
            raise error from None
        if verify:
            check_folder_undamaged(folder, patterns)
        return folder, False


def download_file(repository: str, file: str) -> Path:
    """Download one file of a repository into the hub's cache, unless it is there and undamaged.

    **Arguments:** `repository`: a hub id. `file`: the path in the repository.
    **Returns:** the file in the cache.
    **Raises:** as `download`.
    """
    with explain_hub_errors(repository, repository, cached=False):
        try:
            return fetch_file(repository, file)
        except WeightsError:
            raise
        except Exception:  # several libraries raise network errors
            path = cached_file(repository, file)
            if path is None:
                raise
            check_folder_undamaged(path.parent, [path.name])
            return path
