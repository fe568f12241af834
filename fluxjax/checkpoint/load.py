"""A plan's leaves into memory, onto devices, or rounded to fewer bits as they are read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from fluxjax.checkpoint.dtypes import loaded_dtype
from fluxjax.checkpoint.kinds import Network
from fluxjax.checkpoint.packed_leaves import MatrixStack, with_packed_matrices
from fluxjax.checkpoint.plan import Index, Plan
from fluxjax.nets.rounding import check_quantization, empty_rounded, fitting_format, put_block
from fluxjax.nets.stack import is_rounded, is_stacked, leaf_names, path_name
from fluxjax.nets.weight import Dense, Weight

Shardings = Any
"""One sharding for all leaves, a pytree of one per leaf, or a function that makes the pytree.

The function takes the network with shapes as leaves. None is for the default device.
"""


def load(plan: Plan, *, dtype: DTypeLike | None = None, sharding: Shardings = None) -> Network:
    """Fill a network with the tensors of a checkpoint.

    **Arguments:** `dtype`: of the weights; None keeps the file's, of blocks that are stacked the
    widest, and packed matrices of blocks stay packed; otherwise they are decoded. float64 becomes
    float32 unless `jax_enable_x64` is on. `sharding`: where the leaves go; a process reads no more
    of a tensor than its own devices hold.
    **Returns:** the network with arrays as leaves.
    **Raises:** `WeightsError` that names a tensor with NaN or infinity, or with a value that the
    dtype can't hold; `ValueError` for a pytree of shardings with another number of leaves.
    """
    network = plan.network
    stacks: dict[str, MatrixStack] = {}
    if dtype is None:
        network, stacks = with_packed_matrices(plan)
    leaves, structure = jax.tree.flatten(network)
    shardings = _one_per_leaf(sharding, network, len(leaves))
    arrays = []
    for name, leaf, place in zip(leaf_names(network), leaves, shardings, strict=True):
        if isinstance(leaf, jax.Array):
            # Numbers of blocks, which no file has.
            arrays.append(jax.device_put(leaf, place))
            continue
        if name in stacks:
            read = partial(stacks[name].read, plan)
        else:
            target = loaded_dtype(plan, name, leaf.shape, dtype)
            read = partial(plan.leaf, name, leaf.shape, target)
        # Waiting bounds the memory: only one leaf at a time is both on the host and on the device.
        arrays.append(jax.block_until_ready(_place(read, leaf.shape, place)))
    return jax.tree.unflatten(structure, arrays)


def _one_per_leaf(sharding: Shardings, network: Network, count: int) -> Sequence[Sharding | None]:
    """Return one sharding per leaf, in the order of the leaves."""
    # A pytree of shardings has the structure of a network, and networks can be called.
    if callable(sharding) and not isinstance(sharding, eqx.Module):
        sharding = sharding(network)
    if sharding is None or isinstance(sharding, Sharding):
        return [sharding] * count
    shardings = jax.tree.leaves(sharding)
    if len(shardings) != count:
        raise ValueError(
            f"`load(sharding)` needs one sharding a leaf, {count}, got {len(shardings)}. "
            "Pass one sharding for all, or a pytree with the network's leaves."
        )
    return shardings


def _place(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: Sharding | None
) -> jax.Array:
    """Return a leaf as an array on the devices of its sharding.

    **Arguments:** `read`: returns a region of it. `sharding`: None for the default device.
    """
    if sharding is None or (sharding.is_fully_replicated and sharding.is_fully_addressable):
        values = read((slice(None),) * len(shape))
        return jax.device_put(values, sharding, may_alias=True)
    # `device_put` would send the whole leaf to other processes, or compare theirs with it.
    return jax.make_array_from_callback(shape, sharding, lambda index: read(index or ()))


MakeWeight = Callable[[str, tuple[int, ...], np.dtype], Weight]
"""Makes the weight of a leaf from its name, its shape with the axis of blocks, and its dtype."""


def load_with_block_weights(
    plan: Plan,
    make_weight: MakeWeight,
    *,
    dtype: DTypeLike | None = None,
    chosen: Callable[[str], bool] = is_stacked,
) -> Network:
    """Load a network whose blocks' matrices are made by a function and not loaded as they are.

    **Arguments:** `make_weight`: is called for each matrix that is stacked over blocks, after all
    other leaves are loaded. `dtype`: as for `load`. `chosen`: of a name, whether its matrix is one
    of these.
    **Returns:** the network. **Raises:** as `load`.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def remove(path: KeyPath, node: object) -> object:
        name = path_name(path)
        if not isinstance(node, Dense) or not chosen(name):
            return node
        shapes[name] = node.shape
        return None

    # `None` is a pytree without leaves, so `load` skips what is removed.
    rest = jax.tree_util.tree_map_with_path(
        remove,
        plan.network,
        is_leaf=lambda node: isinstance(node, Dense),
    )
    # A plan of another class, as of merged weights, stays one.
    loaded = load(replace(plan, network=rest), dtype=dtype)
    weights: dict[str, Weight] = {}
    for name, shape in shapes.items():
        target = loaded_dtype(plan, name, shape, dtype)
        weights[name] = make_weight(name, shape, target)

    def insert(path: KeyPath, node: object) -> object:
        return weights.get(path_name(path), node)

    return jax.tree_util.tree_map_with_path(
        insert,
        loaded,
        is_leaf=lambda node: node is None,
    )


def load_quantized(plan: Plan, format: str, *, dtype: DTypeLike | None = None) -> Network:
    """Load a network with its blocks' matrices rounded to fewer bits, as by `quantize`.

    They are rounded block by block as they are read, so that a whole matrix of all blocks is
    never in memory in its own dtype.

    **Arguments:** `format`: one of `QUANTIZATIONS`. `dtype`: as for `load`, of what is not rounded.
    **Returns:** the network. **Raises:** as `load`, and `ValueError` for another format.
    """
    check_quantization(format)

    def read(name: str, shape: tuple[int, ...], source_dtype: np.dtype) -> Weight:
        fitting = fitting_format(shape, format)
        if fitting is None:
            return Dense(_place(partial(plan.leaf, name, shape, source_dtype), shape, None))
        weight = empty_rounded(shape, fitting)
        for block in range(shape[0]):
            values = plan.leaf(name, shape, source_dtype, block_index(shape, block))
            weight = put_block(weight, jnp.asarray(values[0]), block)
        return jax.block_until_ready(weight)

    return load_with_block_weights(plan, read, dtype=dtype, chosen=is_rounded)


def block_index(shape: tuple[int, ...], block: int) -> tuple[slice, ...]:
    """Return the index of one block in a leaf of this shape, which keeps the axis of blocks."""
    return (slice(block, block + 1), *(slice(0, size) for size in shape[1:]))
