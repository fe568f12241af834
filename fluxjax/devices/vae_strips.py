"""A VAE on one device with little memory: the image is run in strips, one after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, gcd, prod
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.devices.tile import PartialMoments, TilePlace, TileResult, run_stages
from fluxjax.nets.rows import WHOLE
from fluxjax.nets.vae import Decoder, Encoder, Vae
from fluxjax.nets.vae_layers import Stage
from fluxjax.shapes import Array, Float, Int

Index = int | Int[Array, ""]
Strip = Float[Array, "_ _ _"]
"""[rows, columns, channels] of a strip, or of the rows that are read beside it."""
Segment = tuple[Stage, ...]


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


def strip_vae(vae: Vae, strips: VaeStrips) -> Vae:
    """Return a VAE that runs images strip by strip, in less memory.

    The result is that of the whole VAE, except for the order of sums: norms have the statistics of
    the whole image, and the attention has all cells. Each norm needs a pass over the image before
    its result is known, so layers are computed several times.

    **Raises:** `ValueError` when it is called, if strips are shorter than what layers that are run
    together read around them; when it is differentiated.
    """
    encoder = StripNetwork(vae.encoder, strips, vae.config.factor)
    decoder = StripNetwork(vae.decoder, strips, 1)
    return eqx.tree_at(lambda vae: (vae.encoder, vae.decoder), vae, (encoder, decoder))


class StripNetwork(eqx.Module):
    """An encoder or a decoder that is run in strips; called as the network.

    `unit`: rows of the input for each row of the latent.
    """

    network: Encoder | Decoder
    strips: VaeStrips = eqx.field(static=True)
    unit: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "rows columns channels"]) -> Float[Array, "y x out"]:
        segments = segments_of(self.network.stages(), self.unit, self.strips.stored)
        grid = Grid.over(x.shape, self.strips, self.unit)
        padding = grid.rows * self.unit * grid.strips - len(x)
        strips = jnp.pad(x, ((0, padding), (0, 0), (0, 0))).reshape(grid.strips, -1)
        source = Stored(strips, (grid.rows * self.unit, x.shape[1], x.shape[2]))
        targets = _shapes(segments, source, x.dtype)
        # The attention takes the most beside the features, which are the smallest where it is. So
        # those of the latent's resolution have an array, and all others have another one.
        arrays: dict[bool, Array] = {}
        for segment, shape in zip(segments[:-1], targets[:-1], strict=True):
            coarse = shape[0] == grid.rows
            if coarse not in arrays:
                alike = [other for other in targets[:-1] if (other[0] == grid.rows) == coarse]
                arrays[coarse] = _filled(alike, grid.strips, source)
            arrays[coarse] = run_segment(segment, source, Stored(arrays[coarse], shape), grid)
            source = Stored(arrays[coarse], shape)
        last = Stored(_filled(targets[-1:], grid.strips, source), targets[-1])
        strips = run_segment(segments[-1], source, last, grid)
        whole = strips.reshape(-1, *targets[-1][1:])
        return _without_gradient(whole[: grid.latent_rows * targets[-1][0] // grid.rows])


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
        """Return a strip."""
        strip = jax.lax.dynamic_slice_in_dim(self.data, number * self.units, self.units)
        return strip.reshape(self.shape)

    def write(self, number: Index, strip: Strip) -> Float[Array, "units numbers"]:
        """Return the data with another strip in the place of one."""
        units = strip.reshape(self.units, -1)
        return jax.lax.dynamic_update_slice_in_dim(self.data, units, number * self.units, 0)


class Grid(NamedTuple):
    """Where strips and tiles are, in cells of the latent. The last of them may end in padding."""

    latent_rows: int
    latent_columns: int
    rows: int
    columns: int

    @classmethod
    def over(cls, shape: Sequence[int], strips: VaeStrips, unit: int) -> "Grid":
        """Return the grid over an input of a shape."""
        rows, columns = shape[0] // unit, shape[1] // unit
        return cls(rows, columns, min(strips.rows, rows), min(strips.columns, columns))

    @property
    def strips(self) -> int:
        """The number of strips."""
        return ceil(self.latent_rows / self.rows)


def segments_of(stages: Sequence[Stage], unit: int, stored: int) -> list[Segment]:
    """Return groups of stages: the features between groups are stored.

    Those of the `stored` coarsest resolutions are. What enlarges is run with the stage that follows
    it, which in FLUX.1's decoder halves the channels.
    """
    segments, joined = [], []
    scale = float(unit)  # the rows of the features for each row of the latent
    for stage in stages:
        scale *= stage.scale
        joined.append(stage)
        if stage.scale <= 1 and scale <= 2 ** (stored - 1):
            segments.append(tuple(joined))
            joined = []
    if joined:
        segments.append(tuple(joined))
    return segments


def reach_of(segment: Segment) -> int:
    """Return how many cells around those of a strip its result depends on, at its input."""
    reach, finest, scale = 0, 1.0, 1.0
    for stage in reversed(segment):
        reach = ceil(reach / stage.scale) + stage.reach
    for stage in segment:
        scale *= stage.scale
        finest = min(finest, scale)
    multiple = round(1 / finest)  # so that the strip with them has whole cells at every resolution
    return ceil(reach / multiple) * multiple


def run_segment(
    segment: Segment, source: Stored, target: Stored, grid: Grid
) -> Float[Array, "units numbers"]:
    """Return the target's data with the results of a segment, whose source may be in it as well.

    What a norm or an attention needs of the whole image is collected in a pass for each of them.
    """
    halo = reach_of(segment)
    tiles = _Tiles(source, grid, halo if grid.strips > 1 else 0, halo)
    known: list = []
    while True:
        run = partial(run_stages, segment, tuple(known))
        kind = eqx.filter_eval_shape(tiles.map_strip, run, tiles.read(0), 0)
        if isinstance(kind, jax.ShapeDtypeStruct):
            return _write(tiles, run, target)
        passes = jax.lax.map(
            lambda number, run=run: tiles.map_strip(run, tiles.read(number), number),
            jnp.arange(grid.strips),
        )
        known.append(passes.combined(tiles.whole_cells))


class _Tiles(NamedTuple):
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
        return self.join(self.edge(number, -1), self.source.read(number), self.edge(number, 1))

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
        return strip[len(strip) - self.above :] if side < 0 else strip[: self.above]

    def join(self, *parts: Strip) -> Strip:
        return jnp.concatenate(parts) if self.above else parts[1]

    def map_strip(
        self, run: Callable[[Strip, TilePlace], TileResult], strip: Strip, number: Index
    ) -> TileResult:
        """Return what `run(tile, place)` returns of a strip's tiles, joined.

        **Arguments:** `strip`: the one of this number, with its halo.
        """
        scale, grid = self.scale, self.grid
        # Attention, which reads nothing around a cell, takes cells in the order of the image.
        width = (grid.columns if self.beside else grid.latent_columns) * scale
        whole_width = grid.latent_columns * scale
        count = ceil(whole_width / width)
        beside = self.beside if count > 1 else 0
        place = TilePlace(
            first_row=number * self.source.shape[0] - self.above,
            first_column=-beside,
            halo=(self.above, beside),
            size=(len(strip), width + 2 * beside),
            whole=(grid.latent_rows * scale, whole_width),
        )
        if count == 1:
            return run(strip, place)
        padding = count * width - whole_width
        padded = jnp.pad(strip, ((0, 0), (beside, beside + padding), (0, 0)))

        def run_tile(tile_number: Index) -> TileResult:
            start = tile_number * width
            tile = jax.lax.dynamic_slice_in_dim(padded, start, width + 2 * beside, axis=1)
            return run(tile, place._replace(first_column=start - beside))

        found = jax.lax.map(run_tile, jnp.arange(count))
        if isinstance(found, PartialMoments):
            return found
        joined = jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1, found.shape[-1])
        return joined[:, : whole_width * found.shape[2] // width]


def _write(
    tiles: _Tiles, run: Callable[[Strip, TilePlace], TileResult], target: Stored
) -> Float[Array, "units numbers"]:
    """Return the target's data with the results of all strips.

    Source and target may begin at the same place of one array. If a result is larger than what it
    is computed from, the last strip is first, so that none is overwritten before it is read. Of
    the strip before, the rows that the next one reads are kept.
    """
    count = tiles.grid.strips
    in_place = tiles.source.data is target.data
    side = 1 if target.units > tiles.source.units else -1

    def body(step: Index, carry: tuple) -> tuple:
        data, edge = carry
        number = count - 1 - step if side == 1 else step
        source = tiles.source._replace(data=data) if in_place else tiles.source
        current = tiles._replace(source=source)
        strip, other = source.read(number), current.edge(number, -side)
        parts = (edge, strip, other) if side == -1 else (other, strip, edge)
        result = current.map_strip(run, current.join(*parts), number)
        assert isinstance(result, Array)
        data = target._replace(data=data).write(number, result)
        return data, current.rows_beside(strip, side)

    edge = jnp.zeros((tiles.above, *tiles.source.shape[1:]), tiles.source.data.dtype)
    return jax.lax.fori_loop(0, count, body, (target.data, edge))[0]


def _shapes(
    segments: Sequence[Segment], source: Stored, dtype: jnp.dtype
) -> list[tuple[int, int, int]]:
    """Return the shape of a strip after each segment."""
    shapes = []
    x = jax.ShapeDtypeStruct(source.shape, dtype)
    for segment in segments:
        for stage in segment:
            x = jax.eval_shape(lambda x, stage=stage: stage.run(x, WHOLE), x)
        shapes.append(x.shape)
    return shapes


def _filled(
    shapes: Sequence[tuple[int, int, int]], count: int, source: Stored
) -> Float[Array, "units numbers"]:
    """Return an array that can hold so many strips of any of these shapes.

    What it is filled with is never read. As it comes from the source, XLA can't allocate the array
    before the source is computed, which takes memory as well.
    """
    sizes = [prod(shape) for shape in shapes]
    unit = gcd(*sizes)
    return jnp.full((count * max(sizes) // unit, unit), source.data[0, 0])


@jax.custom_jvp
def _without_gradient(x: Array) -> Array:
    """Return x, which can't be differentiated: the loops would keep every strip of every pass."""
    return x


@_without_gradient.defjvp
def _refuse_gradient(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    raise ValueError(
        "A VAE in strips has no gradient: it would need more memory than the whole. "
        "Differentiate the VAE without `strip_vae` or `limit_vae_memory`."
    )
