"""Networks kept in the host's memory until they are used; what lies where."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax

from fluxjax.devices.weights import FileWeight, HostWeight

Network = TypeVar("Network", bound=eqx.Module)
_HOST, _DEVICE = "pinned_host", "device"


def offload(network: Network) -> Network:
    """Return a network with its arrays in the host's memory, on the same devices' side. `fetch` brings it back; nothing runs
    on it there."""
    return _moved(network, _HOST)


def fetch(network: Network) -> Network:
    """Return a network with its arrays on their devices; those that are there are not copied, and what is streamed stays."""
    return _moved(network, _DEVICE)


def _moved(network: Any, kind: str) -> Any:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.sharding.memory_kind == kind:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(move, network, is_leaf=lambda node: isinstance(node, HostWeight))


def residency(networks: Mapping[str, Any]) -> str:
    """Return where the bytes of networks lie, a line each: on the devices, in the host's memory, in files. None: nowhere."""
    return "\n".join(f"{name}: {_told(network)}" for name, network in networks.items())


def _told(network: Any) -> str:
    found: dict[str, int] = {}

    def add(place: str, size: int) -> None:
        found[place] = found.get(place, 0) + size

    for node in jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, FileWeight)):
        if isinstance(node, FileWeight):
            add("in files", math.prod(node.shape) * node.reader.dtype.itemsize)
        elif isinstance(node, jax.Array):
            devices = len(node.sharding.device_set)
            share = math.prod(node.sharding.shard_shape(node.shape)) * node.dtype.itemsize
            place = "in host memory" if node.sharding.memory_kind == _HOST else "in device memory"
            add(place if devices == 1 else f"{place} for each of {devices} devices", share)
    return (
        ", ".join(f"{size / 1e9:.3f} GB {place}" for place, size in found.items())
        or "not in memory"
    )
