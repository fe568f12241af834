"""Adapters beside the weights: low-rank leaves, so that adapters and scales are arguments of a compiled function."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.weights import parameters_of
from fluxjax.lora.merge import changes_of, merge_changes, rows_of
from fluxjax.lora.read import Change, Lora
from fluxjax.lora.scales import Scales, check_scales
from fluxjax.nets.stack import is_stacked, leaf_names, path_name
from fluxjax.nets.weight import AdaptedWeight, Dense, Weight
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)


@convert_arguments
def attach(model: Network, loras: Sequence[Lora], scales: Scales | None = None) -> Network:
    """Return a network whose adapted weights carry the adapters as low-rank leaves; the weights themselves are shared, not
    copied. Biases and norm scales, which are small, are changed as by `merge`, but kept in float32: nothing is rounded.

    It costs next to nothing and is a pure function of arrays, so call it inside what is jitted: with adapters and scales as
    arguments, another scale, or another adapter of the same modules and ranks, compiles nothing; under `jax.vmap` each image
    has its own.

    **Arguments:** as for `merge`; scales may be traced.
    **Raises:** as `merge`, and `WeightsError` for an adapter that has no low-rank form (DoRA, a LoKr of whole factors, full
    differences, a widened input): merge it instead.
    """
    plain = _plain(model)
    wanted = changes_of(plain, loras, check_scales("attach", len(loras), scales))
    names, slots, parts = leaf_names(plain), parameters_of(plain), fused_parts(model.config)  # type: ignore[attr-defined]
    vectors = {name: found for name, found in wanted.items() if len(slots[name].shape) < 2}
    model = merge_changes(
        _in_float32(model, {names[slots[name].leaf] for name in vectors}), vectors, donate=False
    )
    matrices: dict[str, dict[int | None, Sequence[tuple[Change, Any]]]] = {}
    for name, found in wanted.items():
        if name not in vectors:
            slot = slots[name]
            matrices.setdefault(names[slot.leaf], {})[slot.block] = found

    def adapted(path: Any, weight: Any) -> Any:
        name = path_name(path)
        if name not in matrices:
            return weight
        if not isinstance(weight, Weight):
            raise WeightsError(
                f"{name} is a table, which no low-rank leaf can stand beside. Merge the adapter instead."
            )
        return _beside(name, weight, matrices.pop(name), parts)

    return jax.tree_util.tree_map_with_path(
        adapted, model, is_leaf=lambda node: isinstance(node, Weight)
    )


def _in_float32(model: Network, names: set[str]) -> Network:
    """Return a network with these leaves in float32."""
    leaves, structure = jax.tree.flatten(model)
    found = zip(leaf_names(model), leaves, strict=True)
    return jax.tree.unflatten(
        structure, [leaf.astype(jnp.float32) if name in names else leaf for name, leaf in found]
    )


def _plain(model: Network) -> Network:
    """Return the shapes of a network as if its matrices were stored as themselves."""

    def shape(node: Any) -> Any:
        if not isinstance(node, Weight) and not eqx.is_array(node):
            return node
        plain = jax.ShapeDtypeStruct(node.shape, jnp.float32)
        return (
            eqx.tree_at(lambda dense: dense.value, Dense(jnp.zeros((0, 0))), plain)
            if isinstance(node, Weight)
            else plain
        )

    return jax.tree.map(shape, model, is_leaf=lambda node: isinstance(node, Weight))


def _beside(
    name: str,
    base: Weight,
    found: Mapping[int | None, Sequence[tuple[Change, Any]]],
    parts: Mapping[str, slice],
) -> AdaptedWeight:
    """Return a weight with the factors of its blocks beside it, padded with zeros to the largest rank."""
    shape = base.shape[1:] if is_stacked(name) else base.shape
    factors = {block: factors_of(name, changes, shape, parts) for block, changes in found.items()}
    if not is_stacked(name):
        return AdaptedWeight(base, *factors[None])
    rank = max(down.shape[0] for down, _ in factors.values())
    none = (jnp.zeros((rank, shape[1])), jnp.zeros((shape[0], rank)))
    blocks = [
        _padded(*factors[block], rank) if block in factors else none
        for block in range(base.shape[0])
    ]
    return AdaptedWeight(
        base, jnp.stack([down for down, _ in blocks]), jnp.stack([up for _, up in blocks])
    )


def _padded(down: Array, up: Array, rank: int) -> tuple[Array, Array]:
    extra = rank - down.shape[0]
    return jnp.pad(down, ((0, extra), (0, 0))), jnp.pad(up, ((0, 0), (0, extra)))


def factors_of(
    name: str,
    changes: Sequence[tuple[Change, Any]],
    shape: tuple[int, ...],
    parts: Mapping[str, slice],
) -> tuple[Array, Array]:
    """Return all of a weight's changes as one low-rank product: downs stacked, ups placed in their rows, scales in the ups."""
    downs, ups = [], []
    for change, scale in changes:
        factors = change.term.factors()
        if factors is None:
            raise WeightsError(
                f"What an adapter does to {name} ({type(change.term).__name__}) has no low-rank form. Merge it instead."
            )
        extra = shape[1] - factors[1].shape[1]
        if extra < 0:
            raise WeightsError(
                f"An adapter widens {name}, which no low-rank leaf can. Merge it instead."
            )
        start, stop = rows_of(change, shape, parts)
        up = jnp.float32(scale) * factors[0]
        up = jnp.roll(up, (stop - start) // 2, axis=0) if change.swap else up
        downs.append(
            jnp.pad(factors[1], ((0, 0), (0, extra)))
        )  # of the input, of which it may adapt the first columns only
        ups.append(jnp.zeros((shape[0], up.shape[1])).at[start:stop].set(up))
    return jnp.concatenate(downs), jnp.concatenate(ups, axis=1)
