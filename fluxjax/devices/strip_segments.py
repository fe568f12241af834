"""Layers that are run together on the strips of an image, and what they read around each."""

from collections.abc import Sequence
from functools import partial
from math import ceil

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.devices.strip_grid import Grid, Index, Stored
from fluxjax.devices.strip_tiles import RunTile, StripTiles
from fluxjax.devices.tile import run_stages
from fluxjax.nets.vae_layers import Stage
from fluxjax.shapes import Array, Float

Segment = tuple[Stage, ...]
"""Stages of which only the last one's result is stored."""


def segments_of(stages: Sequence[Stage], unit: int, stored: int) -> list[Segment]:
    """Return groups of stages: the features between groups are stored.

    Those of the `stored` coarsest resolutions are. What enlarges is run with the stage that follows
    it, which in FLUX.1's decoder halves the channels.

    **Arguments:** `stages`: of an encoder or a decoder, in order. `unit`: rows of the input for
    each row of the latent. `stored`: as for `VaeStrips`.
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
    """Return how many cells around those of a strip its result depends on, at its input.

    They are so many that the strip with them has whole cells at every resolution of the segment.
    """
    reach = 0
    for stage in reversed(segment):
        reach = ceil(reach / stage.scale) + stage.reach
    scale = coarsest = 1.0
    for stage in segment:
        scale *= stage.scale
        coarsest = min(coarsest, scale)
    multiple = round(1 / coarsest)
    return ceil(reach / multiple) * multiple


def run_segment(
    segment: Segment, source: Stored, target: Stored, grid: Grid
) -> Float[Array, "units numbers"]:
    """Return the target's data with the results of a segment, whose source may be in it as well.

    What a norm or an attention needs of the whole image is collected in a pass for each of them.
    """
    halo = reach_of(segment)
    above = halo if grid.strips > 1 else 0
    tiles = StripTiles(source, grid, above=above, beside=halo)
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


def _write(tiles: StripTiles, run: RunTile, target: Stored) -> Float[Array, "units numbers"]:
    """Return the target's data with the results of all strips.

    Source and target may begin at the same place of one array. If a result is larger than what it
    is computed from, the last strip is first, so that none is overwritten before it is read. Of
    the strip before, the rows that the next one reads are kept.
    """
    count = tiles.grid.strips
    in_place = tiles.source.data is target.data
    grows = target.units > tiles.source.units

    def body(step: Index, carry: tuple) -> tuple:
        data, edge = carry
        number = count - 1 - step if grows else step
        source = tiles.source._replace(data=data) if in_place else tiles.source
        current = tiles._replace(source=source)
        strip = source.read(number)
        if grows:
            joined = current.join(current.edge(number, -1), strip, edge)
            edge = current.rows_beside(strip, 1)
        else:
            joined = current.join(edge, strip, current.edge(number, 1))
            edge = current.rows_beside(strip, -1)
        result = current.map_strip(run, joined, number)
        assert isinstance(result, Array)
        return target._replace(data=data).write(number, result), edge

    edge = jnp.zeros((tiles.above, *tiles.source.shape[1:]), tiles.source.data.dtype)
    data, _ = jax.lax.fori_loop(0, count, body, (target.data, edge))
    return data
