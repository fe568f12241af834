"""How an image is cut into strips for a VAE: their sizes, and arrays that hold the strips."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

import jax

from fluxjax.shapes import Array, Float, Int

Index = int | Int[Array, ""]
Strip = Float[Array, "_ _ _"]
"""[rows, columns, channels] of a strip, or of the rows that are read beside it."""


@dataclass(frozen=True, kw_only=True)
class VaeStrips:
    """How a VAE is run part by part.

    `rows`: of the latent in a strip. `columns`: of the latent in a tile, into which strips are cut
    where several layers are run together. `stored`: so many resolutions, the coarsest first, keep
    the features of the whole image in memory, where each layer changes them strip by strip. The
    layers of the others are run together, tile by tile and from the stored features, once for each
    of their norms and once for the result.
    """

    rows: int
    columns: int
    stored: int

    def __post_init__(self):
        if min(self.rows, self.columns, self.stored) < 1:
            raise ValueError(
                f"`VaeStrips(rows={self.rows}, columns={self.columns}, stored={self.stored})` "
                "needs numbers of at least 1."
            )


class Grid(NamedTuple):
    """Where strips and tiles are, in cells of the latent. The last of them may end in padding.

    `latent_rows`, `latent_columns`: of the whole image. `rows`: of a strip. `columns`: of a tile.
    """

    latent_rows: int
    latent_columns: int
    rows: int
    columns: int

    @classmethod
    def over(cls, shape: Sequence[int], strips: VaeStrips, unit: int) -> "Grid":
        """Return the grid over an input.

        **Arguments:** `shape`: of the input, [rows, columns, channels]. `unit`: its rows for each
        row of the latent.
        """
        rows, columns = shape[0] // unit, shape[1] // unit
        return cls(
            latent_rows=rows,
            latent_columns=columns,
            rows=min(strips.rows, rows),
            columns=min(strips.columns, columns),
        )

    @property
    def strips(self) -> int:
        """The number of strips."""
        return ceil(self.latent_rows / self.rows)


class Stored(NamedTuple):
    """The strips of an image, one after another in the rows of a matrix.

    `data`: [units, numbers]; a strip is as many whole units as its shape needs, and there may be
    units that hold nothing. `shape`: of a strip.
    """

    data: Float[Array, "units numbers"]
    shape: tuple[int, int, int]

    @property
    def units(self) -> int:
        """The units of a strip."""
        return prod(self.shape) // self.data.shape[1]

    def read(self, number: Index) -> Strip:
        """Return the strip of a number."""
        first = number * self.units
        strip = jax.lax.dynamic_slice_in_dim(self.data, first, self.units)
        return strip.reshape(self.shape)

    def write(self, number: Index, strip: Strip) -> Float[Array, "units numbers"]:
        """Return the data with another strip in the place of the one of a number."""
        units = strip.reshape(self.units, -1)
        first = number * self.units
        return jax.lax.dynamic_update_slice_in_dim(self.data, units, first, axis=0)
