"""CLIP's text encoder: token ids to a pooled vector."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import attention
from fluxjax.nets.layers import Embedding, LayerNorm, Linear, check_ids, gelu
from fluxjax.nets.stack import scan_blocks, stack
from fluxjax.shapes import Array, Float, PRNGKeyArray, Tokens

States = Float[Array, "tokens width"]


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The numbers of a CLIP text encoder; the defaults are CLIP-L's.

    `positions`: the most tokens it takes. `eos_token`: the id that ends a text, where the pooled state is read; None
    for the largest id present, the rule of CLIP's older configs. `activation`: "quick_gelu" (x sigmoid(1.702 x)) or "gelu".
    """

    vocabulary: int = 49408
    positions: int = 77
    width: int = 768
    heads: int = 12
    depth: int = 12
    mlp_width: int = 3072
    eos_token: int | None = 49407
    activation: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f"`ClipConfig` needs a width that heads divide, got {self.width} and {self.heads}."
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"`ClipConfig(activation={self.activation!r})` is unknown. Choose one of {', '.join(_ACTIVATIONS)}."
            )

    @classmethod
    def large(cls) -> "ClipConfig":
        """CLIP ViT-L/14's text encoder."""
        return cls()


_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": gelu,
}


class ClipBlock(eqx.Module):
    """Causal attention and an MLP, each after a LayerNorm and with a skip."""

    norm1: LayerNorm
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    norm2: LayerNorm
    up: Linear
    down: Linear
    head_dim: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(self, config: ClipConfig, *, key: PRNGKeyArray):
        width, hidden = config.width, config.mlp_width
        *projections, up, down = jax.random.split(key, 6)
        self.head_dim, self.activation = config.width // config.heads, config.activation
        self.norm1, self.norm2 = LayerNorm(width, eps=config.eps), LayerNorm(width, eps=config.eps)
        self.q, self.k, self.v, self.out = (Linear(width, width, key=k) for k in projections)
        self.up, self.down = Linear(width, hidden, key=up), Linear(hidden, width, key=down)

    def __call__(self, x: States) -> States:
        y = self.norm1(x)
        q, k, v = (
            rearrange(layer(y), "t (h d) -> t h d", d=self.head_dim)
            for layer in (self.q, self.k, self.v)
        )
        mixed = attention(q, k, v, causal=True, implementation="xla")
        x = x + self.out(rearrange(mixed, "t h d -> t (h d)"))
        return x + self.down(_ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class Clip(eqx.Module):
    """The encoder, blocks stacked. Source: Radford et al. 2021, section 2.4."""

    config: ClipConfig = eqx.field(static=True)
    tokens: Embedding
    positions: Embedding
    blocks: ClipBlock
    norm: LayerNorm

    def __init__(self, config: ClipConfig, *, key: PRNGKeyArray):
        tokens, positions, blocks = jax.random.split(key, 3)
        self.config = config
        self.tokens = Embedding(config.vocabulary, config.width, key=tokens)
        self.positions = Embedding(config.positions, config.width, key=positions)
        self.blocks = stack(lambda key: ClipBlock(config, key=key), config.depth, key=blocks)
        self.norm = LayerNorm(config.width, eps=config.eps)

    @convert_arguments
    def hidden_states(self, ids: Tokens, *, dtype: DTypeLike | None = None) -> States:
        """Return the state of every token after the final norm; arguments as for a call."""
        check_ids("Clip", ids, self.config.vocabulary)
        if len(ids) > self.config.positions:
            raise ValueError(
                f"`Clip(ids)` takes at most {self.config.positions} tokens, got {len(ids)}. "
                "Truncate the text, keeping its end token."
            )
        x = self.tokens(ids, dtype) + self.positions(jnp.arange(len(ids)), dtype)
        return self.norm(scan_blocks(self.blocks, x, lambda block, x: block(x)))

    @convert_arguments
    def __call__(self, ids: Tokens, *, dtype: DTypeLike | None = None) -> Float[Array, " width"]:
        """Return the pooled state: that of the first end-of-text token.

        **Arguments:** `ids`: token ids, at most `positions`. `dtype`: of the activations, by default the weights'.
        **Raises:** `ValueError` for more tokens, none, or ids outside of the vocabulary; traced ids outside of it give NaN.
        """
        check_ids("Clip", ids, self.config.vocabulary)
        eos = self.config.eos_token
        end = jnp.argmax(ids if eos is None else (ids == eos).astype(jnp.int32))
        return self.hidden_states(ids, dtype=dtype)[end]
