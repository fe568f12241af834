"""Ulysses attention: devices that each hold a part of the tokens exchange them for heads."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.devices.token_parts import Heads, TxtLength
from fluxjax.kernels.attention import Attention, as_attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.shapes import Array, Float


class UlyssesAttention(eqx.Module):
    """Joint attention in a `jax.shard_map` that splits tokens: devices exchange tokens for heads.

    Each device holds a part of the text tokens and a part of the image tokens, all of one size.
    For the attention it receives all tokens of its share of the heads. Each device sends
    4 / devices of the size of q, k and v.

    **Arguments:**

    - `axis`: of the mesh, over which the tokens are split.
    - `txt_tokens`, `img_tokens`: of all devices. What the parts hold beyond them is padding, which
      no token attends to.
    - `implementation`: of `fluxjax.attention`.
    - `nag`: guides the attention; the text then holds both prompts.

    **Raises:** `ValueError`, when called, if the devices do not divide the heads.
    **Source:** Jacobs et al. 2023 (2309.14509).
    """

    axis: str = eqx.field(static=True)
    txt_tokens: int = eqx.field(static=True)
    img_tokens: int = eqx.field(static=True)
    implementation: str | Attention | None = eqx.field(static=True, default=None)
    nag: Nag | None = None

    def __call__(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        txt_part: int,
        txt_length: TxtLength | None = None,
    ) -> Heads:
        """Return the mixed values of this device's tokens.

        **Arguments:** `q`, `k`, `v`: of this device's tokens. `txt_part`: how many of them are of
        the text, padding included. `txt_length`: how many of all text tokens are attended to; None
        for all of them. With `nag` it is one number for each prompt.
        """
        devices = jax.lax.axis_size(self.axis)
        tokens, heads, dim = q.shape
        if heads % devices:
            raise ValueError(
                f"`UlyssesAttention` needs a number of devices that divides the heads, got "
                f"{devices} devices and {heads} heads. Use `RingAttention`."
            )
        all_q, all_k, all_v = (self._gather_tokens(x, txt_part) for x in (q, k, v))
        mixed = self._attend(all_q, all_k, all_v, txt_length)
        mixed = rearrange(mixed, "tokens heads dim -> tokens (heads dim)")
        text = mixed[: self.txt_tokens]
        image = mixed[self.txt_tokens :]
        text_part = self._scatter_tokens(text, txt_part)
        image_part = self._scatter_tokens(image, tokens - txt_part)
        columns = jnp.concatenate([text_part, image_part])
        return rearrange(columns, "tokens (heads dim) -> tokens heads dim", dim=dim)

    def _gather_tokens(
        self,
        x: Heads,
        txt_part: int,
    ) -> Float[Array, "joint_tokens device_heads head_dim"]:
        """Return all tokens, without padding, of this device's share of the heads."""
        # Heads are columns here, as the projection and flash_tpu have them: with an axis of heads
        # TPUs would change the layout in memory.
        columns = rearrange(x, "tokens heads dim -> tokens (heads dim)")
        # All tokens, of which each device has its own columns from here on.
        text = self._exchange(columns[:txt_part], 1)
        image = self._exchange(columns[txt_part:], 1)
        real_text = text[: self.txt_tokens]
        real_image = image[: self.img_tokens]
        joint = jnp.concatenate([real_text, real_image])
        return rearrange(joint, "tokens (heads dim) -> tokens heads dim", dim=x.shape[-1])

    def _scatter_tokens(
        self,
        x: Float[Array, "all_tokens device_columns"],
        part: int,
    ) -> Float[Array, "part columns"]:
        """Return this device's part of the tokens, padded, with all heads."""
        padding = jax.lax.axis_size(self.axis) * part - len(x)
        padded = jnp.pad(x, ((0, padding), (0, 0)))
        return self._exchange(padded, 0)

    def _exchange(self, x: Array, split: int) -> Array:
        """Split one axis of a matrix among the devices, and join their parts along the other."""
        return jax.lax.all_to_all(
            x,
            self.axis,
            split_axis=split,
            concat_axis=1 - split,
            tiled=True,
        )

    def _attend(self, q: Heads, k: Heads, v: Heads, txt_length: TxtLength | None) -> Heads:
        """Return the mixed values of all tokens, of this device's share of the heads."""
        if self.nag is None:
            return as_attention(self.implementation)(q, k, v, self.txt_tokens, txt_length)
        # The norms of Nag are over all heads of a token, which are split over this axis too.
        axes = (*self.nag.head_axes, self.axis)
        nag = replace(self.nag, implementation=self.implementation, head_axes=axes)
        return nag(q, k, v, self.txt_tokens, txt_length)
