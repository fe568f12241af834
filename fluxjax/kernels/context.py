"""Attention over tokens that are split among devices: Ulysses' exchange of heads for tokens, and a ring of keys and values."""

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.kernels.attention import Attention, as_attention
from fluxjax.shapes import Array, Float, ScalarLike

Heads = Float[Array, "tokens heads head_dim"]


class Ulysses(eqx.Module):
    """Joint attention in a `jax.shard_map` in which each device has a part of the text's tokens and of the image's, as many
    each: every device mixes all tokens of its share of the heads.

    `axis`: of the mesh. `txt_tokens`, `img_tokens`: in all; what the parts hold beyond them is padding, which no token sees.
    `implementation`: of `fluxjax.attention`. Heads must be divisible among the devices. Moves 4 / n of q, k and v.
    **Source:** Jacobs et al. 2023 (2309.14509).
    """

    axis: str = eqx.field(static=True)
    txt_tokens: int = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)
    implementation: str | Attention | None = eqx.field(static=True, default=None)

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_part: int) -> Heads:
        devices = jax.lax.axis_size(self.axis)
        if q.shape[1] % devices:
            raise ValueError(
                f"`Ulysses` splits {q.shape[1]} heads among {devices} devices, which must divide them. Use `Ring`."
            )

        def exchange(x: Array, split: int) -> Array:
            return jax.lax.all_to_all(x, self.axis, split_axis=split, concat_axis=1 - split, tiled=True)

        def collect(x: Array) -> tuple[Array, Array]:
            # Heads are columns here, as the projection and flash_tpu have them: TPUs would lay out an axis of heads anew.
            columns = rearrange(x, "tokens heads dim -> tokens (heads dim)")
            return exchange(columns[:txt_part], 1), exchange(columns[txt_part:], 1)

        def heads(text: Array, image: Array) -> Array:
            return rearrange(jnp.concatenate([text, image]), "tokens (heads dim) -> tokens heads dim", dim=q.shape[-1])

        def real(x: Array) -> Array:
            text, image = collect(x)
            return heads(text[: self.txt_tokens], image[: self.img_tokens])

        text, image = collect(q)
        mixed = as_attention(self.implementation)(heads(text, image), real(k), real(v))
        mixed = rearrange(mixed, "tokens heads dim -> tokens (heads dim)")
        mixed = jnp.concatenate([exchange(mixed[: len(text)], 0), exchange(mixed[len(text) :], 0)])
        return rearrange(mixed, "tokens (heads dim) -> tokens heads dim", dim=q.shape[-1])


class Ring(eqx.Module):
    """As `Ulysses`, for any number of heads: keys and values go round the devices, a part at a time, and each device adds up
    what its own queries take from them.

    Moves k and v (n - 1) / n times. Sums and maxima are float32.
    **Source:** Liu et al. 2023 (2310.01889).
    """

    axis: str = eqx.field(static=True)
    txt_tokens: int = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_part: int) -> Heads:
        devices, index = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        img_part = len(k) - txt_part
        queries = q.astype(jnp.float32) * q.shape[-1] ** -0.5
        onward = [(i, (i + 1) % devices) for i in range(devices)]

        def seen(taken: tuple, number: ScalarLike, k: Array, v: Array) -> tuple:
            owner = (index - number) % devices
            text = owner * txt_part + jnp.arange(txt_part) < self.txt_tokens
            image = owner * img_part + jnp.arange(img_part) < self.img_tokens
            return _take(queries, k, v, jnp.concatenate([text, image]), taken)

        def turn(number: Array, carry: tuple) -> tuple:
            taken, k, v = carry
            # Sent before it is used, so that the transfer and the sums can overlap.
            sent = [jax.lax.ppermute(x, self.axis, onward) for x in (k, v)]
            return seen(taken, number, k, v), *sent

        none = jnp.full((q.shape[1], len(q)), -jnp.inf)
        taken = (none, jnp.zeros_like(none), jnp.zeros(queries.shape))
        taken, k, v = jax.lax.fori_loop(0, devices - 1, turn, (taken, k, v))
        _, weights, values = seen(taken, devices - 1, k, v)
        return (values / weights.T[..., None]).astype(q.dtype)


def _take(queries: Array, k: Array, v: Array, real: Array, before: tuple) -> tuple[Array, Array, Array]:
    """Return (largest logit, sum of weights, sum of weighted values) over the keys seen before and these."""
    logits = jnp.where(real, jnp.einsum("qhd,khd->hqk", queries, k.astype(jnp.float32)), -jnp.inf)
    largest = jnp.maximum(before[0], jnp.max(logits, axis=-1, initial=-jnp.inf))
    # Where nothing has been seen yet there is nothing to rescale either.
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    kept, exponent = jnp.exp(before[0] - shift), jnp.exp(logits - shift[..., None])
    weights = before[1] * kept + exponent.sum(-1)
    values = before[2] * kept.T[..., None] + jnp.einsum("hqk,khd->qhd", exponent, v.astype(jnp.float32))
    return largest, weights, values
