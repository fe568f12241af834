"""A transformer on several devices, each of which runs a part of the tokens."""

from collections.abc import Sequence
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.devices.ring import RingAttention
from fluxjax.devices.ulysses import UlyssesAttention
from fluxjax.kernels.attention import Attention
from fluxjax.kernels.guided_attention import Nag
from fluxjax.nets.degraded import DegradedBlocks
from fluxjax.nets.flux_attention import AttentionChoice
from fluxjax.nets.flux_prepare import checked_length
from fluxjax.nets.flux_state import Prepared, TxtLength
from fluxjax.nets.image_prompt import ImagePrompt
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array, Float, ScalarLike


class PreparedShard(eqx.Module):
    """What `prepare` returns for this device's tokens, and the number of all text tokens."""

    prepared: Prepared
    txt_tokens: int = eqx.field(static=True)


class TokenParallelFlux(eqx.Module):
    """A transformer inside of `jax.shard_map`, tokens split over the mesh's axis "context".

    Its `prepare` and `velocity` are called as the network's: each device gets and returns all
    tokens. It runs a part of the text's and a part of the image's tokens. Where the number of
    devices does not divide them, the last ones get padding, which no token attends to.

    Where the devices divide the heads, the attention exchanges heads for tokens
    (`UlyssesAttention`); otherwise it is ring attention (`RingAttention`). Both can run inside of
    `Nag`.
    """

    flux: AbstractTransformer

    def prepare(
        self,
        times: Float[Array, " times"],
        *,
        txt: Float[Array, "txt_tokens context"],
        vec: Float[Array, " pooled"] | None = None,
        img_ids: Float[Array, "img_tokens axes"],
        txt_ids: Float[Array, "txt_tokens axes"] | None = None,
        guidance: ScalarLike | None = None,
        dtype: DTypeLike | None = None,
        remat: bool = False,
    ) -> PreparedShard:
        """Compute what `velocity` needs at any of several times; as the network's `prepare`."""
        prepared = self.flux.prepare(
            times,
            txt=_local_tokens(txt),
            vec=vec,
            img_ids=_local_tokens(img_ids),
            txt_ids=None if txt_ids is None else _local_tokens(txt_ids),
            guidance=guidance,
            dtype=dtype,
            remat=remat,
        )
        return PreparedShard(prepared, len(txt))

    def with_txt_length(
        self, prepared: PreparedShard, length: TxtLength | int | None
    ) -> PreparedShard:
        """Return what was prepared, with the number of text tokens of all devices that are attended
        to; as the network's."""
        checked = checked_length(type(self.flux).__name__, length, prepared.txt_tokens)
        part = prepared.prepared._replace(txt_length=checked)
        return PreparedShard(part, prepared.txt_tokens)

    def with_image_prompts(
        self, prepared: PreparedShard, prompts: Sequence[ImagePrompt]
    ) -> PreparedShard:
        """Return what was prepared, with image prompts; as the network's."""
        parts = []
        for prompt in prompts:
            weights = prompt.token_weights
            if weights is not None:
                prompt = replace(prompt, token_weights=_local_tokens(weights[:, None])[:, 0])
            parts.append(prompt)
        part = self.flux.with_image_prompts(prepared.prepared, parts)
        return PreparedShard(part, prepared.txt_tokens)

    def velocity(
        self,
        x: Float[Array, "img_tokens channels"],
        t: ScalarLike,
        prepared: PreparedShard,
        *,
        attention: AttentionChoice | Nag = None,
        degraded: DegradedBlocks | None = None,
        remat: bool = False,
    ) -> Float[Array, "img_tokens out_channels"]:
        """Return the velocity at one of the times that were prepared; as the network's.

        **Raises:** `ValueError` for a custom attention, which would see only a part of the tokens,
        or for a named one where ring attention is used.
        """
        nag = attention if isinstance(attention, Nag) else None
        implementation = _implementation(attention if nag is None else nag.implementation)
        if degraded is not None:
            _implementation(degraded.attention)
        devices, tensor = jax.lax.axis_size("context"), jax.lax.axis_size("tensor")
        joint: UlyssesAttention | RingAttention
        if not uses_ring(self.flux.config.heads, tensor, devices):
            joint = UlyssesAttention("context", prepared.txt_tokens, len(x), implementation, nag)
        elif implementation is None:
            joint = RingAttention("context", prepared.txt_tokens, len(x), nag)
        else:
            heads = self.flux.config.heads // tensor
            raise ValueError(
                f"{heads} heads are not divided by context={devices}, so ring attention is used, "
                "which has only one implementation. Leave out attention=, or choose a context that "
                "divides them."
            )
        part = self.flux.velocity(
            _local_tokens(x),
            t,
            prepared.prepared,
            attention=joint,
            degraded=degraded,
            remat=remat,
        )
        return jax.lax.all_gather(part, "context", tiled=True)[: len(x)]


def uses_ring(heads: int, tensor: int, context: int) -> bool:
    """Return whether the attention of a network on a mesh is `RingAttention`.

    **Arguments:** `heads`: of the whole network. `tensor`, `context`: sizes of the mesh's axes.
    """
    # "tensor" splits the heads before "context" exchanges them.
    return heads // tensor % context > 0


def _implementation(attention: AttentionChoice) -> str | Attention | None:
    """Return an attention that can be run on split tokens.

    **Raises:** `ValueError` for a custom one.
    """
    if attention is None or isinstance(attention, str | Attention):
        return attention
    raise ValueError("A custom attention would see a part of the tokens. Use context=1 with it.")


def _local_tokens(x: Float[Array, "tokens features"]) -> Float[Array, "part features"]:
    """Return this device's part of the tokens, padded with zeros to the size of the others'."""
    devices = jax.lax.axis_size("context")
    size = -(-len(x) // devices)  # rounded up
    padded = jnp.pad(x, ((0, size * devices - len(x)), (0, 0)))
    start = jax.lax.axis_index("context") * size
    return jax.lax.dynamic_slice_in_dim(padded, start, size)
