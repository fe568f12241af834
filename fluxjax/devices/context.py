"""Attention over tokens that are split among devices: Ulysses' exchange of heads for tokens, and a ring of keys and values."""

from collections.abc import Sequence
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.kernels.attention import Attention, as_attention
from fluxjax.kernels.guiding import Nag
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, ScalarLike

Heads = Float[Array, "tokens heads head_dim"]


class Ulysses(eqx.Module):
    """Joint attention in a `jax.shard_map` in which each device has a part of the text's tokens and of the image's, as many
    each: every device mixes all tokens of its share of the heads.

    `axis`: of the mesh. `txt_tokens`, `img_tokens`: in all; what the parts hold beyond them is padding, which no token sees.
    `implementation`: of `fluxjax.attention`. `nag`: guides inside of it; the text then holds both prompts. Heads must be
    divisible among the devices. Moves 4 / n of q, k and v.
    **Source:** Jacobs et al. 2023 (2309.14509).
    """

    axis: str = eqx.field(static=True)
    txt_tokens: int = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)
    implementation: str | Attention | None = eqx.field(static=True, default=None)
    nag: Nag | None = None

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_part: int) -> Heads:
        devices = jax.lax.axis_size(self.axis)
        if q.shape[1] % devices:
            raise ValueError(
                f"`Ulysses` splits {q.shape[1]} heads among {devices} devices, which must divide them. Use `Ring`."
            )

        def exchange(x: Array, split: int) -> Array:
            return jax.lax.all_to_all(
                x, self.axis, split_axis=split, concat_axis=1 - split, tiled=True
            )

        def collect(x: Array) -> tuple[Array, Array]:
            # Heads are columns here, as the projection and flash_tpu have them: TPUs would lay out an axis of heads anew.
            columns = rearrange(x, "tokens heads dim -> tokens (heads dim)")
            return exchange(columns[:txt_part], 1), exchange(columns[txt_part:], 1)

        def real(x: Array) -> Array:
            text, image = collect(x)
            joint = jnp.concatenate([text[: self.txt_tokens], image[: self.img_tokens]])
            return rearrange(joint, "tokens (heads dim) -> tokens heads dim", dim=q.shape[-1])

        def give_back(x: Array, part: int) -> Array:
            return exchange(jnp.pad(x, ((0, devices * part - len(x)), (0, 0))), 0)

        mixed = rearrange(
            self._mixed(real(q), real(k), real(v)), "tokens heads dim -> tokens (heads dim)"
        )
        text, image = mixed[: self.txt_tokens], mixed[self.txt_tokens :]
        mixed = jnp.concatenate([give_back(text, txt_part), give_back(image, len(q) - txt_part)])
        return rearrange(mixed, "tokens (heads dim) -> tokens heads dim", dim=q.shape[-1])

    def _mixed(self, q: Heads, k: Heads, v: Heads) -> Heads:
        if self.nag is None:
            return as_attention(self.implementation)(q, k, v)
        # Its norms are over all heads of a token, which are split over this axis too.
        nag = replace(
            self.nag, implementation=self.implementation, over=(*self.nag.over, self.axis)
        )
        return nag(q, k, v, self.txt_tokens)


class Ring(eqx.Module):
    """As `Ulysses`, for any number of heads: keys and values go round the devices, a part at a time, and each device adds up
    what its own queries take from them.

    `nag`: guides inside of it; the text then holds both prompts, and each is attended to by itself. Moves k and v (n - 1) / n
    times. Sums and maxima are float32 at least.
    **Source:** Liu et al. 2023 (2310.01889).
    """

    axis: str = eqx.field(static=True)
    txt_tokens: int = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)
    nag: Nag | None = None

    def __call__(self, q: Heads, k: Heads, v: Heads, txt_part: int) -> Heads:
        if self.nag is None:
            return self._mixed(q, k, v, txt_part, [(0, self.txt_tokens)])[0]
        half = self.txt_tokens // 2
        away, toward = self._mixed(q, k, v, txt_part, [(0, half), (half, self.txt_tokens)])
        numbers = jax.lax.axis_index(self.axis) * txt_part + jnp.arange(txt_part)
        text = jnp.where((numbers < half)[:, None, None], away[:txt_part], toward[:txt_part])
        return jnp.concatenate([text, self.nag.combine(toward[txt_part:], away[txt_part:])])

    def _mixed(
        self, q: Heads, k: Heads, v: Heads, txt_part: int, texts: Sequence[tuple[int, int]]
    ) -> list[Heads]:
        """Return what the queries take from the image and the text's tokens from start to stop, for each of some of these."""
        devices, index = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        img_part, wide = len(k) - txt_part, wide_dtype(q.dtype)
        queries = q.astype(wide) * q.shape[-1] ** -0.5
        onward = [(i, (i + 1) % devices) for i in range(devices)]

        def seen(taken: tuple, number: ScalarLike, k: Array, v: Array) -> tuple:
            owner = (index - number) % devices
            text = owner * txt_part + jnp.arange(txt_part)
            image = owner * img_part + jnp.arange(img_part) < self.img_tokens
            masks = [
                jnp.concatenate([(start <= text) & (text < stop), image]) for start, stop in texts
            ]
            return tuple(
                _take(queries, k, v, mask, before)
                for mask, before in zip(masks, taken, strict=True)
            )

        def turn(number: Array, carry: tuple) -> tuple:
            taken, k, v = carry
            # Sent before it is used, so that the transfer and the sums can overlap.
            sent = [jax.lax.ppermute(x, self.axis, onward) for x in (k, v)]
            return seen(taken, number, k, v), *sent

        none = jnp.full((q.shape[1], len(q)), -jnp.inf, wide)
        start = ((none, jnp.zeros_like(none), jnp.zeros_like(queries)),) * len(texts)
        taken, k, v = jax.lax.fori_loop(0, devices - 1, turn, (start, k, v))
        return [
            (values / weights.T[..., None]).astype(q.dtype)
            for _, weights, values in seen(taken, devices - 1, k, v)
        ]


def _take(
    queries: Array, k: Array, v: Array, real: Array, before: tuple
) -> tuple[Array, Array, Array]:
    """Return (largest logit, sum of weights, sum of weighted values) over the keys seen before and these."""
    logits = jnp.where(real, jnp.einsum("qhd,khd->hqk", queries, k.astype(queries.dtype)), -jnp.inf)
    largest = jnp.maximum(before[0], jnp.max(logits, axis=-1, initial=-jnp.inf))
    # Where nothing has been seen yet there is nothing to rescale either.
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    kept, exponent = jnp.exp(before[0] - shift), jnp.exp(logits - shift[..., None])
    weights = before[1] * kept + exponent.sum(-1)
    values = before[2] * kept.T[..., None] + jnp.einsum(
        "hqk,khd->qhd", exponent, v.astype(queries.dtype)
    )
    return largest, weights, values
