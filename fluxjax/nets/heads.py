"""Queries, keys and values of the joint attention, of the projections of text and image tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.kernels.chips import default_device, tpu_chip_name
from fluxjax.kernels.verified import is_verified
from fluxjax.nets.layers import RmsNorm, Rotation, rotate, rotate_by_matrices, split_heads
from fluxjax.shapes import Array, Float

Heads = Float[Array, "tokens heads head_dim"]
"""The features of tokens, as those of each head."""
QueryKeyValue = tuple[Heads, Heads, Heads]
JointAttention = Callable[..., Heads]
"""(q, k, v, txt_tokens) -> values: an attention over the text's tokens, then the image's.

One that takes a fifth argument, the number of text tokens that are attended to, also serves texts
with padding.
"""
KernelRotation = tuple[Array, Array]
"""A rotation as the fused kernel takes it: one factor for a feature, one for its neighbour."""


class Projection(NamedTuple):
    """The projected tokens of one modality, and the norms of its queries and keys.

    `projected`: its first columns are q, k and v of all heads; more columns may follow.
    `query_norm`, `key_norm`: over the features of a head.
    """

    projected: Float[Array, "tokens columns"]
    query_norm: RmsNorm
    key_norm: RmsNorm


class PreparedRotation(NamedTuple):
    """RoPE's rotation of all tokens, also in the form that the fused kernel takes (TPUs only)."""

    rotation: Rotation
    kernel_rotation: KernelRotation | None


def prepare_rotation(rotation: Rotation) -> PreparedRotation:
    """Return a rotation for `query_key_value`.

    Call it outside of the loop over the blocks, so that it is computed once for all of them.
    """
    if default_device().platform != "tpu":
        return PreparedRotation(rotation, None)
    from fluxjax.kernels.qkv_tpu import (
        rotation_factors,  # Pallas takes a third of a second to import
    )

    return PreparedRotation(rotation, rotation_factors(*rotation))


def query_key_value(
    projections: Sequence[Projection],
    rotation: PreparedRotation,
    width: int,
    *,
    fused: bool = False,
) -> QueryKeyValue:
    """Return q, k and v of the joint attention, where q and k are normalized and rotated.

    The tokens of the projections are concatenated in their order.

    **Arguments:** `projections`: of one modality or two, or of both as one sequence. `rotation`: of
    all tokens. `width`: columns of each of q, k and v. `fused`: run one kernel, on a TPU and where
    it takes these shapes. It has gradients in reverse mode only, which are those of the unfused
    computation.
    """
    if fused and rotation.kernel_rotation is not None and is_verified("qkv_tpu", default_device()):
        from fluxjax.kernels.qkv_tpu import fused_qkv_supported

        chip = tpu_chip_name(default_device())
        head_dim = len(projections[0].query_norm.scale)
        dtype = projections[0].projected.dtype
        counts = [len(projection.projected) for projection in projections]
        # Where the kernel does not take these shapes, nothing is lost but time.
        if fused_qkv_supported(counts, width, head_dim, dtype, chip):
            return _fused((width, chip), tuple(projections), *rotation)
    return _unfused(projections, rotation.rotation, width)


def _unfused(
    projections: Sequence[Projection],
    rotation: Rotation,
    width: int,
) -> QueryKeyValue:
    """Compute `query_key_value` with separate operations, which XLA fuses as it can."""
    parts = [_split_and_normalize(projection, width) for projection in projections]
    # Concatenated after the norms, whose scales differ between the modalities.
    if len(parts) > 1:
        q, k, v = (jnp.concatenate(each) for each in zip(*parts, strict=True))
    else:
        q, k, v = parts[0]
    # For cuDNN odd numbers of tokens are padded, in a kernel that `rotate` is fused with.
    on_gpu = default_device().platform == "gpu" and len(q) % 2 == 0
    rotate_heads = rotate_by_matrices if on_gpu else rotate
    return rotate_heads(q, rotation), rotate_heads(k, rotation), v


def _split_and_normalize(
    projection: Projection,
    width: int,
) -> QueryKeyValue:
    """Return q, k and v of one modality, where q and k are normalized."""
    q, k, v = rearrange(
        projection.projected[:, : 3 * width],
        "tokens (three heads head_dim) -> three tokens heads head_dim",
        three=3,
        head_dim=projection.query_norm.scale.shape[-1],
    )
    return projection.query_norm(q), projection.key_norm(k), v


def normalized_queries(projection: Projection, width: int) -> Heads:
    """Return the queries of one modality, normalized and not rotated.

    **Arguments:** `width`: columns of the queries.
    """
    head_dim = projection.query_norm.scale.shape[-1]
    return projection.query_norm(split_heads(projection.projected[:, :width], head_dim))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    width_and_chip: tuple[int, str],
    projections: tuple[Projection, ...],
    rotation: Rotation,
    kernel_rotation: KernelRotation,
) -> QueryKeyValue:
    """Compute `query_key_value` with one kernel.

    **Arguments:** `rotation`: unused here; the gradient goes to it.
    """
    from fluxjax.kernels.qkv_tpu import LANES, fused_qkv_tpu

    width, chip = width_and_chip
    operands = []
    for projection in projections:
        scales = projection.query_norm.scale, projection.key_norm.scale
        operands.append((projection.projected, *scales))
    eps = projections[0].query_norm.eps
    results = fused_qkv_tpu(operands, kernel_rotation, width=width, eps=eps, chip=chip)
    q, k, v = (split_heads(x, LANES) for x in results)
    return q, k, v


Residuals = tuple[tuple[Projection, ...], Rotation]
"""What a gradient needs of the forward pass: the inputs, of which it computes all again."""


def _fused_fwd(
    width_and_chip: tuple[int, str],
    projections: tuple[Projection, ...],
    rotation: Rotation,
    kernel_rotation: KernelRotation,
) -> tuple[QueryKeyValue, Residuals]:
    """Compute q, k and v by the kernel, and keep what the gradients are computed from."""
    result = _fused(width_and_chip, projections, rotation, kernel_rotation)
    return result, (projections, rotation)


def _fused_bwd(
    width_and_chip: tuple[int, str],
    residuals: Residuals,
    cotangents: QueryKeyValue,
) -> tuple[tuple[Projection, ...], Rotation, None]:
    """Differentiate the unfused computation."""
    _, pullback = jax.vjp(partial(_unfused, width=width_and_chip[0]), *residuals)
    projections, rotation = pullback(cotangents)
    # The kernel's form of the rotation is a function of it: all of the gradient goes to `rotation`.
    return projections, rotation, None


_fused.defvjp(_fused_fwd, _fused_bwd)
