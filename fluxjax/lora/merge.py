"""Adapters into a model: differences in float32, summed over adapters, added once, cast once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.weights import Weights, abstract, cast, parameters_of
from fluxjax.lora.read import Change, Lora
from fluxjax.lora.rounding import check_fits, rounded, seed_of
from fluxjax.lora.scales import (
    Scale,
    Scales,
    begins_with,
    check_scales,
    is_zero,
    negative,
    scale_of,
)
from fluxjax.lora.terms import ReplacementTerm, Term
from fluxjax.nets.flux import Flux
from fluxjax.nets.stack import leaf_names
from fluxjax.nets.weight import Dense, Weight
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)
INPUT = "img_in.weight"


@convert_arguments
def merge(
    model: Network, loras: Sequence[Lora], scales: Scales | None = None, *, donate: bool = False
) -> Network:
    """Return a network with adapters added to its weights: W + the sum over adapters of scale * delta, taken in float32.

    The sum is rounded once to the weight's dtype: 8-bit floats stochastically, by draws that depend on the weight's name only,
    because rounded to the nearest they would lose most of a small change; other dtypes to the nearest. `attach` does not round.
    What an adapter sets rather than adds to (a norm of BFL's Control) is set at any scale other than 0.

    **Arguments:** `model`: a `Flux`, `Clip` or `T5`; an adapter's other networks are merged by another call. `scales`: one per
    adapter, 1 by default; negative ones subtract. `donate`: give the model's memory to the result, so that no second copy of
    its weights exists; the model can't be used after.
    **Raises:** `WeightsError` that lists the weights that an adapter does not fit, for two adapters that set one weight, or
    for a result that the weights' dtype can't hold (not in traced code, where it is infinite or NaN); `ValueError` for a scale
    that is not a finite number.
    """
    return _apply(model, loras, check_scales("merge", len(loras), scales), donate)


@convert_arguments
def unmerge(
    model: Network, loras: Sequence[Lora], scales: Scales | None = None, *, donate: bool = False
) -> Network:
    """Return the network that these adapters were merged into; arguments as for `merge`.

    An input that an adapter widened stays wide: its added columns are zeros again, up to rounding.

    **Raises:** `WeightsError` for adapters that can't be subtracted: those that set a weight, and DoRA's. Load the base again
    instead.
    """
    found = check_scales("unmerge", len(loras), scales)
    for lora, scale in zip(loras, found, strict=True):
        for name, changes in _changes(model, lora).items():
            if not all(change.term.additive for change in changes) and not is_zero(
                scale_of(scale, name)
            ):
                raise WeightsError(
                    f"What an adapter did to {name} can't be subtracted: it set it, or scaled it. Load the base again."
                )
    return _apply(model, loras, [negative(scale) for scale in found], donate)


def kind_of(call: str, model: eqx.Module) -> str:
    """Return the name of a network that adapters are for. **Raises:** `ValueError` for what is none."""
    for name, kind in KINDS.items():
        if isinstance(model, kind.network) and name != "vae":
            return name
    raise ValueError(
        f"`{call}` needs a Flux, Clip or T5, got {type(model).__name__}. Pass one network at a time."
    )


def notes_of(model: eqx.Module, lora: Lora) -> tuple[str, ...]:
    """Return one line for each thing in an adapter that has no effect on this network and is left out; what has none on any
    network is in `Lora.notes`."""
    mine = lora.changes.get(kind_of("merge", model), {})
    if not any(_is_without_effect(model, name) for name in mine):
        return ()
    return (
        "Its guidance_in is left out: this network, as schnell, takes no guidance, so it has no effect.",
    )


def _changes(model: eqx.Module, lora: Lora) -> Mapping[str, Sequence[Change]]:
    """Return an adapter's changes of a network, without those that have no effect on it."""
    mine = lora.changes.get(kind_of("merge", model), {})
    return {name: changes for name, changes in mine.items() if not _is_without_effect(model, name)}


def _is_without_effect(model: eqx.Module, name: str) -> bool:
    """Whether a weight is of the guidance, and the network takes none."""
    return (
        isinstance(model, Flux)
        and not model.config.guidance_embed
        and name.startswith("guidance_in.")
    )


Wanted = Mapping[str, Sequence[tuple[Change, Any]]]
"""Changes and their scales, by the name of the weight."""


def changes_of(model: eqx.Module, loras: Sequence[Lora], scales: Scales | None) -> Wanted:
    """Return what adapters change in a network.

    **Raises:** `WeightsError` if one does not fit it, or two set one weight; `ValueError` for scales that are not finite.
    """
    found = check_scales("merge", len(loras), scales)
    kind = kind_of("merge", model)
    wanted: dict[str, list[tuple[Change, Any]]] = {}
    for lora, scale in zip(loras, found, strict=True):
        for name, changes in _changes(model, lora).items():
            wanted.setdefault(name, []).extend(
                (change, scale_of(scale, name)) for change in changes
            )
    if not wanted and loras:
        held = (
            ", ".join(sorted({network for lora in loras for network in lora.changes})) or "nothing"
        )
        raise WeightsError(
            f"The adapters change nothing of a {KINDS[kind].title}; they are for: {held}."
        )
    _check(model, wanted)
    _check_one_sets(model, loras, found)
    keys = {key for scale in found if isinstance(scale, Mapping) for key in scale}
    idle = sorted(
        key for key in keys if not any(begins_with(name, key) for name in parameters_of(model))
    )
    if idle:
        raise ValueError(
            f"No weight of this {type(model).__name__} begins with {idle[0]!r}, which a scale is for."
        )
    return wanted


def _check_one_sets(model: eqx.Module, loras: Sequence[Lora], scales: Sequence[Any]) -> None:
    """**Raises:** `WeightsError` if two adapters set the same rows of a weight, both at scales other than 0."""
    slots, parts = parameters_of(model), fused_parts(model.config)  # type: ignore[attr-defined]
    rows_set: dict[str, list[tuple[int, int, int]]] = {}
    for number, (lora, scale) in enumerate(zip(loras, scales, strict=True)):
        for name, changes in _changes(model, lora).items():
            for change in changes:
                if not isinstance(change.term, ReplacementTerm) or is_zero(scale_of(scale, name)):
                    continue
                start, stop = rows_of(change, slots[name].shape, parts)
                for other, first, last in rows_set.setdefault(name, []):
                    if other != number and first < stop and start < last:
                        raise WeightsError(
                            f"Adapters {other + 1} ({loras[other].format}) and {number + 1} ({lora.format}) both set {name}, "
                            "which has one value only. Leave one of them out, or give it the scale 0."
                        )
                rows_set[name].append((number, start, stop))


def _apply(model: Network, loras: Sequence[Lora], scales: Sequence[Scale], donate: bool) -> Network:
    check_plain(
        model,
        "Nothing can be merged into",
        " Merge into the plain ones before, or `attach` the adapters.",
    )
    return merge_changes(model, changes_of(model, loras, scales), donate=donate)


def check_plain(model: eqx.Module, problem: str, remedy: str = " Pass the plain network.") -> None:
    """**Raises:** `WeightsError` for weights that are quantized, adapted or fetched; `problem` begins the message."""
    for node in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Weight)):
        if isinstance(node, Weight) and not isinstance(node, Dense):
            raise WeightsError(
                f"{problem} weights that are stored as {type(node).__name__}.{remedy}"
            )


def merge_changes(model: Network, wanted: Wanted, *, donate: bool) -> Network:
    """Return a network with changes added, a block of a weight at a time.

    **Raises:** `WeightsError` for a result that the weights' dtype can't hold, unless traced.
    """
    model = _widened(model, wanted)
    parts, slots = fused_parts(model.config), parameters_of(model)  # type: ignore[attr-defined]
    leaves, structure = jax.tree.flatten(model)
    mine = [donate] * len(leaves)  # whether a leaf's memory may be reused
    largest: dict[str, Array] = {}
    for name, changes in wanted.items():
        slot = slots[name]
        terms, places = _arguments(changes, slot.shape, parts)
        step = _added_donating if mine[slot.leaf] else _added
        block = None if slot.block is None else jnp.int32(slot.block)
        leaves[slot.leaf], largest[name] = step(
            leaves[slot.leaf], block, seed_of(name), terms, places
        )
        mine[slot.leaf] = True  # by now it is a new array in any case
    if not any(isinstance(value, jax.core.Tracer) for value in largest.values()):
        for name, value in jax.device_get(largest).items():
            check_fits(name, leaves[slots[name].leaf].dtype, float(value))
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


def _add(
    leaf: Array, block: Array | None, seed: Any, terms: Terms, places: Places
) -> tuple[Array, Array]:
    """Return a leaf with terms added to one block of it, or to all of it, and what does not fit in its dtype."""
    base = leaf if block is None else jax.lax.dynamic_index_in_dim(leaf, block, keepdims=False)
    changed, largest = rounded(_changed(base, terms, places), leaf.dtype, seed)
    return changed if block is None else jax.lax.dynamic_update_index_in_dim(
        leaf, changed, block, 0
    ), largest


def _changed(base: Array, terms: Terms, places: Places) -> Array:
    """Return a weight with terms added to their rows, in float32; every delta is a function of the weight before."""
    exact = base.astype(jnp.float32)
    start_values, total = exact, jnp.zeros_like(exact)
    for (term, scale), ((start, stop), swap) in zip(terms, places, strict=True):
        half = (stop - start) // 2 if swap else 0
        rows = jnp.roll(exact[start:stop], half, axis=0)
        if isinstance(term, ReplacementTerm):
            value = jnp.roll(term.value.astype(jnp.float32), half, axis=0)
            start_values = start_values.at[start:stop].set(
                jnp.where(scale == 0, start_values[start:stop], value)
            )
        else:
            delta = jnp.roll(_delta(term, rows), half, axis=0)
            total = total.at[start:stop].add(scale * delta)
    return start_values + total


def _delta(term: Term, rows: Array) -> Array:
    """Return what a term adds to rows of a weight; nothing in the columns of the input that another adapter has added."""
    columns = term.columns
    if rows.ndim < 2 or columns is None:
        return term.delta(rows)
    return jnp.pad(term.delta(rows[:, :columns]), ((0, 0), (0, rows.shape[1] - columns)))


_added = partial(jax.jit, static_argnames="places")(_add)
_added_donating = partial(jax.jit, static_argnames="places", donate_argnums=0)(_add)
_changed_jitted = partial(jax.jit, static_argnames="places")(_changed)
_rounded_jitted = partial(jax.jit, static_argnames="dtype")(rounded)


class MergedWeights(Weights):
    """Weights in files with adapters added as they are read, so that merging needs the memory of one tensor."""

    def __init__(self, base: Weights, wanted: Wanted):
        self.base, self.wanted = base, wanted
        self.network = eqx.filter_eval_shape(_widened, base.network, dict(wanted))
        self.slots, self.parts = parameters_of(self.network), fused_parts(self.network.config)  # type: ignore[attr-defined]

    def dtype(self, slot: str) -> np.dtype:
        return self.base.dtype(slot)

    def read(self, slot: str, rows: slice, dtype: np.dtype) -> np.ndarray:
        if slot not in self.wanted:
            return self.base.read(slot, rows, dtype)
        shape = self.slots[slot].shape
        # In float32, not in the dtype that a file's 8 bits or blocks are loaded as, which would round them first.
        base = self.base.read(slot, slice(0, shape[0]), np.dtype(np.float32))
        if len(shape) == 2:
            base = np.pad(base, ((0, 0), (0, shape[1] - base.shape[1])))
        terms, places = _arguments(self.wanted[slot], shape, self.parts)
        changed = _changed_jitted(jnp.asarray(base), terms, places)
        if dtype.itemsize > 1:
            values = np.asarray(changed)
            check_fits(slot, values.dtype, 0.0 if np.isfinite(values).all() else np.inf)
            return cast(values[rows], dtype, slot)
        # All of it, so that every reading in pieces draws the same numbers.
        out, largest = _rounded_jitted(changed, dtype, seed_of(slot))
        check_fits(slot, dtype, float(largest))
        return np.asarray(out)[rows]


def _widened(model: Network, wanted: Wanted) -> Network:
    """Return the transformer with zeros for the input features that an adapter adds, as BFL's Control adapters do."""
    if not isinstance(model, Flux) or INPUT not in wanted:
        return model
    columns = max(change.term.columns or 0 for change, _ in wanted[INPUT])
    extra = columns - model.config.in_channels
    if extra <= 0:
        return model
    config = replace(model.config, in_channels=columns, out_channels=model.config.out_channels)
    names = leaf_names(model)
    leaves = [
        jnp.pad(leaf, ((0, 0), (0, extra))) if name == INPUT else leaf
        for name, leaf in zip(names, jax.tree.leaves(model), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract(Flux, config)), leaves)


def _check(model: eqx.Module, wanted: Wanted) -> None:
    """**Raises:** `WeightsError` that lists what does not fit the model."""
    problems = []
    slots, parts = parameters_of(model), fused_parts(model.config)  # type: ignore[attr-defined]
    for name, changes in wanted.items():
        if name not in slots:
            problems.append(f"{name} is not in it")
            continue
        shapes = []
        for change, _ in changes:
            start, stop = rows_of(change, slots[name].shape, parts)
            place = (stop - start, *slots[name].shape[1:])
            shape = change.term.shape(place)
            shapes.append(shape)
            fits = shape[:1] == place[:1] and len(shape) == 2 if name == INPUT else shape == place
            if not fits:
                problems.append(f"{name} is {list(place)}, the adapter's {list(shape)}")
        if name == INPUT and not problems:
            problems += _input_problems(model, [columns for _, columns in shapes])
    if problems:
        more = f" … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise WeightsError(
            f"The adapter does not fit this {type(model).__name__}: {'; '.join(problems[:10])}{more}. "
            "Pass the model it was made for."
        )


def _input_problems(model: Any, columns: Sequence[int]) -> list[str]:
    """Return what is wrong with the input features of adapters.

    A token of the image has as many features as are predicted, in Fill and Control models followed by those of a condition. An
    adapter has the model's features, or those of the image only (it was made for the model without a condition); or it adds
    a condition to a model that has none.
    """
    have, image = model.config.in_channels, model.config.out_channels
    widest = max(have, *columns)
    problems = [
        f"{INPUT} has {have} input features, the adapter's {count}"
        for count in columns
        if count not in (image, have, widest)
    ]
    if widest > have and (have != image or widest % image):
        problems.append(
            f"{INPUT} has {have} input features, which an adapter of {widest} can't widen"
        )
    return problems
