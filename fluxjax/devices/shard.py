"""Networks placed on a mesh of devices."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath

from fluxjax.devices.specs import Network, array_role, specs, tensor_axis
from fluxjax.nets.controlnet import ControlNet
from fluxjax.nets.flux_config import BlockConfig, fused_features
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array


def shard(network: Network, mesh: Mesh) -> Network:
    """Return a network with its arrays on a mesh, as `specs` has them, for `on_mesh`.

    If "tensor" is more than 1, the rows of a transformer's fused layers are reordered, so that each
    device's part holds the queries, keys and values of its own heads. Convert, merge adapters and
    save before.

    **Arguments:** `mesh`: from `make_mesh`.
    **Raises:** `ValueError` if "tensor" does not divide the heads or the hidden features.
    """
    config = network.config if isinstance(network, AbstractTransformer | ControlNet) else None

    def place(
        path: KeyPath,
        leaf: Array,
        spec: PartitionSpec,
    ) -> Array:
        if config is not None and mesh.shape["tensor"] > 1:
            leaf = in_device_order(path, leaf, config, mesh.shape["tensor"])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    arrays, static = eqx.partition(network, eqx.is_array)
    placed = jax.tree_util.tree_map_with_path(place, arrays, specs(network, mesh))
    return eqx.combine(placed, static)


def in_device_order(
    path: KeyPath,
    leaf: Array,
    config: BlockConfig,
    devices: int,
    *,
    inverse: bool = False,
) -> Array:
    """Return an array with what belongs to one device next to each other, if its layer is fused.

    **Arguments:** `path`: of the array in its network, or in an adapted one. `devices`: along the
    axis "tensor". `inverse`: return to the order of files.
    """
    role = array_role(path)
    sizes = fused_features(config).get(role.layer)
    axis = tensor_axis(role)
    if devices == 1 or not role.in_blocks or sizes is None or axis is None:
        # Not fused, or an array that is whole on every device.
        return leaf
    # Of a packed row, each input takes some bits; `specs` has checked that no block is split.
    unit = leaf.shape[axis] / sum(sizes)
    order = _device_order([round(size * unit) for size in sizes], devices)
    return jnp.take(leaf, np.argsort(order) if inverse else order, axis=axis)


def _device_order(sizes: Sequence[int], devices: int) -> np.ndarray:
    """Return the order in which each device's shares of all concatenated parts are together.

    **Arguments:** `sizes`: of the parts, all multiples of the number of devices.
    **Returns:** indices of the concatenated parts.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    order = []
    for device in range(devices):
        for start, size in zip(starts, sizes, strict=True):
            first, last = device * size // devices, (device + 1) * size // devices
            order.append(start + np.arange(first, last))
    return np.concatenate(order)
