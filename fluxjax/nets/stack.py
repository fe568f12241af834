"""Blocks of one kind, stacked along a leading axis or unrolled, and the names of their arrays."""

from abc import abstractmethod
from collections.abc import Callable
from operator import attrgetter
from typing import TypeVar

import equinox as eqx
import jax
from jax.tree_util import GetAttrKey, KeyPath, SequenceKey
from jaxtyping import PyTree

from fluxjax.numeric import index_axis
from fluxjax.shapes import Array, Int, PRNGKeyArray

Block = TypeVar("Block")
Network = TypeVar("Network", bound=eqx.Module)

_STACKED = (
    "double",
    "single",
    "blocks",
    "double_residual",
    "single_residual",
    "approximator",
)
"""The fields of the networks that hold stacked blocks; everything else asks `is_stacked`."""


def stack(
    make: Callable[[PRNGKeyArray], Block],
    depth: int,
    *,
    key: PRNGKeyArray,
) -> Block:
    """Return `depth` blocks as one block whose arrays have a leading depth axis.

    **Arguments:** `make`: makes one block of a key.
    """
    return eqx.filter_vmap(make)(jax.random.split(key, depth))


class Unrolled(eqx.Module):
    """Blocks that are not stacked, in their order.

    Each is compiled separately, and no loop slices its weights.
    """

    blocks: tuple[PyTree, ...]


class SharedArrays(eqx.Module):
    """Arrays of stacked blocks that have no axis of blocks: each block gets them all.

    `content`: a pytree of them.
    """

    content: PyTree


class BlockStack(eqx.Module):
    """A part of stacked blocks of which an unrolled block is not a slice of every array."""

    @abstractmethod
    def block(self, number: int) -> PyTree:
        """Return the part of one block. `number`: of the block, not traced."""


def split_arrays(blocks: PyTree) -> tuple[PyTree, PyTree]:
    """Return the arrays of stacked blocks that have an axis of blocks, and all the rest.

    `eqx.combine` joins the two, also after the first has been sliced.
    """
    return eqx.partition(blocks, eqx.is_array, is_leaf=lambda node: isinstance(node, SharedArrays))


def map_part(blocks: PyTree, part: Callable[[PyTree], PyTree]) -> PyTree:
    """Return part(block) of every block, stacked or unrolled as the blocks are.

    **Arguments:** `part`: a function that selects or replaces layers; it gets a whole stack at
    once.
    """
    if isinstance(blocks, Unrolled):
        return Unrolled(tuple(map(part, blocks.blocks)))
    return part(blocks)


def zip_blocks(first: PyTree, second: PyTree) -> PyTree:
    """Return blocks that are pairs: each block of one kind with the one of the other.

    **Arguments:** `first`, `second`: as many of each, both stacked or both unrolled.
    """
    if isinstance(first, Unrolled):
        return Unrolled(tuple(zip(first.blocks, second.blocks, strict=True)))
    return first, second


def depth_of(blocks: PyTree) -> int:
    """Return how many blocks there are: of stacked ones, the leading size of all their arrays."""
    if isinstance(blocks, Unrolled):
        return len(blocks.blocks)
    arrays, _ = split_arrays(blocks)
    return jax.tree.leaves(arrays)[0].shape[0]


def block_at(blocks: PyTree, index: int | Int[Array, ""]) -> PyTree:
    """Return one block, or the rows of it in a pytree of arrays.

    **Arguments:** `index`: may be traced, unless the blocks are unrolled.
    """
    if isinstance(blocks, Unrolled):
        return blocks.blocks[index]
    arrays, rest = split_arrays(blocks)
    return eqx.combine(jax.tree.map(lambda leaf: index_axis(leaf, index), arrays), rest)


def unroll(network: Network, *, donate: bool = False) -> Network:
    """Return a network whose blocks are unrolled: each is compiled separately.

    A loop over stacked blocks compiles them once, but on GPUs it copies each block's weights before
    it uses them. Unrolled blocks are read in place, and take longer to compile.

    **Arguments:** `network`: a `Flux`, `T5` or `Clip`, as it is to be run. Attach adapters,
    quantize and stream before; converting, saving and attaching take stacked blocks only. `donate`:
    free the memory of each stacked array once it is copied, after which `network` can't be used;
    otherwise there are two copies of the blocks.
    **Raises:** `ValueError` for a network without stacked blocks.
    """
    names = []
    for name, blocks in vars(network).items():
        # No blocks stay stacked: unrolled, nothing would tell the shapes of their modulation.
        if is_stacked(name) and not isinstance(blocks, Unrolled) and depth_of(blocks) > 0:
            names.append(name)
    if not names:
        raise ValueError(
            "`unroll(network)` takes stacked blocks apart, and this "
            f"{type(network).__name__} has none. Pass a Flux, T5 or Clip that is not unrolled yet."
        )
    for name in names:
        unrolled = _unrolled(getattr(network, name), donate)
        network = eqx.tree_at(attrgetter(name), network, unrolled)
    return network


def _unrolled(blocks: PyTree, donate: bool) -> Unrolled:
    """Return stacked blocks as unrolled ones, copied array by array."""
    leaves, structure = jax.tree.flatten(blocks, is_leaf=lambda node: isinstance(node, BlockStack))
    depth = depth_of(blocks)
    leaves_of_block: list[list] = [[] for _ in range(depth)]
    for leaf in leaves:
        for number, block in enumerate(leaves_of_block):
            if isinstance(leaf, BlockStack):
                block.append(leaf.block(number))
            else:
                block.append(leaf[number] if eqx.is_array(leaf) else leaf)
        if donate and eqx.is_array(leaf):
            # The copies have to be finished before their source is freed.
            jax.block_until_ready([block[-1] for block in leaves_of_block])
            leaf.delete()
    return Unrolled(tuple(jax.tree.unflatten(structure, block) for block in leaves_of_block))


def path_name(path: KeyPath) -> str:
    """Return the name of what is at a path of a network: fields and indices, joined by dots.

    **Arguments:** `path`: as of `jax.tree_util.tree_map_with_path`.
    """
    return ".".join(_entry_name(entry) for entry in path)


def _entry_name(entry: GetAttrKey | SequenceKey) -> str:
    return entry.name if isinstance(entry, GetAttrKey) else str(entry.idx)


def leaf_names(network: eqx.Module) -> list[str]:
    """Return the names of a network's arrays, in the order of its leaves.

    A plain weight or kernel is named as the layer's field ("img_in.weight"), without the field of
    its storage (".value"): these are the names in files of fluxjax's own layout.
    """
    paths = jax.tree_util.tree_flatten_with_path(network)[0]
    return [path_name(path).removesuffix(".value") for path, _ in paths]


def is_stacked(name: str) -> bool:
    """Return whether what has this name in a network belongs to its stacked blocks.

    **Arguments:** `name`: as of `path_name`; of an array, or of a field of the network.
    """
    return name.partition(".")[0] in _STACKED


def is_rounded(name: str) -> bool:
    """Return whether the matrices of what has this name are rounded where blocks are quantized.

    Chroma's approximator is stacked as well, but it runs once for a whole sampling, and what it
    gives modulates every block.

    **Arguments:** `name`: as for `is_stacked`.
    """
    return is_stacked(name) and not name.startswith("approximator.")


def block_name(leaf: str, block: int) -> str:
    """Return the name of one block of a stacked array: the index follows the first field.

    **Arguments:** `leaf`: the name of the stacked array, such as "double.img.qkv.weight".
    **Returns:** such as "double.3.img.qkv.weight".
    """
    first, _, rest = leaf.partition(".")
    return f"{first}.{block}.{rest}"
