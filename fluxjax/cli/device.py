"""The device that a command runs on, in one line; and a GPU that JAX does not use, in another."""

import importlib.util
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import jax

from fluxjax.cli.console import complain
from fluxjax.generate.limits import first_device, gigabytes, memory_bytes

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_PLUGINS = {"jax_cuda12_plugin": 525, "jax_cuda13_plugin": 580}
"""JAX's plugins for CUDA, and the oldest driver that each works with."""


def name_device(*, quiet: bool = False) -> None:
    """Print the device on standard error, in one line. A GPU that JAX does not use is another.

    **Arguments:** `quiet`: whether only the second is printed.
    """
    device = first_device()
    if jax.process_index() == 0 and not quiet:
        print(describe_device(device), file=sys.stderr)
    if device.platform == "cpu" and is_cpu_by_default():
        problem = unused_gpu(_DRIVER_FILE)
        if problem is not None:
            complain(problem)


def describe_device(device: jax.Device) -> str:
    """Return the name of a device, how many there are, and the memory that JAX has there."""
    count = jax.local_device_count()
    name = "CPU" if device.platform == "cpu" else device.device_kind
    text = f"device: {name}" if count == 1 else f"devices: {count} x {name}"
    memory = memory_bytes(device)
    return text if memory is None else f"{text}, {gigabytes(memory)}"


def is_cpu_by_default() -> bool:
    """Return whether nothing tells JAX to use the CPU."""
    configured = jax.config.jax_platforms  # type: ignore[attr-defined]
    return not (os.environ.get("JAX_PLATFORMS") or configured)


def unused_gpu(driver_file: Path) -> str | None:
    """Return what to do about an NVIDIA GPU that JAX does not use; None if there is none.

    **Arguments:** `driver_file`: in which NVIDIA's driver describes itself on Linux.
    """
    version = driver_version(driver_file)
    if version is None and shutil.which("nvidia-smi") is None:
        return None
    found = "There is an NVIDIA GPU"
    if version is not None:
        found += f" (driver {version})"
    return f"{found}, but JAX runs on the CPU, in float32 and many times slower. {_remedy(version)}"


def driver_version(driver_file: Path) -> int | None:
    """Return the first number of the driver's version; None where there is no driver."""
    with suppress(OSError):
        match = re.search(r"\b(\d{3})\.\d+", driver_file.read_text(errors="replace"))
        return None if match is None else int(match[1])
    return None


def _remedy(version: int | None) -> str:
    """Return what makes JAX use the GPU that it does not use.

    **Arguments:** `version`: of the driver, None if it is not known.
    """
    installed = [name for name in _PLUGINS if importlib.util.find_spec(name) is not None]
    oldest = min(_PLUGINS.values())
    if version is not None and version < oldest:
        return f"Update the driver to {oldest} or newer, and install jax[cuda12]."
    fitting = "jax[cuda12]"
    if version is not None and version >= _PLUGINS["jax_cuda13_plugin"]:
        fitting = "jax[cuda13]"
    if not installed:
        return f"Install JAX for it: pip install -U '{fitting}'."
    needed = max(_PLUGINS[name] for name in installed)
    if version is not None and version < needed:
        return (
            f"The installed CUDA plugin needs driver {needed} or newer: update the driver, or "
            f"pip install -U '{fitting}'."
        )
    return (
        "The CUDA plugin is installed and did not start: run `python -c 'import jax; "
        'jax.devices("cuda")\'` to see why.'
    )
