"""The leaves of a network by name, and networks of which some leaves are elsewhere."""

from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
from jaxtyping import PyTree

from fluxjax.nets.stack import leaf_names
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array

WeightArrays = dict[str, Array]
"""Arrays by name: what is trained, or gradients of it."""


class LeafHole(eqx.Module):
    """The place of a trained array in the frozen part.

    It has no leaves, so that placing, casting and compiling the frozen part pass it by, and it
    keeps the structure of the network, so that the array can be put back by name.
    """


def is_hole(node: PyTree) -> bool:
    """Return whether a node is the place of a trained array."""
    return isinstance(node, LeafHole)


def leaf_path_name(path: jax.tree_util.KeyPath) -> str:
    """Return the name of a leaf of any pytree: its fields, keys and indices, joined by dots."""
    parts = []
    for entry in path:
        for attribute in ("name", "key", "idx"):
            if hasattr(entry, attribute):
                parts.append(str(getattr(entry, attribute)))
                break
    return ".".join(parts)


def flatten_by_name(
    network: AbstractTransformer,
) -> tuple[dict[str, PyTree], dict[str, jax.tree_util.KeyPath], jax.tree_util.PyTreeDef]:
    """Return the leaves of a network and their paths, both by name, and its structure.

    The places of trained leaves hold `LeafHole`. Names are those of `fluxjax.nets.leaf_names`,
    without the field of a plain weight's storage.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(network, is_leaf=is_hole)
    leaves, paths = {}, {}
    for path, leaf in found:
        name = leaf_path_name(path).removesuffix(".value")
        leaves[name] = leaf
        paths[name] = path
    return leaves, paths, structure


def select_leaves(network: AbstractTransformer, names: Sequence[str]) -> WeightArrays:
    """Return some leaves of a transformer.

    **Arguments:** `names`: as `fluxjax.nets.leaf_names` gives them.
    """
    leaves = dict(zip(leaf_names(network), jax.tree.leaves(network), strict=True))
    return {name: leaves[name] for name in names}


def replace_leaves(
    network: AbstractTransformer, arrays: Mapping[str, PyTree]
) -> AbstractTransformer:
    """Return a transformer with other leaves of these names.

    **Arguments:** `arrays`: by the names that `fluxjax.nets.leaf_names` gives.
    """
    leaves, structure = jax.tree.flatten(network)
    named = dict(zip(leaf_names(network), leaves, strict=True))
    replaced = named | dict(arrays)
    return jax.tree.unflatten(structure, list(replaced.values()))


def with_named_leaves(tree: PyTree, arrays: Mapping[str, PyTree]) -> PyTree:
    """Return a pytree whose places of trained arrays are filled again.

    **Arguments:** `tree`: the frozen part of an adapter. `arrays`: by the names that
    `leaf_path_name` gives.
    """

    def fill(path: jax.tree_util.KeyPath, node: PyTree) -> PyTree:
        if not isinstance(node, LeafHole):
            return node
        return arrays[leaf_path_name(path)]

    return jax.tree_util.tree_map_with_path(fill, tree, is_leaf=is_hole)
