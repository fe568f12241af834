"""The transformer block of CLIP's encoders of text and images, and of SigLIP's encoder."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import PyTree

from fluxjax.kernels.attention import attention
from fluxjax.nets.activations import ACTIVATIONS
from fluxjax.nets.layers import LayerNorm, Linear, join_heads, split_heads
from fluxjax.nets.scan import read_block, scan_blocks
from fluxjax.nets.stack import depth_of
from fluxjax.shapes import Array, Float, Int, PRNGKeyArray

EncoderStates = Float[Array, "_ width"]
"""One hidden state per token."""


@runtime_checkable
class EncoderSizes(Protocol):
    """The fields of an encoder's config that its blocks are made of."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def mlp_width(self) -> int: ...

    @property
    def activation(self) -> str: ...

    @property
    def eps(self) -> float: ...


def check_encoder_config(config: EncoderSizes) -> None:
    """Check what the blocks of an encoder need of its config.

    **Raises:** `ValueError` for no block, heads that do not divide the width, or an unknown
    activation.
    """
    name = type(config).__name__
    if config.depth < 1:
        raise ValueError(f"`{name}(depth)` is 1 or more, got {config.depth}.")
    if config.width % config.heads:
        raise ValueError(
            f"`{name}` needs a width that heads divide, got {config.width} and {config.heads}."
        )
    if config.activation not in ACTIVATIONS:
        raise ValueError(
            f"`{name}(activation={config.activation!r})` is unknown. Choose one of "
            f"{', '.join(ACTIVATIONS)}."
        )


def encode_token(
    blocks: PyTree,
    x: EncoderStates,
    token: Int[Array, ""],
) -> Float[Array, " width"]:
    """Return the hidden state of one token after all blocks.

    The last block is computed for this token only.

    **Arguments:** `blocks`: stacked or unrolled. `x`: the states of all tokens before them.
    `token`: the index of one.
    """
    last = depth_of(blocks) - 1
    x = scan_blocks(blocks, x, lambda block, x: block(x), stop=last)
    return read_block(blocks, last).state_of(x, token)


class EncoderBlock(eqx.Module):
    """Attention and an MLP, each after a LayerNorm and with a residual connection.

    `q`, `k`, `v`, `out`: of the attention. `up`, `down`: of the MLP. `causal`: whether a token
    attends only to those before it.
    """

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
    causal: bool = eqx.field(static=True)

    def __init__(self, config: EncoderSizes, *, causal: bool, key: PRNGKeyArray):
        width, hidden = config.width, config.mlp_width
        q, k, v, out, up, down = jax.random.split(key, 6)
        self.head_dim = width // config.heads
        self.activation = config.activation
        self.causal = causal
        self.norm1 = LayerNorm(width, eps=config.eps)
        self.norm2 = LayerNorm(width, eps=config.eps)
        self.q = Linear(width, width, key=q)
        self.k = Linear(width, width, key=k)
        self.v = Linear(width, width, key=v)
        self.out = Linear(width, width, key=out)
        self.up = Linear(width, hidden, key=up)
        self.down = Linear(hidden, width, key=down)

    def __call__(self, x: EncoderStates) -> EncoderStates:
        """Return the hidden states after this block."""
        normed = self.norm1(x)
        return self._add_mlp(x + self._attend(normed, normed, causal=self.causal))

    def state_of(self, x: EncoderStates, token: Int[Array, ""]) -> Float[Array, " width"]:
        """Return the hidden state of one token after this block, without those of the others.

        Of the others only keys and values are computed: of the products of the block that is a
        sixth.

        **Arguments:** `x`: the states of all tokens before this block. `token`: the index of one.
        **Returns:** what a call of the block gives in this row, up to rounding.
        """

        def row(states: EncoderStates) -> EncoderStates:
            return jax.lax.dynamic_slice_in_dim(states, token, 1)

        normed = self.norm1(x)
        # A causal block: the token attends to itself and those before it.
        length = token + 1 if self.causal else None
        attended = self._attend(row(normed), normed, key_length=length)
        return self._add_mlp(row(x) + attended)[0]

    def _attend(
        self,
        queries: EncoderStates,
        keys: EncoderStates,
        *,
        causal: bool = False,
        key_length: Int[Array, ""] | None = None,
    ) -> EncoderStates:
        """Return what attention adds to the states of the queries."""
        q = split_heads(self.q(queries), self.head_dim)
        k = split_heads(self.k(keys), self.head_dim)
        v = split_heads(self.v(keys), self.head_dim)
        # Of at most 77 tokens of text, or 729 of an image: a fused implementation would gain
        # little.
        attended = attention(q, k, v, causal=causal, key_length=key_length, implementation="xla")
        return self.out(join_heads(attended))

    def _add_mlp(self, x: EncoderStates) -> EncoderStates:
        """Return states with what the MLP adds to them."""
        activation = ACTIVATIONS[self.activation]
        hidden = activation(self.up(self.norm2(x)))
        return x + self.down(hidden)
