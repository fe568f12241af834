"""Adapters attached beside the weights as low-rank factors, as a function of arrays.

The product W x + up (down x) is computed as it is written, so nothing is merged or rounded, and
the weights may be quantized. `nets/weight.py` has the type of such a weight, `AdaptedWeight`.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows, fused_parts
from fluxjax.checkpoint.weights import Parameter, parameters_of
from fluxjax.lora.adapter import Lora
from fluxjax.lora.changes import ScaledChange, WeightChanges, changes_of
from fluxjax.lora.factors import Factor, combined_factors
from fluxjax.lora.merge import merge_changes
from fluxjax.lora.networks import Leaf, dense_shapes, is_weight
from fluxjax.lora.row_scales import BlockChanges, scale_rows
from fluxjax.lora.scales import Scales, check_scales
from fluxjax.lora.widen import widen_for_changes
from fluxjax.nets.stack import is_stacked, leaf_names
from fluxjax.nets.weight import AdaptedWeight, RowScaledWeight, Weight
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)


@convert_arguments
def attach(
    model: Network,
    loras: Sequence[Lora],
    scales: Scales | None = None,
) -> Network:
    """Return a network whose adapted weights have the adapters beside them as low-rank factors.

    The weights are shared with the model, not copied, and may be stored in any way. Biases and
    norm scales, which are small, are changed as by `merge`, but kept in float32: nothing is
    rounded.

    It is a cheap function of arrays, so call it inside the jitted function. With adapters and
    scales as arguments, another scale, or another adapter of the same modules and ranks, compiles
    nothing; under `jax.vmap`, each image has its own.

    For example, as part of a jitted velocity:

        @eqx.filter_jit
        def velocity(flux, loras, scales, x, t, **inputs):
            return fluxjax.attach(flux, loras, scales)(x, t, **inputs)

    **Arguments:**

    - `model`: a `Flux`, `Clip` or `T5`, of weights in any storage.
    - `loras`: any number of adapters.
    - `scales`: as for `merge`; they may be traced.

    **Returns:** a network of the same kind, whose adapted matrices are `AdaptedWeight`. Its input
    is wider if an adapter adds input features, as those of FLUX.1 Canny and Depth do.
    **Raises:** as `merge`, and `WeightsError` for an adapter that has no low-rank form (a DoRA of
    columns, OFT, a LoKr whose second factor is whole, full differences): merge it instead. So has a
    DoRA of rows beside weights that are not plain arrays, since it depends on their norms.
    """
    shapes = dense_shapes(model)
    changes = changes_of(shapes, loras, check_scales("attach", len(loras), scales))
    model = widen_for_changes(model, changes)
    shapes = dense_shapes(model)
    slots = parameters_of(shapes)
    names = leaf_names(shapes)
    # Vectors are changed as they are; matrices get factors beside them, by leaf and block.
    vectors: dict[str, Sequence[ScaledChange]] = {}
    matrices: dict[str, dict[int | None, Sequence[ScaledChange]]] = {}
    for name, of_weight in changes.items():
        slot = slots[name]
        if len(slot.shape) < 2:
            vectors[name] = of_weight
        else:
            matrices.setdefault(names[slot.leaf], {})[slot.block] = of_weight
    model = _change_vectors(model, vectors, slots, names)
    parts = fused_parts(shapes.config)  # type: ignore[attr-defined]

    def adapt(path: jax.tree_util.KeyPath, node: Weight | Leaf) -> Weight | Leaf:
        name = ".".join(str(key.name) for key in path)
        if name not in matrices:
            return node
        if not isinstance(node, Weight):
            raise WeightsError(
                f"{name} is a lookup table, beside which no low-rank factors can be attached. "
                "Merge the adapter instead."
            )
        base, low_rank = scale_rows(name, node, matrices[name], parts)
        return _adapt_weight(name, base, low_rank, parts)

    return jax.tree_util.tree_map_with_path(adapt, model, is_leaf=is_weight)


def without_adapters(model: Network) -> Network:
    """Return a network whose matrices are those that adapters were attached beside.

    Biases, norm scales and a wider input, which `attach` changes, stay changed. Its weights may
    have been placed on a mesh since.
    """

    def is_adapted(node: object) -> bool:
        return isinstance(node, AdaptedWeight)

    def strip(node: Weight | Leaf) -> Weight | Leaf:
        if not isinstance(node, AdaptedWeight):
            return node
        return node.base.base if isinstance(node.base, RowScaledWeight) else node.base

    return jax.tree.map(strip, model, is_leaf=is_adapted)


def _change_vectors(
    model: Network,
    changes: WeightChanges,
    slots: Mapping[str, Parameter],
    names: Sequence[str],
) -> Network:
    """Return a network whose biases and norm scales are changed, in float32 where they are.

    **Arguments:**

    - `model`: of weights in any storage.
    - `changes`: of vectors only.
    - `slots`, `names`: the slots and the names of the leaves of the dense network.
    """
    changed = {names[slots[name].leaf] for name in changes}
    leaves, structure = jax.tree.flatten(model)
    exact = []
    for name, leaf in zip(leaf_names(model), leaves, strict=True):
        exact.append(leaf.astype(jnp.float32) if name in changed else leaf)
    return merge_changes(jax.tree.unflatten(structure, exact), changes, donate=False)


def _adapt_weight(
    name: str,
    base: Weight,
    changes: BlockChanges,
    parts: FusedRows,
) -> AdaptedWeight:
    """Return a weight with the factors of its changes beside it.

    The factors of all blocks of a stack have the largest rank among them, padded with zeros.

    **Arguments:**

    - `name`: of the leaf.
    - `base`: the weight, in any storage; it is shared, not copied.
    - `changes`: of its blocks.
    - `parts`: the rows of the parts of fused weights.
    """
    if not is_stacked(name):
        down, up = combined_factors(name, changes[None], base.shape, parts)
        return AdaptedWeight(base, jnp.asarray(down), jnp.asarray(up))
    shape = base.shape[1:]
    factors = {}
    for block, of_block in changes.items():
        factors[block] = combined_factors(name, of_block, shape, parts)
    rank = max(down.shape[0] for down, _ in factors.values())
    # Blocks that no adapter changes get a product of zeros: a stack has one shape for all.
    no_change = (jnp.zeros((rank, shape[1])), jnp.zeros((shape[0], rank)))
    downs, ups = [], []
    for block in range(base.shape[0]):
        if block in factors:
            block_down, block_up = factors[block]
            down, up = _pad_rank(block_down, block_up, rank)
        else:
            down, up = no_change
        downs.append(down)
        ups.append(up)
    return AdaptedWeight(base, jnp.stack(downs), jnp.stack(ups))


def _pad_rank(
    down: Factor,
    up: Factor,
    rank: int,
) -> tuple[Array, Array]:
    """Return factors of a larger rank with the same product, padded with zeros."""
    missing = rank - down.shape[0]
    padded_down = jnp.pad(down, ((0, missing), (0, 0)))
    padded_up = jnp.pad(up, ((0, 0), (0, missing)))
    return padded_down, padded_up
