"""The networks inside of `jax.shard_map`, where each device has a part of their arrays."""

import jax
from jax.sharding import PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from fluxjax.devices.specs import array_role, tensor_split
from fluxjax.devices.weights import (
    ConcatenatedWeight,
    GatheredKernel,
    GatheredWeight,
    SummedWeight,
)
from fluxjax.nets.conv import DenseKernel, Kernel
from fluxjax.nets.grouped import GroupedWeight
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.stack import SharedArrays
from fluxjax.nets.weight import AdaptedWeight, Dense, RowScaledWeight, Weight


def local(network: PyTree, placed: PyTree) -> PyTree:
    """Return a network that runs on one device's part of its arrays, inside of `jax.shard_map`.

    Its weights gather what is split over "fsdp", and all-reduce or gather the products that are
    split over "tensor".

    **Arguments:** `network`: with this device's parts of the arrays; or a pytree of networks.
    `placed`: its `specs`.
    **Raises:** `ValueError` for weights that are streamed.
    """

    def wrap(
        path: KeyPath,
        node: PyTree,
        spec: PyTree,
    ) -> PyTree:
        if isinstance(node, DenseKernel) and _is_split(spec, "fsdp"):
            return GatheredKernel(node.value)
        if not isinstance(node, Weight):
            return node
        weight = _gathered(node, spec)
        if not _is_split(spec, "tensor"):
            return weight
        # Of the networks' own paths: in a pytree of networks, the first entries are not theirs.
        role = array_role(path)
        match tensor_split(role.layer, True):
            case "in":
                return SummedWeight(weight)
            case "out_gathered":
                return ConcatenatedWeight(weight)
            case _:
                return weight

    def is_stored(node: PyTree) -> bool:
        return isinstance(node, Weight | Kernel)

    return jax.tree_util.tree_map_with_path(wrap, network, placed, is_leaf=is_stored)


def _is_split(spec: PyTree, axis: str) -> bool:
    """Return whether any array of a weight is split over an axis of the mesh."""
    leaves = jax.tree.leaves(spec, is_leaf=lambda node: isinstance(node, PartitionSpec))
    return any(axis in tuple(leaf) for leaf in leaves)


def _gathered(weight: Weight, spec: PyTree) -> Weight:
    """Return a weight that gathers what is split over "fsdp"."""
    if isinstance(weight, AdaptedWeight):
        return AdaptedWeight(_gathered(weight.base, spec.base), weight.down, weight.up)
    if isinstance(weight, RowScaledWeight):
        return RowScaledWeight(_gathered(weight.base, spec.base), weight.scale)
    if isinstance(weight, GroupedWeight):
        pairs = zip(weight.stacks.content, spec.stacks.content, strict=True)
        stacks = tuple(_gathered(stack, placed) for stack, placed in pairs)
        return GroupedWeight(weight.group, weight.place, SharedArrays(stacks))
    if not isinstance(weight, Dense | QuantizedWeight | PackedWeight):
        raise ValueError(
            f"A {type(weight).__name__} weight has no form on a mesh. Use dense or quantized ones, "
            "or attached adapters."
        )
    axes = tuple(spec.value)
    if "fsdp" not in axes:
        return weight
    axis = axes.index("fsdp") - len(axes)
    return GatheredWeight(weight, axis, jax.lax.axis_size("fsdp"))
