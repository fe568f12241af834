"""The hub's HTTP client with two safeguards that it lacks: time limits and checked file names."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.printable import printable

# Here, `Any` stands for httpx's `Client`, `Request` and `Response`. Neither httpx nor
# huggingface_hub is imported before something is downloaded, because their imports are slow.

# The client makes names of files and folders in the cache of these headers.
_HEADERS_USED_AS_NAMES = ("etag", "x-linked-etag", "x-repo-commit", "x-xet-hash")
_SAFE_NAME = re.compile(r"[0-9A-Za-z_+=-][0-9A-Za-z_+=.-]{0,199}")


@contextmanager
def guarded_client() -> Iterator[None]:
    """Limit how long the hub's client waits, and check headers that it makes file names of.

    **Raises:** `WeightsError` in the block for an answer with a header that is not safe as a name.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    previous = _http._GLOBAL_CLIENT_FACTORY  # there is no public way to read it

    def make_client() -> Any:
        client = previous()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", ()), _limit_waiting],
            "response": [*hooks.get("response", ()), _check_headers],
        }
        return client

    set_client_factory(make_client)
    try:
        yield
    finally:
        set_client_factory(previous)


def _limit_waiting(request: Any) -> None:
    """Limit how long a request waits for a connection and for each piece of the answer."""
    from huggingface_hub import constants

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds
    if request.method == "HEAD":
        limit = constants.HF_HUB_ETAG_TIMEOUT
    timeouts = request.extensions.get("timeout") or {}
    limited: dict[str, float] = {}
    for step in ("connect", "read", "write", "pool"):
        timeout = timeouts.get(step)
        limited[step] = limit if timeout is None else min(timeout, limit)
    request.extensions["timeout"] = limited


def _check_headers(response: Any) -> None:
    """Check headers of an answer from which the client makes names of files.

    **Raises:** `WeightsError` for one that could leave the cache's folder.
    """
    if response.request.method != "HEAD":
        return  # the client reads these headers from answers to HEAD only
    for header in _HEADERS_USED_AS_NAMES:
        value = response.headers.get(header)
        if value is None:
            continue
        name = value.removeprefix("W/").strip('"')
        if not _SAFE_NAME.fullmatch(name):
            raise hostile_answer(response.request.url.host, header, value)


def hostile_answer(repository: str, what: str, value: object) -> WeightsError:
    """Return the error for an answer of the hub that would place a file outside of the cache.

    **Arguments:** `what`: what the value should be, such as "version".
    """
    return WeightsError(
        f"The hub's answer for {repository} has an invalid {what}: {printable(repr(value))}. "
        "Nothing was written there. Check HF_ENDPOINT, and whether you trust this server."
    )
