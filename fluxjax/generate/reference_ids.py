"""Positions of the tokens of reference images."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.generate.latents import check_size
from fluxjax.shapes import Array, Float
from fluxjax.zoo import FLUX1

PLACEMENTS = ("offset", "index", "uxo")
"""How the positions of several references differ, by name; see `reference_ids`."""
Grid = tuple[int, int]
"""Rows and columns of tokens."""
Origin = tuple[int, int, int]
"""Index, row and column of a reference's first token."""
_SIDE = FLUX1.latent.token_side


def check_placement(call: str, placement: str) -> None:
    """**Raises:** `ValueError` for a placement that is none of `PLACEMENTS`."""
    if placement not in PLACEMENTS:
        raise ValueError(
            f"`{call}(placement)` takes one of {', '.join(PLACEMENTS)}, got {placement!r}. "
            "Choose one."
        )


@convert_arguments
def reference_ids(
    sizes: Sequence[tuple[int, int]],
    *,
    placement: str = "offset",
    size: tuple[int, int] | None = None,
) -> Float[Array, "reference_tokens 3"]:
    """Return the positions (index, row, column) of the tokens of references, one after another.

    The image that is drawn has index 0. "offset": all have index 1 and lie side by side in one
    plane: each right of the others, or below where that keeps the plane less wide than it is high.
    "index": they have the indices 1, 2, 3, … "uxo": index 0, each beyond the lower right corner of
    the image and of those before. Kontext was trained on one reference, for which the first two are
    the same.

    **Arguments:** `sizes`: of the references, height and width in pixels, multiples of 16. `size`:
    of the image that is drawn, for "uxo".
    **Raises:** `ValueError` for no reference, other sizes, another placement, or "uxo" without the
    image's size.
    """
    check_placement("reference_ids", placement)
    if not sizes:
        raise ValueError("`reference_ids` needs at least one reference. Pass its size.")
    for one in sizes:
        check_size("`reference_ids(sizes)`", *one)
    grids = [(rows // _SIDE, columns // _SIDE) for rows, columns in sizes]
    if placement == "index":
        origins = [(number, 0, 0) for number in range(1, len(grids) + 1)]
    elif placement == "offset":
        origins = _side_by_side(grids)
    elif size is None:
        raise ValueError(
            "`reference_ids(placement='uxo')` places references beyond the image that is drawn. "
            "Pass its size."
        )
    else:
        check_size("`reference_ids(size)`", *size)
        origins = _diagonal(grids, size[0] // _SIDE, size[1] // _SIDE)
    ids = []
    for origin, grid in zip(origins, grids, strict=True):
        row, column = np.indices(grid).reshape(2, -1)
        own = np.stack([np.zeros_like(row), row, column], axis=-1)
        ids.append(own + np.asarray(origin))
    return jnp.asarray(np.concatenate(ids), jnp.float32)


def _side_by_side(grids: Sequence[Grid]) -> list[Origin]:
    """Return the origins of references in one plane, whose extent so far is height x width."""
    height = width = 0
    origins = []
    for rows, columns in grids:
        right = rows + height > columns + width
        row, column = (0, width) if right else (height, 0)
        origins.append((1, row, column))
        height, width = max(height, row + rows), max(width, column + columns)
    return origins


def _diagonal(grids: Sequence[Grid], row: int, column: int) -> list[Origin]:
    """Return the origins of references, the first of which begins at this row and column."""
    origins = []
    for rows, columns in grids:
        origins.append((0, row, column))
        row, column = row + rows, column + columns
    return origins
