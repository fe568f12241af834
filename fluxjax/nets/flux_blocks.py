"""The blocks of the FLUX transformer, and the modulation that they take."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.heads import Projection
from fluxjax.nets.layers import Linear, RmsNorm, gelu, modulate
from fluxjax.nets.weight import materialize
from fluxjax.shapes import Array, Float, PRNGKeyArray

BlockAttention = Callable[..., Float[Array, "tokens width"]]
"""(width, *projections) -> the attention's output for all of their tokens, heads concatenated.

q, k and v have `width` columns each.
"""
Activation = Callable[[Array], Array]
ImageAndText = tuple[Float[Array, "img_tokens width"], Float[Array, "txt_tokens width"]]


class StreamModulation(NamedTuple):
    """The modulation of one modality in a double block: of its attention, then of its MLP."""

    shift1: Float[Array, " width"]
    scale1: Float[Array, " width"]
    gate1: Float[Array, " width"]
    shift2: Float[Array, " width"]
    scale2: Float[Array, " width"]
    gate2: Float[Array, " width"]


class DoubleModulation(NamedTuple):
    """The modulation of a double block, or of several: shifts, scales and gates concatenated."""

    img: Float[Array, "*rows six_width"]
    txt: Float[Array, "*rows six_width"]


class Mlp(eqx.Module):
    """down(activation(up(x)))."""

    up: Linear
    down: Linear

    def __init__(self, features: int, hidden: int, out: int, *, key: PRNGKeyArray):
        up, down = jax.random.split(key)
        self.up = Linear(features, hidden, key=up)
        self.down = Linear(hidden, out, key=down)

    def __call__(
        self, x: Float[Array, "*batch features"], activation: Activation
    ) -> Float[Array, "*batch out"]:
        return self.down(materialize(activation(self.up(x))))


class Stream(eqx.Module):
    """The layers of a double block that belong to one modality: the image or the text."""

    modulation: Linear
    qkv: Linear
    query_norm: RmsNorm
    key_norm: RmsNorm
    out: Linear
    mlp: Mlp

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        modulation, qkv, out, mlp = jax.random.split(key, 4)
        width = config.width
        # adaLN-zero: the gates of a new block are zeros, so that it is the identity.
        self.modulation = Linear(width, 6 * width, scale=0, key=modulation)
        self.qkv = Linear(width, 3 * width, key=qkv)
        self.query_norm = RmsNorm(config.head_dim)
        self.key_norm = RmsNorm(config.head_dim)
        self.out = Linear(width, width, key=out)
        self.mlp = Mlp(width, config.mlp_width, width, key=mlp)

    def project(self, x: Float[Array, "tokens width"], modulation: StreamModulation) -> Projection:
        """Return the projection of these tokens for the joint attention."""
        modulated = modulate(x, modulation.shift1, modulation.scale1)
        return Projection(self.qkv(modulated), self.query_norm, self.key_norm)

    def finish(
        self,
        x: Float[Array, "tokens width"],
        attended: Float[Array, "tokens attended_width"],
        modulation: StreamModulation,
    ) -> Float[Array, "tokens width"]:
        """Add the attention's output, then the MLP's, each times its gate."""
        x = x + modulation.gate1 * self.out(attended)
        hidden = self.mlp(modulate(x, modulation.shift2, modulation.scale2), gelu)
        return x + modulation.gate2 * hidden


class DoubleBlock(eqx.Module):
    """Image and text tokens with separate weights, and one joint attention over both.

    **Source:** Esser et al. 2024, fig. 2b.
    """

    img: Stream
    txt: Stream

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        img, txt = jax.random.split(key)
        self.img = Stream(config, key=img)
        self.txt = Stream(config, key=txt)

    def __call__(
        self, tokens: ImageAndText, modulation: DoubleModulation, attention: BlockAttention
    ) -> ImageAndText:
        """Return the image's and the text's tokens after this block."""
        img, txt = tokens
        img_modulation = StreamModulation(*jnp.split(modulation.img, 6))
        txt_modulation = StreamModulation(*jnp.split(modulation.txt, 6))
        # The joint attention's sequence is the text's tokens, then the image's.
        txt_projection = self.txt.project(txt, txt_modulation)
        img_projection = self.img.project(img, img_modulation)
        # By shape, not by config, so that a block may hold a device's part of the heads.
        width = txt_projection.projected.shape[-1] // 3
        attended = attention(width, txt_projection, img_projection)
        txt_attended, img_attended = attended[: len(txt)], attended[len(txt) :]
        img = self.img.finish(img, img_attended, img_modulation)
        return img, self.txt.finish(txt, txt_attended, txt_modulation)


class SingleBlock(eqx.Module):
    """Text and image tokens as one sequence, with attention and MLP in parallel.

    `linear1` holds the projections to q, k, v and the MLP's hidden features; `linear2` those back.

    **Source:** Dehghani et al. 2023, section 2.
    """

    modulation: Linear
    linear1: Linear
    query_norm: RmsNorm
    key_norm: RmsNorm
    linear2: Linear

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        modulation, first, second = jax.random.split(key, 3)
        width, hidden = config.width, config.mlp_width
        self.modulation = Linear(width, 3 * width, scale=0, key=modulation)
        self.linear1 = Linear(width, 3 * width + hidden, key=first)
        self.query_norm = RmsNorm(config.head_dim)
        self.key_norm = RmsNorm(config.head_dim)
        self.linear2 = Linear(width + hidden, width, key=second)

    def __call__(
        self,
        x: Float[Array, "tokens width"],
        modulation: Float[Array, " three_width"],
        attention: BlockAttention,
    ) -> Float[Array, "tokens width"]:
        """Return the tokens after this block."""
        shift, scale, gate = jnp.split(modulation, 3)
        # linear1 has 3 width + hidden outputs, linear2 has width + hidden inputs. By shape, so that
        # a block may hold a device's part of the heads.
        width = (self.linear1.weight.shape[-2] - self.linear2.weight.shape[-1]) // 2
        projected = materialize(self.linear1(modulate(x, shift, scale)))
        attended = attention(width, Projection(projected, self.query_norm, self.key_norm))
        hidden = materialize(gelu(projected[:, 3 * width :]))
        return x + gate * self.linear2(jnp.concatenate([attended, hidden], axis=-1))


class FinalLayer(eqx.Module):
    """Modulate the tokens, then project them to the output channels."""

    modulation: Linear
    linear: Linear

    def __init__(self, config: FluxConfig, *, key: PRNGKeyArray):
        modulation, linear = jax.random.split(key)
        self.modulation = Linear(config.width, 2 * config.width, scale=0, key=modulation)
        self.linear = Linear(config.width, config.out_channels, scale=0, key=linear)

    def __call__(
        self, x: Float[Array, "tokens width"], modulation: Float[Array, " two_width"]
    ) -> Float[Array, "tokens out_channels"]:
        shift, scale = jnp.split(modulation, 2)
        return self.linear(modulate(x, shift, scale))
