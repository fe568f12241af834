"""The layers of the VAE: group norms, residual blocks and attention over the cells of an image."""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from fluxjax.kernels.attention import attention
from fluxjax.nets.conv import Conv
from fluxjax.nets.layers import Linear
from fluxjax.nets.rows import WHOLE, Cells, Rows
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray


class GroupNorm(eqx.Module):
    """Standardize groups of channels over all cells of the image, then scale and shift.

    **Source:** Wu & He 2018, eq. 7.
    """

    scale: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, groups: int):
        self.scale = jnp.ones(channels)
        self.bias = jnp.zeros(channels)
        self.groups = groups

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> Cells:
        """Normalize. `rows`: where the image's rows are."""
        centered = x.astype(wide_dtype(x.dtype))
        centered = centered - self._group_means(centered, rows)
        y = centered * jax.lax.rsqrt(self._group_means(jnp.square(centered), rows) + 1e-6)
        return (y * self.scale.astype(y.dtype) + self.bias.astype(y.dtype)).astype(x.dtype)

    def _group_means(self, x: Cells, rows: Rows) -> Float[Array, " channels"]:
        """Return, for each channel, the mean of its group over all cells.

        The channels stay the last axis throughout, which is the fastest layout.
        """
        means = rows.channel_means(x)
        group_means = reduce(means, "(groups each) -> groups", "mean", groups=self.groups)
        return jnp.repeat(group_means, x.shape[-1] // self.groups)


class Resnet(eqx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    If the number of channels changes, x goes through a 1x1 convolution, `shortcut`.
    """

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Conv | None

    def __init__(self, channels: int, out: int, groups: int, *, key: PRNGKeyArray):
        first, second, skip = jax.random.split(key, 3)
        self.norm1 = GroupNorm(channels, groups)
        self.conv1 = Conv(channels, out, key=first)
        self.norm2 = GroupNorm(out, groups)
        self.conv2 = Conv(out, out, key=second)
        self.shortcut = None if channels == out else Conv(channels, out, side=1, key=skip)

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> Float[Array, "rows columns out"]:
        y = self.conv1(jax.nn.silu(self.norm1(x, rows)), rows)
        y = self.conv2(jax.nn.silu(self.norm2(y, rows)), rows)
        if self.shortcut is None:
            return y + x
        return y + self.shortcut(x, rows)


class CellAttention(eqx.Module):
    """x + self-attention with one head over all cells of the image."""

    norm: GroupNorm
    q: Linear
    k: Linear
    v: Linear
    out: Linear

    def __init__(self, channels: int, groups: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.norm = GroupNorm(channels, groups)
        self.q, self.k, self.v, self.out = (Linear(channels, channels, key=k) for k in keys)

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> Cells:
        cells = rearrange(self.norm(x, rows), "y x c -> (y x) c")
        q, k, v = (
            rearrange(layer(cells), "cells c -> cells 1 c") for layer in (self.q, self.k, self.v)
        )
        attended = attention(q, rows.all_cells(k), rows.all_cells(v))
        mixed = self.out(rearrange(attended, "cells 1 c -> cells c"))
        return x + rearrange(mixed, "(y x) c -> y x c", y=x.shape[0])


class Middle(eqx.Module):
    """The layers of the coarsest level: residual block, attention, residual block."""

    resnet1: Resnet
    attention: CellAttention
    resnet2: Resnet

    def __init__(self, channels: int, groups: int, *, key: PRNGKeyArray):
        first, attention, second = jax.random.split(key, 3)
        self.resnet1 = Resnet(channels, channels, groups, key=first)
        self.attention = CellAttention(channels, groups, key=attention)
        self.resnet2 = Resnet(channels, channels, groups, key=second)

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> Cells:
        return self.resnet2(self.attention(self.resnet1(x, rows), rows), rows)


class Level(eqx.Module):
    """The residual blocks of one resolution, and the convolution that changes it, if any.

    The call runs the residual blocks only: the encoder and the decoder use `resample` differently.
    """

    resnets: tuple[Resnet, ...]
    resample: Conv | None

    def __init__(
        self, channels: int, out: int, depth: int, groups: int, *, resample: bool, key: PRNGKeyArray
    ):
        *keys, last = jax.random.split(key, depth + 1)
        widths = (channels,) + (out,) * (depth - 1)
        resnets = []
        for width, resnet_key in zip(widths, keys, strict=True):
            resnets.append(Resnet(width, out, groups, key=resnet_key))
        self.resnets = tuple(resnets)
        self.resample = Conv(out, out, key=last) if resample else None

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> Float[Array, "rows columns out"]:
        for resnet in self.resnets:
            x = resnet(x, rows)
        return x
