"""A part of an image, and what its cells contribute to norms and attention of the whole one."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from fluxjax.kernels.attention import attention
from fluxjax.kernels.xla_attention import CHUNK_LOGIT_BYTES
from fluxjax.nets.rows import (
    AllCellHeads,
    CellHeads,
    Cells,
    ChannelMeans,
    GroupMoments,
    Pad,
    PaddedCells,
    Rows,
    of_groups,
)
from fluxjax.nets.vae_layers import Stage
from fluxjax.shapes import Array, Bool, Float, Int


class TilePlace(NamedTuple):
    """Where a tile is in an image; all numbers are of the resolution that it begins with.

    `first_row`, `first_column`: of the image, at the tile's first cell; negative beyond it. `halo`:
    rows above and below, and columns at each side, which are of other tiles. `size`: with the halo.
    `whole`: of the image. Padding follows it.
    """

    first_row: int | Int[Array, ""]
    first_column: int | Int[Array, ""]
    halo: tuple[int, int]
    size: tuple[int, int]
    whole: tuple[int, int]

    def image_cells(self, x: Cells) -> Bool[Array, "rows columns 1"]:
        """Return which cells of a tile are in the image."""
        inside = []
        for axis, first in enumerate((self.first_row, self.first_column)):
            length = x.shape[axis]
            cells = first * length // self.size[axis] + jnp.arange(length)
            inside.append((cells >= 0) & (cells < self.whole[axis] * length // self.size[axis]))
        return (inside[0][:, None] & inside[1])[:, :, None]

    def without_halo(self, x: Array) -> Array:
        """Return the cells of a tile that are its own."""
        above, beside = (
            halo * x.shape[axis] // self.size[axis] for axis, halo in enumerate(self.halo)
        )
        return x[above : len(x) - above, beside : x.shape[1] - beside]


class PartialMoments(NamedTuple):
    """What some tiles contribute to the moments of a norm.

    `cells`: how many. `mean`: of each group, for each channel. `squares`: the sum over cells of the
    squares of the distance from it, by group.
    """

    cells: Float[Array, "*tiles"]
    mean: Float[Array, "*tiles channels"]
    squares: Float[Array, "*tiles channels"]

    def combined(self, whole_cells: int) -> GroupMoments:
        """Return the moments over all tiles.

        **Source:** Chan et al. 1983, eq. 1.5: sums around the means of tiles lose no digits.
        """
        del whole_cells  # the counts have no padding
        count, tiles = self.cells[..., None], tuple(range(self.cells.ndim))
        total = jnp.sum(count, tiles)
        mean = jnp.sum(count * self.mean, tiles) / total
        between = jnp.sum(count * jnp.square(self.mean - mean), tiles)
        return GroupMoments(mean, (jnp.sum(self.squares, tiles) + between) / total)


class StripCells(NamedTuple):
    """Keys or values of the cells of strips, in the order of the image."""

    cells: Float[Array, "*strips cells heads head_dim"]

    def combined(self, whole_cells: int) -> AllCellHeads:
        """Return those of the whole image. `whole_cells`: its cells; the rest is padding."""
        return self.cells.reshape(-1, *self.cells.shape[-2:])[:whole_cells]


TileResult = Array | PartialMoments | StripCells


class _UnknownError(Exception):
    """What a layer needs of the whole image is not known; `part`: what this tile contributes."""

    def __init__(self, part: PartialMoments | StripCells):
        super().__init__()
        self.part = part


class Tile(Rows):
    """A part of an image, on which layers run with what is known of the whole one.

    Convolutions add zeros around a tile, so that cells of its halo are wrong, one further cell for
    each convolution; halos are as wide as that.

    `place`: where it is. `known`: what the layers need of the whole image, in the order in which
    they need it; a layer that needs more raises `_UnknownError`. It serves one run of the layers.
    """

    place: TilePlace
    known: list[GroupMoments | AllCellHeads]

    def pad(self, x: Cells, pad: Pad) -> tuple[PaddedCells, Pad]:
        """Return the cells with zeros beyond the image, and the padding as it is."""
        # Cells beyond the image are not zeros after a convolution: they must be read as zeros.
        return jnp.where(self.place.image_cells(x), x, 0), pad

    def channel_means(self, x: Cells) -> ChannelMeans:
        raise NotImplementedError("A tile has moments of groups only.")

    def moments(self, x: Cells, groups: int) -> GroupMoments:
        """Return the next moments that are known of the whole image.

        **Raises:** `_UnknownError` with what this tile contributes, if no more are known.
        """
        if self.known:
            return cast(GroupMoments, self.known.pop(0))
        own = self.place.without_halo(x)
        inside = self.place.without_halo(self.place.image_cells(x))
        count = jnp.sum(inside, dtype=x.dtype)
        cells = jnp.maximum(count, 1)  # a tile may be padding only
        mean = of_groups(jnp.sum(jnp.where(inside, own, 0), axis=(0, 1)) / cells, groups)
        squares = jnp.sum(jnp.where(inside, jnp.square(own - mean), 0), axis=(0, 1))
        raise _UnknownError(PartialMoments(count, mean, of_groups(squares, groups)))

    def all_cells(self, x: CellHeads) -> AllCellHeads:
        """Return the next cells that are known of the whole image.

        **Raises:** `_UnknownError` with those of this tile, if no more are known.
        """
        if self.known:
            return cast(Array, self.known.pop(0))
        raise _UnknownError(StripCells(x))

    def attend(self, q: CellHeads, k: AllCellHeads, v: AllCellHeads) -> CellHeads:
        """Attend from a tile's cells to those of the whole image, in chunks of queries."""

        # As xla_chunked, but without the copies of keys and values in float32 that it keeps for
        # gradients.
        def one_query(query: Float[Array, "heads head_dim"]) -> Float[Array, "heads head_dim"]:
            return attention(query[None], k, v, implementation="xla")[0]

        at_once = max(1, CHUNK_LOGIT_BYTES // (4 * len(k)))
        return jax.lax.map(one_query, q, batch_size=min(at_once, len(q)))


def run_stages(
    stages: Sequence[Stage],
    known: Sequence[GroupMoments | AllCellHeads],
    x: Cells,
    place: TilePlace,
) -> TileResult:
    """Run layers on a tile, up to the first that needs more of the whole image than is known.

    **Returns:** the layers' result without the halo, or what the tile contributes to that need.
    """
    rows = Tile(place, list(known))
    try:
        for stage in stages:
            x = stage.run(x, rows)
    except _UnknownError as unknown:
        return unknown.part
    return place.without_halo(x)
