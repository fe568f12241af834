"""What has happened to a picture that is to be restored: blur, shrinking, hidden parts."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.flow.operators import Blur, Composition, Decoded, Downsample, Mask, Operator
from fluxjax.generate.latents import pack_latents, unpack_latents
from fluxjax.generate.masks import (
    MARGIN,
    PixelMask,
    cell_mask,
    check_mask,
    mask_tokens,
    pad_image,
)
from fluxjax.nets.vae import Vae
from fluxjax.shapes import Array, Float, Image, Latent, Packed


class DecodePixels(eqx.Module):
    """The decoder of one image, from its packed latent: [img_tokens, channels] to pixels.

    It returns float32, [3, height, width], not clipped, which is differentiable everywhere.
    `height`, `width`: multiples of 16. `dtype`: of the activations. `remat`: as for `Vae.decode`.
    """

    vae: Vae
    height: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    dtype: DTypeLike = eqx.field(static=True)
    remat: bool = eqx.field(static=True, default=False)

    def __call__(self, packed: Packed) -> Float[Array, "3 height width"]:
        latent = unpack_latents(packed, self.height, self.width)
        image = self.vae.decode(latent.astype(self.dtype), remat=self.remat)
        return jnp.moveaxis(image.astype(jnp.float32), -1, 0)


class Corner(Operator):
    """The first rows and columns of an image: [channels, height, width] of a padded one."""

    height: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "channels rows columns"]) -> Array:
        return x[:, : self.height, : self.width]


class Mirrored(Operator):
    """An image that is mirrored at all its edges, by some pixels: [channels, height, width]."""

    margin: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "channels rows columns"]) -> Array:
        return jnp.pad(x, ((0, 0), *[(self.margin, self.margin)] * 2), mode="symmetric")


class Inner(Operator):
    """An image without a margin at all its edges: [channels, height, width]."""

    margin: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "channels rows columns"]) -> Array:
        _, rows, columns = x.shape
        return x[:, self.margin : rows - self.margin, self.margin : columns - self.margin]


@dataclass(frozen=True)
class Degradation:
    """What has happened to a picture.

    The whole picture is restored at a size of multiples of 16 pixels, and cropped.
    """

    def restored_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the picture, from those of what is left of it."""
        return height, width

    def check(self, image: Image) -> None:
        """**Raises:** `ValueError` if this can not have led to an image."""

    @abstractmethod
    def operator(self, height: int, width: int) -> Operator:
        """Return the operator of the picture's pixels, [3, rows, columns], padded or not.

        **Arguments:** `height`, `width`: of the picture, without padding.
        """

    def measured(self, image: Image, encode: Callable[[Image], Latent]) -> Array:
        """Return what was measured, as the operator gives it.

        **Arguments:** `image`: what is left of the picture. `encode`: returns the latent of an
        image, whose sides are multiples of 16 pixels.
        """
        return jnp.moveaxis(image, -1, 0)

    def of_tokens(self, decode: DecodePixels, height: int, width: int) -> Operator:
        """Return the operator of the picture's packed latent."""
        return Decoded(decode, self.operator(height, width))


@convert_arguments
@dataclass(frozen=True)
class Blurred(Degradation):
    """Blurred by a Gaussian, beyond its edges as if the picture were mirrored there.

    `deviation`: of the Gaussian, in pixels, above 0 and at most 64.
    """

    deviation: float

    def __post_init__(self):
        if not 0 < self.deviation <= 64:
            raise ValueError(
                "`Blurred(deviation)` needs a number of pixels above 0, and at most 64, got "
                f"{self.deviation:g}."
            )

    @property
    def radius(self) -> int:
        """Pixels from the middle of the kernel to its end, three deviations."""
        return math.ceil(3 * self.deviation)

    def check(self, image: Image) -> None:
        if self.radius > min(image.shape[:2]):
            raise ValueError(
                f"`Blurred({self.deviation:g})` reaches {self.radius} pixels far, and the image "
                f"has {image.shape[1]}x{image.shape[0]}. Give a smaller deviation."
            )

    def operator(self, height: int, width: int) -> Operator:
        distances = jnp.arange(-self.radius, self.radius + 1, dtype=jnp.float32)
        weights = jnp.exp(-jnp.square(distances / jnp.float32(self.deviation)) / 2)
        weights = weights / weights.sum()
        inner: Operator = Corner(height, width)
        rows = Blur(weights[:, None], circular=False)
        columns = Blur(weights[None, :], circular=False)
        # One axis after another: 2 x 13 products for a pixel instead of 169.
        for outer in (Mirrored(self.radius), rows, columns, Inner(self.radius)):
            inner = Composition(outer, inner)
        return inner


@convert_arguments
@dataclass(frozen=True)
class Shrunk(Degradation):
    """Made smaller: each pixel is the mean of a block of `factor` x `factor` pixels."""

    factor: int

    def __post_init__(self):
        if not 1 <= self.factor <= 64:
            raise ValueError(
                f"`Shrunk(factor)` needs a whole number from 1 to 64, got {self.factor}. "
                "4 is a quarter of each side."
            )

    def restored_size(self, height: int, width: int) -> tuple[int, int]:
        return self.factor * height, self.factor * width

    def operator(self, height: int, width: int) -> Operator:
        return Composition(Downsample(self.factor), Corner(height, width))


@convert_arguments
@dataclass(frozen=True)
class Hidden(Degradation):
    """Partly hidden: only some of its pixels are known.

    What is known is measured in the latent, so that no gradient of the decoder is needed: a cell of
    8x8 pixels is known if all of them are, and all in a margin around it.

    `mask`: [height, width], 0 where a pixel is known, anything else where it is not. `margin`: in
    pixels.
    """

    mask: PixelMask
    margin: int = MARGIN

    def check(self, image: Image) -> None:
        check_mask("Hidden", self.mask, image)

    def operator(self, height: int, width: int) -> Operator:
        known = (self.mask == 0).astype(jnp.float32)
        return Composition(Mask(known), Corner(height, width))

    def of_tokens(self, decode: DecodePixels, height: int, width: int) -> Operator:
        hidden = cell_mask(pad_image(self.mask), margin=self.margin)
        channels = decode.vae.config.latent_channels
        return Mask((mask_tokens(hidden, channels=channels) == 0).astype(jnp.float32))

    def measured(self, image: Image, encode: Callable[[Image], Latent]) -> Array:
        return pack_latents(encode(pad_image(image)))
