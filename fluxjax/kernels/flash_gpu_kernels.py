"""What a program of each kernel of flash_gpu computes.

The backward pass computes the logits again, from the log-sum-exp of the forward pass: once for the
gradient of q, and once for those of k and v.

Exponentials are to base 2, and `spec.scale` has a factor log2(e) for that. The softmax is the same,
and the multiplication by the scale is the only one: e^x would be computed as 2^(x log2(e)).
The gradients of q and k are multiplied by the scale without that factor.
**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4; Dao 2023 (2307.08691).
"""

import math

import jax.numpy as jnp
from jax import lax

from fluxjax.kernels.flash_gpu_spec import GpuKernelSpec, KernelContext
from fluxjax.kernels.pallas_types import Step
from fluxjax.shapes import Array, Float

Matrix = Float[Array, "rows columns"]
Vector = Float[Array, " length"]

SoftmaxState = tuple[Matrix, Vector, Vector]
"""Sum of the weighted values, largest logit, and sum of the exponentials, of each query."""


def compute_forward(context: KernelContext) -> tuple[Matrix, Vector]:
    """Compute attention of a block of queries.

    **Arguments:** `context`: with q resident, and k and v streamed.
    **Returns:** the mixed values, and log2 of the sum of 2^logit of each query.
    """
    # The second tile, if there is one, is for the log-sum-exp and holds nothing yet.
    q, *_ = context.resident
    keys, values = context.streams
    rows, dim = q.shape
    _, size = context.spec.forward

    def add_block(masked: bool, step: Step, state: SoftmaxState) -> SoftmaxState:
        mixed, largest, total = state
        (k,) = keys.wait(step)
        # The other warpgroup gets the tensor cores as soon as this product is under way.
        logits = context.matmul_transposed(q, k, overlap=context.ping_pong)
        keys.free(step)

        updated, weights = _weigh(context, logits, largest, step, masked)
        # What was summed up to now is relative to the previous largest logit.
        rescale = jnp.exp2(largest - updated)
        mixed = mixed * _spread(rescale, mixed.shape)
        total = total * rescale + weights.sum(1)

        # The softmax is finished before this warpgroup waits for the tensor cores.
        mixed, updated, total, weights = context.ping_pong(
            mixed,
            updated,
            total,
            weights.astype(q.dtype),
        )
        (v,) = values.wait(step)
        mixed = context.add_matmul(mixed, weights, v)
        values.free(step)
        return mixed, updated, total

    context.start_ping_pong()
    state = (
        context.zeros(rows, dim),
        context.zeros(rows) - jnp.inf,
        context.zeros(rows),
    )
    mixed, largest, total = context.loop_over_keys(size, add_block, state)
    context.end_ping_pong()

    # Where there was no key the values are 0, rather than 0 / 0.
    inverse = 1 / jnp.where(total == 0, 1.0, total)
    mixed = mixed * _spread(inverse, mixed.shape)
    log_sum = largest + jnp.log(total) * math.log2(math.e)
    return mixed, log_sum


def _weigh(
    context: KernelContext,
    logits: Matrix,
    largest: Vector,
    step: Step,
    masked: bool,
) -> tuple[Vector, Matrix]:
    """Return the largest logit of the keys up to this step, and 2^logit relative to it."""
    _, size = context.spec.forward
    scale = context.spec.scale
    if masked:
        indices = step * size + context.iota(logits.shape, 1)
        logits = jnp.where(indices < context.key_end, scale * logits, -jnp.inf)
        # Masked logits are scaled already: a scale of 0 would make NaN of -inf.
        scale = 1.0
    # The largest product has the largest logit, since the scale is not negative.
    updated = jnp.maximum(largest, scale * logits.max(1))
    weights = jnp.exp2(scale * logits - _spread(updated, logits.shape))
    return updated, weights


def compute_dq(context: KernelContext) -> tuple[Matrix]:
    """Compute the gradient of a block of queries.

    **Arguments:** `context`: with k and v streamed. Resident are q, the gradient of the mixed
    values, their log-sum-exp, and delta: the sum of the mixed values times their gradient.
    **Returns:** the gradient of q.
    """
    q, grad, log_sum_tile, delta_tile = context.resident
    keys, values = context.streams
    spec = context.spec
    _, size = spec.dq
    log_sum = context.load_vector(log_sum_tile, 0)
    delta = context.load_vector(delta_tile, 0)

    def add_block(masked: bool, step: Step, total: Matrix) -> Matrix:
        (k,) = keys.wait(step)
        logits = context.matmul_transposed(q, k)
        weights = jnp.exp2(spec.scale * logits - _spread(log_sum, logits.shape))

        (v,) = values.wait(step)
        weight_grads = context.matmul_transposed(grad, v)
        values.free(step)

        # The gradient of softmax.
        logit_grads = weights * (weight_grads - _spread(delta, weight_grads.shape))
        if masked:
            indices = step * size + context.iota(logit_grads.shape, 1)
            logit_grads = jnp.where(indices < context.key_end, logit_grads, 0.0)
        total = context.add_matmul(total, logit_grads, k)
        keys.free(step)
        return total

    total = context.loop_over_keys(size, add_block, context.zeros(*q.shape))
    return (total * _natural_scale(spec),)


def compute_dkv(context: KernelContext) -> tuple[Matrix, Matrix]:
    """Compute the gradients of a block of keys and values.

    Logits are transposed here, [keys, queries]. Queries beyond the last are zeros, and so is what
    comes with them, so that they add nothing.

    **Arguments:** `context`: with k and v resident. Streamed are q with its log-sum-exp, and the
    gradient of the mixed values with delta, as of `compute_dq`.
    **Returns:** the gradients of k and of v.
    """
    k, v = context.resident
    queries, grads = context.streams
    spec = context.spec

    def add_block(step: Step, carry: tuple[Matrix, Matrix]) -> tuple[Matrix, Matrix]:
        dk, dv = carry
        q, log_sum_tile = queries.wait(step)
        logits = context.matmul_transposed(k, q)
        scaled = spec.scale * logits
        log_sum = context.load_vector(log_sum_tile, 1)
        weights = jnp.exp2(scaled - _spread(log_sum, logits.shape, 1))

        grad, delta_tile = grads.wait(step)
        dv = context.add_matmul(dv, weights, grad)
        weight_grads = context.matmul_transposed(v, grad)
        delta = context.load_vector(delta_tile, 1)
        # The gradient of softmax.
        logit_grads = weights * (weight_grads - _spread(delta, weight_grads.shape, 1))
        grads.free(step)

        # Only now is q no longer needed: it was read as the second operand above too.
        dk = context.add_matmul(dk, logit_grads, q)
        queries.free(step)
        return dk, dv

    zeros = context.zeros(*k.shape), context.zeros(*k.shape)
    dk, dv = lax.fori_loop(0, context.steps, add_block, zeros)
    # Padding has no gradient, whatever it holds.
    indices = context.first_token + context.iota(k.shape, 0)
    real = indices < context.key_end
    dk = jnp.where(real, dk * _natural_scale(spec), 0.0)
    dv = jnp.where(real, dv, 0.0)
    return dk, dv


def _natural_scale(spec: GpuKernelSpec) -> float:
    """Return the scale of the logits without the factor of log2(e) that is for base 2."""
    return spec.scale / math.log2(math.e)


def _spread(vector: Vector, shape: tuple[int, ...], axis: int = 0) -> Matrix:
    """Broadcast a vector along an axis to a matrix of a shape."""
    return lax.broadcast_in_dim(vector, shape, (axis,))
