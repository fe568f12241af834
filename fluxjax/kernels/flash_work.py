"""What the kernels of flash_gpu compute, whichever compiler they are for: with a block of one side, over those of the other.

The backward pass computes the logits again, from the forward's log-sum-exp: once for q's gradient, once for those of k and v.
**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4; Dao 2023 (2307.08691).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fluxjax.kernels.blocks import round_up
from fluxjax.shapes import Array


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is static in a call: a `scale` to base 2; blocks of (queries, keys) a kernel; `keys`, beyond which is padding.

    `run` runs a kernel, as `fluxjax.kernels.flash_mosaic.run` does.
    """

    scale: float
    keys: int
    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    run: Callable
    interpret: Any

    def sides(self, kernel: str) -> tuple[int, int]:
        """Return the tokens of a program's own block, and of one that is streamed."""
        return self.dkv[::-1] if kernel == "dkv" else getattr(self, kernel)

    def steps(self, kernel: str, others: int, seen: Any, start: Any) -> Any:
        """Return how many of the blocks of `others` tokens are streamed to a program whose own block begins at `start`."""
        size = self.sides(kernel)[1]
        if isinstance(seen, int):
            return pl.cdiv(others if kernel == "dkv" else seen, size)
        if kernel == "dkv":  # none, for keys that are padding
            return jnp.where(start < seen, jnp.int32(pl.cdiv(others, size)), jnp.int32(0))
        return lax.div(seen + (size - 1), jnp.int32(size))


def padded(x: Array, multiple: int) -> Array:
    """Pad the tokens of a matrix, [tokens, heads, head_dim], or of a row, [heads, tokens], by zeros."""
    axis = 0 if x.ndim == 3 else 1
    missing = round_up(x.shape[axis], multiple) - x.shape[axis]
    return jnp.pad(x, [(0, missing if axis == i else 0) for i in range(x.ndim)]) if missing else x


def cut(x: Array, tokens: int) -> Array:
    """Return the first tokens of a matrix or of a row."""
    return x[:tokens] if x.ndim == 3 else x[:, :tokens]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Who computes: `own`, references to its blocks; `streams`, each with `wait(step)` for what comes and `free(step)`.

    `first` is the token that its rows begin with; `seen` the keys that are no padding; `steps` the blocks that come. A row
    along `axis` 0 of a matrix has a value for each of its rows, along 1 for each of its columns.
    """

    call: Call
    own: list
    streams: list
    first: Any
    seen: Any
    steps: Any

    def zeros(self, *shape: int) -> Array:
        """Return zeros, a matrix or a row along axis 0."""
        return jnp.zeros(shape, jnp.float32)

    def row(self, x: Any, axis: int) -> Array:
        return x[...]

    def numbered(self, shape: tuple[int, ...], axis: int) -> Array:
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def product(self, a: Any, b: Any, *, meanwhile: Callable[[], Any] = lambda: None) -> Array:
        """Return a b^T, and do something else meanwhile."""
        meanwhile()
        return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)

    def added(self, total: Array, a: Array, b: Any) -> Array:
        """Return total + a b, of an `a` rounded to b's dtype."""
        return total + jnp.dot(a.astype(b.dtype), b[...], preferred_element_type=jnp.float32)

    def turn(self, *done: Array) -> tuple[Array, ...]:
        """Let another worker multiply, until it is done, and return what is to be done before."""
        return done

    def begin(self) -> None:
        """Start the turns."""

    def end(self) -> None:
        """End the turns."""

    def over_keys(self, size: int, take: Callable, carry: Any) -> Any:
        """Take every block of `size` keys, (masked, step, carry) -> carry; masked is the one that keys end in."""
        if isinstance(self.seen, int):
            whole = self.seen // size
            carry = lax.fori_loop(0, whole, partial(take, False), carry)
            return (
                carry
                if whole == self.steps
                else lax.fori_loop(whole, self.steps, partial(take, True), carry)
            )
        end = lax.div(self.seen, jnp.int32(size))
        return lax.fori_loop(
            end, self.steps, partial(take, True), lax.fori_loop(0, end, partial(take, False), carry)
        )


def _wide(row: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
    return lax.broadcast_in_dim(row, shape, (axis,))


def mix(at: Worker) -> tuple[Array, ...]:
    """Return the mixed values of own queries, and log2 of the sum of 2^logit of each."""
    (q, *_), (keys, values) = at.own, at.streams
    (rows, dim), size = q.shape, at.call.forward[1]

    def take(masked: bool, step: Any, carry: tuple) -> tuple:
        mixed, largest, total = carry
        logits, scale = at.product(q, *keys.wait(step), meanwhile=at.turn), at.call.scale
        keys.free(step)
        if masked:
            logits = jnp.where(
                step * size + at.numbered(logits.shape, 1) < at.seen, scale * logits, -jnp.inf
            )
            scale = 1.0
        now = jnp.maximum(largest, scale * logits.max(1))
        weights, kept = jnp.exp2(scale * logits - _wide(now, logits.shape)), jnp.exp2(largest - now)
        mixed, total = mixed * _wide(kept, mixed.shape), total * kept + weights.sum(1)
        mixed, now, total, weights = at.turn(mixed, now, total, weights.astype(q.dtype))
        mixed = at.added(mixed, weights, *values.wait(step))
        values.free(step)
        return mixed, now, total

    at.begin()
    mixed, largest, total = at.over_keys(
        size, take, (at.zeros(rows, dim), at.zeros(rows) - jnp.inf, at.zeros(rows))
    )
    at.end()
    # No key seen: no values, rather than 0 / 0.
    mixed = mixed * _wide(1 / jnp.where(total == 0, 1.0, total), mixed.shape)
    return mixed, largest + jnp.log(total) * math.log2(math.e)


def gradient_of_q(at: Worker) -> tuple[Array, ...]:
    """Return the gradient of own queries, of which there are the mixed values' gradients, and sums."""
    (q, grad, *sums), (keys, values), size = at.own, at.streams, at.call.dq[1]
    residual, delta = (at.row(x, 0) for x in sums)

    def take(masked: bool, step: Any, total: Array) -> Array:
        (k,) = keys.wait(step)
        logits = at.product(q, k)
        weights = jnp.exp2(at.call.scale * logits - _wide(residual, logits.shape))
        towards = at.product(grad, *values.wait(step))
        values.free(step)
        slopes = weights * (towards - _wide(delta, towards.shape))
        if masked:
            slopes = jnp.where(step * size + at.numbered(slopes.shape, 1) < at.seen, slopes, 0.0)
        total = at.added(total, slopes, k)
        keys.free(step)
        return total

    return (at.over_keys(size, take, at.zeros(*q.shape)) * (at.call.scale / math.log2(math.e)),)


def gradient_of_k_and_v(at: Worker) -> tuple[Array, ...]:
    """Return the gradients of own keys and values. All is transposed here, [keys, queries].

    Queries beyond the last are zeros, and so are their sums and their gradients: they add nothing.
    """
    (k, v), (queries, grads) = at.own, at.streams

    def take(step: Any, carry: tuple) -> tuple:
        dk, dv = carry
        q, residual = queries.wait(step)
        logits = at.product(k, q)
        weights = jnp.exp2(at.call.scale * logits - _wide(at.row(residual, 1), logits.shape, 1))
        grad, delta = grads.wait(step)
        dv = at.added(dv, weights, grad)
        towards = at.product(v, grad)
        slopes = weights * (towards - _wide(at.row(delta, 1), towards.shape, 1))
        grads.free(step)
        dk = at.added(dk, slopes, q)
        queries.free(step)
        return dk, dv

    dk, dv = lax.fori_loop(0, at.steps, take, (at.zeros(*k.shape), at.zeros(*k.shape)))
    real = at.first + at.numbered(k.shape, 0) < at.seen
    return jnp.where(real, dk * (at.call.scale / math.log2(math.e)), 0.0), jnp.where(real, dv, 0.0)
