"""Networks whose blocks pass through the device one by one, from host memory or from files."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.checkpoint.load import load_with_block_weights
from fluxjax.checkpoint.packed_leaves import block_storages
from fluxjax.checkpoint.plan import Plan
from fluxjax.devices.offload import DEVICE_MEMORY, HOST_MEMORY, move_arrays
from fluxjax.devices.streamed import BlockReader, FileWeight, HostWeight, StoredWeight
from fluxjax.nets.clip import Clip
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.grouped import GroupedWeight
from fluxjax.nets.mixed import mixed_weight
from fluxjax.nets.stack import is_rounded, is_stacked, path_name
from fluxjax.nets.t5 import T5
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)


def stream_blocks(network: Network) -> Network:
    """Return a network whose blocks' matrices stay in the host's memory.

    Each block's are copied to the device while the block before it runs, so that it holds two
    blocks at once. Everything else is on the device.

    **Arguments:** `network`: a `Flux`, `Chroma`, `ControlNet`, `T5` or `Clip`, on the device or
    from `offload`, with which it is never on the device as a whole. Merge adapters before, or
    attach them.
    **Raises:** `ValueError` for another network.
    """
    if not isinstance(network, AbstractTransformer | ControlNet | T5 | Clip):
        raise ValueError(
            "`stream_blocks(network)` takes a network of stacked blocks (a Flux, Chroma, "
            f"ControlNet, T5 or Clip), got a {type(network).__name__}. Keep others on the device."
        )

    def place(path: KeyPath, node: PyTree) -> PyTree:
        if isinstance(node, GroupedWeight):
            return HostWeight(mixed_weight(node, _in_host_memory))
        if isinstance(node, StoredWeight) and is_stacked(path_name(path)):
            return HostWeight(move_arrays(node, HOST_MEMORY))
        return move_arrays(node, DEVICE_MEMORY)

    def is_placed(node: PyTree) -> bool:
        return isinstance(node, StoredWeight | GroupedWeight)

    return jax.tree_util.tree_map_with_path(place, network, is_leaf=is_placed)


def _in_host_memory(array: np.ndarray) -> Array:
    """Return an array in the host's memory that the device copies from."""
    sharding = SingleDeviceSharding(jax.devices()[0], memory_kind=HOST_MEMORY)
    return jax.device_put(array, sharding)


def load_streamed(plan: Plan, *, dtype: DTypeLike | None = None) -> PyTree:
    """Load a checkpoint, except for its blocks' matrices, which stay in the files.

    Each of these is read once now, block by block, so that NaN, infinity and values that the dtype
    can't hold are reported here and not in the middle of an image.

    **Arguments** and **Raises:** as for `fluxjax.checkpoint.load.load`.
    """

    def file_weight(
        name: str,
        shape: tuple[int, ...],
        target: np.dtype,
    ) -> FileWeight:
        format = _packed_format(plan, name, shape) if dtype is None else None
        reader = BlockReader(plan, name, shape, format or target)
        for block in range(shape[0]):
            reader.check(block)
        return FileWeight(jnp.arange(shape[0]), reader)

    return load_with_block_weights(plan, file_weight, dtype=dtype)


def _packed_format(plan: Plan, name: str, shape: tuple[int, ...]) -> str | None:
    """Return the format in which all blocks of a matrix stay packed; None if they are decoded."""
    if not is_rounded(name):
        return None
    ways = set(block_storages(plan, name, shape))
    way = ways.pop() if len(ways) == 1 else None
    return way if isinstance(way, str) else None
