"""The blocks of the FLUX transformer, and the modulation that they take.

The blocks read their widths from the shapes of their weights and not from the config, so that they
also run on one device's part of the heads and hidden features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.nets.activations import Activation, gelu, gelu_maxima
from fluxjax.nets.flux_config import BlockConfig
from fluxjax.nets.heads import Projection
from fluxjax.nets.image_prompt import BlockPrompt, add_after_block, add_to_attention
from fluxjax.nets.layers import Features, Linear, Outputs, RmsNorm, modulate
from fluxjax.nets.weight import RowMaxima, materialize
from fluxjax.shapes import Array, Float, PRNGKeyArray

TokenStates = Float[Array, "tokens width"]
"""The hidden states of one example's tokens, in the residual stream."""
Attended = Float[Array, "tokens attended_width"]
"""The attention's output, heads concatenated; narrower where a device has a part of the heads."""
Width = Float[Array, " width"]
ImageAndText = tuple[Float[Array, "img_tokens width"], Float[Array, "txt_tokens width"]]
BlockAttention = Callable[..., Attended]
"""(width, *projections) -> the attention's output for all of their tokens.

`width`: the columns of each of q, k and v. The projections' tokens are one sequence, in order.
"""


class StreamModulation(NamedTuple):
    """The modulation of one modality in a double block: of its attention, then of its MLP."""

    shift1: Width
    scale1: Width
    gate1: Width
    shift2: Width
    scale2: Width
    gate2: Width


class DoubleModulation(NamedTuple):
    """The modulation of a double block: for each modality, six vectors as one.

    Their order is that of `StreamModulation`. Leading axes, if any, are blocks and times.
    """

    img: Float[Array, "*rows six_width"]
    txt: Float[Array, "*rows six_width"]


class Mlp(eqx.Module):
    """down(activation(up(x)))."""

    up: Linear
    down: Linear

    def __init__(
        self,
        features: int,
        hidden: int,
        out: int,
        *,
        key: PRNGKeyArray,
    ):
        """Make an MLP with biases. `hidden`: features between the layers."""
        up, down = jax.random.split(key)
        self.up = Linear(features, hidden, key=up)
        self.down = Linear(hidden, out, key=down)

    def __call__(self, x: Features, activation: Activation) -> Outputs:
        # Where `down` is of 8 bits, its input is read twice: for the scales, and for the product.
        before = self.up(x)
        hidden = materialize(activation(before))
        # Of GELU it is known without computing it, so that it need not be written for two readers.
        maxima = partial(gelu_maxima, before) if activation is gelu else None
        return self.down(hidden, maxima)


class Stream(eqx.Module):
    """The layers of a double block that belong to one modality: the image or the text.

    `modulation`: from the conditioning vector to six vectors; None where they are computed
    elsewhere, as in Chroma. `qkv`: to queries, keys and values of all heads. `query_norm`,
    `key_norm`: over the features of a head. `out`: of the attention.
    """

    modulation: Linear | None
    qkv: Linear
    query_norm: RmsNorm
    key_norm: RmsNorm
    out: Linear
    mlp: Mlp

    def __init__(self, config: BlockConfig, *, modulated: bool = True, key: PRNGKeyArray):
        """Make the layers of one block, with random weights. `modulated`: with `modulation`."""
        modulation, qkv, out, mlp = jax.random.split(key, 4)
        width = config.width
        self.modulation = None
        if modulated:
            # adaLN-zero: the gates of a new block are zeros, so that it is the identity.
            self.modulation = Linear(width, 6 * width, scale=0, key=modulation)
        self.qkv = Linear(width, 3 * width, key=qkv)
        self.query_norm = RmsNorm(config.head_dim)
        self.key_norm = RmsNorm(config.head_dim)
        self.out = Linear(width, width, key=out)
        self.mlp = Mlp(width, config.mlp_width, width, key=mlp)

    def project(
        self,
        x: TokenStates,
        modulation: StreamModulation,
    ) -> Projection:
        """Return the projection of these tokens for the joint attention."""
        modulated = modulate(x, modulation.shift1, modulation.scale1)
        return Projection(self.qkv(modulated), self.query_norm, self.key_norm)

    def finish(
        self,
        x: TokenStates,
        attended: Attended,
        modulation: StreamModulation,
    ) -> TokenStates:
        """Add the attention's output, then the MLP's, each times its gate.

        **Arguments:** `x`: the tokens before this block. `attended`: of the joint attention.
        """
        x = x + modulation.gate1 * self.out(attended)
        modulated = modulate(x, modulation.shift2, modulation.scale2)
        return x + modulation.gate2 * self.mlp(modulated, gelu)


class DoubleBlock(eqx.Module):
    """Image and text tokens with separate weights, and one joint attention over both.

    **Source:** Esser et al. 2024, fig. 2b.
    """

    img: Stream
    txt: Stream

    def __init__(self, config: BlockConfig, *, modulated: bool = True, key: PRNGKeyArray):
        """Make one block, with random weights. `modulated`: with the layers of its modulation."""
        img, txt = jax.random.split(key)
        self.img = Stream(config, modulated=modulated, key=img)
        self.txt = Stream(config, modulated=modulated, key=txt)

    def __call__(
        self,
        tokens: ImageAndText,
        modulation: DoubleModulation,
        attention: BlockAttention,
        prompts: Sequence[BlockPrompt] = (),
    ) -> ImageAndText:
        """Return the image's and the text's tokens after this block.

        **Arguments:** `tokens`: the image's and the text's. `modulation`: of this block.
        `attention`: over the text's tokens, then the image's. `prompts`: which the image's tokens
        attend to as well.
        """
        img, txt = tokens
        img_modulation = StreamModulation(*jnp.split(modulation.img, 6))
        txt_modulation = StreamModulation(*jnp.split(modulation.txt, 6))
        txt_projection = self.txt.project(txt, txt_modulation)
        img_projection = self.img.project(img, img_modulation)
        width = txt_projection.projected.shape[-1] // 3
        attended = attention(width, txt_projection, img_projection)
        txt_attended, img_attended = attended[: len(txt)], attended[len(txt) :]
        img_attended = add_to_attention(img_attended, img_projection, width, prompts)
        img = self.img.finish(img, img_attended, img_modulation)
        img = add_after_block(img, img_projection, width, prompts)
        txt = self.txt.finish(txt, txt_attended, txt_modulation)
        return img, txt


class SingleBlock(eqx.Module):
    """Text and image tokens as one sequence, with attention and MLP in parallel.

    `modulation`: from the conditioning vector to shift, scale and gate; None as in `Stream`.
    `linear1`: to q, k and v of all heads and the hidden features of the MLP. `linear2`: of the
    attention's output and the hidden features.
    **Source:** Dehghani et al. 2023, section 2.
    """

    modulation: Linear | None
    linear1: Linear
    query_norm: RmsNorm
    key_norm: RmsNorm
    linear2: Linear

    def __init__(self, config: BlockConfig, *, modulated: bool = True, key: PRNGKeyArray):
        """Make one block, with random weights. `modulated`: with `modulation`."""
        modulation, first, second = jax.random.split(key, 3)
        width, hidden = config.width, config.mlp_width
        self.modulation = None
        if modulated:
            # adaLN-zero, as in `Stream`.
            self.modulation = Linear(width, 3 * width, scale=0, key=modulation)
        self.linear1 = Linear(width, 3 * width + hidden, key=first)
        self.query_norm = RmsNorm(config.head_dim)
        self.key_norm = RmsNorm(config.head_dim)
        self.linear2 = Linear(width + hidden, width, key=second)

    def __call__(
        self,
        x: TokenStates,
        modulation: Float[Array, " three_width"],
        attention: BlockAttention,
        prompts: Sequence[BlockPrompt] = (),
    ) -> TokenStates:
        """Return the tokens after this block.

        **Arguments:** `x`: the text's tokens, then the image's. `modulation`: shift, scale and gate
        of this block. `prompts`: which all tokens attend to as well; they join the attention.
        """
        shift, scale, gate = jnp.split(modulation, 3)
        # linear1 has 3 width + hidden outputs, and linear2 has width + hidden inputs.
        outputs = self.linear1.weight.shape[-2]
        inputs = self.linear2.weight.shape[-1]
        width = (outputs - inputs) // 2
        projected = materialize(self.linear1(modulate(x, shift, scale)))
        projection = Projection(projected, self.query_norm, self.key_norm)
        attended = attention(width, projection)
        attended = add_to_attention(attended, projection, width, prompts)
        before = projected[:, 3 * width :]
        joined = jnp.concatenate([attended, materialize(gelu(before))], axis=-1)

        def maxima() -> RowMaxima:
            return jnp.maximum(jnp.max(jnp.abs(attended), axis=-1), gelu_maxima(before))

        return x + gate * self.linear2(joined, maxima)


class FinalLayer(eqx.Module):
    """Modulate the tokens, then project them to the output channels.

    `modulation`: from the conditioning vector to shift and scale; None as in `Stream`.
    """

    modulation: Linear | None
    linear: Linear

    def __init__(self, width: int, out: int, *, modulated: bool = True, key: PRNGKeyArray):
        """Make the layer. `out`: channels that are predicted. `modulated`: with `modulation`."""
        modulation, linear = jax.random.split(key)
        # Zeros: a new network predicts a velocity of zero.
        self.modulation = None
        if modulated:
            self.modulation = Linear(width, 2 * width, scale=0, key=modulation)
        self.linear = Linear(width, out, scale=0, key=linear)

    def __call__(
        self,
        x: TokenStates,
        modulation: Float[Array, " two_width"],
    ) -> Float[Array, "tokens out_channels"]:
        """Return the prediction for each token. `modulation`: shift, then scale."""
        shift, scale = jnp.split(modulation, 2)
        return self.linear(modulate(x, shift, scale))
