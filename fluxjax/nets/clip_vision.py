"""CLIP's vision encoder: an image to one vector in the space that CLIP shares with texts."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.nets.conv import Conv
from fluxjax.nets.encoder_block import (
    EncoderBlock,
    EncoderStates,
    check_encoder_config,
    encode_token,
)
from fluxjax.nets.layers import Embedding, LayerNorm, Linear
from fluxjax.nets.patches import Pixels, check_pixels, embed_patches
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import stack
from fluxjax.nets.summary import describe_network
from fluxjax.shapes import Array, Float, PRNGKeyArray


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """The sizes of a CLIP vision encoder; the defaults are those of ViT-L/14.

    `image_size`: pixels along a side of the image. `patch`: pixels along a side of a patch.
    `width`: features of a token. `mlp_width`: hidden features of the MLPs. `embedding`: features of
    the projected vector. `activation`: as of `ClipConfig`. `eps`: of the norms.
    """

    image_size: int = 224
    patch: int = 14
    width: int = 1024
    heads: int = 16
    depth: int = 24
    mlp_width: int = 4096
    embedding: int = 768
    activation: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self):
        check_encoder_config(self)

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.image_size // self.patch) ** 2

    @classmethod
    def large(cls) -> "ClipVisionConfig":
        """The vision encoder of CLIP ViT-L/14, that of XLabs' IP-Adapters."""
        return cls()


class ClipVision(eqx.Module):
    """The encoder, blocks stacked.

    It takes one image. `eqx.filter_jit(eqx.filter_vmap(clip_vision))` encodes a batch of them.

    `class_token`: goes before the patches; its state is the image's. `patches`: from the pixels of
    a patch to a token. `positions`: a table of vectors, added to the tokens. `norm_in`, `norm`:
    before the blocks, and of the class token after them. `blocks`: stacked. `project`: to the
    embedding.
    **Source:** Radford et al. 2021, section 2.4.
    """

    config: ClipVisionConfig = eqx.field(static=True)
    class_token: Float[Array, " width"]
    patches: Conv
    positions: Embedding
    norm_in: LayerNorm
    blocks: EncoderBlock  # stacked
    norm: LayerNorm
    project: Linear

    def __init__(self, config: ClipVisionConfig, *, key: PRNGKeyArray):
        class_token, patches, positions, blocks, project = jax.random.split(key, 5)
        width = config.width
        self.config = config
        self.class_token = jax.random.normal(class_token, (width,))
        self.patches = Conv(3, width, side=config.patch, bias=False, key=patches)
        self.positions = Embedding(config.patches + 1, width, key=positions)
        self.norm_in = LayerNorm(width, eps=config.eps)
        self.blocks = stack(
            lambda key: EncoderBlock(config, causal=False, key=key), config.depth, key=blocks
        )
        self.norm = LayerNorm(width, eps=config.eps)
        self.project = Linear(width, config.embedding, bias=False, key=project)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def hidden_states(
        self,
        pixels: Pixels,
        *,
        dtype: DTypeLike | None = None,
    ) -> EncoderStates:
        """Return the hidden states of the class token and of every patch after the blocks.

        **Arguments:** and **Raises:** as for a call of the network.
        """
        x = self._embed(pixels, dtype)
        return scan_blocks(self.blocks, x, lambda block, x: block(x))

    def _embed(self, pixels: Pixels, dtype: DTypeLike | None) -> EncoderStates:
        """Return the hidden states of the class token and of every patch before the blocks."""
        check_pixels("ClipVision", pixels, self.config.image_size)
        dtype = self.positions.weight.dtype if dtype is None else dtype
        x = embed_patches(self.patches, pixels.astype(dtype), self.config.patch)
        x = jnp.concatenate([self.class_token.astype(dtype)[None], x])
        return self.norm_in(x + self.positions.weight.astype(dtype))

    @convert_arguments
    def __call__(
        self,
        pixels: Pixels,
        *,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, " embedding"]:
        """Return the projected embedding of an image, which is not normalized.

        It is that of the class token's state: the last block is computed for this token only.

        **Arguments:** `pixels`: of an image of `image_size`, as from `clip_pixels`. `dtype`: of the
        activations, by default that of the weights.
        **Raises:** `ValueError` for an image of another size.
        """
        x = self._embed(pixels, dtype)
        class_token = jnp.int32(0)
        return self.project(self.norm(encode_token(self.blocks, x, class_token)))
