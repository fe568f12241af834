"""The strips of an image with what is around them, cut into tiles, and a function run on each."""

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.devices.strip_grid import Grid, Index, Stored, Strip
from fluxjax.devices.tile import PartialMoments, TilePlace, TileResult

RunTile = Callable[[Strip, TilePlace], TileResult]
"""(tile, place) -> what layers make of a tile."""


class StripTiles(NamedTuple):
    """The strips of a source, each with a halo around it, cut into tiles.

    `above`: rows of the halo. `beside`: columns of it, where strips are cut at all.
    """

    source: Stored
    grid: Grid
    above: int
    beside: int

    @property
    def scale(self) -> int:
        """Rows of the source for each row of the latent."""
        return self.source.shape[0] // self.grid.rows

    @property
    def whole_cells(self) -> int:
        """Cells of the whole image, without padding."""
        return self.grid.latent_rows * self.grid.latent_columns * self.scale**2

    def read(self, number: Index) -> Strip:
        """Return a strip with rows of those above and below."""
        above = self.edge(number, -1)
        below = self.edge(number, 1)
        return self.join(above, self.source.read(number), below)

    def edge(self, number: Index, side: int) -> Strip:
        """Return the rows of the strip above (-1) or below (1) that are next to a strip.

        There are none beyond the image: what is returned there is masked later.
        """
        neighbour = jnp.clip(number + side, 0, self.grid.strips - 1)
        return self.rows_beside(self.source.read(neighbour), side)

    def rows_beside(self, strip: Strip, side: int) -> Strip:
        """Return the rows of a strip that are next to the one below (-1) or above it (1)."""
        if self.above > len(strip):
            raise ValueError(
                f"`VaeStrips(rows={self.grid.rows})` needs strips of at least "
                f"{ceil(self.above / self.scale)} rows, which layers that are run together read "
                "around them. Choose more rows, or more `stored` resolutions."
            )
        if side < 0:
            return strip[len(strip) - self.above :]
        return strip[: self.above]

    def join(self, above: Strip, strip: Strip, below: Strip) -> Strip:
        """Return a strip between the rows that are next to it."""
        if not self.above:
            return strip
        return jnp.concatenate([above, strip, below])

    def map_strip(self, run: RunTile, strip: Strip, number: Index) -> TileResult:
        """Return what `run(tile, place)` returns of a strip's tiles, joined.

        **Arguments:** `strip`: the one of this number, with its halo.
        """
        width, whole_width = self._widths()
        count = ceil(whole_width / width)
        beside = self.beside if count > 1 else 0
        tile_width = width + 2 * beside
        place = TilePlace(
            first_row=number * self.source.shape[0] - self.above,
            first_column=-beside,
            halo=(self.above, beside),
            size=(len(strip), tile_width),
            whole=(self.grid.latent_rows * self.scale, whole_width),
        )
        if count == 1:
            return run(strip, place)
        padding = count * width - whole_width
        padded = jnp.pad(strip, ((0, 0), (beside, beside + padding), (0, 0)))

        def run_tile(tile_number: Index) -> TileResult:
            start = tile_number * width
            tile = jax.lax.dynamic_slice_in_dim(padded, start, tile_width, axis=1)
            return run(tile, place._replace(first_column=start - beside))

        found = jax.lax.map(run_tile, jnp.arange(count))
        if isinstance(found, PartialMoments):
            return found
        _, rows, columns, channels = found.shape
        joined = jnp.moveaxis(found, 0, 1).reshape(rows, -1, channels)
        return joined[:, : whole_width * columns // width]

    def _widths(self) -> tuple[int, int]:
        """Return the columns of a tile, without its halo, and those of the whole image."""
        whole_width = self.grid.latent_columns * self.scale
        if not self.beside:
            # Attention, which reads nothing around a cell, takes cells in the order of the image.
            return whole_width, whole_width
        return self.grid.columns * self.scale, whole_width
