"""Networks of 8-bit weights: a quarter of float32's memory, and matmuls that accelerators run twice as fast as bfloat16's."""

from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.convert.load import Plan, is_stacked, load
from fluxjax.memory import put_back, take_out
from fluxjax.nets.layers import Dense, Weight
from fluxjax.nets.quantized import EIGHT_BITS, Quantized, rounded
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)


def quantize(network: Network, format: str, *, donate: bool = False) -> Network:
    """Return a network whose blocks' matrices are rounded to 8 bits, a scale an output; embedders, norms, biases, and what is
    outside of the blocks stay as they are.

    **Arguments:** `network`: a `Flux` or `T5`, merged before; adapters can be attached after. `format`: "int8" or "fp8"
    (e4m3). `donate`: give each matrix's memory free as it is done; the network can't be used after.
    **Raises:** `ValueError` for another format, or a network without blocks of plain matrices.
    """
    dtype, count = _dtype(format), 0

    def eight(path: Any, node: Any) -> Any:
        nonlocal count
        if not isinstance(node, Weight) or not is_stacked(str(path[0].name)):
            return node
        if not isinstance(node, Dense):
            raise ValueError(
                f"`quantize(network)` rounds plain matrices, got a {type(node).__name__}. Merge or quantize before others."
            )
        if node.value.ndim != 3:
            raise ValueError("`quantize(network)` takes stacked blocks. Quantize before `unroll`.")
        count += 1
        found = _empty(node.value.shape, dtype)
        for block in range(len(node.value)):
            found = _put(found, node.value[block], block)
        if donate:
            jax.block_until_ready(found)
            node.value.delete()
        return found

    result = jax.tree_util.tree_map_with_path(eight, network, is_leaf=lambda node: isinstance(node, Weight))
    if not count:
        raise ValueError(
            f"`quantize(network)` rounds plain matrices of blocks, and a {type(network).__name__} has none. Pass a Flux or T5."
        )
    return result


def load_quantized(plan: Plan, format: str, *, dtype: Any = None) -> Any:
    """As `fluxjax.convert.load.load`, with the blocks' matrices rounded as by `quantize`, block by block as they are read."""
    eight = _dtype(format)
    rest, taken = take_out(plan)

    def read(name: str, shape: tuple[int, ...], target: np.dtype) -> Quantized:
        found, whole = _empty(shape, eight), tuple(slice(0, size) for size in shape[1:])
        for block in range(shape[0]):
            found = _put(found, jnp.asarray(plan.leaf(name, shape, target, (slice(block, block + 1), *whole))[0]), block)
        return jax.block_until_ready(found)

    return put_back(load(rest, dtype=dtype), {name: read(name, *leaf(dtype)) for name, leaf in taken.items()})


def _dtype(format: str) -> Any:
    if format not in EIGHT_BITS:
        raise ValueError(f"There is no format {format!r} of 8 bits. Choose one of {', '.join(EIGHT_BITS)}.")
    return EIGHT_BITS[format]


def _empty(shape: tuple[int, ...], dtype: Any) -> Quantized:
    return Quantized(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1]))


@partial(jax.jit, donate_argnums=0)
def _put(weight: Quantized, block: Array, number: Any) -> Quantized:
    value, scale = rounded(block, weight.value.dtype)
    return Quantized(weight.value.at[number].set(value), weight.scale.at[number].set(scale))
