"""Meshes of devices, and the names of their axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from fluxjax.arguments import convert_arguments

AXES = ("data", "fsdp", "tensor", "context")
"""The axes of every mesh, in the order in which its devices are laid out."""


@convert_arguments
def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[object] | None = None,
) -> Mesh:
    """Return a mesh of devices.

    **Arguments:** `data`: parts of a batch. `fsdp`: parts of a batch and of every weight, which is
    gathered when it is used. `tensor`: parts of the heads and of the hidden features. `context`:
    parts of the tokens. One of the four may be -1, for all devices that the others leave.
    `devices`: by default all; those of a topology, for compiling ahead of time, work too.
    **Raises:** `ValueError` if the product of the sizes is not the number of devices.
    """
    available = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    automatic = [axis for axis, size in sizes.items() if size == -1]
    if len(automatic) == 1:
        fixed = -math.prod(sizes.values())
        # If nothing fits, the size stays -1, and the error below tells it as it was given.
        if fixed > 0 and len(available) % fixed == 0:
            sizes[automatic[0]] = len(available) // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(available):
        requested = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(
            f"`make_mesh({requested})` does not use {len(available)} devices. Choose sizes whose "
            "product is that, one of them -1 for all that the others leave, or pass devices=."
        )
    # The last axes vary fastest: devices of "tensor" and "context", which exchange the most, are
    # next to each other.
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(np.array(available).reshape(shape), AXES)
