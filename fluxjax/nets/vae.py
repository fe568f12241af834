"""The 8x VAE: an image of [-1, 1] to a 16-channel latent and back. Channels last inside."""

from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import attention
from fluxjax.nets.layers import Linear
from fluxjax.nets.weight import product_dtype
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Image, Latent, PRNGKeyArray

Cells = Float[Array, "rows columns channels"]
Padding = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The numbers of a VAE; the defaults are FLUX.1's.

    `channels`: features of each level, finest first; each level but the last halves the size. `resnets`: residual
    blocks a level of the encoder, the decoder has one more. `latent = (z - shift) * scale`.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2
    groups: int = 32
    latent_channels: int = 16
    scale: float = 0.3611
    shift: float = 0.1159

    def __post_init__(self):
        uneven = [c for c in self.channels if c % self.groups]
        if uneven:
            raise ValueError(
                f"`VaeConfig(channels={self.channels}, groups={self.groups})` needs channels that are multiples of groups."
            )

    @property
    def factor(self) -> int:
        """Pixels along a side of a latent cell."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def flux(cls) -> "VaeConfig":
        """The VAE that all of FLUX.1 shares."""
        return cls()


class Conv(eqx.Module):
    """A square convolution over [rows, columns, channels], weight [side, side, in, out]."""

    weight: Float[Array, "side side channels out"]
    bias: Float[Array, " out"]

    def __init__(self, channels: int, out: int, *, side: int = 3, key: PRNGKeyArray):
        fan_in = side * side * channels
        self.weight = jax.random.normal(key, (side, side, channels, out)) / jnp.sqrt(fan_in)
        self.bias = jnp.zeros(out)

    def __call__(
        self, x: Cells, *, stride: int = 1, padding: Padding | None = None
    ) -> Float[Array, "new_rows new_columns out"]:
        """Convolve. `padding`: zeros above and below, left and right; None keeps the size."""
        around = self.weight.shape[0] // 2
        return self.apply(
            x,
            self.kernel(),
            stride,
            ((around, around), (around, around)) if padding is None else padding,
        )

    def enlarged(self, x: Cells) -> Float[Array, "twice_rows twice_columns out"]:
        """Convolve cells that are first repeated twice along each side: a 3x3 kernel meets 2x2 cells then, and others for even
        and odd rows and columns, so that 16 products are taken for 36."""
        kernel = self.kernel()
        kernel = kernel.astype(wide_dtype(kernel.dtype))
        parts = [
            self.apply(
                x,
                _folded(_folded(kernel, 0, odd), 1, right),
                1,
                ((1 - odd, odd), (1 - right, right)),
            )
            for odd in (0, 1)
            for right in (0, 1)
        ]
        return rearrange(jnp.stack(parts), "(odd right) y x c -> (y odd) (x right) c", odd=2)

    def kernel(self) -> Float[Array, "side side channels out"]:
        """Return the whole weight."""
        return self.weight

    def apply(
        self, x: Cells, kernel: Array, stride: int, padding: Padding
    ) -> Float[Array, "new_rows new_columns out"]:
        """Convolve with a kernel and add the bias."""
        y = _convolve(x[None], kernel.astype(x.dtype), stride, padding)[0]
        return (y + self.bias.astype(y.dtype)).astype(x.dtype)


def _folded(kernel: Array, axis: int, odd: int) -> Array:
    """Return the two weights along an axis that the cells of an even or odd place meet: two of the three meet the same cell."""
    first, middle, last = (jax.lax.index_in_dim(kernel, i, axis) for i in range(3))
    return jnp.concatenate([first + middle, last] if odd else [first, middle + last], axis)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve(x: Array, weight: Array, stride: int, padding: Padding) -> Array:
    """Convolve [1, rows, columns, channels], accumulated in float32, in the dtype of `written`."""
    return _convolve_to(product_dtype(x), x, weight, stride, padding)


@_convolve.defjvp
def _convolve_jvp(
    stride: int, padding: Padding, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    """JAX transposes no convolution whose result has another dtype than its operands, so the tangent keeps theirs."""
    (x, weight), (dx, dweight) = primals, tangents
    by_x = _convolve_to(x.dtype, dx, weight, stride, padding)
    by_weight = _convolve_to(x.dtype, x, dweight, stride, padding)
    return _convolve(x, weight, stride, padding), (by_x + by_weight).astype(product_dtype(x))


def _convolve_to(dtype: DTypeLike, x: Array, weight: Array, stride: int, padding: Padding) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), padding, dimension_numbers=layout, preferred_element_type=dtype
    )


class GroupNorm(eqx.Module):
    """Standardize groups of channels over all cells, then scale and shift. Source: Wu & He 2018, eq. 7."""

    scale: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    groups: int = eqx.field(static=True)

    def __init__(self, channels: int, groups: int):
        self.scale, self.bias, self.groups = jnp.ones(channels), jnp.zeros(channels), groups

    def __call__(self, x: Cells) -> Cells:
        centered = x.astype(wide_dtype(x.dtype))
        centered = centered - self._group_means(centered)
        y = centered * jax.lax.rsqrt(self._group_means(jnp.square(centered)) + 1e-6)
        return (y * self.scale.astype(y.dtype) + self.bias.astype(y.dtype)).astype(x.dtype)

    def _group_means(self, x: Cells) -> Float[Array, " channels"]:
        """Return, for each channel, the mean over all cells of its group; channels stay the fastest axis throughout."""
        means = reduce(self.means(x), "(groups each) -> groups", "mean", groups=self.groups)
        return jnp.repeat(means, x.shape[-1] // self.groups)

    def means(self, x: Cells) -> Float[Array, " channels"]:
        """Return each channel's mean over all cells."""
        return jnp.mean(x, axis=(0, 1))


class Resnet(eqx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the skip through a 1x1 convolution if the channels change."""

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Conv | None

    def __init__(self, channels: int, out: int, groups: int, *, key: PRNGKeyArray):
        first, second, skip = jax.random.split(key, 3)
        self.norm1, self.conv1 = GroupNorm(channels, groups), Conv(channels, out, key=first)
        self.norm2, self.conv2 = GroupNorm(out, groups), Conv(out, out, key=second)
        self.shortcut = None if channels == out else Conv(channels, out, side=1, key=skip)

    def __call__(self, x: Cells) -> Float[Array, "rows columns out"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class CellAttention(eqx.Module):
    """x + single-head self-attention over all cells."""

    norm: GroupNorm
    q: Linear
    k: Linear
    v: Linear
    out: Linear

    def __init__(self, channels: int, groups: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.norm = GroupNorm(channels, groups)
        self.q, self.k, self.v, self.out = (Linear(channels, channels, key=k) for k in keys)

    def __call__(self, x: Cells) -> Cells:
        y = rearrange(self.norm(x), "y x c -> (y x) c")
        q, k, v = (
            rearrange(layer(y), "cells c -> cells 1 c") for layer in (self.q, self.k, self.v)
        )
        mixed = rearrange(self.mix(q, k, v), "cells 1 c -> cells c")
        return x + rearrange(self.out(mixed), "(y x) c -> y x c", y=x.shape[0])

    def mix(self, q: Array, k: Array, v: Array) -> Float[Array, "cells 1 channels"]:
        """Return the values of all cells, mixed for these queries."""
        return attention(q, k, v)


class Middle(eqx.Module):
    """Residual block, attention, residual block, at the coarsest level."""

    resnet1: Resnet
    attention: CellAttention
    resnet2: Resnet

    def __init__(self, channels: int, groups: int, *, key: PRNGKeyArray):
        first, mix, second = jax.random.split(key, 3)
        self.resnet1 = Resnet(channels, channels, groups, key=first)
        self.attention = CellAttention(channels, groups, key=mix)
        self.resnet2 = Resnet(channels, channels, groups, key=second)

    def __call__(self, x: Cells) -> Cells:
        return self.resnet2(self.attention(self.resnet1(x)))


class Level(eqx.Module):
    """The residual blocks of one size, then the convolution that goes with a change of size, if any."""

    resnets: tuple[Resnet, ...]
    resample: Conv | None

    def __init__(
        self, channels: int, out: int, depth: int, groups: int, *, resample: bool, key: PRNGKeyArray
    ):
        *keys, last = jax.random.split(key, depth + 1)
        widths = (channels,) + (out,) * (depth - 1)
        self.resnets = tuple(
            Resnet(width, out, groups, key=k) for width, k in zip(widths, keys, strict=True)
        )
        self.resample = Conv(out, out, key=last) if resample else None

    def __call__(self, x: Cells) -> Float[Array, "rows columns out"]:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Encoder(eqx.Module):
    """An image to the mean and log-variance of z, coarsest level last."""

    conv_in: Conv
    down: tuple[Level, ...]
    middle: Middle
    norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, config: VaeConfig, *, key: PRNGKeyArray):
        first, middle, last, *keys = jax.random.split(key, 3 + len(config.channels))
        outs, groups = config.channels, config.groups
        ins = (outs[0], *outs[:-1])
        self.conv_in = Conv(3, outs[0], key=first)
        self.down = tuple(
            Level(ins[i], outs[i], config.resnets, groups, resample=i < len(outs) - 1, key=k)
            for i, k in enumerate(keys)
        )
        self.middle = Middle(outs[-1], groups, key=middle)
        self.norm_out = GroupNorm(outs[-1], groups)
        self.conv_out = Conv(outs[-1], 2 * config.latent_channels, key=last)

    def __call__(self, image: Image) -> Float[Array, "rows columns moments"]:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
            if level.resample is not None:
                x = level.resample(x, stride=2, padding=((0, 1), (0, 1)))
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(eqx.Module):
    """A z to an image, coarsest level first."""

    conv_in: Conv
    middle: Middle
    up: tuple[Level, ...]
    norm_out: GroupNorm
    conv_out: Conv

    def __init__(self, config: VaeConfig, *, key: PRNGKeyArray):
        first, middle, last, *keys = jax.random.split(key, 3 + len(config.channels))
        outs, groups = config.channels[::-1], config.groups
        ins = (outs[0], *outs[:-1])
        self.conv_in = Conv(config.latent_channels, outs[0], key=first)
        self.middle = Middle(outs[0], groups, key=middle)
        self.up = tuple(
            Level(ins[i], outs[i], config.resnets + 1, groups, resample=i < len(outs) - 1, key=k)
            for i, k in enumerate(keys)
        )
        self.norm_out = GroupNorm(outs[-1], groups)
        self.conv_out = Conv(outs[-1], 3, key=last)

    def __call__(self, z: Cells) -> Image:
        x = self.middle(self.conv_in(z))
        for level in self.up:
            x = level(x)
            if level.resample is not None:
                x = level.resample.enlarged(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Vae(eqx.Module):
    """The autoencoder. Source: Rombach et al. 2021, with FLUX's 16 channels and without quant convolutions."""

    config: VaeConfig = eqx.field(static=True)
    encoder: Encoder
    decoder: Decoder

    def __init__(self, config: VaeConfig, *, key: PRNGKeyArray):
        encoder, decoder = jax.random.split(key)
        self.config = config
        self.encoder, self.decoder = Encoder(config, key=encoder), Decoder(config, key=decoder)

    @convert_arguments
    def moments(self, image: Image) -> tuple[Latent, Latent]:
        """Return the posterior's mean and log-variance (clamped to [-30, 20]) of z, not scaled or shifted.

        **Raises:** `ValueError` unless height and width are multiples of 8.
        """
        factor = self.config.factor
        if image.shape[0] % factor or image.shape[1] % factor:
            raise ValueError(
                f"`Vae.encode(image)` needs height and width that are multiples of {factor}, got "
                f"{image.shape[0]}x{image.shape[1]}. Crop or resize the image."
            )
        mean, log_variance = jnp.split(rearrange(self.encoder(image), "y x c -> c y x"), 2)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    @convert_arguments
    def encode(self, image: Image, *, key: PRNGKeyArray | None = None) -> Latent:
        """Encode an image.

        **Arguments:** `image`: in [-1, 1], height and width multiples of 8. `key`: sample the posterior, or None
        for its mean.
        **Returns:** [16, height / 8, width / 8], scaled and shifted, in the image's dtype.
        **Raises:** `ValueError` for other sizes.
        """
        mean, log_variance = self.moments(image)
        z = mean.astype(wide_dtype(mean.dtype))
        if key is not None:
            z = z + jnp.exp(0.5 * log_variance.astype(z.dtype)) * jax.random.normal(
                key, z.shape, z.dtype
            )
        return ((z - self.config.shift) * self.config.scale).astype(image.dtype)

    @convert_arguments
    def decode(self, latent: Latent) -> Image:
        """Decode a latent, [16, rows, columns], to an image, [8 rows, 8 columns, 3], in [-1, 1] but not clipped."""
        z = latent.astype(wide_dtype(latent.dtype)) / self.config.scale + self.config.shift
        return self.decoder(rearrange(z.astype(latent.dtype), "c y x -> y x c"))
