"""Queries, keys and values of the joint attention, from each modality's projection: cut, joined, normed and rotated."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.kernels.chips import default_device, tpu_chip_name
from fluxjax.nets.layers import RmsNorm, Rotation, rotate
from fluxjax.shapes import Array, Float

Heads = Float[Array, "tokens heads head_dim"]


class Projection(NamedTuple):
    """What a modality's tokens give to the joint attention: a projection, whose first columns are q, k and v, and norms."""

    projected: Float[Array, "tokens columns"]
    query_norm: RmsNorm
    key_norm: RmsNorm


class Turn(NamedTuple):
    """The tokens' rotation, and what the kernel takes of it, on a TPU."""

    rotation: Rotation
    factors: tuple[Array, Array] | None


def turn_of(rotation: Rotation) -> Turn:
    """Return what `heads_of` takes of a rotation; called outside of the blocks' loop, so that it is made once."""
    if default_device().platform != "tpu":
        return Turn(rotation, None)
    # Pallas takes a third of a second to import.
    from fluxjax.kernels.qkv_tpu import rotation_factors

    return Turn(rotation, rotation_factors(*rotation))


def heads_of(
    parts: Sequence[Projection], turn: Turn, width: int, *, fused: bool = False
) -> tuple[Heads, Heads, Heads]:
    """Return q, k and v of the parts' tokens, a part after the other; q and k are normed and rotated.

    **Arguments:** `width`: columns of each of q, k and v. `fused`: as one kernel, on a TPU, where that suits the shapes; it has
    gradients by reverse mode alone, of what is not fused.
    """
    if fused and turn.factors is not None:
        from fluxjax.kernels.qkv_tpu import fused_qkv_supported

        chip, dim = tpu_chip_name(default_device()), len(parts[0].query_norm.scale)
        if fused_qkv_supported(
            [len(part.projected) for part in parts], width, dim, parts[0].projected.dtype, chip
        ):
            return _fused((width, chip), tuple(parts), *turn)
    return _apart(parts, turn.rotation, width)


def _apart(
    parts: Sequence[Projection], rotation: Rotation, width: int
) -> tuple[Heads, Heads, Heads]:
    def normed(part: Projection) -> tuple[Heads, Heads, Heads]:
        dim, qkv = part.query_norm.scale.shape[-1], part.projected[:, : 3 * width]
        q, k, v = rearrange(
            qkv, "tokens (three heads dim) -> three tokens heads dim", three=3, dim=dim
        )
        return part.query_norm(q), part.key_norm(k), v

    q, k, v = (
        jnp.concatenate(each) if len(each) > 1 else each[0]
        for each in zip(*map(normed, parts), strict=True)
    )
    return rotate(q, rotation), rotate(k, rotation), v


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    call: tuple[int, str],
    parts: tuple[Projection, ...],
    rotation: Rotation,
    factors: tuple[Array, Array],
) -> Any:
    from fluxjax.kernels.qkv_tpu import LANES, fused_qkv_tpu

    width, chip = call
    given = [(part.projected, part.query_norm.scale, part.key_norm.scale) for part in parts]
    found = fused_qkv_tpu(given, factors, width=width, eps=parts[0].query_norm.eps, chip=chip)
    return tuple(rearrange(x, "tokens (heads dim) -> tokens heads dim", dim=LANES) for x in found)


def _fused_fwd(
    call: tuple[int, str], parts: Any, rotation: Rotation, factors: Any
) -> tuple[Any, Any]:
    return _fused(call, parts, rotation, factors), (parts, rotation)


def _fused_bwd(call: tuple[int, str], kept: tuple[Any, Rotation], grads: Any) -> tuple:
    # The factors are of the rotation, which has the whole of the gradient.
    return *jax.vjp(partial(_apart, width=call[0]), *kept)[1](grads), None


_fused.defvjp(_fused_fwd, _fused_bwd)
