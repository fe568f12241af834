"""All low-rank changes of one weight as a single pair of factors."""

from collections.abc import Sequence

import jax.numpy as jnp

from fluxjax.checkpoint.plan import Parts
from fluxjax.checkpoint.safetensors import WeightsError
from fluxjax.lora.changes import ScaledChange, row_range
from fluxjax.shapes import Array


def combined_factors(
    name: str, changes: Sequence[ScaledChange], shape: tuple[int, ...], parts: Parts
) -> tuple[Array, Array]:
    """Return the sum of a weight's changes as one product up @ down.

    **Arguments:** `name`: of the weight, for the error messages. `shape`: of the weight. `parts`:
    the rows of the parts of fused weights.
    **Returns:** down [ranks, columns], the downs of all changes above each other; and up
    [rows, ranks], their ups beside each other, scaled and placed in the rows that they change.
    **Raises:** `WeightsError` for a change that has no low-rank form, or that is wider than the
    weight.
    """
    downs, ups = [], []
    for change, scale in changes:
        factors = change.term.factors()
        if factors is None:
            raise WeightsError(
                f"What an adapter does to {name} ({type(change.term).__name__}) has no low-rank "
                "form. Merge it instead."
            )
        up, down = factors
        missing = shape[1] - down.shape[1]
        if missing < 0:
            raise WeightsError(
                f"An adapter widens {name}, which is not possible beside the weight. "
                "Merge it instead."
            )
        start, stop = row_range(change, shape, parts)
        up = jnp.float32(scale) * up
        if change.swap:
            up = jnp.roll(up, (stop - start) // 2, axis=0)
        # An adapter may change only the first columns of a wide input.
        downs.append(jnp.pad(down, ((0, 0), (0, missing))))
        ups.append(jnp.zeros((shape[0], up.shape[1])).at[start:stop].set(up))
    return jnp.concatenate(downs), jnp.concatenate(ups, axis=1)
