"""The layers of the VAE: group norms, residual blocks and attention over the cells of an image.

All take `rows`, which tells where the rows of the image are: `WHOLE`, by default, is an image that
is on this device, and `fluxjax.devices` has the rows of one that is split among devices, or run
part by part.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.nets.activations import silu
from fluxjax.nets.conv import Conv, OutCells
from fluxjax.nets.layers import Linear, Vector
from fluxjax.nets.rows import WHOLE, Cells, Rows
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import PRNGKeyArray

_EPS = 1e-6
"""Added to the variance of group norms."""


class GroupNorm(eqx.Module):
    """Standardize groups of channels over all cells of the image, then scale and shift.

    `scale`, `bias`: for each channel. `groups`: their number; channels of one are adjacent.
    **Source:** Wu & He 2018, eq. 7.
    """

    scale: Vector
    bias: Vector
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, groups: int):
        """Start with a scale of ones and a bias of zeros."""
        self.scale = jnp.ones(channels)
        self.bias = jnp.zeros(channels)
        self.groups = groups

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> Cells:
        """Normalize, in float32 at least. The result has the dtype of `x`."""
        wide = x.astype(wide_dtype(x.dtype))
        # Means of channels, then of groups: the channels stay the last axis, the fastest layout.
        mean, variance = rows.moments(wide, self.groups)
        y = (wide - mean) * jax.lax.rsqrt(variance + _EPS)
        y = y * self.scale.astype(y.dtype) + self.bias.astype(y.dtype)
        return y.astype(x.dtype)


class Resnet(eqx.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    `shortcut`: a 1x1 convolution of x, if the number of channels changes; otherwise None.
    """

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Conv | None

    def __init__(
        self,
        channels: int,
        out: int,
        groups: int,
        *,
        key: PRNGKeyArray,
    ):
        """Make a block from `channels` to `out` channels."""
        first, second, skip = jax.random.split(key, 3)
        self.norm1 = GroupNorm(channels, groups)
        self.conv1 = Conv(channels, out, key=first)
        self.norm2 = GroupNorm(out, groups)
        self.conv2 = Conv(out, out, key=second)
        self.shortcut = None
        if channels != out:
            self.shortcut = Conv(channels, out, side=1, key=skip)

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> OutCells:
        """Return the cells after this block, in the same resolution."""
        y = self.norm1(x, rows)
        y = self.conv1(silu(y), rows)
        y = self.norm2(y, rows)
        y = self.conv2(silu(y), rows)
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

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        key: PRNGKeyArray,
    ):
        """Make an attention of `channels` features. `groups`: of its norm."""
        q, k, v, out = jax.random.split(key, 4)
        self.norm = GroupNorm(channels, groups)
        self.q = Linear(channels, channels, key=q)
        self.k = Linear(channels, channels, key=k)
        self.v = Linear(channels, channels, key=v)
        self.out = Linear(channels, channels, key=out)

    def __call__(self, x: Cells, rows: Rows = WHOLE) -> Cells:
        """Return the cells after the attention. Queries are those of the cells of `x` only."""
        cells = rearrange(self.norm(x, rows), "y x c -> (y x) c")
        q, k, v = (
            rearrange(layer(cells), "cells c -> cells 1 c") for layer in (self.q, self.k, self.v)
        )
        # Queries stay on their device; all of them need all keys and values.
        k, v = rows.all_cells(k), rows.all_cells(v)
        attended = rows.attend(q, k, v)
        mixed = self.out(rearrange(attended, "cells 1 c -> cells c"))
        return x + rearrange(mixed, "(y x) c -> y x c", y=x.shape[0])


class Stage(NamedTuple):
    """A step of an encoder or a decoder, each of which is a chain of them.

    `run`: (cells, rows) -> cells. `reach`: how many cells away, of its input, it reads. `scale`:
    the rows of its output for each row of its input: 1, 2 or 1/2.
    """

    run: Callable[[Cells, Rows], OutCells]
    reach: int
    scale: float = 1


class Middle(eqx.Module):
    """The layers of the coarsest level: residual block, attention, residual block."""

    resnet1: Resnet
    attention: CellAttention
    resnet2: Resnet

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        key: PRNGKeyArray,
    ):
        """Make layers of `channels` channels. `groups`: of their norms."""
        first, middle, second = jax.random.split(key, 3)
        self.resnet1 = Resnet(channels, channels, groups, key=first)
        self.attention = CellAttention(channels, groups, key=middle)
        self.resnet2 = Resnet(channels, channels, groups, key=second)

    def stages(self) -> list[Stage]:
        """Return the layers in their order."""
        return [Stage(self.resnet1, 2), Stage(self.attention, 0), Stage(self.resnet2, 2)]


class Level(eqx.Module):
    """The residual blocks of one resolution, and the convolution that changes it, if any."""

    resnets: tuple[Resnet, ...]
    resample: Conv | None

    def __init__(
        self,
        channels: int,
        out: int,
        depth: int,
        groups: int,
        *,
        resample: bool,
        key: PRNGKeyArray,
    ):
        """Make `depth` residual blocks, of which the first goes from `channels` to `out`."""
        *keys, last = jax.random.split(key, depth + 1)
        resnets = []
        for resnet_key in keys:
            resnets.append(Resnet(channels, out, groups, key=resnet_key))
            channels = out
        self.resnets = tuple(resnets)
        self.resample = Conv(out, out, key=last) if resample else None

    def enlarging(self) -> list[Stage]:
        """Return the layers in their order, the last of which doubles rows and columns."""
        stages = self._resnets()
        if self.resample is not None:
            stages.append(Stage(self.resample.upsample, 1, 2))
        return stages

    def reducing(self) -> list[Stage]:
        """Return the layers in their order, the last of which halves rows and columns."""
        stages = self._resnets()
        if self.resample is not None:
            stages.append(Stage(self._downsample, 1, 0.5))
        return stages

    def _resnets(self) -> list[Stage]:
        return [Stage(resnet, 2) for resnet in self.resnets]

    def _downsample(self, x: Cells, rows: Rows) -> OutCells:
        assert self.resample is not None
        # Padded at the end only, as the original in PyTorch.
        return self.resample(x, rows, stride=2, padding=((0, 1), (0, 1)))
