"""Flash attention for TPUs: logits are computed block by block in VMEM and never leave it.

The backward pass computes the logits again, from the log-sum-exp of the forward pass: once for the
gradient of q, and once for those of k and v.
**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4; Dao 2023 (2307.08691).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from fluxjax.kernels.block_sizes import BlockSizes, round_up
from fluxjax.kernels.flash_tpu_blocks import LANES, tpu_block_sizes
from fluxjax.kernels.flash_tpu_call import (
    BackwardInputs,
    KeyLength,
    Matrix,
    Row,
    run_dkv,
    run_dq,
    run_forward,
)
from fluxjax.kernels.flash_tpu_kernels import TpuKernelSpec
from fluxjax.shapes import Array, Float, Int

_DTYPES = (jnp.bfloat16, jnp.float32)


def flash_attention_tpu(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys heads head_dim"],
    v: Float[Array, "keys heads head_dim"],
    *,
    scale: float,
    chip: str,
    key_length: Int[Array, ""] | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "queries heads head_dim"]:
    """Compute softmax(scale * q k^T) v, for any number of tokens.

    A head_dim that is not a multiple of 128 is padded to one.

    **Arguments:**

    - `q`, `k`, `v`: bfloat16, or float32, which is multiplied at the highest precision.
    - `chip`: a key of `TPU_CHIPS`; its VMEM bounds the blocks.
    - `key_length`: keys from this index on are padding.
    - `block_sizes`: None for those chosen for the chip.
    - `interpret`: whether to interpret the kernels, slowly, on any platform.

    **Returns:** the mixed values, in the dtype of `q`.
    **Raises:** `ValueError` for another dtype, for blocks that are not multiples of 128, or for
    blocks too large for the chip's VMEM.
    """
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"`flash_tpu` needs bfloat16 or float32, got {q.dtype}. Pass implementation=None."
        )
    (queries, _, dim), keys = q.shape, len(k)
    padded_dim = round_up(dim, LANES)
    spec = TpuKernelSpec(
        head_dim=padded_dim,
        # Exponentials are to base 2, so that this is the only factor that the logits need.
        scale=scale * math.log2(math.e),
        **tpu_block_sizes(queries, keys, dim, q.dtype, chip, block_sizes),
        chip=chip,
        interpret=interpret,
    )
    # A head is a column of whole lanes, so that a block of it is cut out and nothing transposed.
    columns = [_pad_and_join_heads(x, padded_dim) for x in (q, k, v)]
    length = None
    if key_length is not None:
        length = jnp.minimum(key_length.astype(jnp.int32), keys).reshape(1, 1)
    mixed = _flash_attention(spec, *columns, length)
    return rearrange(mixed, "tokens (heads dim) -> tokens heads dim", dim=padded_dim)[..., :dim]


def _pad_and_join_heads(x: Float[Array, "tokens heads head_dim"], padded_dim: int) -> Matrix:
    """Return a matrix of the heads side by side, each padded with zeros to a size."""
    missing = padded_dim - x.shape[-1]
    if missing:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, missing)))
    return rearrange(x, "tokens heads dim -> tokens (heads dim)")


class _Residuals(NamedTuple):
    """What the backward pass needs of the forward pass."""

    q: Matrix
    k: Matrix
    v: Matrix
    length: KeyLength | None
    mixed: Matrix
    log_sum: Row


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash_attention(
    spec: TpuKernelSpec,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    length: KeyLength | None,
) -> Matrix:
    (mixed,) = run_forward(spec, q, k, v, length, with_log_sum=False)
    return mixed


def _flash_attention_fwd(
    spec: TpuKernelSpec,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    length: KeyLength | None,
) -> tuple[Matrix, _Residuals]:
    """Compute attention, and keep what the gradients are computed from."""
    mixed, log_sum = run_forward(spec, q, k, v, length, with_log_sum=True)
    return mixed, _Residuals(q, k, v, length, mixed, log_sum)


def _flash_attention_bwd(
    spec: TpuKernelSpec,
    residuals: _Residuals,
    grad: Matrix,
) -> tuple[Matrix, Matrix, Matrix, None]:
    """Return the gradients of q, k and v; the length has none."""
    q, k, v, length, mixed, log_sum = residuals
    # The gradient of softmax subtracts their sums: the weighted means of the weights' gradients.
    products = mixed.astype(jnp.float32) * grad.astype(jnp.float32)
    by_head = products.reshape(len(q), -1, spec.head_dim)
    delta = by_head.sum(-1).T[:, None]
    inputs = BackwardInputs(q=q, k=k, v=v, grad=grad, log_sum=log_sum, delta=delta)
    dq = run_dq(spec, inputs, length)
    dk, dv = run_dkv(spec, inputs, length)
    return dq, dk, dv, None


_flash_attention.defvjp(_flash_attention_fwd, _flash_attention_bwd)
