"""Attention by cuDNN, through JAX's own function."""

import jax
import jax.numpy as jnp

from fluxjax.kernels.xla_attention import Heads, LogitOptions
from fluxjax.shapes import Array, Float


def cudnn_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    bias: Float[Array, "heads queries keys"] | None,
    options: LogitOptions,
) -> Heads:
    """Compute attention by cuDNN, which takes a batch: here of one example.

    JAX refuses gradients of cuDNN's attention for odd numbers of tokens, and the forward pass
    cannot know whether it will be differentiated. So odd numbers are padded by one token, which
    is masked.

    Labels become a mask of tokens x tokens, one for all heads: a bias in the dtype of `q`.

    **Arguments:** as of `xla_attention`; float16 or bfloat16.
    **Returns:** the mixed values, in the dtype of `q`.
    """
    queries, keys = len(q), len(k)
    length = options.key_length
    if keys % 2:
        k = _pad_by_one_token(k)
        v = _pad_by_one_token(v)
        if length is None:
            length = jnp.int32(keys)
    if bias is not None:
        padding = ((0, 0), (0, queries % 2), (0, keys % 2))
        bias = jnp.pad(bias, padding)[None].astype(q.dtype)
    mask = None
    if options.labels is not None:
        # Padding has no bit in common with any token.
        labels = jnp.pad(options.labels, (0, keys % 2))
        mask = (labels[:, None] & labels != 0)[None, None]
    if queries % 2:
        q = _pad_by_one_token(q)
    mixed = jax.nn.dot_product_attention(
        q[None],
        k[None],
        v[None],
        bias=bias,
        mask=mask,
        is_causal=options.causal,
        scale=options.scale,
        key_value_seq_lengths=None if length is None else length[None],
        implementation="cudnn",
    )
    return mixed[0, :queries]


def _pad_by_one_token(x: Heads) -> Heads:
    return jnp.pad(x, ((0, 1), (0, 0), (0, 0)))
