"""The rows of an image in a convolutional network: all on this device, or split among several."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp

from fluxjax.shapes import Array, Float

Cells = Float[Array, "rows columns channels"]
"""The features of an image at some resolution, channels last."""
Pad = tuple[int, int]
"""Rows of zeros above and below, or columns of zeros at the left and right."""


class Rows(eqx.Module):
    """What layers that mix the rows of an image need to know about where the rows are.

    Layers take one as an argument, so that the same layers run on whole images and on parts.
    """

    @abstractmethod
    def pad(self, x: Cells, pad: Pad) -> tuple[Cells, Pad]:
        """Return cells with rows that other devices have around them, and the rows of zeros left.

        **Arguments:** `pad`: how many rows a convolution reads beyond the image.
        """

    @abstractmethod
    def channel_means(self, x: Cells) -> Float[Array, " channels"]:
        """Return the mean of each channel over all cells of the image."""

    @abstractmethod
    def all_cells(
        self, x: Float[Array, "cells heads head_dim"]
    ) -> Float[Array, "all_cells heads head_dim"]:
        """Return the keys or values of all cells of the image, of those that are here.

        Cells are in order, a row after another.
        """


class WholeImage(Rows):
    """All rows of the image are on this device."""

    def pad(self, x: Cells, pad: Pad) -> tuple[Cells, Pad]:
        return x, pad

    def channel_means(self, x: Cells) -> Float[Array, " channels"]:
        return jnp.mean(x, axis=(0, 1))

    def all_cells(
        self, x: Float[Array, "cells heads head_dim"]
    ) -> Float[Array, "all_cells heads head_dim"]:
        return x


WHOLE = WholeImage()
