"""The 8x VAE: an image in [-1, 1] to a latent of 16 channels, and back. Channels last inside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.arguments import convert_arguments
from fluxjax.nets.activations import silu
from fluxjax.nets.conv import Conv, OutCells
from fluxjax.nets.rows import WHOLE, Cells, Rows
from fluxjax.nets.summary import describe_network
from fluxjax.nets.vae_layers import GroupNorm, Level, Middle, Stage
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Image, Latent, PRNGKeyArray


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The sizes of a VAE; the defaults are FLUX.1's.

    `channels`: features at each resolution, the finest first; each but the last halves the size.
    `resnets`: residual blocks at each resolution of the encoder; the decoder has one more.
    `groups`: of the group norms. `latent_channels`: of the latent. `scale`, `shift`: the latent is
    (z - shift) * scale.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2
    groups: int = 32
    latent_channels: int = 16
    scale: float = 0.3611
    shift: float = 0.1159

    def __post_init__(self):
        if any(channels % self.groups for channels in self.channels):
            raise ValueError(
                f"`VaeConfig(channels={self.channels}, groups={self.groups})` needs channels that "
                "are multiples of groups."
            )

    @property
    def factor(self) -> int:
        """Pixels along a side of a latent cell."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def flux(cls) -> "VaeConfig":
        """The VAE that all of FLUX.1 shares."""
        return cls()


Moments = Float[Array, "rows columns moments"]
"""The mean of z, then its log-variance, as channels."""


class Encoder(eqx.Module):
    """An image to the mean and log-variance of z.

    `conv_in`: from colours to features. `down`: from the finest level to the coarsest. `middle`: at
    the coarsest. `conv_out`: to the moments of z.
    """

    conv_in: Conv
    down: tuple[Level, ...]
    middle: Middle
    norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, config: VaeConfig, *, key: PRNGKeyArray):
        first, middle, last, *keys = jax.random.split(key, 3 + len(config.channels))
        channels = config.channels
        self.conv_in = Conv(3, channels[0], key=first)
        self.down = _levels(channels, config.resnets, config.groups, keys)
        self.middle = Middle(channels[-1], config.groups, key=middle)
        self.norm_out = GroupNorm(channels[-1], config.groups)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, key=last)

    def __call__(self, image: Image, rows: Rows = WHOLE) -> Moments:
        """Encode an image.

        **Arguments:** `image`: [height, width, 3]. `rows`: where its rows are.
        **Returns:** [height / 8, width / 8, 2 latent_channels].
        """
        for stage in self.stages():
            image = stage.run(image, rows)
        return image

    def stages(self) -> list[Stage]:
        """Return the chain of layers that makes up the encoder."""
        levels = [level.reducing() for level in self.down]
        return [
            Stage(self.conv_in, 1),
            *chain.from_iterable(levels),
            *self.middle.stages(),
            Stage(self._head, 1),
        ]

    def _head(self, x: Cells, rows: Rows) -> Moments:
        return self.conv_out(silu(self.norm_out(x, rows)), rows)


class Decoder(eqx.Module):
    """A z to an image.

    `conv_in`: from z to features. `middle`: at the coarsest level. `up`: from the coarsest level to
    the finest. `conv_out`: to colours.
    """

    conv_in: Conv
    middle: Middle
    up: tuple[Level, ...]
    norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, config: VaeConfig, *, key: PRNGKeyArray):
        first, middle, last, *keys = jax.random.split(key, 3 + len(config.channels))
        channels = config.channels[::-1]
        self.conv_in = Conv(config.latent_channels, channels[0], key=first)
        self.middle = Middle(channels[0], config.groups, key=middle)
        self.up = _levels(channels, config.resnets + 1, config.groups, keys)
        self.norm_out = GroupNorm(channels[-1], config.groups)
        self.conv_out = Conv(channels[-1], 3, key=last)

    def __call__(self, z: Cells, rows: Rows = WHOLE, *, remat: bool = False) -> Image:
        """Decode a z.

        **Arguments:** `z`: [rows, columns, latent_channels]. `rows`: where its rows are. `remat`:
        keep only the input of each layer for a derivative, and compute the layer again.
        **Returns:** [8 rows, 8 columns, 3].
        """
        for stage in self.stages():
            run: Callable[[Cells], OutCells] = partial(_run_stage, stage, rows)
            z = jax.checkpoint(run)(z) if remat else run(z)
        return z

    def stages(self) -> list[Stage]:
        """Return the chain of layers that makes up the decoder."""
        levels = [level.enlarging() for level in self.up]
        return [
            Stage(self.conv_in, 1),
            *self.middle.stages(),
            *chain.from_iterable(levels),
            Stage(self._head, 1),
        ]

    def _head(self, x: Cells, rows: Rows) -> Image:
        return self.conv_out(silu(self.norm_out(x, rows)), rows)


def _run_stage(stage: Stage, rows: Rows, x: Cells) -> OutCells:
    return stage.run(x, rows)


def _levels(
    channels: Sequence[int],
    depth: int,
    groups: int,
    keys: Sequence[PRNGKeyArray],
) -> tuple[Level, ...]:
    """Return levels in the order of their channels, of which all but the last change the size.

    **Arguments:** `channels`: of each level. `depth`: residual blocks of each. `groups`: of the
    norms. `keys`: one for each level.
    """
    levels = []
    channels_in = channels[0]
    for number, (out, key) in enumerate(zip(channels, keys, strict=True)):
        resample = number < len(channels) - 1
        levels.append(Level(channels_in, out, depth, groups, resample=resample, key=key))
        channels_in = out
    return tuple(levels)


class Vae(eqx.Module):
    """The autoencoder.

    It takes one image or latent. `eqx.filter_jit(eqx.filter_vmap(vae.decode))` decodes a batch.

    **Source:** Rombach et al. 2021, with FLUX's 16 channels and without quant convolutions.
    """

    config: VaeConfig = eqx.field(static=True)
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: VaeConfig, *, key: PRNGKeyArray):
        encoder, decoder = jax.random.split(key)
        self.config = config
        self.encoder = Encoder(config, key=encoder)
        self.decoder = Decoder(config, key=decoder)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def moments(self, image: Image) -> tuple[Latent, Latent]:
        """Return the posterior's mean and log-variance of z, neither scaled nor shifted.

        **Arguments:** `image`: in [-1, 1].
        **Returns:** both as [16, height / 8, width / 8]; the log-variance is clipped to [-30, 20].
        **Raises:** `ValueError` unless height and width are multiples of 8.
        """
        height, width, _ = image.shape
        factor = self.config.factor
        if height % factor or width % factor:
            raise ValueError(
                f"`Vae.encode(image)` needs height and width that are multiples of {factor}, got "
                f"{height}x{width}. Crop or resize the image."
            )
        moments = rearrange(self.encoder(image), "y x c -> c y x")
        mean, log_variance = jnp.split(moments, 2)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    @convert_arguments
    def encode(
        self,
        image: Image,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Latent:
        """Encode an image.

        **Arguments:** `image`: in [-1, 1], height and width multiples of 8. `key`: to sample the
        posterior; None for its mean.
        **Returns:** [16, height / 8, width / 8], scaled and shifted, in the image's dtype.
        **Raises:** `ValueError` for other sizes.
        """
        mean, log_variance = self.moments(image)
        # Scaled and sampled in float32 at least, and rounded once.
        z = mean.astype(wide_dtype(mean.dtype))
        if key is not None:
            deviation = jnp.exp(0.5 * log_variance.astype(z.dtype))
            z = z + deviation * jax.random.normal(key, z.shape, z.dtype)
        return ((z - self.config.shift) * self.config.scale).astype(image.dtype)

    @convert_arguments
    def decode(self, latent: Latent, *, remat: bool = False) -> Image:
        """Decode a latent.

        **Arguments:** `latent`: [16, rows, columns], scaled and shifted. `remat`: for a derivative,
        keep only the input of each layer and compute the layer again, which needs a fraction of the
        memory.
        **Returns:** an image, [8 rows, 8 columns, 3], in [-1, 1] but not clipped, in the latent's
        dtype.
        **Raises:** `ValueError` for `remat` with a decoder that is run in strips.
        """
        wide = latent.astype(wide_dtype(latent.dtype))
        z = wide / self.config.scale + self.config.shift
        cells = rearrange(z.astype(latent.dtype), "c y x -> y x c")
        if not remat:
            return self.decoder(cells)
        if not isinstance(self.decoder, Decoder):
            raise ValueError(
                "`Vae.decode(remat=True)` needs the decoder as it was loaded, and this one is run "
                "in strips. Differentiate the VAE that `strip_vae`, `limit_vae_memory` or "
                "`split_vae_rows` got."
            )
        return self.decoder(cells, remat=True)
