"""What a program of each kernel of flash_gpu computes.

The backward pass computes the logits again, from the log-sum-exp of the forward pass: once for the
gradient of q, and once for those of k and v.
**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4; Dao 2023 (2307.08691).
"""

import math

import jax.numpy as jnp
from jax import lax

from fluxjax.kernels.flash_gpu_spec import KernelContext
from fluxjax.kernels.pallas_types import Index
from fluxjax.shapes import Array, Float

Matrix = Float[Array, "rows columns"]
Vector = Float[Array, " length"]
SoftmaxState = tuple[Matrix, Vector, Vector]
"""Sum of the weighted values, largest logit, and sum of the exponentials."""


def compute_forward(context: KernelContext) -> tuple[Array, ...]:
    """Return the mixed values of the queries, and log2 of the sum of 2^logit of each."""
    (q, *_), (keys, values) = context.resident, context.streams
    (rows, dim), size = q.shape, context.spec.forward[1]

    def add_block(masked: bool, step: Index, state: SoftmaxState) -> SoftmaxState:
        mixed, largest, total = state
        (k,) = keys.wait(step)
        logits = context.matmul_transposed(q, k, overlap=context.ping_pong)
        keys.free(step)
        scale = context.spec.scale
        if masked:
            indices = step * size + context.iota(logits.shape, 1)
            logits = jnp.where(indices < context.key_end, scale * logits, -jnp.inf)
            scale = 1.0
        updated = jnp.maximum(largest, scale * logits.max(1))
        weights = jnp.exp2(scale * logits - _spread(updated, logits.shape))
        rescale = jnp.exp2(largest - updated)
        mixed = mixed * _spread(rescale, mixed.shape)
        total = total * rescale + weights.sum(1)
        mixed, updated, total, weights = context.ping_pong(
            mixed, updated, total, weights.astype(q.dtype)
        )
        (v,) = values.wait(step)
        mixed = context.add_matmul(mixed, weights, v)
        values.free(step)
        return mixed, updated, total

    context.start_ping_pong()
    state = context.zeros(rows, dim), context.zeros(rows) - jnp.inf, context.zeros(rows)
    mixed, largest, total = context.loop_over_keys(size, add_block, state)
    context.end_ping_pong()
    # Where there was no key the values are 0, rather than 0 / 0.
    mixed = mixed * _spread(1 / jnp.where(total == 0, 1.0, total), mixed.shape)
    return mixed, largest + jnp.log(total) * math.log2(math.e)


def compute_dq(context: KernelContext) -> tuple[Array, ...]:
    """Return the gradient of the queries.

    Resident are q, the gradient of the mixed values, their log-sum-exp, and delta: the sum of the
    mixed values times their gradient.
    """
    (q, grad, log_sum_tile, delta_tile), (keys, values) = context.resident, context.streams
    spec, size = context.spec, context.spec.dq[1]
    log_sum, delta = context.load_vector(log_sum_tile, 0), context.load_vector(delta_tile, 0)

    def add_block(masked: bool, step: Index, total: Matrix) -> Matrix:
        (k,) = keys.wait(step)
        logits = context.matmul_transposed(q, k)
        weights = jnp.exp2(spec.scale * logits - _spread(log_sum, logits.shape))
        (v,) = values.wait(step)
        weight_grads = context.matmul_transposed(grad, v)
        values.free(step)
        logit_grads = weights * (weight_grads - _spread(delta, weight_grads.shape))
        if masked:
            indices = step * size + context.iota(logit_grads.shape, 1)
            logit_grads = jnp.where(indices < context.key_end, logit_grads, 0.0)
        total = context.add_matmul(total, logit_grads, k)
        keys.free(step)
        return total

    total = context.loop_over_keys(size, add_block, context.zeros(*q.shape))
    return (total * (spec.scale / math.log2(math.e)),)


def compute_dkv(context: KernelContext) -> tuple[Array, ...]:
    """Return the gradients of the keys and of the values.

    Streamed are q with its log-sum-exp, and the gradient of the mixed values with delta. Logits
    are transposed here, [keys, queries]. Queries beyond the last are zeros, and so are what comes
    with them: they add nothing.
    """
    (k, v), (queries, grads) = context.resident, context.streams
    spec = context.spec

    def add_block(step: Index, carry: tuple[Matrix, Matrix]) -> tuple[Matrix, Matrix]:
        dk, dv = carry
        q, log_sum_tile = queries.wait(step)
        logits = context.matmul_transposed(k, q)
        scaled = spec.scale * logits
        log_sum = _spread(context.load_vector(log_sum_tile, 1), logits.shape, 1)
        weights = jnp.exp2(scaled - log_sum)
        grad, delta_tile = grads.wait(step)
        dv = context.add_matmul(dv, weights, grad)
        weight_grads = context.matmul_transposed(v, grad)
        delta = _spread(context.load_vector(delta_tile, 1), weight_grads.shape, 1)
        logit_grads = weights * (weight_grads - delta)
        grads.free(step)
        dk = context.add_matmul(dk, logit_grads, q)
        queries.free(step)
        return dk, dv

    zeros = context.zeros(*k.shape), context.zeros(*k.shape)
    dk, dv = lax.fori_loop(0, context.steps, add_block, zeros)
    real = context.first_token + context.iota(k.shape, 0) < context.key_end
    dk = jnp.where(real, dk * (spec.scale / math.log2(math.e)), 0.0)
    return dk, jnp.where(real, dv, 0.0)


def _spread(vector: Vector, shape: tuple[int, ...], axis: int = 0) -> Matrix:
    """Broadcast a vector along an axis to a matrix of a shape."""
    return lax.broadcast_in_dim(vector, shape, (axis,))
