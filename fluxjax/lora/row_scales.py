"""DoRA beside a weight: its rows scaled, and a low-rank product added to them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax.numpy as jnp

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows
from fluxjax.lora.base_terms import MagnitudeTerm
from fluxjax.lora.changes import ScaledChange, row_range
from fluxjax.lora.terms import LowRankTerm
from fluxjax.nets.weight import Dense, RowScaledWeight, Weight
from fluxjax.shapes import Array, Float

BlockChanges = Mapping[int | None, Sequence[ScaledChange]]
"""The changes of one leaf by block; None for a leaf that is not stacked."""


def scale_rows(
    name: str,
    base: Weight,
    changes: BlockChanges,
    parts: FusedRows,
) -> tuple[Weight, BlockChanges]:
    """Return a weight whose rows DoRAs have scaled, and what is left of the changes to be added.

    A weight that no DoRA changes is returned as it is.

    **Arguments:**

    - `name`: of the leaf, for the error messages.
    - `parts`: the rows of the parts of fused weights.

    **Raises:** `WeightsError` for magnitudes of columns, and for a base whose rows have no norm
    without being decoded.
    """
    if not any(_has_magnitudes(of_block) for of_block in changes.values()):
        return base, changes
    if not isinstance(base, Dense):
        raise WeightsError(
            f"A DoRA of {name} depends on the norms of its rows, which are stored as "
            f"{type(base).__name__}, so that it has no low-rank form. Merge it instead."
        )
    remaining: dict[int | None, list[ScaledChange]] = {}
    scales = jnp.ones(base.shape[:-1], jnp.float32)
    for block, of_block in changes.items():
        index = ... if block is None else block
        matrix = base.value[index].astype(jnp.float32)
        scale, remaining[block] = _scale_block(name, matrix, of_block, parts)
        scales = scales.at[index].set(scale)
    return RowScaledWeight(base, scales), remaining


def _has_magnitudes(changes: Sequence[ScaledChange]) -> bool:
    return any(isinstance(change.term, MagnitudeTerm) for change, _ in changes)


def _scale_block(
    name: str,
    matrix: Float[Array, "rows columns"],
    changes: Sequence[ScaledChange],
    parts: FusedRows,
) -> tuple[Float[Array, " rows"], list[ScaledChange]]:
    """Return the factors of a matrix's rows, and the changes that are added to them."""
    scales = jnp.ones(len(matrix), jnp.float32)
    remaining: list[ScaledChange] = []
    for change, scale in changes:
        if not isinstance(change.term, MagnitudeTerm):
            remaining.append((change, scale))
            continue
        start, stop = row_range(change, matrix.shape, parts)
        form = None if change.swap else change.term.scaled_factors(matrix[start:stop])
        if form is None:
            raise WeightsError(
                f"What an adapter does to {name} (a DoRA of columns) has no low-rank form. "
                "Merge it instead."
            )
        ratio, up, down = form
        scales = scales.at[start:stop].add(scale * (ratio - 1))
        term = LowRankTerm(ratio[:, None] * up, down, jnp.float32(1.0))
        remaining.append((replace(change, term=term), scale))
    return scales, remaining
