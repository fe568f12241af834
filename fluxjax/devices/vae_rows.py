"""A VAE on several devices, each of which runs a part of the image's rows."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.nets.rows import AllCellHeads, CellHeads, Cells, ChannelMeans, Pad, PaddedCells, Rows
from fluxjax.nets.vae import Decoder, Encoder, Vae
from fluxjax.shapes import Array, Bool, Float


def split_vae_rows(
    vae: Vae,
    axes: Sequence[str] = ("tensor", "context"),
) -> Vae:
    """Return a VAE whose rows are split among devices, for use inside of `jax.shard_map`.

    Every device gets and returns the whole image and latent, and runs a strip of its rows. All
    strips have one height: where the devices do not divide the rows, the last rows are padding,
    which is masked.

    Convolutions exchange the rows at the strips' borders with the devices above and below, the
    norms' means are summed over all devices, and the keys and values of the attention are gathered.
    The result is that of the whole VAE, except for the order of the norms' sums.

    **Arguments:** `axes`: of the mesh, over which the rows are split.
    """
    encoder = _SplitRows(vae.encoder, vae.config.factor, tuple(axes))
    decoder = _SplitRows(vae.decoder, 1, tuple(axes))
    return eqx.tree_at(lambda vae: (vae.encoder, vae.decoder), vae, (encoder, decoder))


class _SplitRows(eqx.Module):
    """An encoder or a decoder on a strip of rows; called as the network.

    `unit`: rows of the input for each row of the latent. Strips are multiples of it, so that no
    cell of a coarser level belongs to two devices.
    """

    network: Encoder | Decoder
    unit: int = eqx.field(static=True)
    axes: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, x: Cells) -> Float[Array, "new_rows new_columns out"]:
        """Return the network's output for the whole input, on every device."""
        devices = jax.lax.axis_size(self.axes)
        latent_rows = len(x) // self.unit
        strip_rows = -(-latent_rows // devices)  # rounded up
        missing = strip_rows * devices - latent_rows
        padded = jnp.pad(x, ((0, missing * self.unit), (0, 0), (0, 0)))
        size = strip_rows * self.unit
        start = jax.lax.axis_index(self.axes) * size
        strip = jax.lax.dynamic_slice_in_dim(padded, start, size)
        rows = RowStrip(self.axes, latent_rows, strip_rows)
        out = self.network(strip, rows)
        gathered = jax.lax.all_gather(out, self.axes, tiled=True)
        return gathered[: rows.image_rows(out)]


class RowStrip(Rows):
    """The rows of an image, split into strips of one height among the devices along `axes`.

    `latent_rows`: of the whole latent. `strip_rows`: of the latent, on each device. Layers run at
    several resolutions, so the sizes of what they get are multiples of these.
    """

    axes: tuple[str, ...] = eqx.field(static=True)
    latent_rows: int = eqx.field(static=True)
    strip_rows: int = eqx.field(static=True)

    def pad(self, x: Cells, pad: Pad) -> tuple[PaddedCells, Pad]:
        # The halo is all that a convolution reads: no rows of zeros are left to be added.
        above, below = pad
        return self.with_halo(x, above, below), (0, 0)

    def with_halo(
        self,
        x: Cells,
        above: int,
        below: int,
    ) -> PaddedCells:
        """Return rows between those of the devices above and below; zeros beyond the image.

        **Arguments:** `above`, `below`: how many rows of each neighbour.
        """
        # Padding rows are not zeros after a convolution: they must not be read as the border.
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

    def channel_means(self, x: Cells) -> ChannelMeans:
        # Sums and not means are exchanged: strips have different numbers of real rows.
        total = jnp.sum(jnp.where(self.is_real(x), x, 0), axis=(0, 1))
        cells = self.image_rows(x) * x.shape[1]
        return jax.lax.psum(total, self.axes) / cells

    def all_cells(self, x: CellHeads) -> AllCellHeads:
        # Cells are in order, one row after another, so padding is at the end.
        gathered = jax.lax.all_gather(x, self.axes, tiled=True)
        return gathered[: self.image_rows(x)]

    def is_real(self, x: Cells) -> Bool[Array, "rows 1 1"]:
        """Return which rows belong to the image; the others are padding."""
        first = jax.lax.axis_index(self.axes) * len(x)
        rows = first + jnp.arange(len(x))
        return (rows < self.image_rows(x))[:, None, None]

    def image_rows(self, x: Array) -> int:
        """Return how many of such rows the whole image has.

        **Arguments:** `x`: rows of this device; or cells, of which it returns how many in all.
        """
        return self.latent_rows * len(x) // self.strip_rows
