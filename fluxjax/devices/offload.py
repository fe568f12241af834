"""Networks moved between the host's memory and the devices', and a report of where they are."""

import math
from collections.abc import Mapping
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from fluxjax.devices.streamed import FileWeight, HostWeight

Network = TypeVar("Network", bound=eqx.Module)
Tree = TypeVar("Tree", bound=PyTree)
HOST_MEMORY = "pinned_host"
DEVICE_MEMORY = "device"
"""Names of JAX's kinds of memory."""


def offload(network: Network) -> Network:
    """Return a network with its arrays in the host's memory; `fetch` moves them back.

    The arrays keep their sharding. The network can't be run until it is fetched.
    """
    return move_arrays(network, HOST_MEMORY)


def fetch(network: Network) -> Network:
    """Return a network with its arrays on their devices.

    Arrays that are on them are not copied, and streamed weights stay where they are.
    """
    return move_arrays(network, DEVICE_MEMORY)


def move_arrays(tree: Tree, memory: str) -> Tree:
    """Return a pytree with its arrays in a kind of memory, except for streamed weights.

    **Arguments:** `memory`: `HOST_MEMORY` or `DEVICE_MEMORY`.
    """

    def move(leaf: PyTree) -> PyTree:
        if not isinstance(leaf, jax.Array) or leaf.sharding.memory_kind == memory:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(memory))

    return jax.tree.map(move, tree, is_leaf=lambda node: isinstance(node, HostWeight))


def free(network: PyTree) -> None:
    """Free the memory of a network's arrays at once, whoever holds them; it is then unusable."""
    for leaf in jax.tree.leaves(network):
        if isinstance(leaf, jax.Array):
            leaf.delete()


def residency(networks: Mapping[str, object]) -> str:
    """Return where the bytes of networks are: on devices, in the host's memory, or in files.

    **Arguments:** `networks`: by name; None for one that is not in memory.
    **Returns:** one line for each network.
    """
    return "\n".join(f"{name}: {_places(network)}" for name, network in networks.items())


def _places(network: PyTree) -> str:
    """Return how many bytes of a network are at each place."""
    bytes_at: dict[str, int] = {}
    for node in jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, FileWeight)):
        if isinstance(node, FileWeight):
            place = "in files"
            stored = node.reader.struct
            size = math.prod(node.number.shape) * math.prod(stored.shape) * stored.dtype.itemsize
        elif isinstance(node, jax.Array):
            place = _place(node)
            # Of a sharded array, the part of one device.
            size = math.prod(node.sharding.shard_shape(node.shape)) * node.dtype.itemsize
        else:
            continue
        bytes_at[place] = bytes_at.get(place, 0) + size
    if not bytes_at:
        return "not in memory"
    return ", ".join(f"{size / 1e9:.3f} GB {place}" for place, size in bytes_at.items())


def _place(array: jax.Array) -> str:
    """Return where an array is, in words."""
    in_host = array.sharding.memory_kind == HOST_MEMORY
    place = "in host memory" if in_host else "in device memory"
    devices = len(array.sharding.device_set)
    if devices > 1:
        return f"{place} for each of {devices} devices"
    return place
