"""Adapters into a model: differences in float32, summed over adapters, added once, cast once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.convert.files import WeightsError
from fluxjax.convert.load import Weights, abstract, cast, leaf_names, slots_of
from fluxjax.convert.source import KINDS, fused_parts
from fluxjax.lora.read import Change, Lora
from fluxjax.lora.terms import Term
from fluxjax.nets.flux import Flux
from fluxjax.nets.layers import Dense, Weight
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)
Scale = float | jax.Array | Mapping[str, float]
"""One scale, or scales by the beginning of a weight's name ("double.3", "single", "" for the rest); the longest counts, and
what none fits is left as it is."""


def merge(model: Network, loras: Sequence[Lora], scales: Sequence[Scale] | None = None, *, donate: bool = False) -> Network:
    """Return a network with adapters added to its weights: W + the sum over adapters of scale * delta, taken in float32.

    **Arguments:** `model`: a `Flux`, `Clip` or `T5`; an adapter's other networks are merged by another call. `scales`: one an
    adapter, 1 by default; negative ones subtract. `donate`: give the model's memory to the result, so that no second copy of
    its weights exists; the model can't be used after.
    **Raises:** `WeightsError` that lists the weights that an adapter does not fit.
    """
    return _apply(model, loras, [1.0] * len(loras) if scales is None else scales, donate)


def unmerge(model: Network, loras: Sequence[Lora], scales: Sequence[Scale] | None = None, *, donate: bool = False) -> Network:
    """Return the network that these adapters were merged into; arguments as for `merge`.

    **Raises:** `WeightsError` for adapters that can't be subtracted: those that set or widen a weight, and DoRA's. Load
    the base again instead.
    """
    kind = kind_of(model)
    for lora in loras:
        for name, changes in lora.changes.get(kind, {}).items():
            if not all(change.term.additive for change in changes):
                raise WeightsError(
                    f"What an adapter did to {name} can't be subtracted: it set it, or scaled it. Load the base again."
                )
            wider = any((change.term.columns or 0) > model.config.out_channels for change in changes)  # type: ignore[attr-defined]
            if name == "img_in.weight" and wider:
                raise WeightsError("An adapter that widened img_in can't be undone. Load the base again.")
    scales = [1.0] * len(loras) if scales is None else scales
    return _apply(model, loras, [_negative(scale) for scale in scales], donate)


def _negative(scale: Scale) -> Scale:
    return {name: -value for name, value in scale.items()} if isinstance(scale, Mapping) else -scale


def kind_of(model: eqx.Module) -> str:
    for name, kind in KINDS.items():
        if isinstance(model, kind.network) and name != "vae":
            return name
    raise ValueError(f"`merge(model)` needs a Flux, Clip or T5, got {type(model).__name__}. Merge the networks one by one.")


def scale_of(scale: Scale, name: str) -> Any:
    if not isinstance(scale, Mapping):
        return scale
    fitting = [key for key in scale if _begins(name, key)]
    return scale[max(fitting, key=len)] if fitting else 0.0


def _begins(name: str, key: str) -> bool:
    return key == "" or name == key or name.startswith(f"{key}.")


def notes_of(model: eqx.Module, lora: Lora) -> tuple[str, ...]:
    """Return one line for each thing in an adapter that has no effect on a network and is left out, to be shown to the user."""
    mine = lora.changes.get(kind_of(model), {})
    if not any(_is_without_effect(model, name) for name in mine):
        return lora.notes
    return (*lora.notes, "Its guidance_in is left out: this network, as schnell, takes no guidance, so it has no effect.")


def _is_without_effect(model: eqx.Module, name: str) -> bool:
    """Whether a weight is of the guidance, and the network takes none."""
    return isinstance(model, Flux) and not model.config.guidance_embed and name.startswith("guidance_in.")


Wanted = Mapping[str, Sequence[tuple[Change, Any]]]
"""Changes and their scales, by the name of the weight."""


def changes_of(model: eqx.Module, loras: Sequence[Lora], scales: Sequence[Scale]) -> Wanted:
    """Return what adapters change in a network. **Raises:** `WeightsError` if one does not fit it."""
    if len(loras) != len(scales):
        raise ValueError(f"Adapters need one scale each, got {len(scales)} for {len(loras)}.")
    kind = kind_of(model)
    wanted: dict[str, list[tuple[Change, Any]]] = {}
    for lora, scale in zip(loras, scales, strict=True):
        for name, changes in lora.changes.get(kind, {}).items():
            if not _is_without_effect(model, name):
                wanted.setdefault(name, []).extend((change, scale_of(scale, name)) for change in changes)
    if not wanted and loras:
        held = ", ".join(sorted({network for lora in loras for network in lora.changes})) or "nothing"
        raise WeightsError(f"The adapters change nothing of a {KINDS[kind].title}; they are for: {held}.")
    _check(model, wanted)
    keys = {key for scale in scales if isinstance(scale, Mapping) for key in scale}
    idle = sorted(key for key in keys if not any(_begins(name, key) for name in slots_of(model)))
    if idle:
        raise ValueError(f"No weight of this {type(model).__name__} begins with {idle[0]!r}, which a scale is for.")
    return wanted


def _apply(model: Network, loras: Sequence[Lora], scales: Sequence[Scale], donate: bool) -> Network:
    for node in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Weight)):
        if isinstance(node, Weight) and not isinstance(node, Dense):
            raise WeightsError(
                f"Nothing can be merged into weights that are stored as {type(node).__name__}. Merge into the plain ones "
                "before, or `attach` the adapters."
            )
    return merge_changes(model, changes_of(model, loras, scales), donate=donate)


def merge_changes(model: Network, wanted: Wanted, *, donate: bool) -> Network:
    """Return a network with changes added, a block of a weight at a time."""
    model = _widened(model, wanted)
    parts, slots = fused_parts(model.config), slots_of(model)  # type: ignore[attr-defined]
    leaves, structure = jax.tree.flatten(model)
    mine = [donate] * len(leaves)  # whether a leaf's memory may be reused
    for name, changes in wanted.items():
        slot = slots[name]
        terms, places = _arguments(changes, slot.shape, parts)
        step = _added_donating if mine[slot.leaf] else _added
        block = None if slot.block is None else jnp.int32(slot.block)
        leaves[slot.leaf] = step(leaves[slot.leaf], block, terms, places)
        mine[slot.leaf] = True  # by now it is a new array in any case
    return jax.tree.unflatten(structure, leaves)


Terms = Sequence[tuple[Term, Any]]
Places = tuple[tuple[tuple[int, int], bool], ...]


def _arguments(
    changes: Sequence[tuple[Change, Any]], shape: tuple[int, ...], parts: Mapping[str, slice]
) -> tuple[Terms, Places]:
    terms = [(change.term, jnp.float32(scale)) for change, scale in changes]
    return terms, tuple((rows_of(change, shape, parts), change.swap) for change, _ in changes)


def rows_of(change: Change, shape: tuple[int, ...], parts: Mapping[str, slice]) -> tuple[int, int]:
    rows = slice(0, shape[0]) if change.part is None else parts[change.part]
    return rows.start, rows.stop


def _add(leaf: Array, block: Array | None, terms: Terms, places: Places) -> Array:
    """Return a leaf with terms added to one block of it, or to all of it."""
    base = leaf if block is None else jax.lax.dynamic_index_in_dim(leaf, block, keepdims=False)
    changed = _changed(base, terms, places).astype(leaf.dtype)
    return changed if block is None else jax.lax.dynamic_update_index_in_dim(leaf, changed, block, 0)


def _changed(base: Array, terms: Terms, places: Places) -> Array:
    """Return a weight with terms added to their rows, in float32."""
    exact = base.astype(jnp.float32)
    total = jnp.zeros_like(exact)
    for (term, scale), ((start, stop), swap) in zip(terms, places, strict=True):
        rows = exact[start:stop]
        half = (stop - start) // 2
        delta = term.delta(jnp.roll(rows, half, axis=0) if swap else rows)
        delta = jnp.roll(delta, half, axis=0) if swap else delta
        if delta.ndim == 2:  # an adapter of the base's own inputs, beside one that widened them
            delta = jnp.pad(delta, ((0, 0), (0, exact.shape[1] - delta.shape[1])))
        total = total.at[start:stop].add(scale * delta)
    return exact + total


_added = partial(jax.jit, static_argnames="places")(_add)
_added_donating = partial(jax.jit, static_argnames="places", donate_argnums=0)(_add)
_changed_jitted = partial(jax.jit, static_argnames="places")(_changed)


class Merged(Weights):
    """Weights in files with adapters added as they are read, so that merging needs the memory of one tensor."""

    def __init__(self, base: Weights, wanted: Wanted):
        self.base, self.wanted = base, wanted
        self.network = eqx.filter_eval_shape(_widened, base.network, dict(wanted))
        self.slots, self.parts = slots_of(self.network), fused_parts(self.network.config)  # type: ignore[attr-defined]

    def dtype(self, slot: str) -> np.dtype:
        return self.base.dtype(slot)

    def read(self, slot: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        if slot not in self.wanted:
            return self.base.read(slot, rows, dtype)
        shape = self.slots[slot].shape
        base = self.base.read(slot, slice(0, shape[0]), self.base.dtype(slot))
        if len(shape) == 2:
            base = np.pad(base, ((0, 0), (0, shape[1] - base.shape[1])))
        terms, places = _arguments(self.wanted[slot], shape, self.parts)
        return cast(np.asarray(_changed_jitted(jnp.asarray(base), terms, places))[rows], dtype, slot)


def _widened(model: Network, wanted: Wanted) -> Network:
    """Return the transformer with zeros for the input features that an adapter adds, as BFL's Control adapters do."""
    if not isinstance(model, Flux) or "img_in.weight" not in wanted:
        return model
    columns = max(change.term.columns or 0 for change, _ in wanted["img_in.weight"])
    extra = columns - model.config.in_channels
    if extra <= 0:
        return model
    config = replace(model.config, in_channels=columns, out_channels=model.config.out_channels)
    names = leaf_names(model)
    leaves = [
        jnp.pad(leaf, ((0, 0), (0, extra))) if name == "img_in.weight" else leaf
        for name, leaf in zip(names, jax.tree.leaves(model), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract(Flux, config)), leaves)


def _check(model: eqx.Module, wanted: Wanted) -> None:
    """**Raises:** `WeightsError` that lists what does not fit the model."""
    problems = []
    slots, parts = slots_of(model), fused_parts(model.config)  # type: ignore[attr-defined]
    for name, changes in wanted.items():
        if name not in slots:
            problems.append(f"{name} is not in it")
            continue
        for change, _ in changes:
            start, stop = rows_of(change, slots[name].shape, parts)
            place = (stop - start, *slots[name].shape[1:])
            shape = change.term.shape(place)
            # An adapter may widen the input, and one of the base's own inputs fits beside it.
            fits = shape[:1] == place[:1] if name == "img_in.weight" else shape == place
            if not fits:
                problems.append(f"{name} is {list(place)}, the adapter's {list(shape)}")
    if problems:
        more = f" … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsError(
            f"The adapter does not fit this {type(model).__name__}: {'; '.join(problems[:10])}{more}. "
            "Pass the model it was made for."
        )
