"""All low-rank changes of one weight as a single pair of factors.

The sum of products up_1 @ down_1 + up_2 @ down_2 is one product of concatenated factors. Changes
of a part of a fused weight have zeros in the other rows of their up.
"""

from collections.abc import Sequence
from types import ModuleType

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import FusedRows
from fluxjax.lora.changes import ScaledChange, row_range
from fluxjax.shapes import Array

Factor = Array | np.ndarray
"""A matrix of JAX or NumPy."""


def combined_factors(
    name: str,
    changes: Sequence[ScaledChange],
    shape: tuple[int, ...],
    parts: FusedRows,
    *,
    xp: ModuleType = jnp,
) -> tuple[Factor, Factor]:
    """Return the sum of a weight's changes as one product up @ down.

    **Arguments:**

    - `name`: of the weight, for the error messages.
    - `shape`: of the weight.
    - `parts`: the rows of the parts of fused weights.
    - `xp`: `jax.numpy`, or `numpy` outside of traced code, which compiles nothing for new shapes.

    **Returns:** down [ranks, columns], the downs of all changes above each other; and up
    [rows, ranks], their ups beside each other, scaled and placed in the rows that they change.
    **Raises:** `WeightsError` for a change that has no low-rank form.
    """
    downs: list[Factor] = []
    ups: list[Factor] = []
    for change, scale in changes:
        factors = change.term.factors()
        if factors is None:
            raise WeightsError(
                f"What an adapter does to {name} ({type(change.term).__name__}) has no low-rank "
                "form. Merge it instead."
            )
        up, down = (xp.asarray(factor) for factor in factors)
        missing = shape[1] - down.shape[1]
        start, stop = row_range(change, shape, parts)
        up = xp.float32(scale) * up
        if change.swap:
            up = xp.roll(up, (stop - start) // 2, axis=0)
        # An adapter may change only the first columns of a wide input.
        downs.append(xp.pad(down, ((0, 0), (0, missing))))
        ups.append(xp.pad(up, ((start, shape[0] - stop), (0, 0))))
    return xp.concatenate(downs), xp.concatenate(ups, axis=1)
