"""The bodies of flash_tpu's kernels: what one program computes for a block of queries and of keys.

**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4; Dao 2023 (2307.08691).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from fluxjax.kernels.block_sizes import Block
from fluxjax.kernels.flash_tpu_blocks import LANES
from fluxjax.kernels.pallas_types import Index, Ref
from fluxjax.shapes import Array, Bool, Float

Condition = np.bool_ | Bool[Array, ""]
"""Whether something holds: known in Python, or decided inside of the kernel."""

Logits = Float[Array, "rows columns"]


@dataclass(frozen=True, kw_only=True)
class TpuKernelSpec:
    """What is static in one call of flash_tpu.

    **Arguments:**

    - `head_dim`: padded to whole lanes.
    - `scale`: factor of the logits, times log2(e), since exponentials are to base 2.
    - `forward`, `dq`, `dkv`: (queries, keys) of each kernel's block.
    - `chip`: a key of `TPU_CHIPS`.
    - `interpret`: whether the kernels are interpreted, on any platform.
    """

    head_dim: int
    scale: float
    forward: Block
    dq: Block
    dkv: Block
    chip: str
    interpret: bool


@dataclass(frozen=True)
class TokenEnds:
    """Indices of the first queries and keys that are padding.

    None where every block is full, so that nothing needs a mask.
    """

    queries: int | None
    keys: Index | None


KernelBody = Callable[[TpuKernelSpec, TokenEnds, Sequence[Ref]], None]
"""A kernel, of references to its operands, its results and its scratch memory."""


def forward_kernel(spec: TpuKernelSpec, ends: TokenEnds, refs: Sequence[Ref]) -> None:
    """Add a block of keys to the online softmax of a block of queries."""
    # The row of log-sum-exp is a result only if there will be a gradient.
    q_ref, k_ref, v_ref, out_ref, *row_refs, largest, total, values = refs
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        values[...] = jnp.zeros_like(values)

    def add_block(masked: bool) -> None:
        logits = spec.scale * _matmul(q_ref[...], k_ref[...], (1, 1))
        v = v_ref[...]
        if masked:
            logits = jnp.where(_is_before(ends.keys, step, logits.shape, 1), logits, -jnp.inf)
            # Memory after the last key may hold NaN, and 0 times NaN is not 0.
            v = jnp.where(_is_before(ends.keys, step, v.shape, 0), v, jnp.zeros_like(v))
        previous = largest[...]
        updated = jnp.maximum(previous, logits.max(1, keepdims=True))
        weights = jnp.exp2(logits - updated[:, :1])
        rescale = jnp.exp2(previous - updated)
        largest[...] = updated
        total[...] = rescale * total[...] + weights.sum(1, keepdims=True)
        products = rescale[:, :1] * values[...]
        values[...] = products + _matmul(weights.astype(v.dtype), v, (1, 0))

    _for_key_block(ends.keys, step, k_ref.shape[0], add_block)

    @pl.when(step == steps - 1)
    def _() -> None:
        sums, weighted = total[...], values[...]
        # Where there was no key the values are 0, rather than 0 / 0.
        divisor = jnp.where(sums == 0, 1, sums)[:, :1]
        out_ref[...] = (weighted / divisor).astype(out_ref.dtype)
        for row_ref in row_refs:
            row_ref[...] = (largest[...] + jnp.log2(sums)).T[:1]


def dq_kernel(spec: TpuKernelSpec, ends: TokenEnds, refs: Sequence[Ref]) -> None:
    """Add a block of keys to the gradient of a block of queries."""
    q_ref, k_ref, v_ref, grad_ref, log_sum_row, delta_row, dq_ref, *scratch = refs
    log_sum, delta, total = scratch
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        # Statistics are stored as rows, and are needed here as columns.
        for column, row in ((log_sum, log_sum_row), (delta, delta_row)):
            column[...] = jnp.broadcast_to(row[...], (LANES, row.shape[-1])).T
        total[...] = jnp.zeros_like(total)

    def add_block(masked: bool) -> None:
        k = k_ref[...]
        weights = jnp.exp2(spec.scale * _matmul(q_ref[...], k, (1, 1)) - log_sum[:, :1])
        logit_grads = weights * (_matmul(grad_ref[...], v_ref[...], (1, 1)) - delta[:, :1])
        if masked:
            before = _is_before(ends.keys, step, logit_grads.shape, 1)
            logit_grads = jnp.where(before, logit_grads, 0)
            k = jnp.where(_is_before(ends.keys, step, k.shape, 0), k, jnp.zeros_like(k))
        total[...] += _matmul(logit_grads.astype(k.dtype), k, (1, 0))

    _for_key_block(ends.keys, step, k_ref.shape[0], add_block)

    @pl.when(step == steps - 1)
    def _() -> None:
        dq_ref[...] = (spec.scale / math.log2(math.e) * total[...]).astype(dq_ref.dtype)


def dkv_kernel(spec: TpuKernelSpec, ends: TokenEnds, refs: Sequence[Ref]) -> None:
    """Add a block of queries to the gradients of a block of keys and values.

    Logits are transposed here, [keys, queries], so that statistics are used as the rows in which
    they are stored.
    """
    q_ref, k_ref, v_ref, grad_ref, log_sum_row, delta_row, dk_ref, dv_ref, dk, dv = refs
    block, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def add_block(masked: bool) -> None:
        q, grad = q_ref[...], grad_ref[...]
        weights = jnp.exp2(spec.scale * _matmul(k_ref[...], q, (1, 1)) - log_sum_row[...])
        differences = _matmul(v_ref[...], grad, (1, 1)) - delta_row[...]
        if masked:
            real_queries = _is_before(ends.queries, step, weights.shape, 1)
            real = real_queries & _is_before(ends.keys, block, weights.shape, 0)
            weights = jnp.where(real, weights, 0)
            differences = jnp.where(real, differences, 0)
            rows = _is_before(ends.queries, step, q.shape, 0)
            q = jnp.where(rows, q, jnp.zeros_like(q))
            grad = jnp.where(rows, grad, jnp.zeros_like(grad))
        dv[...] += _matmul(weights.astype(grad.dtype), grad, (1, 0))
        dk[...] += _matmul((weights * differences).astype(q.dtype), q, (1, 0))

    # A mask is needed in a block in which either the queries or the keys end.
    masked = _ends_in(ends.queries, step, q_ref.shape[0])
    masked = masked | _ends_in(ends.keys, block, k_ref.shape[0])
    has_keys = True if ends.keys is None else block * k_ref.shape[0] < ends.keys
    _run_block(add_block, masked, has_keys)

    @pl.when(step == steps - 1)
    def _() -> None:
        dk_ref[...] = (spec.scale / math.log2(math.e) * dk[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)


def _matmul(a: Array, b: Array, axes: tuple[int, int]) -> Logits:
    """Sum over one axis of each matrix, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _is_before(
    end: Index | None, block: Index, shape: tuple[int, ...], axis: int
) -> Bool[Array, "rows columns"]:
    """Return where a block's tokens, along one axis, come before the end; None for no end."""
    if end is None:
        return jnp.full(shape, True)
    return block * shape[axis] + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end


def _ends_in(end: Index | None, block: Index, size: int) -> Condition:
    """Return whether the end comes before the end of a block of `size` tokens."""
    if end is None:
        return np.bool_(False)
    return (block + 1) * size > end


def _for_key_block(
    end: Index | None, block: Index, size: int, add_block: Callable[[bool], None]
) -> None:
    """Add a block of keys, unless all of it is padding."""
    masked = _ends_in(end, block, size)
    has_keys = True if end is None else block * size < end
    _run_block(add_block, masked, has_keys)


def _run_block(
    add_block: Callable[[bool], None], masked: Condition, has_keys: bool | Bool[Array, ""]
) -> None:
    """Add a block if it has keys, with a mask only where one is needed."""
    if isinstance(masked, np.bool_):
        add_block(bool(masked))
        return
    pl.when(has_keys & masked)(lambda: add_block(True))
    pl.when(has_keys & jnp.logical_not(masked))(lambda: add_block(False))
