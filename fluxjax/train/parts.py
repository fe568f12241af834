"""What is trained of a transformer: all of it, some of its layers, or an adapter beside it.

The trained numbers are a flat dictionary of arrays by name, which optimizers, checkpoints and
averages treat alike. They are in the order of files on every mesh.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.devices.shard import in_device_order
from fluxjax.lora.adapter import Lora
from fluxjax.lora.attach import attach
from fluxjax.lora.init import trainable
from fluxjax.nets.stack import block_name, is_stacked
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.nets.weight import AdaptedWeight, RowScaledWeight
from fluxjax.shapes import Array
from fluxjax.train.named_leaves import (
    LeafHole,
    WeightArrays,
    flatten_by_name,
    leaf_path_name,
    select_leaves,
    with_named_leaves,
)

_ADDED_FIELDS = ("down", "up")
"""The fields of weights that adapters put beside a base."""


class Division(NamedTuple):
    """A transformer, or an adapter on it, divided into what is trained and the rest.

    - `weights`: what is trained, in the dtype that it is trained in.
    - `frozen`: the rest, a pytree that `TrainedPart.join` takes. What is trained whole is not in
      it, so that there is one copy of it.
    """

    weights: WeightArrays
    frozen: PyTree


class TrainedPart(eqx.Module):
    """Which numbers are trained, and how a transformer is made of them and of the rest."""

    @abstractmethod
    def join(self, weights: WeightArrays, frozen: PyTree, tensor: int = 1) -> AbstractTransformer:
        """Return the transformer.

        **Arguments:** `weights`: in the order of files. `frozen`: the rest, placed on a mesh by
        `shard` if `tensor` is more than 1: the number of devices along that axis.
        """

    @abstractmethod
    def names(self, network: AbstractTransformer) -> list[str]:
        """Return the names of the leaves of a joined transformer that depend on the weights."""

    @abstractmethod
    def gradients(
        self, of_network: WeightArrays, weights: WeightArrays, frozen: PyTree, tensor: int = 1
    ) -> WeightArrays:
        """Return gradients of the weights.

        **Arguments:** `of_network`: the gradients of the leaves that `names` lists. The others as
        for `join`.
        """


class TrainedLayers(TrainedPart):
    """All of a transformer, or some of its layers.

    `rows`: by the name of each chosen leaf, the blocks of a stack that are trained; None for all of
    them, or for a leaf that is not stacked.
    """

    rows: tuple[tuple[str, tuple[int, ...] | None], ...] = eqx.field(static=True)

    def join(self, weights: WeightArrays, frozen: PyTree, tensor: int = 1) -> AbstractTransformer:
        leaves, paths, structure = flatten_by_name(frozen)
        for name, rows in self.rows:
            path, frozen_leaf = paths[name], leaves[name]
            value = in_device_order(path, weights[name], frozen.config, tensor)
            if rows is None:
                leaves[name] = value
            else:
                index = jnp.asarray(rows)
                leaves[name] = frozen_leaf.at[index].set(value.astype(frozen_leaf.dtype))
        return jax.tree.unflatten(structure, list(leaves.values()))

    def names(self, network: AbstractTransformer) -> list[str]:
        return [name for name, _ in self.rows]

    def gradients(
        self, of_network: WeightArrays, weights: WeightArrays, frozen: PyTree, tensor: int = 1
    ) -> WeightArrays:
        _, paths, _ = flatten_by_name(frozen)
        found = {}
        for name, rows in self.rows:
            gradient = of_network[name]
            if rows is not None:
                gradient = gradient[jnp.asarray(rows)]
            gradient = in_device_order(paths[name], gradient, frozen.config, tensor, inverse=True)
            found[name] = gradient
        return found


class TrainedAdapter(TrainedPart):
    """An adapter beside a transformer whose own weights stay as they are.

    Its frozen part is a pair: the transformer, whose weights may be stored in any way, and what of
    the adapter is not trained, as alpha / rank.

    The transformer's leaves that depend on the adapter are the factors beside its weights. Their
    gradients are computed on the mesh, and go from there to those of the adapter's own numbers.
    """

    def join(self, weights: WeightArrays, frozen: PyTree, tensor: int = 1) -> AbstractTransformer:
        network, rest = frozen
        adapted = attach(network, [with_named_leaves(rest, weights)])
        nodes = jax.tree.leaves(adapted, is_leaf=_is_row_scaled)
        if tensor > 1 and any(map(_is_row_scaled, nodes)):
            raise ValueError(
                "A DoRA depends on the norms of rows, which have changed places where heads are "
                f"split over tensor={tensor}. Use fsdp or context in its place."
            )

        def reorder(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
            # The base is in the order of the devices already.
            if not _is_added(path):
                return leaf
            return in_device_order(path, leaf, network.config, tensor)

        return jax.tree_util.tree_map_with_path(reorder, adapted)

    def names(self, network: AbstractTransformer) -> list[str]:
        found = []

        def note(path: jax.tree_util.KeyPath, node: PyTree) -> None:
            prefix = leaf_path_name(path)
            if isinstance(node, AdaptedWeight):
                found.extend([f"{prefix}.down", f"{prefix}.up"])
                if isinstance(node.base, RowScaledWeight):
                    found.append(f"{prefix}.base.scale")

        def is_adapted(node: PyTree) -> bool:
            return isinstance(node, AdaptedWeight)

        jax.tree_util.tree_map_with_path(note, network, is_leaf=is_adapted)
        return found

    def gradients(
        self, of_network: WeightArrays, weights: WeightArrays, frozen: PyTree, tensor: int = 1
    ) -> WeightArrays:
        def leaves_of(weights: WeightArrays) -> WeightArrays:
            network = self.join(weights, frozen, tensor)
            return select_leaves(network, self.names(network))

        _, pull_back = jax.vjp(leaves_of, weights)
        return pull_back(of_network)[0]


def divide_layers(
    flux: AbstractTransformer, targets: Sequence[str] | None = None, *, dtype: DTypeLike
) -> tuple[TrainedLayers, Division]:
    """Return what full fine-tuning trains, or the fine-tuning of some layers.

    **Arguments:** `targets`: regular expressions; a layer is chosen if one matches its whole name,
    as `double.0.img.qkv`, with its weight and bias; None for all. `dtype`: of the trained weights.
    **Returns:** the part, and the divided transformer, whose chosen leaves are not in `frozen`.
    **Raises:** `ValueError` for a pattern that is not valid, or that matches nothing.
    """
    leaves, _, structure = flatten_by_name(flux)
    chosen = _chosen_rows(leaves, targets)
    weights = {}
    for name, rows in chosen.items():
        leaf = leaves[name] if rows is None else leaves[name][jnp.asarray(rows)]
        weights[name] = leaf.astype(dtype)
    frozen = _without_chosen(structure, leaves, chosen)
    return TrainedLayers(tuple(chosen.items())), Division(weights, frozen)


def divide_adapter(
    flux: AbstractTransformer, lora: Lora, *, dtype: DTypeLike = jnp.float32
) -> tuple[TrainedAdapter, Division]:
    """Return what the training of an adapter trains.

    **Arguments:** `lora`: from `init_lora`, `init_lokr`, `init_dora`, or `read_lora`, to go on with
    one. `dtype`: of the trained factors.
    **Raises:** as `attach`.
    """
    mask = trainable(lora)
    trained, rest = eqx.partition(lora, mask)
    weights = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        weights[leaf_path_name(path)] = jnp.asarray(leaf, dtype)
    # The structure stays whole, so that arrays can be put back by name.
    skeleton = eqx.combine(rest, jax.tree.map(lambda leaf: LeafHole(), trained))
    return TrainedAdapter(), Division(weights, (flux, skeleton))


def _is_row_scaled(node: PyTree) -> bool:
    return isinstance(node, RowScaledWeight)


def _is_added(path: jax.tree_util.KeyPath) -> bool:
    """Return whether a leaf is a factor that an adapter puts beside a weight."""
    if getattr(path[-1], "name", "") not in _ADDED_FIELDS:
        return False
    return "weight" in leaf_path_name(path).split(".")


def _without_chosen(
    structure: jax.tree_util.PyTreeDef,
    leaves: Mapping[str, Array],
    chosen: Mapping[str, tuple[int, ...] | None],
) -> AbstractTransformer:
    """Return a network with `LeafHole` in the place of each leaf that is trained whole.

    Of a stack of which some blocks are trained, the whole stack stays: `TrainedLayers.join` writes
    the trained blocks over their old values.

    **Arguments:** `structure`, `leaves`: from `flatten_by_name`. `chosen`: from `_chosen_rows`.
    """
    filled = []
    for name, leaf in leaves.items():
        filled.append(LeafHole() if name in chosen and chosen[name] is None else leaf)
    return jax.tree.unflatten(structure, filled)


def _chosen_rows(
    leaves: Mapping[str, Array], targets: Sequence[str] | None
) -> dict[str, tuple[int, ...] | None]:
    """Return the chosen leaves, and the chosen blocks of those that are stacked.

    **Arguments:** `leaves`: of the network, by name. `targets`: as for `divide_layers`.
    **Returns:** for each chosen leaf the numbers of its blocks; None for all of it.
    **Raises:** `ValueError` for patterns that are not valid, or that match nothing.
    """
    if targets is None:
        return dict.fromkeys(leaves)
    patterns = [_compile(target) for target in targets]
    used: set[str] = set()
    chosen: dict[str, tuple[int, ...] | None] = {}
    for name, leaf in leaves.items():
        if not is_stacked(name):
            if _matches(name, patterns, used):
                chosen[name] = None
            continue
        rows = []
        for block in range(leaf.shape[0]):
            if _matches(block_name(name, block), patterns, used):
                rows.append(block)
        if rows:
            chosen[name] = None if len(rows) == leaf.shape[0] else tuple(rows)
    unused = [pattern.pattern for pattern in patterns if pattern.pattern not in used]
    if unused or not patterns:
        examples = ", ".join(list(leaves)[:3])
        raise ValueError(
            f"`divide_layers(targets)`: {unused or 'no patterns'} match no layer of this network. "
            f"Its names are as {examples}, and double.0.img.qkv in blocks."
        )
    return chosen


def _matches(name: str, patterns: Sequence[re.Pattern], used: set[str]) -> bool:
    """Return whether a pattern matches an array's name or its layer's.

    **Arguments:** `name`: of an array of one block, as "double.0.img.qkv.weight". `used`: gets the
    patterns that match, so that those that match nothing can be reported.
    """
    layer = name.rpartition(".")[0]
    found = False
    for pattern in patterns:
        if pattern.fullmatch(name) or pattern.fullmatch(layer):
            used.add(pattern.pattern)
            found = True
    return found


def _compile(target: str) -> re.Pattern:
    """**Raises:** `ValueError` for a pattern that is not a valid regular expression."""
    try:
        return re.compile(target)
    except re.error as error:
        raise ValueError(
            f"`divide_layers(targets)`: {target!r} is not a valid regular expression: {error}. "
            "Escape the characters that are meant as they are."
        ) from error
