"""A transformer of which each device runs a part of the tokens."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.devices.context import RingAttention, UlyssesAttention
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.nets.flux import Flux, Prepared
from fluxjax.shapes import Array, Float


class PreparedShard(eqx.Module):
    """What is prepared for this device's part of the tokens, and how many tokens the whole text has."""

    prepared: Prepared
    txt_tokens: int = eqx.field(static=True)


class TokenParallelFlux(eqx.Module):
    """A `Flux` of which each device along "context" runs a part of the text's and of the image's tokens; `prepare` and
    `velocity` are as the network's.

    Tokens that the devices do not divide are padded, and no token sees the padding. Heads are exchanged for tokens
    (`UlyssesAttention`) where the devices divide them, else keys and values go round (`RingAttention`). Both know `Nag`.
    **Raises:** `ValueError` for a custom attention, which would see a part of the tokens, or one that is named where keys and
    values go round.
    """

    flux: Flux

    def prepare(
        self, times: Any, *, txt: Array, img_ids: Array, txt_ids: Array | None = None, **inputs: Any
    ) -> PreparedShard:
        ids = None if txt_ids is None else _mine(txt_ids)
        return PreparedShard(
            self.flux.prepare(times, txt=_mine(txt), img_ids=_mine(img_ids), txt_ids=ids, **inputs),
            len(txt),
        )

    def velocity(
        self,
        x: Float[Array, "img_tokens channels"],
        t: Any,
        part: PreparedShard,
        *,
        attention: Any = None,
        weaken: Any = None,
    ) -> Float[Array, "img_tokens out_channels"]:
        nag = attention if isinstance(attention, Nag) else None
        named = attention if nag is None else nag.implementation
        custom = callable(named) and not isinstance(named, Attention)
        if custom or (weaken is not None and weaken.attention is not None):
            raise ValueError(
                "A custom attention would see a part of the tokens. Use context=1 with it."
            )
        devices = jax.lax.axis_size("context")
        heads = self.flux.config.heads // jax.lax.axis_size("tensor")
        if heads % devices and named is not None:
            raise ValueError(
                f"{heads} heads are not divided by context={devices}, so keys and values go round, by an attention of that "
                "ring's own. Leave out attention=, or choose a context that divides them."
            )
        counts = (part.txt_tokens, len(x))
        joint = (
            RingAttention("context", *counts, nag)
            if heads % devices
            else UlyssesAttention("context", *counts, named, nag)
        )
        out = self.flux.velocity(_mine(x), t, part.prepared, attention=joint, weaken=weaken)
        return jax.lax.all_gather(out, "context", tiled=True)[: len(x)]


def _mine(rows: Float[Array, "tokens features"]) -> Float[Array, "part features"]:
    """Return this device's part of the tokens along "context", padded to be as many as the others'."""
    devices, index = jax.lax.axis_size("context"), jax.lax.axis_index("context")
    part = -(-len(rows) // devices)
    rows = jnp.pad(rows, ((0, part * devices - len(rows)), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(rows, index * part, part)
