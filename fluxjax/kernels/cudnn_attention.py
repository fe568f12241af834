"""Attention by cuDNN, through JAX's own function."""

from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fluxjax.kernels.xla_attention import Heads, LogitOptions
from fluxjax.shapes import Array, Float, Int

HeadsBatch = Float[Array, "batch tokens heads head_dim"]
LabelsBatch = Int[Array, "batch tokens"]


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

    **Arguments:** as of `xla_attention`, without labels; float16 or bfloat16.
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
    if queries % 2:
        q = _pad_by_one_token(q)
    mixed = jax.nn.dot_product_attention(
        q[None],
        k[None],
        v[None],
        bias=bias,
        is_causal=options.causal,
        scale=options.scale,
        key_value_seq_lengths=None if length is None else length[None],
        implementation="cudnn",
    )
    return mixed[0, :queries]


def cudnn_labelled_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    labels: Int[Array, " tokens"],
    scale: float,
) -> Heads:
    """Compute attention by cuDNN in which tokens see those whose label shares a bit with theirs.

    The labels become a mask of tokens x tokens, one for all heads: a bias in the dtype of `q`.
    Under `jax.vmap` JAX's own function refuses such a mask if it differs between the examples, or
    wants it once for each head, which for 4608 tokens of dev would take 1.0 GB instead of 42 MB. So
    examples become one batch here before JAX sees them.

    **Arguments:** `q`, `k`, `v`: of the same tokens; float16 or bfloat16. `labels`: not 0. `scale`:
    factor of the logits.
    **Returns:** the mixed values, in the dtype of `q`.
    """
    tokens = len(q)
    if tokens % 2:  # refused by JAX for gradients, as in `cudnn_attention`
        q, k, v = _pad_by_one_token(q), _pad_by_one_token(k), _pad_by_one_token(v)
        labels = jnp.pad(labels, (0, 1))  # which has no bit in common with any token
    attend = _batch_attention(scale)
    return attend(q[None], k[None], v[None], labels[None])[0, :tokens]


@cache
def _batch_attention(scale: float) -> Callable[..., HeadsBatch]:
    """Return attention by labels of a batch, to which `jax.vmap` adds examples."""

    def attend(q: HeadsBatch, k: HeadsBatch, v: HeadsBatch, labels: LabelsBatch) -> HeadsBatch:
        visible = labels[:, :, None] & labels[:, None, :] != 0
        return jax.nn.dot_product_attention(
            q, k, v, mask=visible[:, None], scale=scale, implementation="cudnn"
        )

    def pull_back(
        q: HeadsBatch, k: HeadsBatch, v: HeadsBatch, labels: LabelsBatch, cotangent: HeadsBatch
    ) -> tuple[HeadsBatch, HeadsBatch, HeadsBatch]:
        # The forward pass is computed again: its residuals are JAX's own.
        _, pull = jax.vjp(lambda q, k, v: attend(q, k, v, labels), q, k, v)
        return pull(cotangent)

    forward, backward = _with_merged_examples(attend), _with_merged_examples(pull_back)

    def save(*inputs: Array) -> tuple[HeadsBatch, tuple[Array, ...]]:
        return forward(*inputs), inputs

    def differentiate(inputs: tuple[Array, ...], cotangent: HeadsBatch) -> tuple[Array | None, ...]:
        return (*backward(*inputs, cotangent), None)  # labels have no gradient

    differentiable = jax.custom_vjp(forward)
    differentiable.defvjp(save, differentiate)
    return differentiable


def _with_merged_examples(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return a function of batches, whose examples under `jax.vmap` become one larger batch."""
    batched = jax.custom_batching.custom_vmap(function)

    @batched.def_vmap
    def merge(count: int, are_batched: Sequence[bool], *inputs: Array) -> tuple[PyTree, PyTree]:
        merged = []
        for one, is_batched in zip(inputs, are_batched, strict=True):
            of_all = one if is_batched else jnp.broadcast_to(one, (count, *one.shape))
            merged.append(of_all.reshape(-1, *of_all.shape[2:]))
        results = batched(*merged)
        divided = jax.tree.map(lambda one: one.reshape(count, -1, *one.shape[1:]), results)
        return divided, jax.tree.map(lambda one: True, divided)

    return batched


def _pad_by_one_token(x: Heads) -> Heads:
    return jnp.pad(x, ((0, 1), (0, 0), (0, 0)))
