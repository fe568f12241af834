"""A VAE on several devices, each of which runs a part of the image's rows."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.nets.rows import Cells, Pad, Rows
from fluxjax.nets.vae import Decoder, Encoder, Vae
from fluxjax.shapes import Array, Bool, Float


def split_vae_rows(vae: Vae, axes: Sequence[str] = ("tensor", "context")) -> Vae:
    """Return a VAE whose rows are split among devices, for use inside of `jax.shard_map`.

    Every device gets and returns the whole image and latent, and runs a strip of its rows, all
    strips of one height. Convolutions exchange the rows at the strips' borders with the devices
    above and below, the norms' means are summed over all devices, and the keys and values of the
    attention are gathered. The result is that of the whole VAE, except for the order of the norms'
    sums. Where the devices do not divide the rows, the last ones are padding, which is masked.

    **Arguments:** `axes`: of the mesh, over which the rows are split.
    """
    encoder = _SplitRows(vae.encoder, vae.config.factor, tuple(axes))
    decoder = _SplitRows(vae.decoder, 1, tuple(axes))
    return eqx.tree_at(lambda vae: (vae.encoder, vae.decoder), vae, (encoder, decoder))


class _SplitRows(eqx.Module):
    """An encoder or a decoder on a strip of rows; called as the network.

    `unit`: rows of the input for each row of the latent. Strips are multiples of it.
    """

    network: Encoder | Decoder
    unit: int = eqx.field(static=True)
    axes: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, x: Cells) -> Float[Array, "new_rows new_columns out"]:
        devices = jax.lax.axis_size(self.axes)
        latent_rows = len(x) // self.unit
        strip_rows = -(-latent_rows // devices)
        missing = strip_rows * devices - latent_rows
        padded = jnp.pad(x, ((0, missing * self.unit), (0, 0), (0, 0)))
        size = strip_rows * self.unit
        start = jax.lax.axis_index(self.axes) * size
        strip = jax.lax.dynamic_slice_in_dim(padded, start, size)
        rows = RowStrip(self.axes, latent_rows, strip_rows)
        out = self.network(strip, rows)
        return jax.lax.all_gather(out, self.axes, tiled=True)[: rows.image_rows(out)]


class RowStrip(Rows):
    """The rows of an image, split into strips of one height among the devices along `axes`.

    `latent_rows`: of the whole latent. `strip_rows`: of the latent, on each device. Layers run at
    several resolutions, so the sizes of what they get are multiples of these.
    """

    axes: tuple[str, ...] = eqx.field(static=True)
    latent_rows: int = eqx.field(static=True)
    strip_rows: int = eqx.field(static=True)

    def pad(self, x: Cells, pad: Pad) -> tuple[Cells, Pad]:
        return self.with_halo(x, *pad), (0, 0)

    def with_halo(
        self, x: Cells, above: int, below: int
    ) -> Float[Array, "more_rows columns channels"]:
        """Return rows between those of the devices above and below; zeros beyond the image."""
        x = jnp.where(self.is_real(x), x, 0)
        last = jax.lax.axis_size(self.axes) - 1
        parts = [x]
        # The first and the last device receive nothing, for which `ppermute` gives zeros.
        if above:
            downward = [(i, i + 1) for i in range(last)]
            parts.insert(0, jax.lax.ppermute(x[-above:], self.axes, downward))
        if below:
            upward = [(i + 1, i) for i in range(last)]
            parts.append(jax.lax.ppermute(x[:below], self.axes, upward))
        return jnp.concatenate(parts)

    def channel_means(self, x: Cells) -> Float[Array, " channels"]:
        total = jnp.sum(jnp.where(self.is_real(x), x, 0), axis=(0, 1))
        return jax.lax.psum(total, self.axes) / (self.image_rows(x) * x.shape[1])

    def all_cells(
        self, x: Float[Array, "cells heads head_dim"]
    ) -> Float[Array, "all_cells heads head_dim"]:
        # Cells are in order, a row after another, so padding is at the end.
        return jax.lax.all_gather(x, self.axes, tiled=True)[: self.image_rows(x)]

    def is_real(self, x: Cells) -> Bool[Array, "rows 1 1"]:
        """Return which rows belong to the image; the others are padding."""
        rows = jax.lax.axis_index(self.axes) * len(x) + jnp.arange(len(x))
        return (rows < self.image_rows(x))[:, None, None]

    def image_rows(self, x: Array) -> int:
        """Return how many of such rows the whole image has; or cells, if x has cells first."""
        return self.latent_rows * len(x) // self.strip_rows
