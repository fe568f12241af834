"""Whether a VAE is run whole or in strips: the memory that both need, and the choice."""

from math import ceil

import equinox as eqx
import numpy as np
from jax.typing import DTypeLike

from fluxjax.devices.strip_grid import VaeStrips
from fluxjax.devices.vae_strips import StripNetwork
from fluxjax.nets.vae import Decoder, Encoder, Vae, VaeConfig
from fluxjax.numeric import check_positive
from fluxjax.shapes import Array, Float

VAE_MEMORY = 1.5 * 2**30
"""Bytes that the whole VAE of FLUX.1 needs for 1024x1024 in bfloat16, beside its weights."""
_COPIES = 3
"""Copies of its features that a program holds, of a tile and of a whole image."""
_ATTENTION_COPIES = 4
"""Copies of the features of the attention: what enters it, keys, values, and one for their loop."""
_LOGITS = 0.2 * 2**30
"""Bytes of the attention's logits: a chunk of them in float32, and its exponentials."""


def limit_vae_memory(vae: Vae, memory: float = VAE_MEMORY) -> Vae:
    """Return a VAE that runs an image in strips if it needs more memory than this otherwise.

    The result is that of the whole VAE, except for the order of sums. Images that are run in strips
    have no gradient.

    **Arguments:** `memory`: bytes beside weights, input and output. `choose_strips` chooses by the
    size and dtype of an image, and says what it does if even strips need more.
    **Raises:** `ValueError` for memory that is not positive; when an image in strips is
    differentiated.
    """
    check_positive("limit_vae_memory", memory=memory)
    config = vae.config
    encoder = _Limited(vae.encoder, config, memory, config.factor)
    decoder = _Limited(vae.decoder, config, memory, 1)
    return eqx.tree_at(lambda vae: (vae.encoder, vae.decoder), vae, (encoder, decoder))


def without_vae_limit(vae: Vae) -> Vae:
    """Return the VAE that was given to `limit_vae_memory`, which has gradients for every image."""
    whole = []
    for part in (vae.encoder, vae.decoder):
        whole.append(part.network if isinstance(part, _Limited) else part)
    return eqx.tree_at(lambda vae: (vae.encoder, vae.decoder), vae, whole)


class _Limited(eqx.Module):
    """An encoder or a decoder that is run whole or in strips; called as the network.

    `unit`: rows of the input for each row of the latent.
    """

    network: Encoder | Decoder
    config: VaeConfig = eqx.field(static=True)
    memory: float = eqx.field(static=True)
    unit: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "rows columns channels"]) -> Float[Array, "y x out"]:
        pixels = self.config.factor // self.unit
        height, width = pixels * x.shape[0], pixels * x.shape[1]
        strips = choose_strips(self.config, height, width, dtype=x.dtype, memory=self.memory)
        if strips is None:
            return self.network(x)
        return StripNetwork(self.network, strips, self.unit)(x)


def choose_strips(
    config: VaeConfig,
    height: int,
    width: int,
    *,
    dtype: DTypeLike,
    memory: float = VAE_MEMORY,
) -> VaeStrips | None:
    """Return how a VAE runs an image in some memory: None, for whole, if that fits.

    Of the strips that fit, those that compute the least are returned; if none fits, those that need
    the least memory.

    **Arguments:** `height`, `width`: of the image, in pixels. `dtype`: of the activations.
    `memory`: bytes beside weights, input and output. What a program needs is estimated.
    **Raises:** `ValueError` for memory that is not positive.
    """
    check_positive("choose_strips", memory=memory)
    size = np.dtype(dtype).itemsize
    rows, columns = height // config.factor, width // config.factor
    if whole_bytes(config, rows, columns, size) <= memory:
        return None
    candidates = _candidates(config, rows, columns)
    needs = [strips_bytes(config, rows, columns, size, strips) for strips in candidates]
    for strips, need in zip(candidates, needs, strict=True):
        if need <= memory:
            return strips
    return candidates[needs.index(min(needs))]


def whole_bytes(config: VaeConfig, rows: int, columns: int, size: int) -> float:
    """Return the bytes that a VAE needs beside its weights to run a whole image.

    **Arguments:** `rows`, `columns`: of the latent. `size`: bytes of a number.
    """
    return _COPIES * rows * columns * _widest_features(config) * size


def strips_bytes(config: VaeConfig, rows: int, columns: int, size: int, strips: VaeStrips) -> float:
    """Return the bytes that a VAE needs to run an image in strips.

    It is what the attention takes, or what the finest layers take, whichever is more: the stored
    features, copies of a strip and of a tile, and the image twice.

    **Arguments:** as for `whole_bytes`.
    """
    cells = rows * columns
    channels = config.channels[::-1]
    attention = _ATTENTION_COPIES * cells * channels[0] * size + _LOGITS
    # Numbers for each cell of the latent, by resolution, the coarsest first.
    features = [4**level * channels[level] for level in range(strips.stored)]
    strip = strips.rows * columns * features[-1]
    halo = 2 * decoder_reach(config, strips.stored)
    tile_rows = strips.rows + halo
    tile_columns = min(strips.columns, columns) + halo
    tile = tile_rows * tile_columns * _widest_features(config)
    image = 2 * 3 * cells * config.factor**2
    layers = max(features) * cells + _COPIES * (strip + tile) + image
    return max(attention, layers * size)


def decoder_reach(config: VaeConfig, stored: int) -> float:
    """Return how many cells of the latent the layers around a strip read that are run together.

    **Arguments:** `stored`: as for `VaeStrips`.
    """
    levels = len(config.channels)
    if stored >= levels:
        return 2 / 2 ** (levels - 1)  # a residual block by itself
    reach = 1  # of the last convolution
    for _ in range(levels - stored):
        reach = ceil((reach + 2 * (config.resnets + 1)) / 2) + 1
    return reach / 2 ** (stored - 1)


def _widest_features(config: VaeConfig) -> int:
    """Return the numbers of the largest features, for each cell of the latent."""
    # The decoder enlarges before it narrows.
    return config.factor**2 * max(config.channels[:2])


def _candidates(config: VaeConfig, rows: int, columns: int) -> list[VaeStrips]:
    """Return ways to run an image, those that compute less first."""
    levels = len(config.channels)
    found = []
    for stored in range(levels, 0, -1):
        least = ceil(max(decoder_reach(config, stored), 2))
        for tile in (32, 16, 8, 4):
            # Strips whose features are all stored have narrow halos, and need not be cut.
            width = columns if stored == levels else min(2 * tile, columns)
            found.append(VaeStrips(rows=min(max(tile, least), rows), columns=width, stored=stored))
    return found
