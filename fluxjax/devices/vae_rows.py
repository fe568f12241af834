"""A VAE over several devices, each of which runs a part of the image's rows: halos are exchanged, norms summed over all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.kernels.attention import attention
from fluxjax.nets.vae import CellAttention, Cells, Conv, GroupNorm, Padding, Vae
from fluxjax.shapes import Array, Bool, Float


def split_vae_rows(vae: Vae, axes: Sequence[str] = ("tensor", "context")) -> Vae:
    """Return a VAE that encodes and decodes in strips, for use inside of `jax.shard_map`.

    Each device along `axes` (of a mesh) runs as many of the latent's rows; where they do not divide, the last ones are padding,
    which no cell sees. Convolutions are sent the rows beside theirs, the norms' means and variances are sums over all devices,
    and the attention's keys and values are gathered: the result is the whole VAE's, but for the order of the norms' sums.
    Every device takes, and returns, the whole image and latent.
    """
    axes = tuple(axes)
    parts = (_OnRows(vae.encoder, vae.config.factor, axes), _OnRows(vae.decoder, 1, axes))
    return eqx.tree_at(lambda whole: (whole.encoder, whole.decoder), vae, parts)


@dataclass(frozen=True)
class _Strip:
    """A device's part of the rows: `part` of the latent's `count`, as many along `axes` each, the last filled up."""

    axes: tuple[str, ...]
    count: int
    part: int

    def real(self, x: Cells) -> Bool[Array, "rows 1 1"]:
        """Return which of a level's rows are of the image."""
        rows = jax.lax.axis_index(self.axes) * len(x) + jnp.arange(len(x))
        return (rows < self.whole(x))[:, None, None]

    def whole(self, x: Cells) -> int:
        """Return how many rows the image has at a level."""
        return self.count * len(x) // self.part

    def halo(self, x: Cells, above: int, below: int) -> Float[Array, "more_rows columns channels"]:
        """Return rows with those of the devices above and below around them, and zeros beyond the image."""
        x, last = jnp.where(self.real(x), x, 0), jax.lax.axis_size(self.axes) - 1
        parts = [x]
        if above:
            parts.insert(
                0, jax.lax.ppermute(x[-above:], self.axes, [(i, i + 1) for i in range(last)])
            )
        if below:
            parts.append(jax.lax.ppermute(x[:below], self.axes, [(i + 1, i) for i in range(last)]))
        return jnp.concatenate(parts)


class _OnRows(eqx.Module):
    """An encoder or decoder over strips of `unit` rows and multiples of it; its call is the network's."""

    network: Any
    unit: int = eqx.field(static=True)
    axes: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, x: Cells) -> Float[Array, "new_rows new_columns out"]:
        devices, count = jax.lax.axis_size(self.axes), len(x) // self.unit
        part = -(-count // devices)
        padded = jnp.pad(x, ((0, (part * devices - count) * self.unit), (0, 0), (0, 0)))
        rows = part * self.unit
        mine = jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(self.axes) * rows, rows)
        strip = _Strip(self.axes, count, part)
        out = jax.tree.map(lambda layer: _split(layer, strip), self.network, is_leaf=_is_split)(
            mine
        )
        return jax.lax.all_gather(out, self.axes, tiled=True)[: strip.whole(out)]


class _SplitConv(Conv):
    """A convolution whose rows' padding comes from the devices above and below."""

    base: Conv
    strip: _Strip = eqx.field(static=True)

    def __init__(self, base: Conv, strip: _Strip):
        self.weight, self.bias, self.base, self.strip = base.weight, base.bias, base, strip

    def kernel(self) -> Float[Array, "side side channels out"]:
        return self.base.kernel()

    def apply(
        self, x: Cells, kernel: Array, stride: int, padding: Padding
    ) -> Float[Array, "new_rows new_columns out"]:
        return self.base.apply(
            self.strip.halo(x, *padding[0]), kernel, stride, ((0, 0), padding[1])
        )


class _SplitNorm(GroupNorm):
    """A group norm whose means are over all devices' cells."""

    strip: _Strip = eqx.field(static=True)

    def __init__(self, base: GroupNorm, strip: _Strip):
        self.scale, self.bias, self.groups, self.strip = base.scale, base.bias, base.groups, strip

    def means(self, x: Cells) -> Float[Array, " channels"]:
        mine = jnp.sum(jnp.where(self.strip.real(x), x, 0), axis=(0, 1))
        return jax.lax.psum(mine, self.strip.axes) / (self.strip.whole(x) * x.shape[1])


class _SplitAttention(CellAttention):
    """An attention of a device's cells over all devices'."""

    strip: _Strip = eqx.field(static=True)

    def __init__(self, base: CellAttention, strip: _Strip):
        self.norm = _SplitNorm(base.norm, strip)
        self.q, self.k, self.v, self.out, self.strip = base.q, base.k, base.v, base.out, strip

    def mix(self, q: Array, k: Array, v: Array) -> Float[Array, "cells 1 channels"]:
        cells = self.strip.whole(q)
        k, v = (jax.lax.all_gather(x, self.strip.axes, tiled=True)[:cells] for x in (k, v))
        return attention(q, k, v)


def _is_split(node: Any) -> bool:
    return isinstance(node, Conv | GroupNorm | CellAttention)


def _split(layer: Any, strip: _Strip) -> Any:
    """Return a layer in its form over strips."""
    if isinstance(layer, Conv):
        return _SplitConv(layer, strip)
    if isinstance(layer, GroupNorm):
        return _SplitNorm(layer, strip)
    return _SplitAttention(layer, strip) if isinstance(layer, CellAttention) else layer
