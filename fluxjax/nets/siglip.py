"""SigLIP's vision encoder: an image to one hidden state per patch, and to a pooled state."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import attention
from fluxjax.nets.activations import ACTIVATIONS
from fluxjax.nets.conv import Conv
from fluxjax.nets.encoder_block import EncoderBlock, EncoderStates, check_encoder_config
from fluxjax.nets.flux_blocks import Mlp
from fluxjax.nets.layers import Embedding, LayerNorm, Linear, join_heads, split_heads
from fluxjax.nets.patches import Pixels, check_pixels, embed_patches
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import stack
from fluxjax.nets.summary import describe_network
from fluxjax.shapes import Array, Float, PRNGKeyArray


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The sizes of a SigLIP vision encoder; the defaults are those of so400m-patch14-384.

    `image_size`: pixels along a side of the image. `patch`: pixels along a side of a patch.
    `width`: features of a token. `mlp_width`: hidden features of the MLPs. `activation`: as of
    `ClipConfig`. `eps`: of the norms.
    """

    image_size: int = 384
    patch: int = 14
    width: int = 1152
    heads: int = 16
    depth: int = 27
    mlp_width: int = 4304
    activation: str = "gelu_tanh"
    eps: float = 1e-6

    def __post_init__(self):
        check_encoder_config(self)

    @property
    def patches(self) -> int:
        """How many patches an image has; pixels beyond the last whole patch are not read."""
        return (self.image_size // self.patch) ** 2

    @classmethod
    def so400m(cls) -> "SiglipConfig":
        """so400m-patch14-384, the encoder of FLUX.1 Redux and of InstantX's IP-Adapter."""
        return cls()


class SiglipPooler(eqx.Module):
    """Attention of one learned query over all tokens, and an MLP with a residual connection.

    `probe`: the query, [1, 1, width], before its projection. `qkv`: to queries, keys and values of
    all heads. `out`: of the attention. `norm`: before the MLP.
    """

    probe: Float[Array, "1 1 width"]
    qkv: Linear
    out: Linear
    norm: LayerNorm
    mlp: Mlp
    head_dim: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(self, config: SiglipConfig, *, key: PRNGKeyArray):
        probe, qkv, out, mlp = jax.random.split(key, 4)
        width = config.width
        self.head_dim = width // config.heads
        self.activation = config.activation
        self.probe = jax.random.normal(probe, (1, 1, width))
        self.qkv = Linear(width, 3 * width, key=qkv)
        self.out = Linear(width, width, key=out)
        self.norm = LayerNorm(width, eps=config.eps)
        self.mlp = Mlp(width, config.mlp_width, width, key=mlp)

    def __call__(self, states: EncoderStates) -> Float[Array, " width"]:
        # The probe is one more row, so that one product gives its query and the tokens' k and v.
        rows = jnp.concatenate([self.probe[0].astype(states.dtype), states])
        q, k, v = (split_heads(x, self.head_dim) for x in jnp.split(self.qkv(rows), 3, axis=-1))
        attended = attention(q[:1], k[1:], v[1:], implementation="xla")
        x = self.out(join_heads(attended))
        return (x + self.mlp(self.norm(x), ACTIVATIONS[self.activation]))[0]


class Siglip(eqx.Module):
    """The encoder, blocks stacked.

    It takes one image. `eqx.filter_jit(eqx.filter_vmap(siglip))` encodes a batch of them.

    `patches`: from the pixels of a patch to a token. `positions`: a table of vectors, added to the
    tokens. `blocks`: stacked. `norm`: after them. `pooler`: from all tokens to one vector.
    **Source:** Zhai et al. 2023 (SigLIP); Zhai et al. 2022, section 3 (the pooler).
    """

    config: SiglipConfig = eqx.field(static=True)
    patches: Conv
    positions: Embedding
    blocks: EncoderBlock  # stacked
    norm: LayerNorm
    pooler: SiglipPooler

    def __init__(self, config: SiglipConfig, *, key: PRNGKeyArray):
        patches, positions, blocks, pooler = jax.random.split(key, 4)
        self.config = config
        self.patches = Conv(3, config.width, side=config.patch, key=patches)
        self.positions = Embedding(config.patches, config.width, key=positions)
        self.blocks = stack(
            lambda key: EncoderBlock(config, causal=False, key=key), config.depth, key=blocks
        )
        self.norm = LayerNorm(config.width, eps=config.eps)
        self.pooler = SiglipPooler(config, key=pooler)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def __call__(
        self,
        pixels: Pixels,
        *,
        dtype: DTypeLike | None = None,
    ) -> EncoderStates:
        """Return the hidden state of every patch after the final norm, row by row.

        **Arguments:** `pixels`: of an image of `image_size`, as from `siglip_pixels`; in [-1, 1].
        `dtype`: of the activations, by default that of the weights.
        **Raises:** `ValueError` for an image of another size.
        """
        check_pixels("Siglip", pixels, self.config.image_size)
        dtype = self.positions.weight.dtype if dtype is None else dtype
        x = embed_patches(self.patches, pixels.astype(dtype), self.config.patch)
        x = x + self.positions.weight.astype(dtype)
        x = scan_blocks(self.blocks, x, lambda block, x: block(x))
        return self.norm(x)

    @convert_arguments
    def pool(self, states: EncoderStates) -> Float[Array, " width"]:
        """Return the pooled state of an image.

        **Arguments:** `states`: of all its patches, from a call of the network.
        """
        return self.pooler(states)
