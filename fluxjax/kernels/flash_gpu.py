"""Flash attention for NVIDIA GPUs: logits are computed block by block in registers.

The kernels are in Mosaic GPU for Hopper, and in Triton for other GPUs.
**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.kernels.block_sizes import BlockSizes
from fluxjax.kernels.flash_gpu_kernels import compute_dkv, compute_dq, compute_forward
from fluxjax.kernels.flash_gpu_spec import GpuKernelSpec, Interpret, KernelCall, KeyLength
from fluxjax.shapes import Array, Float, Int

_DTYPES = (jnp.bfloat16, jnp.float16)

Heads = Float[Array, "_ heads head_dim"]
"""Queries, keys, values or their gradients: [tokens, heads, head_dim]."""

Row = Float[Array, "heads queries"]
"""A number for each query of each head."""


def flash_attention_gpu(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys heads head_dim"],
    v: Float[Array, "keys heads head_dim"],
    *,
    scale: float,
    key_length: Int[Array, ""] | None = None,
    block_sizes: BlockSizes | None = None,
    hopper: bool = True,
    interpret: Interpret = None,
) -> Float[Array, "queries heads head_dim"]:
    """Compute softmax(scale * q k^T) v, for any number of tokens.

    A head_dim that is neither 64 nor 128 is padded to one of them.

    **Arguments:**

    - `q`, `k`, `v`: bfloat16 or float16.
    - `key_length`: keys from this index on are padding.
    - `block_sizes`: None for those of the kernels' own choice.
    - `hopper`: whether to use the kernels in Mosaic GPU, which need compute capability 9.0, rather
      than those in Triton.
    - `interpret`: whether to interpret the kernels, slowly, on any platform, in float32 too. True
      for Triton; for Mosaic, parameters of JAX's interpreter of such kernels, which must give
      zeros for reads out of bounds, as TMA does.

    **Returns:** the mixed values, in the dtype of `q`.
    **Raises:** `ValueError` for another dtype, a head_dim above 128, or unsuitable blocks.
    """
    if q.dtype not in _DTYPES and not interpret:
        raise ValueError(
            f"`flash_gpu` needs bfloat16 or float16, got {q.dtype}. Pass implementation=None."
        )
    (queries, _, dim), keys = q.shape, len(k)
    if dim > 128:
        raise ValueError(
            f"`flash_gpu` needs a head_dim of at most 128, got {dim}. Pass implementation=None."
        )
    # Imported here, since Mosaic GPU needs a package that others do not.
    if hopper:
        from fluxjax.kernels.flash_mosaic import launch_mosaic as launch
        from fluxjax.kernels.flash_mosaic_blocks import mosaic_block_sizes as default_sizes
    else:
        from fluxjax.kernels.flash_triton import (
            launch_triton as launch,
            triton_block_sizes as default_sizes,
        )
    if scale < 0:
        # The kernels subtract the largest logit, which they get from the largest product.
        q, scale = -q, -scale
    spec = GpuKernelSpec(
        # Exponentials are to base 2, so that this is the only factor that the logits need.
        scale=scale * math.log2(math.e),
        keys=keys,
        **default_sizes(queries, keys, dim, block_sizes),
        launch=launch,
        interpret=interpret,
    )
    length = None
    if key_length is not None:
        length = jnp.minimum(key_length.astype(jnp.int32), keys).reshape(1)
    missing = -dim % 64
    if missing:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing))) for x in (q, k, v))
    return _flash_attention(spec, q, k, v, length)[..., :dim]


class _Residuals(NamedTuple):
    """What the backward pass needs of the forward pass."""

    q: Heads
    k: Heads
    v: Heads
    length: KeyLength | None
    mixed: Heads
    log_sum: Row


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash_attention(
    spec: GpuKernelSpec,
    q: Heads,
    k: Heads,
    v: Heads,
    length: KeyLength | None,
) -> Heads:
    """Compute attention without what only a gradient needs."""
    call = KernelCall(
        name="forward",
        compute=compute_forward,
        resident=[q],
        streamed=[[k], [v]],
        results=[q],
    )
    (mixed,) = spec.launch(spec, call, length)
    return mixed


def _flash_attention_fwd(
    spec: GpuKernelSpec,
    q: Heads,
    k: Heads,
    v: Heads,
    length: KeyLength | None,
) -> tuple[Heads, _Residuals]:
    """Compute attention, and keep what the gradients are computed from."""
    row = jax.ShapeDtypeStruct((q.shape[1], len(q)), jnp.float32)
    call = KernelCall(
        name="forward",
        compute=compute_forward,
        resident=[q],
        streamed=[[k], [v]],
        results=[q, row],
    )
    mixed, log_sum = spec.launch(spec, call, length)
    return mixed, _Residuals(q, k, v, length, mixed, log_sum)


def _flash_attention_bwd(
    spec: GpuKernelSpec,
    residuals: _Residuals,
    grad: Heads,
) -> tuple[Heads, Heads, Heads, None]:
    """Return the gradients of q, k and v; the length has none."""
    q, k, v, length, mixed, log_sum = residuals
    # The gradient of softmax subtracts it: the weighted mean of the weights' gradients.
    products = mixed.astype(jnp.float32) * grad.astype(jnp.float32)
    delta = products.sum(-1).T
    dq_call = KernelCall(
        name="dq",
        compute=compute_dq,
        resident=[q, grad, log_sum, delta],
        streamed=[[k], [v]],
        results=[q],
    )
    dkv_call = KernelCall(
        name="dkv",
        compute=compute_dkv,
        resident=[k, v],
        streamed=[[q, log_sum], [grad, delta]],
        results=[k, v],
    )
    (dq,) = spec.launch(spec, dq_call, length)
    dk, dv = spec.launch(spec, dkv_call, length)
    return dq, dk, dv, None


_flash_attention.defvjp(_flash_attention_fwd, _flash_attention_bwd)
