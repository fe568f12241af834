"""Attention over tokens that are split among devices: Ulysses' exchange of heads for tokens, and a ring of keys and values."""

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.kernels.attention import attention
from fluxjax.shapes import Array, Float, ScalarLike

Heads = Float[Array, "tokens heads head_dim"]


class Ulysses(eqx.Module):
    """Joint attention in a `jax.shard_map` in which each device has all of the text's tokens and a part of the image's, as many
    each: every device mixes all tokens of its share of the heads.

    `axis`: of the mesh. `img_tokens`: of the image, in all; what the parts hold beyond them is padding, which no token sees.
    `implementation`: of `fluxjax.attention`. Heads must be divisible among the devices. Moves 4 / n of the image's q, k and v.
    **Source:** Jacobs et al. 2023 (2309.14509).
    """

    axis: str = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True, default=None)

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_tokens: int) -> Heads:
        devices, index = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        if q.shape[1] % devices:
            raise ValueError(
                f"`Ulysses` splits {q.shape[1]} heads among {devices} devices, which must divide them. Use `Ring`."
            )
        share = q.shape[1] // devices

        def collect(x: Array) -> Array:
            text = jax.lax.dynamic_slice_in_dim(x[:txt_tokens], index * share, share, axis=1)
            image = jax.lax.all_to_all(x[txt_tokens:], self.axis, split_axis=1, concat_axis=0, tiled=True)
            return jnp.concatenate([text, image])

        q, k, v = collect(q), collect(k), collect(v)
        seen = txt_tokens + self.img_tokens
        mixed = attention(q, k[:seen], v[:seen], implementation=self.implementation)
        text = jax.lax.all_gather(mixed[:txt_tokens], self.axis, axis=1, tiled=True)
        image = jax.lax.all_to_all(mixed[txt_tokens:], self.axis, split_axis=0, concat_axis=1, tiled=True)
        return jnp.concatenate([text, image])


class Ring(eqx.Module):
    """As `Ulysses`, for any number of heads: the image's keys and values go round the devices, a part at a time, and each
    device adds up what its own queries take from them.

    Moves the image's k and v (n - 1) / n times. Sums and maxima are float32.
    **Source:** Liu et al. 2023 (2310.01889).
    """

    axis: str = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_tokens: int) -> Heads:
        devices, index = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        part = len(k) - txt_tokens
        queries = q.astype(jnp.float32) * q.shape[-1] ** -0.5
        onward = [(i, (i + 1) % devices) for i in range(devices)]

        def seen(taken: tuple, number: ScalarLike, k: Array, v: Array) -> tuple:
            owner = (index - number) % devices
            return _take(queries, k, v, owner * part + jnp.arange(part) < self.img_tokens, taken)

        def turn(number: Array, carry: tuple) -> tuple:
            taken, k, v = carry
            # Sent before it is used, so that the transfer and the sums can overlap.
            sent = [jax.lax.ppermute(x, self.axis, onward) for x in (k, v)]
            return seen(taken, number, k, v), *sent

        taken = _take(queries, k[:txt_tokens], v[:txt_tokens], None, None)
        taken, k, v = jax.lax.fori_loop(0, devices - 1, turn, (taken, k[txt_tokens:], v[txt_tokens:]))
        _, weights, values = seen(taken, devices - 1, k, v)
        return (values / weights.T[..., None]).astype(q.dtype)


def _take(queries: Array, k: Array, v: Array, real: Array | None, before: tuple | None) -> tuple[Array, Array, Array]:
    """Return (largest logit, sum of weights, sum of weighted values) over the keys seen before and these."""
    logits = jnp.einsum("qhd,khd->hqk", queries, k.astype(jnp.float32))
    logits = logits if real is None else jnp.where(real, logits, -jnp.inf)
    if before is None:
        none = jnp.full(logits.shape[:2], -jnp.inf)
        before = (none, jnp.zeros(logits.shape[:2]), jnp.zeros(queries.shape))
    largest = jnp.maximum(before[0], jnp.max(logits, axis=-1, initial=-jnp.inf))
    # Where nothing has been seen yet there is nothing to rescale either.
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    kept, exponent = jnp.exp(before[0] - shift), jnp.exp(logits - shift[..., None])
    weights = before[1] * kept + exponent.sum(-1)
    values = before[2] * kept.T[..., None] + jnp.einsum("hqk,khd->qhd", exponent, v.astype(jnp.float32))
    return largest, weights, values
