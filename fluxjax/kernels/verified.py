"""Which kernels work on the devices of this machine: checked once, and kept in the user's cache."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

from fluxjax.cache_folder import cache_folder
from fluxjax.kernels.chips import local_twin
from fluxjax.kernels.self_check import BlockCheck, block_check, failure_of
from fluxjax.version import __version__

_FILE = "kernels.json"
_MOST_BYTES = 2**20
"""Of the file: a larger one is none of fluxjax's."""
_INSTEAD = {"cudnn": "xla", "flash_tpu": "xla", "qkv_tpu": "separate operations"}
"""What is taken in place of a kernel that fails, for the message."""


def is_verified(name: str, device: jax.Device) -> bool:
    """Return whether a kernel gives right values on a kind of device.

    The first call for a kind of device runs one block of it; the result is kept for this device,
    driver and these versions of JAX and fluxjax. A kernel that fails is reported in one line on
    standard error. For a device that programs are only compiled for, it is taken to work.

    **Arguments:** `name`: as of `block_check`.
    """
    own = local_twin(device)
    if own is None:
        return True
    folder = cache_folder()
    return _is_verified(name, own, None if folder is None else folder / _FILE)


@cache
def _is_verified(name: str, device: jax.Device, file: Path | None) -> bool:
    """Return whether a kernel passes its check; a failure is printed, with what is used instead."""
    reason = cached_failure(name, device, file)
    if reason:
        print(
            f"fluxjax: {name} is not used on {device.device_kind}, but {_INSTEAD[name]}: {reason}",
            file=sys.stderr,
        )
    return not reason


def cached_failure(
    name: str,
    device: jax.Device,
    file: Path | None,
    make_check: Callable[[str, jax.Device], BlockCheck] = block_check,
) -> str:
    """Return why a kernel can't be used on a device, from a file or by a check; "" if it can.

    **Arguments:** `file`: in which results are kept; None to check every time. One that can't be
    read is ignored, and one that can't be written is left out. `make_check`: makes the check.
    """
    key = _key(name, device)
    known = {} if file is None else _read(file)
    if key in known:
        return known[key]
    try:
        reason = failure_of(make_check(name, device), device) or ""
    except Exception as error:  # of the reference, or without memory: it says nothing of the kernel
        print(f"fluxjax: {name} was not checked ({str(error)[:200]})", file=sys.stderr)
        return ""
    if file is not None and "RESOURCE_EXHAUSTED" not in reason:
        with suppress(OSError):
            _write(file, known | {key: reason})
    return reason


def _key(name: str, device: jax.Device) -> str:
    """Return what a result is for: the kernel, the device, its driver, the versions."""
    runtime = " ".join(str(device.client.platform_version).split())
    versions = f"jax {jax.__version__}, jaxlib {version('jaxlib')}, fluxjax {__version__}"
    return f"{name} on {device.device_kind}, {runtime}, {versions}"


def _read(file: Path) -> dict[str, str]:
    """Return the results in a file; none if it is missing or damaged."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            return {}
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    results = {}
    for key, reason in found.items():
        if isinstance(reason, str):
            results[key] = reason
    return results


def _write(file: Path, results: dict[str, str]) -> None:
    """Write results to a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".kernels-")
    try:
        with os.fdopen(descriptor, "w") as opened:
            json.dump(results, opened, indent=1)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
