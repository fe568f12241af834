"""Attention by its default implementation, against float64."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from implementations import operands

from fluxjax import attention
from fluxjax.kernels.cudnn_attention import cudnn_attention
from fluxjax.kernels.xla_attention import LogitOptions, xla_attention

# One program for each shape, rather than one for each operation.
attend = jax.jit(attention)


def exact(q, k, v, scale, bias=None, causal=False):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = scale * np.einsum("qhd,khd->hqk", q, k)
    if bias is not None:
        logits += np.asarray(bias, np.float64)
    if causal:
        logits[:, np.arange(len(q))[:, None] < np.arange(len(k))] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


@settings(max_examples=10)  # each shape compiles
@given(
    queries=st.integers(1, 20),
    keys=st.integers(1, 20),
    heads=st.integers(1, 4),
    dim=st.sampled_from([1, 8, 17]),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_attention_equals_float64(queries, keys, heads, dim, seed, size):
    q, k, v, _ = operands(queries, keys, heads, dim, seed, size)
    # Logits reach 1e4 here, where float32 resolves 1e-3: their exponentials differ by as much.
    atol = 1e-5 * size if size <= 1 else 3e-3 * size
    np.testing.assert_allclose(attend(q, k, v), exact(q, k, v, dim**-0.5), atol=atol)


def test_bias_scale_and_causality_equal_float64():
    q, k, v, _ = operands(9, 9, 2, 8, 0)
    bias = jax.random.normal(jax.random.key(9), (2, 9, 9))
    found = jax.jit(partial(attention, causal=True, scale=0.7))(q, k, v, bias=bias)
    np.testing.assert_allclose(found, exact(q, k, v, 0.7, bias, causal=True), atol=1e-5)


def test_bfloat16_sums_in_float32():
    q, k, v, _ = operands(5, 4000, 1, 16, 0, dtype=jnp.bfloat16)
    found = attend(q, k, v)
    assert found.dtype == jnp.bfloat16
    # The weights and the result are each rounded once, to 2^-8 of values of some 1 / sqrt(4000).
    expected = exact(q, k, v, 0.25)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=2**-8 * 0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"key_length": jnp.int32(7)},
        {"labels": jnp.arange(12, dtype=jnp.int32) % 3 + 1},
    ],
    ids=lambda options: str(*options),
)
def test_heads_of_bfloat16_one_after_another_are_those_of_float32(options, monkeypatch):
    """As CPUs compute large logits, with the derivatives of both modes, of a batch."""
    *inputs, grad = (jnp.stack([x, 2 * x]) for x in operands(12, 12, 3, 8, 1, dtype=jnp.bfloat16))
    inputs.append(jax.random.normal(jax.random.key(9), (2, 3, 12, 12), jnp.bfloat16))

    def run(*inputs):
        attend = partial(xla_attention, options=LogitOptions(0.3, **options))
        mixed, change = jax.jvp(jax.vmap(attend), inputs, inputs)
        _, pull = jax.vjp(jax.vmap(attend), *inputs)
        return [mixed, change, *pull(grad.astype(mixed.dtype))]

    monkeypatch.setattr(sys.modules["fluxjax.kernels.xla_attention"], "CPU_CACHE_BYTES", 0)
    for found, expected in zip(
        jax.jit(run)(*inputs),
        jax.jit(run)(*(x.astype(jnp.float32) for x in inputs)),
        strict=True,
    ):
        assert found.dtype == jnp.bfloat16
        # Weights, their gradients and results are rounded to 2^-9 of them, one after another.
        error = np.linalg.norm(np.asarray(found, np.float64) - expected)
        assert error < 3 * 2**-9 * np.linalg.norm(expected)


def test_gradients_equal_finite_differences_under_vmap():
    batched = [jnp.stack([x, 2 * x]) for x in operands(4, 5, 2, 4, 3)[:3]]
    jax.test_util.check_grads(
        jax.jit(jax.vmap(attention)), batched, order=1, modes=("fwd", "rev"), rtol=1e-2
    )


def test_odd_numbers_of_tokens_are_padded_for_cudnn(monkeypatch):
    """cuDNN's gradients exist for even numbers only; XLA computes here what cuDNN is given."""
    by_xla, counts = jax.nn.dot_product_attention, []

    def without_cudnn(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        counts.append((q.shape[1], k.shape[1]))
        return by_xla(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    for queries, keys, length in ((5, 5, None), (4, 7, None), (5, 6, 5), (3, 7, 4)):
        q, k, v, _ = operands(queries, keys, 2, 8, seed=0)
        options = LogitOptions(1.0, False, None if length is None else jnp.int32(length))
        found = jax.jit(partial(cudnn_attention, bias=None, options=options))(q, k, v)
        expected = exact(q, k[:length], v[:length], 1.0)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert counts == [(6, 6), (4, 8), (6, 6), (4, 8)]
