"""The rows of an image in a convolutional network: all on this device, or split among several."""

from abc import abstractmethod
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from einops import reduce

from fluxjax.kernels.attention import attention, plain_attention
from fluxjax.shapes import Array, Float

Cells = Float[Array, "rows columns channels"]
"""The features of an image at some resolution, channels last."""
CellHeads = Float[Array, "cells heads head_dim"]
"""Keys or values of cells, in order: one row of the image after another."""
PaddedCells = Float[Array, "padded_rows columns channels"]
ChannelMeans = Float[Array, " channels"]
AllCellHeads = Float[Array, "all_cells heads head_dim"]
Pad = tuple[int, int]
"""Rows of zeros above and below, or columns of zeros at the left and right."""


class GroupMoments(NamedTuple):
    """The mean and variance of groups of channels over all cells of an image, for each channel."""

    mean: ChannelMeans
    variance: ChannelMeans


class Rows(eqx.Module):
    """What layers that mix the rows of an image need to know about where the rows are.

    Layers take one as an argument, so that the same layers run on whole images and on parts.
    """

    @abstractmethod
    def pad(self, x: Cells, pad: Pad) -> tuple[PaddedCells, Pad]:
        """Return cells with the rows that other devices have around them.

        **Arguments:** `pad`: how many rows a convolution reads above and below those of `x`.
        **Returns:** the cells, and how many rows of zeros are still to be added.
        """

    @abstractmethod
    def channel_means(self, x: Cells) -> ChannelMeans:
        """Return the mean of each channel over all cells of the image."""

    @abstractmethod
    def all_cells(self, x: CellHeads) -> AllCellHeads:
        """Return the keys or values of all cells of the image, of those that are on this device."""

    def attend(self, q: CellHeads, k: AllCellHeads, v: AllCellHeads) -> CellHeads:
        """Return the attention of queries of this part to the keys and values of all cells."""
        # Restoration takes forward-mode gradients of the decoder, which kernels do not have. They
        # would gain little: this is one layer, and its head of 512 features is too wide for most.
        return attention(q, k, v, implementation=plain_attention(q, k))

    def moments(self, x: Cells, groups: int) -> GroupMoments:
        """Return the moments of groups of adjacent channels over all cells of the image."""
        mean = of_groups(self.channel_means(x), groups)
        return GroupMoments(mean, of_groups(self.channel_means(jnp.square(x - mean)), groups))


class WholeImage(Rows):
    """All rows of the image are on this device."""

    def pad(self, x: Cells, pad: Pad) -> tuple[PaddedCells, Pad]:
        return x, pad

    def channel_means(self, x: Cells) -> ChannelMeans:
        return jnp.mean(x, axis=(0, 1))

    def all_cells(self, x: CellHeads) -> AllCellHeads:
        return x


def of_groups(channel_means: ChannelMeans, groups: int) -> ChannelMeans:
    """Return, for each channel, the mean over its group of adjacent channels."""
    # Groups have as many channels each, so the mean of their means is theirs.
    group_means = reduce(channel_means, "(groups each) -> groups", "mean", groups=groups)
    return jnp.repeat(group_means, channel_means.size // groups)


WHOLE = WholeImage()
"""The default of all layers."""
