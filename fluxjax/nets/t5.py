"""T5's encoder (version 1.1): token ids to one hidden state per token."""

import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import attention
from fluxjax.nets.activations import gelu
from fluxjax.nets.layers import Embedding, Linear, RmsNorm, check_ids, join_heads, split_heads
from fluxjax.nets.scan import scan_blocks
from fluxjax.nets.stack import stack
from fluxjax.nets.summary import describe_network
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Int, PRNGKeyArray, Tokens

States = Float[Array, "tokens width"]
"""One hidden state per token."""
PositionBias = Float[Array, "heads tokens tokens"]
"""What is added to each head's scores, by query and key."""


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The sizes of a T5 encoder; the defaults are those of T5 v1.1 XXL.

    `vocabulary`: number of token ids. `width`: features of a token. `heads`, `head_dim`: of the
    attention. `mlp_width`: hidden features of the MLPs. `buckets`: of relative positions, each with
    its own bias. `max_distance`: distances from there on share a bucket. `eps`: of the norms.
    """

    vocabulary: int = 32128
    width: int = 4096
    heads: int = 64
    head_dim: int = 64
    depth: int = 24
    mlp_width: int = 10240
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    @classmethod
    def xxl(cls) -> "T5Config":
        """T5 v1.1 XXL, the encoder of FLUX.1."""
        return cls()


class T5Block(eqx.Module):
    """Attention with a position bias and a gated MLP.

    Each comes after an RMS norm and has a residual connection. `q`, `k`, `v`, `out`: of the
    attention. `gate`, `up`, `down`: of the MLP, down(gelu(gate(x)) * up(x)).
    """

    norm1: RmsNorm
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    norm2: RmsNorm
    gate: Linear
    up: Linear
    down: Linear
    head_dim: int = eqx.field(static=True)

    def __init__(self, config: T5Config, *, key: PRNGKeyArray):
        width, hidden = config.width, config.mlp_width
        inner = config.heads * config.head_dim
        q, k, v, out, gate, up, down = jax.random.split(key, 7)
        self.head_dim = config.head_dim
        self.norm1 = RmsNorm(width, eps=config.eps)
        self.norm2 = RmsNorm(width, eps=config.eps)
        # T5 does not divide its scores by sqrt(head_dim): the queries start that much smaller.
        self.q = Linear(width, inner, bias=False, scale=1 / math.sqrt(config.head_dim), key=q)
        self.k = Linear(width, inner, bias=False, key=k)
        self.v = Linear(width, inner, bias=False, key=v)
        self.out = Linear(inner, width, bias=False, key=out)
        self.gate = Linear(width, hidden, bias=False, key=gate)
        self.up = Linear(width, hidden, bias=False, key=up)
        self.down = Linear(hidden, width, bias=False, key=down)

    def __call__(
        self,
        x: States,
        bias: PositionBias,
        dtype: DTypeLike,
        length: Int[Array, ""] | None = None,
    ) -> States:
        """Return the residual stream after this block.

        **Arguments:** `x`: the residual stream, in float32 at least. `bias`: of relative positions.
        `dtype`: of the activations. `length`: tokens that are attended to; None for all.
        """
        x = x + self._attend(self.norm1(x, dtype), bias, length).astype(x.dtype)
        y = self.norm2(x, dtype)
        hidden = gelu(self.gate(y)) * self.up(y)
        if hidden.dtype == jnp.bfloat16:
            # Its products are accumulated in float32, and where they are not written so, in
            # bfloat16, which has float32's range. CPUs multiply bfloat16 twice as fast.
            return x + self.down.weight.matmul(hidden).astype(x.dtype)
        # The output of `down` overflows float16: it is computed in the residual stream's dtype.
        return x + self.down(hidden.astype(x.dtype))

    def _attend(self, x: States, bias: PositionBias, length: Int[Array, ""] | None) -> States:
        """Return what attention adds to the states."""
        q = split_heads(self.q(x), self.head_dim)
        k = split_heads(self.k(x), self.head_dim)
        v = split_heads(self.v(x), self.head_dim)
        # Only xla takes a bias on every platform. T5 does not scale its scores.
        attended = attention(q, k, v, bias=bias, scale=1.0, key_length=length, implementation="xla")
        return self.out(join_heads(attended))


class T5(eqx.Module):
    """The encoder, blocks stacked.

    It takes one prompt. `eqx.filter_jit(eqx.filter_vmap(t5))` encodes a batch of them.

    `tokens`: a table of vectors. `position_bias`: of all blocks. `blocks`: stacked. `norm`: after
    them.
    **Source:** Raffel et al. 2020; version 1.1: Shazeer 2020.
    """

    config: T5Config = eqx.field(static=True)
    tokens: Embedding
    position_bias: Embedding  # of each bucket, one number for each head
    blocks: T5Block  # stacked
    norm: RmsNorm

    def __init__(self, config: T5Config, *, key: PRNGKeyArray):
        tokens, bias, blocks = jax.random.split(key, 3)
        self.config = config
        self.tokens = Embedding(config.vocabulary, config.width, key=tokens)
        self.position_bias = Embedding(config.buckets, config.heads, key=bias)
        self.blocks = stack(lambda key: T5Block(config, key=key), config.depth, key=blocks)
        self.norm = RmsNorm(config.width, eps=config.eps)

    def __repr__(self) -> str:
        # Equinox's own has a line for each array.
        return describe_network(self)

    @convert_arguments
    def __call__(
        self,
        ids: Tokens,
        *,
        length: Int[Array, ""] | int | None = None,
        dtype: DTypeLike | None = None,
    ) -> States:
        """Return the hidden state of every token. By default padding is not masked, as in FLUX.

        **Arguments:** `ids`: token ids, padded with 0. `length`: tokens from there on are padding,
        which no token attends to; None masks nothing. `dtype`: of the activations, by default that
        of the weights. The residual stream is float32 at least, since it overflows float16.
        **Returns:** the hidden states in `dtype`, of padding too.
        **Raises:** `ValueError` for no ids, or ids outside of the vocabulary; traced ids outside of
        it give NaN; for a length that is a Python number outside of 1 to the number of ids.
        """
        check_ids("T5", ids, self.config.vocabulary)
        dtype = self.tokens.weight.dtype if dtype is None else dtype
        wide = wide_dtype(jnp.dtype(dtype))
        # The same bias in all blocks.
        bias = self._position_bias(len(ids), wide)
        x = self.tokens(ids, wide)
        if isinstance(length, int) and not 1 <= length <= len(ids):
            raise ValueError(f"`T5(length)` is 1 to {len(ids)}, the number of ids, got {length}.")
        keys = None if length is None else jnp.asarray(length, jnp.int32)
        x = scan_blocks(self.blocks, x, lambda block, x: block(x, bias, dtype, keys))
        return self.norm(x, dtype)

    def _position_bias(self, tokens: int, dtype: DTypeLike) -> PositionBias:
        """Return the bias of each head and pair of tokens, which depends on their offset only."""
        # An offset is the position of the key minus that of the query.
        offsets = jnp.arange(-tokens, tokens, dtype=jnp.int32)
        buckets = position_buckets(offsets, self.config.buckets, self.config.max_distance)
        by_offset = rearrange(self.position_bias(buckets, dtype), "offsets heads -> heads offsets")

        def of_query(query: Int[Array, ""]) -> Float[Array, "heads keys"]:
            # Its keys have the offsets from -query on. A row of them is copied as a whole: to look
            # up every pair, TPUs would need temporary memory of twice the size of the result.
            return jax.lax.dynamic_slice_in_dim(by_offset, tokens - query, tokens, axis=1)

        return jax.vmap(of_query, out_axes=1)(jnp.arange(tokens))


def position_buckets(
    offsets: Int[Array, "*offsets"],
    buckets: int,
    max_distance: int,
) -> Int[Array, "*offsets"]:
    """Return the bucket of each relative position.

    Half of the buckets are for keys after the query. Of each half, half hold one distance each; the
    others are spaced logarithmically up to `max_distance`.

    **Arguments:** `offsets`: positions of keys less those of queries. `buckets`: how many there
    are; a multiple of 4. `max_distance`: distances from there on are in the last bucket of their
    half.
    **Source:** Raffel et al. 2020, section 2.1; Mesh TensorFlow's relative position buckets.
    """
    half, exact = buckets // 2, buckets // 4
    distance = jnp.abs(offsets)
    log_range = math.log(max_distance / exact)
    # Clipped only so that the logarithm is finite; such distances are not far.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / log_range
    far = jnp.minimum(exact + (ratio * (half - exact)).astype(jnp.int32), half - 1)
    near_or_far = jnp.where(distance < exact, distance, far)
    return near_or_far + jnp.where(offsets > 0, half, 0)
