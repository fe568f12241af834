"""Ring attention: the keys and values of all devices travel around a ring of them."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.devices.token_parts import Heads, TxtLength
from fluxjax.kernels.guided_attention import Nag
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Bool, Float, Int, ScalarLike

TokenRange = tuple[int, ScalarLike]
"""Indices of text tokens: from the first one, up to the second one, which is not included."""


class OnlineSoftmax(NamedTuple):
    """What a softmax over the keys so far has come to, of which more keys can be added.

    `largest`: largest logit. `total`: sum of the exponentials. `values`: sum of the values,
    weighted by the exponentials. Exponentials are relative to the largest logit.
    """

    largest: Float[Array, "heads queries"]
    total: Float[Array, "heads queries"]
    values: Float[Array, "queries heads head_dim"]


class RingAttention(eqx.Module):
    """Joint attention in a `jax.shard_map` that splits tokens, by ring attention.

    It is for what `UlyssesAttention` is for, with any number of heads. Each device keeps its
    queries; the parts of the keys and values travel around a ring of the devices, and each device
    accumulates an online softmax over them. Each device sends its k and v (devices - 1) times.
    Sums and maxima are at least float32.

    **Arguments:** `axis`, `txt_tokens`, `img_tokens`: as of `UlyssesAttention`. `nag`: guides the
    attention; the text then holds both prompts, each of which attends by itself.
    **Source:** Liu et al. 2023 (2310.01889).
    """

    axis: str = eqx.field(static=True)
    txt_tokens: int = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)
    nag: Nag | None = None

    def __call__(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        txt_part: int,
        txt_length: TxtLength | None = None,
    ) -> Heads:
        """Return the mixed values of this device's tokens; arguments as of `UlyssesAttention`."""
        if self.nag is None:
            all_text = (0, self.txt_tokens if txt_length is None else txt_length)
            (mixed,) = self._attend(q, k, v, txt_part, [all_text])
            return mixed
        half = self.txt_tokens // 2
        lengths: Sequence[ScalarLike] = (half, half)
        if txt_length is not None:
            lengths = (txt_length[0], txt_length[1])
        negative_prompt, positive_prompt = (0, lengths[0]), (half, half + lengths[1])
        prompts = [negative_prompt, positive_prompt]
        negative, positive = self._attend(q, k, v, txt_part, prompts)
        # Each text token takes the values of the prompt that it belongs to.
        first_index = jax.lax.axis_index(self.axis) * txt_part
        indices = first_index + jnp.arange(txt_part)
        is_negative = (indices < half)[:, None, None]
        text = jnp.where(is_negative, negative[:txt_part], positive[:txt_part])
        guided = self.nag.combine(positive[txt_part:], negative[txt_part:])
        return jnp.concatenate([text, guided])

    def _attend(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        txt_part: int,
        prompts: Sequence[TokenRange],
    ) -> list[Heads]:
        """Return the mixed values over the image and one prompt, for each of the prompts."""
        devices = jax.lax.axis_size(self.axis)
        index = jax.lax.axis_index(self.axis)
        img_part = len(k) - txt_part
        wide = wide_dtype(q.dtype)
        scale = q.shape[-1] ** -0.5
        queries = q.astype(wide) * scale
        ring = [(i, (i + 1) % devices) for i in range(devices)]

        def add_part(
            states: tuple[OnlineSoftmax, ...],
            step: ScalarLike,
            k: Array,
            v: Array,
        ) -> tuple[OnlineSoftmax, ...]:
            """Add the keys and values that are here at this step."""
            # They have come one device further at each step.
            owner = (index - step) % devices
            masks = self._masks(owner, txt_part, img_part, prompts)
            updated = []
            for mask, state in zip(masks, states, strict=True):
                updated.append(_add_keys(state, queries, k, v, mask))
            return tuple(updated)

        def body(step: Array, carry: tuple) -> tuple:
            states, k, v = carry
            # Sent before they are used, so that the transfer overlaps with the computation.
            next_k = jax.lax.ppermute(k, self.axis, ring)
            next_v = jax.lax.ppermute(v, self.axis, ring)
            return add_part(states, step, k, v), next_k, next_v

        lowest = jnp.full((q.shape[1], len(q)), -jnp.inf, wide)
        empty = OnlineSoftmax(lowest, jnp.zeros_like(lowest), jnp.zeros_like(queries))
        states = (empty,) * len(prompts)
        states, k, v = jax.lax.fori_loop(0, devices - 1, body, (states, k, v))
        # Outside of the loop, since the last part needs not be sent on.
        states = add_part(states, devices - 1, k, v)
        mixed = []
        for state in states:
            divisor = state.total.T[..., None]
            mixed.append((state.values / divisor).astype(q.dtype))
        return mixed

    def _masks(
        self,
        owner: Int[Array, ""],
        txt_part: int,
        img_part: int,
        prompts: Sequence[TokenRange],
    ) -> list[Bool[Array, " keys"]]:
        """Return, for each prompt, which keys of a device's part are attended to."""
        text_indices = owner * txt_part + jnp.arange(txt_part)
        image_indices = owner * img_part + jnp.arange(img_part)
        image = image_indices < self.img_tokens
        masks = []
        for start, stop in prompts:
            text = (start <= text_indices) & (text_indices < stop)
            masks.append(jnp.concatenate([text, image]))
        return masks


def _add_keys(
    state: OnlineSoftmax,
    queries: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys heads head_dim"],
    v: Float[Array, "keys heads head_dim"],
    mask: Bool[Array, " keys"],
) -> OnlineSoftmax:
    """Return the online softmax with more keys added, of which `mask` says which count."""
    products = jnp.einsum("qhd,khd->hqk", queries, k.astype(queries.dtype))
    logits = jnp.where(mask, products, -jnp.inf)
    largest_here = jnp.max(logits, axis=-1, initial=-jnp.inf)
    largest = jnp.maximum(state.largest, largest_here)
    # While no key has counted, the largest logit is -inf, and -inf - -inf would be NaN.
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    rescale = jnp.exp(state.largest - shift)
    weights = jnp.exp(logits - shift[..., None])
    total = state.total * rescale + weights.sum(-1)
    rescaled = state.values * rescale.T[..., None]
    values = rescaled + jnp.einsum("hqk,khd->qhd", weights, v.astype(queries.dtype))
    return OnlineSoftmax(largest, total, values)
