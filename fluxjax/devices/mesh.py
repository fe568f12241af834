"""Meshes of devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fluxjax.arguments import convert_arguments

AXES = ("data", "fsdp", "tensor", "context")


@convert_arguments
def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Return a mesh of devices, by default all.

    **Arguments:** `data`: parts of a batch. `fsdp`: parts of a batch and of every weight, which is gathered as it is used.
    `tensor`: parts of the heads and hidden features. `context`: parts of the tokens. One of them may be -1, for the
    devices that the others leave.
    **Raises:** `ValueError` if their product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor, context), strict=True))
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and taken > 0 and len(devices) % taken == 0:
        sizes[free[0]] = len(devices) // taken
    if min(sizes.values()) < 1 or int(np.prod(list(sizes.values()))) != len(devices):
        told = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"`make_mesh({told})` does not use {len(devices)} devices. Choose sizes of that product, one of them -1 for what "
            "is left, or pass devices=."
        )
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), AXES)
