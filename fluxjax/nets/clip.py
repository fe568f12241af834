"""CLIP's text encoder: token ids to a pooled vector."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.nets.encoder_block import EncoderBlock, check_encoder_config, encode_token
from fluxjax.nets.layers import Embedding, LayerNorm, check_ids
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import stack
from fluxjax.nets.summary import describe_network
from fluxjax.shapes import Array, Float, PRNGKeyArray, Tokens

States = Float[Array, "tokens width"]
"""One hidden state per token."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The sizes of a CLIP text encoder; the defaults are those of CLIP-L.

    `vocabulary`: number of token ids. `positions`: the most tokens that it takes. `width`: features
    of a token. `mlp_width`: hidden features of the MLPs. `eos_token`: the id that ends a text,
    where the pooled state is read; None for the largest id present, the rule of CLIP's older
    configs. `activation`: "quick_gelu" (x sigmoid(1.702 x)), "gelu" or "gelu_tanh". `eps`: of the
    norms.
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
        check_encoder_config(self)

    @classmethod
    def large(cls) -> "ClipConfig":
        """The text encoder of CLIP ViT-L/14, the one of FLUX.1."""
        return cls()


class Clip(eqx.Module):
    """The encoder, blocks stacked.

    It takes one prompt. `eqx.filter_jit(eqx.filter_vmap(clip))` encodes a batch of them.

    `tokens`, `positions`: tables of vectors that are added up. `blocks`: stacked. `norm`: after
    them.
    **Source:** Radford et al. 2021, section 2.4.
    """

    config: ClipConfig = eqx.field(static=True)
    tokens: Embedding
    positions: Embedding
    blocks: EncoderBlock  # stacked
    norm: LayerNorm

    def __init__(self, config: ClipConfig, *, key: PRNGKeyArray):
        tokens, positions, blocks = jax.random.split(key, 3)
        self.config = config
        self.tokens = Embedding(config.vocabulary, config.width, key=tokens)
        self.positions = Embedding(config.positions, config.width, key=positions)
        self.blocks = stack(
            lambda key: EncoderBlock(config, causal=True, key=key), config.depth, key=blocks
        )
        self.norm = LayerNorm(config.width, eps=config.eps)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def hidden_states(
        self,
        ids: Tokens,
        *,
        dtype: DTypeLike | None = None,
    ) -> States:
        """Return the hidden state of every token after the final norm.

        **Arguments:** and **Raises:** as for a call of the network.
        """
        x = self._embed(ids, dtype)
        return self.norm(scan_blocks(self.blocks, x, lambda block, x: block(x)))

    def _embed(self, ids: Tokens, dtype: DTypeLike | None) -> States:
        """Return the hidden state of every token before the blocks."""
        check_ids("Clip", ids, self.config.vocabulary)
        if len(ids) > self.config.positions:
            raise ValueError(
                f"`Clip(ids)` takes at most {self.config.positions} tokens, got {len(ids)}. "
                "Truncate the text, keeping its end token."
            )
        x = self.tokens(ids, dtype)
        return x + self.positions(jnp.arange(len(ids)), dtype)

    @convert_arguments
    def __call__(
        self,
        ids: Tokens,
        *,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, " width"]:
        """Return the pooled state: the hidden state of the first end-of-text token.

        The last block is computed for this token only. For the states of all tokens, of which this
        is one, see `hidden_states`.

        **Arguments:** `ids`: token ids, at most `positions` of them. `dtype`: of the activations,
        by default that of the weights.
        **Raises:** `ValueError` for more tokens, none, or ids outside of the vocabulary; traced ids
        outside of it give NaN.
        """
        x = self._embed(ids, dtype)
        # argmax returns the first of equal values.
        if self.config.eos_token is None:
            end = jnp.argmax(ids)
        else:
            end = jnp.argmax((ids == self.config.eos_token).astype(jnp.int32))
        return self.norm(encode_token(self.blocks, x, end))
