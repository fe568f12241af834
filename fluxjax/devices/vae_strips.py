"""A VAE on one device with little memory: the image is run in strips, one after another."""

from collections.abc import Sequence
from math import gcd, prod

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.devices.strip_grid import Grid, Stored, VaeStrips
from fluxjax.devices.strip_segments import Segment, run_segment, segments_of
from fluxjax.nets.rows import WHOLE
from fluxjax.nets.vae import Decoder, Encoder, Vae
from fluxjax.shapes import Array, Float

StripShape = tuple[int, int, int]
"""Rows, columns and channels."""


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
        grid = Grid.over(x.shape, self.strips, self.unit)
        source = self._cut(x, grid)
        segments = segments_of(self.network.stages(), self.unit, self.strips.stored)
        shapes = _shapes(segments, source, x.dtype)
        *inner, (last_segment, last_shape) = zip(segments, shapes, strict=True)
        # The attention takes the most beside the features, which are the smallest where it is. So
        # those of the latent's resolution have an array, and all others have another one.
        arrays: dict[bool, Array] = {}
        for segment, shape in inner:
            is_coarse = shape[0] == grid.rows
            if is_coarse not in arrays:
                alike = [other for _, other in inner if (other[0] == grid.rows) == is_coarse]
                arrays[is_coarse] = _filled(alike, grid.strips, source)
            target = Stored(arrays[is_coarse], shape)
            arrays[is_coarse] = run_segment(segment, source, target, grid)
            source = Stored(arrays[is_coarse], shape)
        target = Stored(_filled([last_shape], grid.strips, source), last_shape)
        strips = run_segment(last_segment, source, target, grid)
        rows, columns, channels = last_shape
        whole = strips.reshape(-1, columns, channels)
        without_padding = whole[: grid.latent_rows * rows // grid.rows]
        return _without_gradient(without_padding)

    def _cut(self, x: Float[Array, "rows columns channels"], grid: Grid) -> Stored:
        """Return the input as strips, the last one padded."""
        _, columns, channels = x.shape
        rows = grid.rows * self.unit
        padding = rows * grid.strips - len(x)
        padded = jnp.pad(x, ((0, padding), (0, 0), (0, 0)))
        return Stored(padded.reshape(grid.strips, -1), (rows, columns, channels))


def _shapes(segments: Sequence[Segment], source: Stored, dtype: jnp.dtype) -> list[StripShape]:
    """Return the shape of a strip after each segment."""
    shapes = []
    x = jax.ShapeDtypeStruct(source.shape, dtype)
    for segment in segments:
        for stage in segment:
            x = jax.eval_shape(lambda x, stage=stage: stage.run(x, WHOLE), x)
        shapes.append(x.shape)
    return shapes


def _filled(
    shapes: Sequence[StripShape], count: int, source: Stored
) -> Float[Array, "units numbers"]:
    """Return an array that can hold so many strips of any of these shapes.

    What it is filled with is never read. As it comes from the source, XLA can't allocate the array
    before the source is computed, which takes memory as well.
    """
    sizes = [prod(shape) for shape in shapes]
    unit = gcd(*sizes)
    units = count * max(sizes) // unit
    return jnp.full((units, unit), source.data[0, 0])


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
