"""Attention written in plain JAX: all logits at once, or one chunk of queries after another."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.kernels.block_sizes import balanced_block_size, round_up
from fluxjax.kernels.chips import default_device
from fluxjax.numeric import from_bits, to_bits, wide_dtype
from fluxjax.shapes import Array, Float, Int

Heads = Float[Array, "_ heads head_dim"]
"""Queries, keys or values of all heads: [tokens, heads, head_dim]."""

Head = Float[Array, "_ head_dim"]
"""Queries, keys or values of one head: [tokens, head_dim]."""

CHUNK_LOGIT_BYTES = 2**26
"""Bytes of one head's float32 logits that `chunked_attention` keeps at a time."""

CPU_CACHE_BYTES = 2**25
"""Bytes of all heads' float32 logits from which CPUs compute one head after another."""

_CPU_GROUPS = 4
"""Groups of heads in which CPUs compute attention with smaller logits."""


class LogitOptions(eqx.Module):
    """What is done to the logits of every head alike.

    `scale`: factor of the logits. `causal`: whether a query attends only to keys up to its own
    index. `key_length`: keys from there on are padding; None for no padding. `labels`: of tokens
    that are queries and keys; a query attends only to keys whose label shares a bit with its own.
    """

    scale: float
    causal: bool = eqx.field(default=False, static=True)
    key_length: Int[Array, ""] | None = None
    labels: Int[Array, " tokens"] | None = None


def xla_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    bias: Float[Array, "heads queries keys"] | None,
    options: LogitOptions,
) -> Heads:
    """Compute attention with all of its logits in memory.

    On CPUs large logits are computed one head after another: plain matmuls, whose logits stay in
    the cache, took 0.6 of the time of a matmul batched over 24 heads of 1536 tokens. Small ones are
    computed in a few groups of heads: each operation reads and writes less, and XLA:CPU can run the
    operations of different groups on different cores.

    **Arguments:** `q`, `k`, `v`: [tokens, heads, head_dim]. `bias`: added to the logits. `options`:
    what else is done to them.
    **Returns:** the mixed values, in the dtype of `q`.
    """

    def one_head(q: Head, k: Head, v: Head, bias: Array | None) -> Head:
        return _head_attention(q, k, v, bias, options)

    # The heads of q, k and v are axis 1, and those of the bias are axis 0.
    over_heads = jax.vmap(one_head, in_axes=(1, 1, 1, 0), out_axes=1)

    def batched() -> Heads:
        return over_heads(q, k, v, bias)

    def grouped() -> Heads:
        count = math.gcd(heads, _CPU_GROUPS)
        q_k_v = [jnp.split(x, count, axis=1) for x in (q, k, v)]
        biases = [None] * count if bias is None else jnp.split(bias, count)
        return jnp.concatenate(list(map(over_heads, *q_k_v, biases)), axis=1)

    def sequential() -> Heads:
        if q.dtype.itemsize == 2:
            return _sequential_by_bits(q, k, v, bias, options)
        return _sequential(q, k, v, bias, options)

    queries, heads, _ = q.shape
    logit_bytes = 4 * heads * queries * len(k)
    if heads == 1:
        return batched()
    if logit_bytes < CPU_CACHE_BYTES:
        return grouped() if default_device().platform == "cpu" else batched()
    # Which one runs is decided when the program is compiled for its platform.
    return jax.lax.platform_dependent(cpu=sequential, default=batched)


def _sequential(
    q: Heads,
    k: Heads,
    v: Heads,
    bias: Array | None,
    options: LogitOptions,
) -> Heads:
    """Compute the attention of one head after another. The arguments are as of `xla_attention`."""

    def one_head(head: tuple) -> Head:
        q, k, v, bias = head
        return _head_attention(q, k, v, bias, options)

    mixed = jax.lax.map(one_head, _heads_first(q, k, v, bias))
    return jnp.swapaxes(mixed, 0, 1)


@jax.custom_jvp
def _sequential_by_bits(
    q: Heads,
    k: Heads,
    v: Heads,
    bias: Array | None,
    options: LogitOptions,
) -> Heads:
    """Compute `_sequential` of 16-bit numbers, which are moved as integers.

    XLA:CPU would move q, k, v and the result as float32: of 24 heads of 1536 tokens, attention
    takes 0.85 of the time this way.
    """
    dtype = q.dtype

    def one_head(head: tuple) -> Array:
        *bits, bias = head
        q, k, v = (from_bits(each, dtype) for each in bits)
        return to_bits(_head_attention(q, k, v, bias, options))

    heads_first = [jnp.swapaxes(to_bits(x), 0, 1) for x in (q, k, v)]
    mixed = jax.lax.map(one_head, (*heads_first, bias))
    return from_bits(jnp.swapaxes(mixed, 0, 1), dtype)


@_sequential_by_bits.defjvp
def _sequential_by_bits_jvp(primals: tuple, tangents: tuple) -> tuple[Heads, Heads]:
    """Differentiate `_sequential`, which moves no integers: these have no derivatives."""
    return jax.jvp(_sequential, primals, tangents)


def chunked_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    bias: Float[Array, "heads queries keys"] | None,
    options: LogitOptions,
    chunk: int | None = None,
) -> Heads:
    """Compute attention by one head and one chunk of its queries after another.

    The logits of a chunk are computed again for a gradient, and never stored.

    **Arguments:** `chunk`: queries of one chunk; None for as many as keep its logits below
    `CHUNK_LOGIT_BYTES`. The others are as of `xla_attention`.
    **Returns:** the mixed values.
    """
    queries, keys = len(q), len(k)
    if chunk is None:
        largest = max(1, CHUNK_LOGIT_BYTES // (4 * keys))
        size = balanced_block_size(queries, largest)
    else:
        size = min(chunk, queries)
    starts = jnp.arange(0, queries, size, dtype=jnp.int32)

    # Inside a loop the compiler merges nothing across iterations, so that the barriers which
    # prevent_cse adds would only cost time.
    @partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(start: Array, q: Head, k: Head, v: Head, bias: Array | None) -> Head:
        return _head_attention(q, k, v, bias, options, start)

    def one_head(head: tuple[Head, Head, Head, Array | None]) -> Head:
        q, k, v, bias = head
        if len(starts) == 1:
            return one_chunk(starts[0], q, k, v, bias)
        q = _split_rows(q, size)
        if bias is not None:
            bias = _split_rows(bias, size)
        # The gradients of k and v are summed over the chunks in the dtype that enters the loop.
        wide_k = k.astype(wide_dtype(k.dtype))
        wide_v = v.astype(wide_dtype(v.dtype))

        def body(chunk: tuple[Array, Head, Array | None]) -> Head:
            start, q, bias = chunk
            narrow_k = wide_k.astype(k.dtype)
            narrow_v = wide_v.astype(v.dtype)
            return one_chunk(start, q, narrow_k, narrow_v, bias)

        mixed = jax.lax.map(body, (starts, q, bias))
        joined = rearrange(mixed, "chunks q d -> (chunks q) d")
        # Without the padding of the last chunk.
        return joined[:queries]

    mixed = jax.lax.map(one_head, _heads_first(q, k, v, bias))
    return jnp.swapaxes(mixed, 0, 1)


def _heads_first(
    q: Heads,
    k: Heads,
    v: Heads,
    bias: Array | None,
) -> tuple[Array, Array, Array, Array | None]:
    """Return what `jax.lax.map` maps over heads.

    **Returns:** q, k and v as [heads, tokens, head_dim], and `bias` as it is: its heads come first
    already.
    """
    return (
        jnp.swapaxes(q, 0, 1),
        jnp.swapaxes(k, 0, 1),
        jnp.swapaxes(v, 0, 1),
        bias,
    )


def _split_rows(
    x: Float[Array, "queries columns"],
    size: int,
) -> Float[Array, "chunks size columns"]:
    """Split rows into chunks of one size; the last one is padded with zeros."""
    missing = round_up(len(x), size) - len(x)
    padded = jnp.pad(x, ((0, missing), (0, 0)))
    return rearrange(padded, "(chunks q) columns -> chunks q columns", q=size)


def _head_attention(
    q: Head,
    k: Head,
    v: Head,
    bias: Float[Array, "queries keys"] | None,
    options: LogitOptions,
    first_query: Int[Array, ""] | int = 0,
) -> Head:
    """Compute the attention of one head by two matmuls.

    With `jax.nn.dot_product_attention` instead, whose operands are transposed, a training step of
    a small FLUX took 1.2 times as long on XLA:CPU.

    **Arguments:** `first_query`: index of the first of these queries, for the causal mask. The
    others are as of `xla_attention`, of one head.
    **Returns:** the mixed values, in the dtype of `q`.
    """
    wide = wide_dtype(q.dtype)
    # Accumulated and kept in float32, also where q and k are bfloat16.
    products = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=wide)
    logits = options.scale * products
    if bias is not None:
        logits = logits + bias.astype(wide)
    # int32, as `key_length` is: with jax_enable_x64 the default would be int64, and JAX refuses to
    # compare the two where jax_numpy_dtype_promotion is "strict".
    keys = jnp.arange(k.shape[0], dtype=jnp.int32)
    if options.causal:
        queries = first_query + jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
        logits = jnp.where(queries >= keys, logits, -jnp.inf)
    if options.key_length is not None:
        # Not -inf: with a key_length of 0 softmax would give NaN. `attention` sets those to 0.
        lowest = jnp.finfo(wide).min
        logits = jnp.where(keys < options.key_length, logits, lowest)
    if options.labels is not None:
        # The last chunk has padding, whose rows are dropped; its label may be that of any token.
        rows = first_query + jnp.arange(q.shape[0], dtype=jnp.int32)
        own = jnp.take(options.labels, rows, mode="clip")
        visible = own[:, None] & options.labels != 0
        logits = jnp.where(visible, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    mixed = jnp.einsum("qk,kd->qd", weights, v, preferred_element_type=wide)
    return mixed.astype(q.dtype)
