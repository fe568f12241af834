"""Blocks of one kind, stacked along a leading axis or unrolled, and loops over them."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.kernels.blocks import default_device
from fluxjax.nets.weight import Weight
from fluxjax.shapes import Array, PRNGKeyArray

Carry = TypeVar("Carry")
Block = TypeVar("Block")
Result = TypeVar("Result")


def stack(make: Callable[[PRNGKeyArray], Block], depth: int, *, key: PRNGKeyArray) -> Block:
    """Return `depth` blocks as one whose arrays have a leading depth axis."""
    return eqx.filter_vmap(make)(jax.random.split(key, depth))


class Unrolled(eqx.Module):
    """Blocks that are not stacked: each is compiled by itself, and no loop slices its weights."""

    blocks: tuple[Any, ...]


def map_part(blocks: Any, part: Callable[[Any], Any]) -> Any:
    """Return a part of every block, stacked or apart as they are."""
    return (
        Unrolled(tuple(map(part, blocks.blocks))) if isinstance(blocks, Unrolled) else part(blocks)
    )


def scan_blocks(
    blocks: Block,
    carry: Carry,
    call: Callable[..., Carry],
    *,
    rows: tuple[Any, ...] = (),
    start: int = 0,
    remat: bool = False,
) -> Carry:
    """Thread `carry` through stacked blocks by call(block, carry, *row), tracing the block once.

    `rows`: pytrees of arrays with one row a block. `start`: the first block; where it is not 0, a gradient takes a sum over the
    whole stack a block. `remat`: a gradient keeps each block's input alone and runs the block again. Source: Chen et al. 2016.
    """
    return _scan(blocks, carry, lambda *inputs: (call(*inputs), None), rows, start, remat)[0]


def map_blocks(blocks: Block, call: Callable[[Block], Result], *, remat: bool = False) -> Result:
    """Return call(block) of each of stacked blocks, stacked. `remat`: as for `scan_blocks`."""
    return _scan(blocks, None, lambda block, _: (None, call(block)), (), 0, remat)[1]


def _scan(
    blocks: Any, carry: Carry, call: Callable[..., tuple], rows: tuple, start: int, remat: bool
) -> tuple[Carry, Any]:
    """Scan call(block, carry, *row) -> (carry, result) over the blocks."""
    if isinstance(blocks, Unrolled):
        return _loop(blocks, carry, call, rows, start, remat)
    arrays, static = eqx.partition(blocks, eqx.is_array)
    if not remat and any(weight.is_remote for weight in _weights(blocks)):
        return _scan_ahead(blocks, carry, call, rows, start)

    numbers = jnp.arange(start, depth_of(blocks))

    def body(carry: Carry, turn: Any) -> tuple[Carry, Any]:
        number, row = turn
        # A slice of the stack would be a copy of it; rows by number are read where they lie.
        one, *rest = take((arrays, *rows), number) if start else row
        here = jax.tree.map(partial(_sliced, number), arrays, one)
        return call(eqx.combine(here, static), carry, *rest)

    # Inside a scan nothing can be merged with the second run, so the barriers against that would only cost.
    step = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(step, carry, (numbers, None if start else (arrays, *rows)))


def _sliced(number: Array, stack: Array, row: Array) -> Array:
    """Return a row of a stack, as it is computed best.

    XLA:CPU slices 16-bit numbers as float32, and makes that of the whole stack before the loop: three times the memory. It
    can't, of a stack that seems to be another in each turn; gradients go by the row.
    """
    if stack.dtype.itemsize != 2 or default_device().platform != "cpu":
        return row
    stack, number = jax.lax.optimization_barrier((jax.lax.stop_gradient(stack), number))
    return _in_place_of(row, stack[number])


@jax.custom_jvp
def _in_place_of(row: Array, same: Array) -> Array:
    return same


@_in_place_of.defjvp
def _in_place_of_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return _in_place_of(*primals), tangents[0]


def _loop(
    blocks: Unrolled, carry: Carry, call: Callable[..., tuple], rows: tuple, start: int, remat: bool
) -> tuple[Carry, Any]:
    """`_scan` of blocks that are apart."""
    results = []
    call = eqx.filter_checkpoint(call) if remat else call
    for number, block in list(enumerate(blocks.blocks))[start:]:
        carry, result = call(block, carry, *take(rows, number))
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results) if results else None


def _scan_ahead(
    blocks: Any, carry: Carry, call: Callable[..., tuple], rows: tuple, start: int
) -> tuple[Carry, Any]:
    """`_scan`, with each next block's weights fetched meanwhile, so that the transfer and the work overlap.

    The last turn fetches the first block again, for nothing: the loop's body is one for all.
    """
    depth = depth_of(blocks)

    def fetched(number: Any) -> Any:
        fetch = lambda node: node.fetch() if isinstance(node, Weight) else node  # noqa: E731
        block = jax.tree.map(
            fetch, take(blocks, number), is_leaf=lambda node: isinstance(node, Weight)
        )
        return eqx.partition(block, eqx.is_array)

    ready, static = fetched(start)

    def body(state: tuple[Carry, Any], turn: tuple[Array, tuple]) -> tuple[tuple[Carry, Any], Any]:
        (carry, ready), (number, row) = state, turn
        soon, _ = fetched((number + 1) % depth)
        carry, result = call(eqx.combine(ready, static), carry, *row)
        return (carry, soon), result

    left = jax.tree.map(lambda leaf: leaf[start:], rows)
    (carry, _), results = jax.lax.scan(body, (carry, ready), (jnp.arange(start, depth), left))
    return carry, results


def _weights(blocks: Any) -> list[Weight]:
    leaves = jax.tree.leaves(blocks, is_leaf=lambda node: isinstance(node, Weight))
    return [leaf for leaf in leaves if isinstance(leaf, Weight)]


def depth_of(blocks: Any) -> int:
    """Return how many blocks are stacked."""
    return jax.tree.leaves(eqx.filter(blocks, eqx.is_array))[0].shape[0]


def take(stacked: Any, index: Any) -> Any:
    """Return the block of this number, of stacked ones or ones that are apart."""
    if isinstance(stacked, Unrolled):
        return stacked.blocks[index]
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, stacked)


Network = TypeVar("Network", bound=eqx.Module)


def unroll(network: Network, *, donate: bool = False) -> Network:
    """Return a network with its blocks apart: each is compiled by itself, and its weights are used where they lie.

    A loop over stacked blocks compiles one for all, but on GPUs it copies each block's weights before it uses them.

    **Arguments:** `network`: a `Flux`, `T5` or `Clip`, as it is to be used: adapters, 8 bits and streaming come before; what
    converts, saves or adapts a network takes stacked ones alone. `donate`: give the stacks' memory free, one by one; the
    network can't be used after. Without it there are two copies of the blocks.
    **Raises:** `ValueError` for a network without stacked blocks.
    """
    stacks = {
        name: child
        for name, child in vars(network).items()
        if is_stacked(name) and not isinstance(child, Unrolled)
    }
    names = [name for name, blocks in stacks.items() if depth_of(blocks)]
    if not names:
        raise ValueError(
            f"`unroll(network)` takes stacked blocks apart, and this {type(network).__name__} has none."
        )
    for name in names:
        network = eqx.tree_at(attrgetter(name), network, _apart(getattr(network, name), donate))
    return network


def _apart(blocks: Any, donate: bool) -> Unrolled:
    leaves, tree = jax.tree.flatten(blocks)
    rows = []
    for leaf in leaves:
        rows.append(
            [leaf[number] for number in range(depth_of(blocks))]
            if eqx.is_array(leaf)
            else [leaf] * depth_of(blocks)
        )
        if donate and eqx.is_array(leaf):
            jax.block_until_ready(rows[-1])
            leaf.delete()
    return Unrolled(tuple(jax.tree.unflatten(tree, row) for row in zip(*rows, strict=True)))


_STACKED = ("double", "single", "blocks")


def path_name(path: Any) -> str:
    """Return the name of what is at a path of a network: fields and indices, joined by dots."""
    return ".".join(_field(entry) for entry in path)


def leaf_names(network: eqx.Module) -> list[str]:
    """Return the names of a network's array leaves, in the order of its leaves: fields and indices joined by dots."""
    paths = jax.tree_util.tree_flatten_with_path(network)[0]
    return [path_name(path).removesuffix(".value") for path, _ in paths]


def _field(entry: Any) -> str:
    return str(entry.name if isinstance(entry, jax.tree_util.GetAttrKey) else entry.idx)


def is_stacked(leaf: str) -> bool:
    """Return whether a leaf of this name has its blocks along the first axis."""
    return leaf.partition(".")[0] in _STACKED


def block_name(leaf: str, block: int) -> str:
    """Return the name of one block of a stacked leaf: the index follows the first field."""
    first, _, rest = leaf.partition(".")
    return f"{first}.{block}.{rest}"
