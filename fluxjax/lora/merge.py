"""Adapters merged into weights, in memory or as files are read: added in float32, cast once."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.weights import Weights, cast, parameters_of
from fluxjax.lora.adapter import Lora
from fluxjax.lora.changes import WeightChanges, changes_of, effective_changes
from fluxjax.lora.networks import check_plain, network_kind
from fluxjax.lora.scales import (
    CheckedScale,
    Scales,
    check_scales,
    is_known_zero,
    negate_scale,
    weight_scale,
)
from fluxjax.lora.stochastic_rounding import check_representable, rounding_seed
from fluxjax.lora.weight_update import (
    add_terms,
    add_terms_donating,
    add_terms_in_float32,
    round_compiled,
    terms_and_rows,
)
from fluxjax.lora.widen import widen_for_changes
from fluxjax.nets.chroma import Chroma
from fluxjax.shapes import Array

Network = TypeVar("Network", bound=eqx.Module)


@convert_arguments
def merge(
    model: Network,
    loras: Sequence[Lora],
    scales: Scales | None = None,
    *,
    donate: bool = False,
) -> Network:
    """Return a network with adapters added to its weights: W + the sum of scale * delta.

    The sum is taken in float32 and rounded once to the weight's dtype: to nearest, or for 8-bit
    floats stochastically, by draws that depend on the weight's name only, because rounding to
    nearest would lose most of a small change. `attach` does not round. What an adapter sets
    rather than adds to (a norm of BFL's Control) is set at any scale other than 0.

    For example, with one adapter at a lower scale in the double blocks:

        flux = fluxjax.load_flux("dev")
        style = fluxjax.read_lora("style.safetensors")
        merged = fluxjax.merge(flux, [style], [{"": 1.0, "double": 0.5}])

    **Arguments:**

    - `model`: a `Flux`, `Clip` or `T5`. An adapter's changes of another network are merged by
      another call.
    - `loras`: any number of adapters, of any formats.
    - `scales`: one for each adapter, 1 by default; negative ones subtract. A scale may also be a
      mapping from the prefix of a weight's name to a number.
    - `donate`: reuse the model's memory for the result, so that there is no second copy of the
      weights; the model can't be used afterwards.

    **Returns:** a network of the same kind and dtypes. Its input is wider if a Control adapter
    adds input features.

    **Raises:** `WeightsError` that lists the weights that an adapter does not fit; for two
    adapters that set one weight; and for a result that the weights' dtype can't represent (in
    traced code the result is infinite or NaN instead). `ValueError` for a scale that is not a
    finite number.
    """
    return _merge(model, loras, check_scales("merge", len(loras), scales), donate)


@convert_arguments
def unmerge(
    model: Network,
    loras: Sequence[Lora],
    scales: Scales | None = None,
    *,
    donate: bool = False,
) -> Network:
    """Return the network that these adapters were merged into, up to rounding.

    An input that an adapter widened stays wide; its added columns become zeros. In bfloat16 the
    rounding of both steps remains, so keep the base where that matters.

    **Arguments:**

    - `model`, `donate`: as for `merge`.
    - `loras`, `scales`: those that were merged.

    **Returns:** a network of the same kind and dtypes.

    **Raises:** as `merge`, and `WeightsError` for adapters that can't be subtracted: those that
    set, rescale or rotate a weight. Load the base again instead.
    """
    checked = check_scales("unmerge", len(loras), scales)
    for lora, scale in zip(loras, checked, strict=True):
        _check_subtractable(model, lora, scale)
    return _merge(model, loras, [negate_scale(scale) for scale in checked], donate)


def notes_of(model: eqx.Module, lora: Lora) -> tuple[str, ...]:
    """Return one line for each thing in an adapter that has no effect on this network.

    What has no effect on any network of FLUX is in `Lora.notes` instead.

    **Arguments:**

    - `model`: the network, or its shapes.
    - `lora`: the adapter.
    """
    changes = lora.changes.get(network_kind("merge", model), {})
    left_out = changes.keys() - effective_changes(model, lora).keys()
    if not left_out:
        return ()
    if isinstance(model, Chroma):
        return (
            f"{len(left_out)} of its weights are left out, as {min(left_out)}: Chroma has no "
            "layers for modulation, time, pooled text and guidance, so they have no effect.",
        )
    return (
        "Its guidance_in is left out: this network, as schnell, takes no guidance, so it has no "
        "effect.",
    )


def _check_subtractable(
    model: eqx.Module,
    lora: Lora,
    scale: CheckedScale,
) -> None:
    """Check that an adapter's differences are the same for every base.

    **Raises:** `WeightsError` if one is not: the base can't be computed from the merged weight.
    """
    for name, changes in effective_changes(model, lora).items():
        if is_known_zero(weight_scale(scale, name)):
            continue
        if not all(change.term.additive for change in changes):
            raise WeightsError(
                f"What an adapter did to {name} can't be subtracted, because it set, rescaled or "
                "rotated the weight. Load the base again."
            )


def _merge(
    model: Network,
    loras: Sequence[Lora],
    scales: Sequence[CheckedScale],
    donate: bool,
) -> Network:
    check_plain(
        model,
        "Nothing can be merged into",
        "Merge into the plain network before, or `attach` the adapters.",
    )
    return merge_changes(model, changes_of(model, loras, scales), donate=donate)


def merge_changes(
    model: Network,
    changes: WeightChanges,
    *,
    donate: bool,
) -> Network:
    """Return a network with changes added, one block of a weight at a time.

    **Arguments:**

    - `model`: a plain network, or the shapes of one while tracing.
    - `changes`: that fit the network, from `changes_of`.
    - `donate`: as for `merge`.

    **Raises:** `WeightsError` for a result that the weights' dtype can't represent, unless traced.
    """
    model = widen_for_changes(model, changes)
    parts = fused_parts(model.config)  # type: ignore[attr-defined]
    slots = parameters_of(model)
    leaves, structure = jax.tree.flatten(model)
    # Whether a leaf's memory may be reused: always once it has been replaced by a new array.
    reusable = [donate] * len(leaves)
    largest: dict[str, Array] = {}
    for name, of_weight in changes.items():
        slot = slots[name]
        add = add_terms_donating if reusable[slot.leaf] else add_terms
        terms, rows = terms_and_rows(of_weight, slot.shape, parts)
        # An array, so that all blocks of a leaf share one compiled function.
        block = None if slot.block is None else jnp.int32(slot.block)
        seed = rounding_seed(name)
        leaves[slot.leaf], largest[name] = add(leaves[slot.leaf], block, seed, terms, rows)
        reusable[slot.leaf] = True
    dtypes = {name: leaves[slots[name].leaf].dtype for name in largest}
    _check_largest(largest, dtypes)
    return jax.tree.unflatten(structure, leaves)


def _check_largest(largest: Mapping[str, Array], dtypes: Mapping[str, jnp.dtype]) -> None:
    """**Raises:** `WeightsError` for a weight that its dtype can't represent; not if traced."""
    if any(isinstance(value, jax.core.Tracer) for value in largest.values()):
        return
    # One transfer for all weights, after the last one was dispatched.
    for name, value in jax.device_get(dict(largest)).items():
        check_representable(name, dtypes[name], float(value))


class MergedWeights(Weights):
    """Weights with adapters added as they are read, so that merging needs memory for one tensor.

    Conversions and `save` read through this class, so their files hold merged weights.

    **Arguments:**

    - `base`: the weights without the adapters, in files or in memory.
    - `changes`: that fit the network of `base`, from `changes_of`.
    """

    def __init__(self, base: Weights, changes: WeightChanges):
        self.base = base
        self.changes = changes
        self.network = eqx.filter_eval_shape(widen_for_changes, base.network, dict(changes))
        self.slots = parameters_of(self.network)
        self.parts = fused_parts(self.network.config)  # type: ignore[attr-defined]

    def dtype(self, slot: str) -> np.dtype:
        return self.base.dtype(slot)

    def read(
        self,
        slot: str,
        rows: slice,
        dtype: np.dtype,
    ) -> np.ndarray:
        if slot not in self.changes:
            return self.base.read(slot, rows, dtype)
        changed = self._read_changed(slot)
        if dtype.itemsize > 1:
            # Rounding to nearest needs no draws, so only the rows that are asked for are cast.
            values = np.asarray(changed)
            largest = 0.0 if np.isfinite(values).all() else np.inf
            check_representable(slot, values.dtype, largest)
            return cast(values[rows], dtype, slot)
        # All rows are rounded, so that reading a weight in pieces draws the same numbers.
        rounded, lost = round_compiled(changed, dtype, rounding_seed(slot))
        check_representable(slot, dtype, float(lost))
        return np.asarray(rounded)[rows]

    def _read_changed(self, slot: str) -> Array:
        """Return a whole weight with its changes added, in float32."""
        shape = self.slots[slot].shape
        # In float32, not in the dtype that quantized files are loaded as, which would round first.
        base = self.base.read(slot, slice(0, shape[0]), np.dtype(np.float32))
        if len(shape) == 2:
            # An input that is widened gets its columns of zeros.
            base = np.pad(base, ((0, 0), (0, shape[1] - base.shape[1])))
        terms, rows = terms_and_rows(self.changes[slot], shape, self.parts)
        return add_terms_in_float32(jnp.asarray(base), terms, rows)
