"""Terms added to one weight, in float32, as compiled functions."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.fused import FusedRows
from fluxjax.lora.changes import ScaledChange, row_range
from fluxjax.lora.stochastic_rounding import round_to_dtype
from fluxjax.lora.terms import ReplacementTerm, Term
from fluxjax.shapes import Array

ScaledTerms = Sequence[tuple[Term, Array]]
"""Terms with their scales in float32."""
Rows = tuple[tuple[tuple[int, int], bool], ...]
"""For each term the first and past-the-last row of the weight, and whether its halves swap."""


def terms_and_rows(
    changes: Sequence[ScaledChange], shape: tuple[int, ...], parts: FusedRows
) -> tuple[ScaledTerms, Rows]:
    """Return the changes of a weight as the arguments of the compiled functions.

    **Arguments:** `shape`: of the weight. `parts`: the rows of the parts of fused weights.
    **Returns:** the traced terms with their scales, and the static rows.
    """
    terms = [(change.term, jnp.float32(scale)) for change, scale in changes]
    rows = [(row_range(change, shape, parts), change.swap) for change, _ in changes]
    return terms, tuple(rows)


def _add(
    leaf: Array, block: Array | None, seed: Array | np.uint32, terms: ScaledTerms, rows: Rows
) -> tuple[Array, Array]:
    """Add terms to one block of a stacked leaf, or to all of a leaf.

    **Arguments:** `block`: its index; None for a leaf that is not stacked. `seed`: of stochastic
    rounding.
    **Returns:** the new leaf, and the largest magnitude that its dtype can't represent.
    """
    if block is None:
        return round_to_dtype(_add_in_float32(leaf, terms, rows), leaf.dtype, seed)
    base = jax.lax.dynamic_index_in_dim(leaf, block, keepdims=False)
    changed, largest = round_to_dtype(_add_in_float32(base, terms, rows), leaf.dtype, seed)
    return jax.lax.dynamic_update_index_in_dim(leaf, changed, block, 0), largest


def _add_in_float32(base: Array, terms: ScaledTerms, rows: Rows) -> Array:
    """Return a weight with terms added to their rows, in float32.

    Every difference is a function of the weight before any change, so the order of the adapters
    does not matter.
    """
    exact = base.astype(jnp.float32)
    start_values, total = exact, jnp.zeros_like(exact)
    for (term, scale), ((start, stop), swap) in zip(terms, rows, strict=True):
        half = (stop - start) // 2 if swap else 0
        in_term_order = jnp.roll(exact[start:stop], half, axis=0)
        if isinstance(term, ReplacementTerm):
            value = jnp.roll(term.value.astype(jnp.float32), half, axis=0)
            # Set, not added: the sum of the base and a difference would be rounded.
            kept = jnp.where(scale == 0, start_values[start:stop], value)
            start_values = start_values.at[start:stop].set(kept)
        else:
            delta = jnp.roll(_delta(term, in_term_order), half, axis=0)
            total = total.at[start:stop].add(scale * delta)
    return start_values + total


def _delta(term: Term, rows: Array) -> Array:
    """Return what a term adds to rows of a weight.

    An adapter may be narrower than an input that another adapter has widened. It adds zeros to
    the other columns, and sees only its own ones, whose norms DoRA takes.
    """
    columns = term.columns
    if rows.ndim < 2 or columns is None:
        return term.delta(rows)
    return jnp.pad(term.delta(rows[:, :columns]), ((0, 0), (0, rows.shape[1] - columns)))


add_terms = partial(jax.jit, static_argnames="rows")(_add)
add_terms_donating = partial(jax.jit, static_argnames="rows", donate_argnums=0)(_add)
add_terms_in_float32 = partial(jax.jit, static_argnames="rows")(_add_in_float32)
round_compiled = partial(jax.jit, static_argnames="dtype")(round_to_dtype)
