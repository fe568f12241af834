"""T5's encoder (version 1.1): token ids to a state a token."""

import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.kernels.attention import attention
from fluxjax.nets.layers import Embedding, Linear, RmsNorm, check_ids, gelu
from fluxjax.nets.stack import scan_blocks, stack
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Int, PRNGKeyArray, Tokens

States = Float[Array, "tokens width"]


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The numbers of a T5 encoder; the defaults are T5 v1.1 XXL's.

    `buckets`, `max_distance`: of the relative position bias; distances beyond `max_distance` share a bucket.
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
    """Attention with a position bias and a gated MLP, each after an RMS norm and with a skip."""

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
        width, inner, hidden = config.width, config.heads * config.head_dim, config.mlp_width
        q, k, v, out, gate, up, down = jax.random.split(key, 7)
        self.head_dim = config.head_dim
        self.norm1, self.norm2 = RmsNorm(width, eps=config.eps), RmsNorm(width, eps=config.eps)
        # T5 has no 1/sqrt(head_dim) on its scores: the queries are drawn that much smaller instead.
        self.q = Linear(width, inner, bias=False, scale=1 / math.sqrt(config.head_dim), key=q)
        self.k, self.v = (Linear(width, inner, bias=False, key=one) for one in (k, v))
        self.out = Linear(inner, width, bias=False, key=out)
        self.gate, self.up = (Linear(width, hidden, bias=False, key=one) for one in (gate, up))
        self.down = Linear(hidden, width, bias=False, key=down)

    def __call__(
        self, x: States, bias: Float[Array, "heads tokens tokens"], dtype: DTypeLike
    ) -> States:
        y = self.norm1(x, dtype)
        q, k, v = (
            rearrange(layer(y), "t (h d) -> t h d", d=self.head_dim)
            for layer in (self.q, self.k, self.v)
        )
        mixed = attention(q, k, v, bias=bias, scale=1.0, implementation="xla")
        x = x + self.out(rearrange(mixed, "t h d -> t (h d)")).astype(x.dtype)
        y = self.norm2(x, dtype)
        hidden = gelu(self.gate(y)) * self.up(y)
        # `down` overflows float16: it runs in the residual stream's float32.
        return x + self.down(hidden.astype(x.dtype))


class T5(eqx.Module):
    """The encoder, blocks stacked. Source: Raffel et al. 2020; version 1.1: Shazeer 2020."""

    config: T5Config = eqx.field(static=True)
    tokens: Embedding
    position_bias: Embedding
    blocks: T5Block
    norm: RmsNorm

    def __init__(self, config: T5Config, *, key: PRNGKeyArray):
        tokens, bias, blocks = jax.random.split(key, 3)
        self.config = config
        self.tokens = Embedding(config.vocabulary, config.width, key=tokens)
        self.position_bias = Embedding(config.buckets, config.heads, key=bias)
        self.blocks = stack(lambda key: T5Block(config, key=key), config.depth, key=blocks)
        self.norm = RmsNorm(config.width, eps=config.eps)

    @convert_arguments
    def __call__(self, ids: Tokens, *, dtype: DTypeLike | None = None) -> States:
        """Return the state of every token, in `dtype`; padding is not masked, as FLUX has it.

        **Arguments:** `ids`: token ids, padded with 0. `dtype`: of the activations, by default the weights'. The
        residual stream is float32 at least, since it overflows float16.
        **Raises:** `ValueError` for no ids, or ids outside of the vocabulary; traced ids outside of it give NaN.
        """
        check_ids("T5", ids, self.config.vocabulary)
        dtype = self.tokens.weight.dtype if dtype is None else dtype
        buckets = position_buckets(len(ids), self.config.buckets, self.config.max_distance)
        wide = wide_dtype(jnp.dtype(dtype))
        bias = rearrange(self.position_bias(buckets, wide), "q k heads -> heads q k")
        x = self.tokens(ids, wide)
        x = scan_blocks(self.blocks, x, lambda block, x: block(x, bias, dtype))
        return self.norm(x, dtype)


def position_buckets(tokens: int, buckets: int, max_distance: int) -> Int[Array, "tokens tokens"]:
    """Return the bucket of each (query, key) pair: half of them for keys after the query; of each half, half hold one
    distance each, and half are spread logarithmically up to `max_distance`.

    **Source:** Raffel et al. 2020, section 2.1; Mesh TensorFlow's relative position buckets.
    """
    number = jnp.arange(tokens, dtype=jnp.int32)
    distance = number[None, :] - number[:, None]
    half, exact = buckets // 2, buckets // 4
    near = jnp.abs(distance)
    ratio = jnp.log(jnp.maximum(near, 1).astype(jnp.float32) / exact) / math.log(
        max_distance / exact
    )
    far = jnp.minimum(exact + (ratio * (half - exact)).astype(jnp.int32), half - 1)
    return jnp.where(near < exact, near, far) + jnp.where(distance > 0, half, 0)
