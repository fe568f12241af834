"""A plan's leaves into memory, onto devices, or rounded to 8 bits as they are read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.checkpoint.plan import (
    LOADED_DTYPES,
    Plan,
    Weights,
    slots_of_leaf,
    widest,
)
from fluxjax.nets.quantized import QuantizedWeight, eight_bit_dtype, empty_quantized, put_block
from fluxjax.nets.stack import is_stacked, leaf_names, path_name
from fluxjax.nets.weight import Dense, Weight
from fluxjax.printable import printable


def load(plan: Plan, *, dtype: DTypeLike | None = None, sharding: Any = None) -> Any:
    """Fill a network with the tensors of a checkpoint.

    **Arguments:** `dtype`: of the weights; None keeps the file's, the widest of those stacked together; float64 becomes float32
    unless `jax_enable_x64` is on. `sharding`: of every
    leaf, or a pytree of shardings, one a leaf, or a function that makes one of the network of shapes; a process reads no more
    of a tensor than its devices hold.
    **Returns:** the network with arrays on the default device, or as `sharding` says.
    **Raises:** `WeightsError` that names a tensor with NaN or infinity, or with a value that the dtype can't hold.
    """
    leaves, structure = jax.tree.flatten(plan.network)
    if callable(sharding) and not isinstance(
        sharding, eqx.Module
    ):  # a pytree of shardings is a network, which can be called
        sharding = sharding(plan.network)
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        shardings = [sharding] * len(leaves)
    else:
        shardings = jax.tree.leaves(sharding)
        if len(shardings) != len(leaves):
            raise ValueError(
                f"`load(sharding)` needs one sharding a leaf, {len(leaves)}, got {len(shardings)}."
            )
    filled = []
    for name, leaf, where in zip(leaf_names(plan.network), leaves, shardings, strict=True):
        target = loaded_dtype(plan, name, leaf.shape, dtype)
        filled.append(jax.block_until_ready(_place(plan, name, leaf.shape, target, where)))
    return jax.tree.unflatten(structure, filled)


def check_dtype(call: str, dtype: DTypeLike | None) -> np.dtype | None:
    """Return the dtype that a loader was given. **Raises:** `ValueError` for one that no weights are loaded as."""
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(
            f"`{call}(dtype)` got {printable(repr(dtype))}. {_dtype_remedy(str(dtype))}"
        ) from error
    if found == np.float64 and jax.config.read("jax_enable_x64"):
        return found
    if str(found) == "float64":
        raise ValueError(
            f"`{call}(dtype='float64')` needs JAX's 64-bit mode, without which arrays are float32. Call "
            "jax.config.update('jax_enable_x64', True) before, or pass dtype='float32'."
        )
    if str(found) not in LOADED_DTYPES:
        raise ValueError(f"`{call}(dtype)` got {found}. {_dtype_remedy(str(found))}")
    return found


def check_written_dtype(call: str, dtype: DTypeLike | None) -> np.dtype | None:
    """Return the dtype that weights are to be written in. **Raises:** `ValueError` for one that fluxjax does not write."""
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or str(found) not in LOADED_DTYPES:
        given = repr(dtype) if found is None else str(found)
        raise ValueError(
            f"`{call}(dtype)` writes floats of 32 bits or fewer, got {printable(given)}. Pass {', '.join(LOADED_DTYPES)}."
        )
    return found


def _dtype_remedy(name: str) -> str:
    format = "fp8" if "8" in name and "f" in name else "int8"
    eight = (
        f" To round the blocks' matrices to 8 bits, `load_flux` and `load_t5` take quantize={format!r}."
        if "8" in name
        else ""
    )
    return (
        f"Weights are loaded as {', '.join(LOADED_DTYPES)}, or float64 in JAX's 64-bit mode.{eight}"
    )


def loaded_dtype(
    weights: Weights, name: str, shape: Sequence[int], dtype: DTypeLike | None
) -> np.dtype:
    """Return what a leaf is loaded as: the given dtype, or its slots' widest, which is at most float32 without 64-bit mode."""
    found = leaf_dtype(weights, name, shape) if dtype is None else np.dtype(dtype)
    return (
        np.dtype(np.float32)
        if found == np.float64 and not jax.config.read("jax_enable_x64")
        else found
    )


def leaf_dtype(weights: Weights, name: str, shape: Sequence[int]) -> np.dtype:
    """Return the widest dtype of a leaf's slots."""
    return widest(weights.dtype(slot) for slot in slots_of_leaf(name, shape))


def _place(
    plan: Plan, name: str, shape: tuple[int, ...], dtype: np.dtype, sharding: Any
) -> jax.Array:
    # One array for several processes is made of what each has, not sent or compared.
    if sharding is not None and not (
        sharding.is_fully_replicated and sharding.is_fully_addressable
    ):
        return jax.make_array_from_callback(
            shape, sharding, lambda index: plan.leaf(name, shape, dtype, index or ())
        )
    return jax.device_put(
        plan.leaf(name, shape, dtype, (slice(None),) * len(shape)), sharding, may_alias=True
    )


def load_quantized(plan: Plan, format: str, *, dtype: Any = None) -> Any:
    """As `fluxjax.convert.load.load`, with the blocks' matrices rounded as by `quantize`, block by block as they are read."""
    eight = eight_bit_dtype(format)
    rest, taken = take_out(plan)

    def read(name: str, shape: tuple[int, ...], target: np.dtype) -> QuantizedWeight:
        found, whole = empty_quantized(shape, eight), tuple(slice(0, size) for size in shape[1:])
        for block in range(shape[0]):
            found = put_block(
                found,
                jnp.asarray(plan.leaf(name, shape, target, (slice(block, block + 1), *whole))[0]),
                block,
            )
        return jax.block_until_ready(found)

    return put_back(
        load(rest, dtype=dtype), {name: read(name, *leaf(dtype)) for name, leaf in taken.items()}
    )


Taken = Mapping[str, Callable[[Any], tuple[tuple[int, ...], np.dtype]]]
"""Of a leaf's name: a function of the dtype that is wanted, or None, that gives its shape and dtype."""


def take_out(plan: Plan) -> tuple[Plan, Taken]:
    """Return a plan without the blocks' matrices, and those."""
    taken: dict[str, Any] = {}

    def leave(path: Any, node: Any) -> Any:
        name = path_name(path)
        if not isinstance(node, Dense) or not is_stacked(name):
            return node
        taken[name] = lambda dtype: (node.shape, loaded_dtype(plan, name, node.shape, dtype))
        return None

    rest = jax.tree_util.tree_map_with_path(
        leave, plan.network, is_leaf=lambda node: isinstance(node, Dense)
    )
    return Plan(rest, plan.pieces, plan.slots), taken


def put_back(network: Any, weights: Mapping[str, Weight]) -> Any:
    """Return a network with weights in the places that `take_out` left."""

    def put(path: Any, node: Any) -> Any:
        return weights.get(path_name(path), node)

    return jax.tree_util.tree_map_with_path(put, network, is_leaf=lambda node: node is None)
