"""IP-Adapters: an image's embedding to keys and values for the blocks of a FLUX transformer."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.nets.activations import exact_gelu
from fluxjax.nets.image_prompt import ImagePrompt, KeyValue
from fluxjax.nets.layers import LayerNorm, Linear, RmsNorm
from fluxjax.nets.scan import map_blocks
from fluxjax.nets.stack import stack
from fluxjax.nets.summary import describe_network
from fluxjax.shapes import Array, Float, PRNGKeyArray, ScalarLike

_NORM_EPS = 1e-5
"""Of the norm of the tokens, and of InstantX's norms of keys and values."""


@dataclass(frozen=True, kw_only=True)
class IpAdapterConfig:
    """The sizes of an IP-Adapter; the defaults are those of XLabs' first one for FLUX.1-dev.

    `features`: of the image's embedding. `hidden`: features between the two layers that embed it;
    None for a single layer. `tokens`: that the image becomes. `context`: features of such a token.
    `width`, `head_dim`: of the transformer and of its heads. `double_depth`, `single_depth`: for
    how many of its blocks there are keys and values. `joins_attention`: whether the result joins
    the attention's output before its projection, with normalized keys and values (InstantX);
    otherwise it is added after the block (XLabs).
    """

    features: int = 768
    hidden: int | None = None
    tokens: int = 4
    context: int = 4096
    width: int = 3072
    head_dim: int = 128
    double_depth: int = 19
    single_depth: int = 0
    joins_attention: bool = False

    def __post_init__(self):
        if self.width % self.head_dim:
            raise ValueError(
                f"`IpAdapterConfig` needs a width of whole heads, got {self.width} and heads of "
                f"{self.head_dim}."
            )
        if self.single_depth and not self.joins_attention:
            raise ValueError(
                "`IpAdapterConfig(single_depth)` is for adapters that join the attention. Pass 0, "
                "or joins_attention=True."
            )

    @classmethod
    def xlabs(cls, tokens: int = 4) -> "IpAdapterConfig":
        """XLabs' IP-Adapter of CLIP's projected embedding; version 2 has 16 tokens."""
        return cls(tokens=tokens)

    @classmethod
    def instantx(cls) -> "IpAdapterConfig":
        """InstantX's IP-Adapter of SigLIP's pooled state."""
        return cls(features=1152, hidden=2304, tokens=128, single_depth=38, joins_attention=True)


class KeyValueLayers(eqx.Module):
    """The layers that make a block's keys and values of the image's tokens."""

    k: Linear
    v: Linear

    def __init__(self, config: IpAdapterConfig, *, key: PRNGKeyArray):
        k, v = jax.random.split(key)
        bias = not config.joins_attention
        self.k = Linear(config.context, config.width, bias=bias, key=k)
        self.v = Linear(config.context, config.width, bias=bias, key=v)


class IpAdapter(eqx.Module):
    """The adapter, with the layers of all blocks stacked: the double blocks, then the single ones.

    Its keys and values depend on the image prompt alone, and are computed once for all steps.

    `up`: from the embedding to the hidden features; None for a single layer. `project`: to the
    tokens of the image. `norm`: of each token. `blocks`: to keys and values.
    **Source:** Ye et al. 2023 (2308.06721); XLabs 2024, x-flux; InstantX 2024.
    """

    config: IpAdapterConfig = eqx.field(static=True)
    up: Linear | None
    project: Linear
    norm: LayerNorm
    blocks: KeyValueLayers  # stacked

    def __init__(self, config: IpAdapterConfig, *, key: PRNGKeyArray):
        up, project, blocks = jax.random.split(key, 3)
        self.config = config
        self.up = None
        features = config.features
        if config.hidden is not None:
            self.up = Linear(features, config.hidden, key=up)
            features = config.hidden
        self.project = Linear(features, config.tokens * config.context, key=project)
        self.norm = LayerNorm(config.context, eps=_NORM_EPS)
        depth = config.double_depth + config.single_depth
        self.blocks = stack(lambda key: KeyValueLayers(config, key=key), depth, key=blocks)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def __call__(
        self,
        embedding: Float[Array, " features"],
        *,
        scale: ScalarLike | Float[Array, " blocks"] = 1.0,
        dtype: DTypeLike | None = None,
    ) -> ImagePrompt:
        """Return an image prompt for the transformer.

        **Arguments:** `embedding`: of the image, by the encoder that the adapter was trained with:
        CLIP's projected one, or SigLIP's pooled state. `scale`: factor of what is added, one number
        or one for each block. `dtype`: of the keys and values, by default that of the embedding.
        **Raises:** `ValueError` for an embedding of another encoder, or another number of scales.
        """
        config = self.config
        if len(embedding) != config.features:
            raise ValueError(
                f"`IpAdapter(embedding)` takes {config.features} features, got {len(embedding)}. "
                "XLabs' adapters take the embedding of CLIP ViT-L/14, InstantX's the pooled state "
                "of SigLIP."
            )
        x = embedding if dtype is None else embedding.astype(dtype)
        tokens = self._tokens(x)

        def block_prompt(layers: KeyValueLayers) -> KeyValue:
            return self._key_value(layers, tokens)

        blocks = map_blocks(self.blocks, block_prompt)
        depth = config.double_depth
        double = KeyValue(blocks.k[:depth], blocks.v[:depth])
        single = None
        if config.single_depth:
            single = KeyValue(blocks.k[depth:], blocks.v[depth:])
        scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (len(blocks.k),))
        return ImagePrompt(double, single, scales, joins_attention=config.joins_attention)

    def _tokens(self, x: Float[Array, " features"]) -> Float[Array, "tokens context"]:
        """Return the tokens of an image."""
        if self.up is not None:
            x = exact_gelu(self.up(x))
        tokens = rearrange(
            self.project(x), "(tokens context) -> tokens context", tokens=self.config.tokens
        )
        return self.norm(tokens)

    def _key_value(
        self, layers: KeyValueLayers, tokens: Float[Array, "tokens context"]
    ) -> KeyValue:
        """Return a block's keys and values."""
        k, v = (
            rearrange(
                layer(tokens),
                "tokens (heads head_dim) -> tokens heads head_dim",
                head_dim=self.config.head_dim,
            )
            for layer in (layers.k, layers.v)
        )
        if self.config.joins_attention:
            # The norms have no scale.
            norm = RmsNorm(self.config.head_dim, eps=_NORM_EPS)
            k, v = norm(k), norm(v)
        return KeyValue(k, v)
