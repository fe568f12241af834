"""Terms added to one weight, in float32, as compiled functions.

A function is compiled once for each shape of a leaf and of the terms, and shared by all blocks
of a stack: the index of the block is an argument. So merging an adapter into all blocks compiles
a few functions, and needs memory for one block in float32 beside the weights.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.fused import FusedRows
from fluxjax.lora.changes import ScaledChange, row_range
from fluxjax.lora.stochastic_rounding import round_to_dtype
from fluxjax.lora.terms import ReplacementTerm, Term
from fluxjax.numeric import index_axis
from fluxjax.shapes import Array

ScaledTerms = Sequence[tuple[Term, Array]]
"""Terms with their scales in float32."""
Rows = tuple[tuple[tuple[int, int], bool], ...]
"""For each term the first and past-the-last row of the weight, and whether its halves swap."""


def terms_and_rows(
    changes: Sequence[ScaledChange],
    shape: tuple[int, ...],
    parts: FusedRows,
) -> tuple[ScaledTerms, Rows]:
    """Return the changes of a weight as the arguments of the compiled functions.

    **Arguments:**

    - `changes`: of one weight, from `changes_of`.
    - `shape`: of the weight.
    - `parts`: the rows of the parts of fused weights.

    **Returns:** the terms with their scales, which are traced; and the rows, which are static.
    """
    # The scales become arrays, so that another scale does not compile anything.
    terms = [(change.term, jnp.float32(scale)) for change, scale in changes]
    rows = [(row_range(change, shape, parts), change.swap) for change, _ in changes]
    return terms, tuple(rows)


def _add(
    leaf: Array,
    block: Array | None,
    seed: Array | np.uint32,
    terms: ScaledTerms,
    rows: Rows,
) -> tuple[Array, Array]:
    """Add terms to one block of a stacked leaf, or to all of a leaf.

    **Arguments:**

    - `leaf`: of the network, in any float dtype.
    - `block`: its index; None for a leaf that is not stacked.
    - `seed`: of stochastic rounding.
    - `terms`, `rows`: from `terms_and_rows`.

    **Returns:** the new leaf, and the largest magnitude that its dtype can't represent.
    """
    if block is None:
        return round_to_dtype(_add_in_float32(leaf, terms, rows), leaf.dtype, seed)
    base = index_axis(leaf, block)
    changed, largest = round_to_dtype(_add_in_float32(base, terms, rows), leaf.dtype, seed)
    return jax.lax.dynamic_update_index_in_dim(leaf, changed, block, 0), largest


def _add_in_float32(
    base: Array,
    terms: ScaledTerms,
    rows: Rows,
) -> Array:
    """Return a weight with terms added to their rows, in float32.

    Every difference is a function of the weight before any change, so the order of the adapters
    does not matter.

    **Arguments:**

    - `base`: the weight, in any float dtype.
    - `terms`, `rows`: from `terms_and_rows`.
    """
    exact = base.astype(jnp.float32)
    start_values, total = exact, jnp.zeros_like(exact)
    for (term, scale), ((start, stop), swap) in zip(terms, rows, strict=True):
        # Rolling by half of the rows swaps the halves, and swaps them back.
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

    **Arguments:**

    - `rows`: the rows of the weight that the term changes, in the term's order, in float32.
    """
    columns = term.columns
    if rows.ndim < 2 or columns is None:
        return term.delta(rows)
    return jnp.pad(term.delta(rows[:, :columns]), ((0, 0), (0, rows.shape[1] - columns)))


# Two versions, because a donated leaf is deleted: a caller's own leaf must survive.
add_terms = partial(jax.jit, static_argnames="rows")(_add)
add_terms_donating = partial(jax.jit, static_argnames="rows", donate_argnums=0)(_add)
add_terms_in_float32 = partial(jax.jit, static_argnames="rows")(_add_in_float32)
round_compiled = partial(jax.jit, static_argnames="dtype")(round_to_dtype)
