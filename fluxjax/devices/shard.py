"""Networks over a mesh of devices: where each weight lies, and how a part of it is used inside of a `jax.shard_map`."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluxjax.devices.specs import _TENSOR, Network, _leaf, specs
from fluxjax.devices.weights import ConcatenatedWeight, GatheredConv, GatheredWeight, SummedWeight
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.vae import Conv
from fluxjax.nets.weight import AdaptedWeight, Dense, Weight
from fluxjax.shapes import Array

ROWS = PartitionSpec(("data", "fsdp"))
"""Of a batch: its rows are split over both axes."""
Result = TypeVar("Result")


def shard(network: Network, mesh: Mesh) -> Network:
    """Return a network with its arrays on a mesh, as `specs` has them, for `on_mesh`.

    With "tensor" the rows of fused layers change places, so that each device's part has its heads' queries, keys and values, in
    this order: convert, merge adapters and save before. **Raises:** `ValueError` if the axis does not divide heads and hidden
    features.
    """

    def place(path: Any, leaf: Array, spec: PartitionSpec) -> Array:
        return jax.device_put(
            _regrouped(path, leaf, network, mesh.shape["tensor"]), NamedSharding(mesh, spec)
        )

    arrays, static = eqx.partition(network, eqx.is_array)
    return eqx.combine(
        jax.tree_util.tree_map_with_path(place, arrays, specs(network, mesh)), static
    )


def _regrouped(path: Any, leaf: Array, network: Any, parts: int) -> Array:
    """Return a fused layer's array with the parts of one device beside each other."""
    layer, role, stacked = _leaf(path)
    if parts == 1 or not stacked or layer not in ("qkv", "linear1", "linear2"):
        return leaf
    width, hidden = network.config.width, network.config.mlp_width
    fused = {"qkv": [width] * 3, "linear1": [width] * 3 + [hidden], "linear2": [width, hidden]}[
        layer
    ]
    columns = layer == "linear2"
    rows: dict[str, int | None] = {"value": -2, "down": None, "up": -2, "bias": -1, "scale": -1}
    axis = rows[role] if not columns else -1 if role in ("value", "down") else None
    if axis is None:
        return leaf
    starts = np.cumsum([0, *fused[:-1]])
    order = [
        start + np.arange(part * size // parts, (part + 1) * size // parts)
        for part in range(parts)
        for start, size in zip(starts, fused, strict=True)
    ]
    return jnp.take(leaf, np.concatenate(order), axis=axis)


def local(network: Any, placed: Any) -> Any:
    """Return a network, or a pytree of some, of one device's arrays, inside of `jax.shard_map`: its weights fetch and sum what
    they lack.

    `placed`: its `specs`.
    """

    def wrap(path: Any, weight: Any, spec: Any) -> Any:
        if isinstance(weight, Conv) and "fsdp" in tuple(spec.weight):
            return GatheredConv(weight)
        if not isinstance(weight, Weight):
            return weight
        how = _TENSOR.get(_leaf((*path, path[-1])).layer) if "tensor" in str(spec) else None
        part = _gathering(weight, spec)
        return (
            SummedWeight(part)
            if how == "in"
            else ConcatenatedWeight(part)
            if how == "joined"
            else part
        )

    return jax.tree_util.tree_map_with_path(
        wrap, network, placed, is_leaf=lambda node: isinstance(node, Weight | Conv)
    )


def _gathering(weight: Weight, spec: Any) -> Weight:
    """Return a weight that gathers what "fsdp" splits."""
    if isinstance(weight, AdaptedWeight):
        return AdaptedWeight(_gathering(weight.base, spec.base), weight.down, weight.up)
    if isinstance(weight, Dense | QuantizedWeight):
        axes = tuple(spec.value)
        return GatheredWeight(weight, axes.index("fsdp") - len(axes)) if "fsdp" in axes else weight
    raise ValueError(
        f"A {type(weight).__name__} weight has no form on a mesh. Use dense or quantized ones, or attached adapters."
    )


def on_mesh(
    function: Callable[[Any, Any, Any], Result],
    mesh: Mesh,
    networks: Any,
    rows: Any,
    rest: Any = None,
    *,
    fill: bool = False,
) -> Result:
    """Return function(networks, rows, rest), computed on a mesh by `jax.shard_map`.

    **Arguments:** `function`: of the networks in their local form, of this device's rows, and of what is the same everywhere;
    gives arrays of its rows. `networks`: from `shard`. `rows`: arrays with one row an example; where the devices do not divide
    them, the last is repeated and dropped. `rest`: a pytree. `fill`: whether that may leave a device nothing but the repeated.
    **Raises:** `ValueError` for fewer rows than data x fsdp, without `fill`.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    count = len(jax.tree.leaves(eqx.filter(rows, eqx.is_array))[0])
    if count < parts and not fill:
        raise ValueError(
            f"A batch of {count} leaves some of data x fsdp = {parts} devices idle. Draw more at once, or let them serve "
            "tensor= or context=."
        )
    rows = jax.tree.map(lambda x: _filled(x, -count % parts) if eqx.is_array(x) else x, rows)
    arrays, static = eqx.partition((networks, rows, rest), eqx.is_array)
    placed = jax.tree.map(
        lambda network: specs(network, mesh),
        arrays[0],
        is_leaf=lambda node: isinstance(node, eqx.Module),
    )
    inputs = (
        placed,
        jax.tree.map(lambda _: ROWS, arrays[1]),
        jax.tree.map(lambda _: PartitionSpec(), arrays[2]),
    )

    def body(arrays: Any) -> Result:
        networks, rows, rest = eqx.combine(arrays, static)
        return function(local(networks, placed), rows, rest)

    # What varies over which axis is for gradients; the steps' first states are constants, which it would refuse.
    result = jax.shard_map(body, mesh=mesh, in_specs=(inputs,), out_specs=ROWS, check_vma=False)(
        arrays
    )
    return jax.tree.map(lambda x: x[:count], result)


def _filled(x: Array, more: int) -> Array:
    return x[np.minimum(np.arange(len(x) + more), len(x) - 1)] if more else x
