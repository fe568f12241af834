"""Errors of the hub and of the network, as errors that say what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fluxjax.checkpoint.errors import WeightsError


@contextmanager
def explain_hub_errors(name: str, repository: str, cached: bool) -> Iterator[None]:
    """Turn the errors of a download into ones that say what to do.

    **Arguments:** `name`: how the user named the model. `cached`: whether only the cache is read.
    **Raises:** `WeightsError` for a gated repository, a refused login or a full disk;
    `FileNotFoundError` for a missing repository or file; else `ConnectionError`.
    """
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
            f"{repository} is gated: accept its licence at {page}, then log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no model at {page}, or it is private. If it is, log in with `hf auth login`."
        ) from error
    except Exception as error:  # several libraries raise network errors
        if cached:
            raise FileNotFoundError(
                f"{repository} is not in the hub's cache. Run `fluxjax download {name}` first."
            ) from error
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(
                f"{page} does not have that file. See its list of files."
            ) from error
        raise _download_error(repository, page, error) from error


def _download_error(repository: str, page: str, error: Exception) -> Exception:
    """Return an error that says what to do about a download that failed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WeightsError(
            f"There is not enough disk space for {repository} in the hub's cache. Free some space, "
            "or set HF_HOME to a folder on a larger disk."
        )
    status = _http_status(error)
    if status in (401, 403):
        return WeightsError(
            f"{page} refuses this login ({status}). Log in with `hf auth login` to an account that "
            f"has access to {repository}."
        )
    return ConnectionError(
        f"{repository} is not complete in the cache and can't be downloaded: {error}. Check the "
        "network and try again: complete files are kept."
    )


def _http_status(error: BaseException) -> int | None:
    """Return the status of the first answer among an error and its causes, or None."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if response is not None:
            return response.status_code
        cause = cause.__cause__
    return None
