"""Flash attention for NVIDIA GPUs: no matrix of logits leaves a program. In Mosaic GPU on Hopper, in Triton on others.

**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fluxjax.kernels.blocks import BlockSizes
from fluxjax.kernels.flash_work import Call, gradient_of_k_and_v, gradient_of_q, mix
from fluxjax.shapes import Array, Float, Int

_DTYPES = (jnp.bfloat16, jnp.float16)


def flash(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys heads head_dim"],
    v: Float[Array, "keys heads head_dim"],
    *,
    scale: float,
    key_length: Int[Array, ""] | None = None,
    block_sizes: BlockSizes | None = None,
    hopper: bool = True,
    interpret: Any = None,
) -> Float[Array, "queries heads head_dim"]:
    """Return softmax(scale * q k^T) v, of any number of tokens; a head_dim that is neither 64 nor 128 is padded to one.

    **Arguments:** `q`, `k`, `v`: bfloat16 or float16. `key_length`: keys that are seen. `block_sizes`: as the `blocks` of the
    kernels take them. `hopper`: whether these are `fluxjax.kernels.flash_mosaic`'s, for compute capability 9.0 alone, or
    `flash_triton`'s. `interpret`: run on any platform, slowly, and float32 too: True for Triton's; for Mosaic's, parameters of
    JAX's interpreter of such kernels, in which what is read out of bounds must be zeros, as it is of TMA.
    **Raises:** `ValueError` for another dtype, a head_dim above 128, or blocks that do not suit.
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
    if hopper:
        from fluxjax.kernels.flash_mosaic import blocks, run
    else:
        from fluxjax.kernels.flash_triton import blocks, run
    if scale < 0:  # so that a row's largest logit is that of its largest product
        q, scale = -q, -scale
    # Exponentials are to base 2, so that the scale's multiplication is the only one.
    sizes = blocks(queries, keys, dim, block_sizes)
    call = Call(scale=scale * math.log2(math.e), keys=keys, **sizes, run=run, interpret=interpret)
    length = (
        None if key_length is None else jnp.minimum(key_length.astype(jnp.int32), keys).reshape(1)
    )
    missing = -dim % 64
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x for x in (q, k, v))
    return _flash(call, q, k, v, length)[..., :dim]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(call: Call, q: Array, k: Array, v: Array, length: Array | None) -> Array:
    return call.run(call, "forward", mix, [q], [[k], [v]], length, [q])[0]


def _flash_fwd(
    call: Call, q: Array, k: Array, v: Array, length: Array | None
) -> tuple[Array, tuple]:
    rows = jax.ShapeDtypeStruct((q.shape[1], len(q)), jnp.float32)
    mixed, residual = call.run(call, "forward", mix, [q], [[k], [v]], length, [q, rows])
    return mixed, (q, k, v, length, mixed, residual)


def _flash_bwd(call: Call, kept: tuple, grad: Array) -> tuple:
    q, k, v, length, mixed, residual = kept
    delta = (mixed.astype(jnp.float32) * grad.astype(jnp.float32)).sum(-1).T
    dq = call.run(call, "dq", gradient_of_q, [q, grad, residual, delta], [[k], [v]], length, [q])
    dkv = call.run(
        call, "dkv", gradient_of_k_and_v, [k, v], [[q, residual], [grad, delta]], length, [k, v]
    )
    return *dq, *dkv, None


_flash.defvjp(_flash_fwd, _flash_bwd)
