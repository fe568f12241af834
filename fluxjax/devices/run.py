"""Functions of networks and a batch, computed on a mesh of devices."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from fluxjax.devices.local import local
from fluxjax.devices.specs import specs
from fluxjax.shapes import Array

ROWS = PartitionSpec(("data", "fsdp"))
"""How a batch is split: its rows over both axes."""
Result = TypeVar("Result", bound=PyTree)
Function = Callable[[PyTree, PyTree, PyTree], Result]
"""(networks, rows, rest) -> arrays with one row for each of the rows."""


def on_mesh(
    function: Function[Result],
    mesh: Mesh,
    networks: PyTree,
    rows: PyTree,
    rest: PyTree = None,
    *,
    fill: bool = False,
) -> Result:
    """Return function(networks, rows, rest), computed on a mesh by `jax.shard_map`.

    Outside of jit it is compiled at the first call. Further calls with the same function object,
    mesh and shapes reuse that program, as with `jax.jit`: define the function once, and pass what
    changes as an argument.

    The function may take gradients in the inputs of networks, on every mesh. Where layers are split
    over "tensor", or tokens over "context", give the network
    `mean_of_copies(x, ("tensor", "context"))` in place of x, or the gradients are wrong. For
    gradients in weights see `fluxjax.train.TrainStep`.

    **Arguments:** `function`: gets the networks as this device runs them, this device's rows, and
    `rest`; returns arrays with one row for each of its rows. `networks`: from `shard`, one or a
    pytree. `rows`: a pytree of arrays with one row for each example. If the devices do not divide
    them, the last row is repeated, and the results of the copies are dropped. `rest`: a pytree of
    what is the same for all rows. `fill`: whether devices may get nothing but copies.
    **Raises:** `ValueError` for fewer rows than data x fsdp, without `fill`.
    """
    networks, rows, rest = jax.tree.map(_as_jax_array, (networks, rows, rest))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    count = _row_count(rows)
    if count < parts and not fill:
        raise ValueError(
            f"A batch of {count} leaves some of data x fsdp = {parts} devices idle. Draw more at "
            "once, or let them serve tensor= or context=."
        )
    leaves = jax.tree.leaves((function, networks, rows, rest))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        # Part of a program that is compiled as a whole.
        return _run(function, mesh, networks, rows, rest)
    return _run_jitted(function, mesh, networks, rows, rest)


def _run(
    function: Function[Result],
    mesh: Mesh,
    networks: PyTree,
    rows: PyTree,
    rest: PyTree,
) -> Result:
    """Compute `on_mesh`, whose arguments have been checked."""
    count = _row_count(rows)
    padding = -count % (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = jax.tree.map(lambda x: _padded(x, padding) if eqx.is_array(x) else x, rows)
    # `shard_map` takes arrays only.
    arrays, static = eqx.partition((networks, rows, rest), eqx.is_array)
    network_specs = jax.tree.map(
        lambda network: specs(network, mesh),
        arrays[0],
        is_leaf=lambda node: isinstance(node, eqx.Module),
    )
    row_specs = jax.tree.map(lambda _: ROWS, arrays[1])
    rest_specs = jax.tree.map(lambda _: PartitionSpec(), arrays[2])

    def body(arrays: PyTree) -> Result:
        networks, rows, rest = eqx.combine(arrays, static)
        return function(local(networks, network_specs), rows, rest)

    # `check_vma` tracks for gradients which values differ between devices. It would refuse the
    # initial states of samplers, which are constants.
    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=((network_specs, row_specs, rest_specs),),
        out_specs=ROWS,
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:count], run(arrays))


# The function and the mesh are static arguments, compared by identity and by value.
_run_jitted = eqx.filter_jit(_run)


def _as_jax_array(leaf: PyTree) -> PyTree:
    """Return NumPy arrays as JAX's: others are static, of which each value is compiled anew."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _row_count(rows: PyTree) -> int:
    """Return the number of rows, which all arrays have."""
    arrays = jax.tree.leaves(eqx.filter(rows, eqx.is_array))
    return arrays[0].shape[0]


def _padded(x: Array, padding: int) -> Array:
    """Return rows, with the last one repeated `padding` times."""
    if padding == 0:
        return x
    return x[np.minimum(np.arange(len(x) + padding), len(x) - 1)]
