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

Condition = bool | np.bool_ | Bool[Array, ""]
"""Whether something holds: known in Python, or decided inside of the kernel."""


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


def forward_kernel(
    spec: TpuKernelSpec,
    ends: TokenEnds,
    refs: Sequence[Ref],
) -> None:
    """Add a block of keys to the online softmax of a block of queries.

    **Arguments:** `refs`: q, k, v; the mixed values and, if there will be a gradient, the row of
    log2 of the sum of 2^logit; scratch: the largest logit and the sum of the exponentials, each
    repeated in all lanes, and the sum of the weighted values.
    """
    q_ref, k_ref, v_ref, mixed_ref, *row_refs, largest, total, values = refs
    step = pl.program_id(2)
    steps = pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        values[...] = jnp.zeros_like(values)

    def add_block(masked: bool) -> None:
        logits = spec.scale * _matmul(q_ref[...], k_ref[...], (1, 1))
        v = v_ref[...]
        if masked:
            visible = _is_before(ends.keys, step, logits.shape, 1)
            logits = jnp.where(visible, logits, -jnp.inf)
            v = _zero_padding(v, ends.keys, step)

        previous = largest[...]
        updated = jnp.maximum(previous, logits.max(1, keepdims=True))
        weights = jnp.exp2(logits - updated[:, :1])
        # What was summed up to now is relative to the previous largest logit.
        rescale = jnp.exp2(previous - updated)
        largest[...] = updated
        total[...] = rescale * total[...] + weights.sum(1, keepdims=True)
        rescaled = rescale[:, :1] * values[...]
        values[...] = rescaled + _matmul(weights.astype(v.dtype), v, (1, 0))

    _for_key_block(ends.keys, step, k_ref.shape[0], add_block)

    @pl.when(step == steps - 1)
    def _() -> None:
        sums = total[...]
        weighted = values[...]
        # Where there was no key the values are 0, rather than 0 / 0.
        divisor = jnp.where(sums == 0, 1, sums)[:, :1]
        mixed_ref[...] = (weighted / divisor).astype(mixed_ref.dtype)
        for row_ref in row_refs:
            # All columns are the same; the transpose makes a row of one of them.
            columns = largest[...] + jnp.log2(sums)
            row_ref[...] = columns.T[:1]


def dq_kernel(
    spec: TpuKernelSpec,
    ends: TokenEnds,
    refs: Sequence[Ref],
) -> None:
    """Add a block of keys to the gradient of a block of queries.

    **Arguments:** `refs`: q, k, v, the gradient of the mixed values, the rows of log-sum-exp and
    of delta; the gradient of q; scratch: both rows as columns, and the sum.
    """
    q_ref, k_ref, v_ref, grad_ref, log_sum_row, delta_row, *others = refs
    dq_ref, log_sum, delta, total = others
    step = pl.program_id(2)
    steps = pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        # Statistics are stored as rows, and are needed here as columns.
        for column, row in ((log_sum, log_sum_row), (delta, delta_row)):
            rows = jnp.broadcast_to(row[...], (LANES, row.shape[-1]))
            column[...] = rows.T
        total[...] = jnp.zeros_like(total)

    def add_block(masked: bool) -> None:
        k = k_ref[...]
        logits = spec.scale * _matmul(q_ref[...], k, (1, 1))
        weights = jnp.exp2(logits - log_sum[:, :1])
        weight_grads = _matmul(grad_ref[...], v_ref[...], (1, 1))
        # The gradient of softmax.
        logit_grads = weights * (weight_grads - delta[:, :1])
        if masked:
            visible = _is_before(ends.keys, step, logit_grads.shape, 1)
            logit_grads = jnp.where(visible, logit_grads, 0)
            k = _zero_padding(k, ends.keys, step)
        total[...] += _matmul(logit_grads.astype(k.dtype), k, (1, 0))

    _for_key_block(ends.keys, step, k_ref.shape[0], add_block)

    @pl.when(step == steps - 1)
    def _() -> None:
        dq = _natural_scale(spec) * total[...]
        dq_ref[...] = dq.astype(dq_ref.dtype)


def dkv_kernel(
    spec: TpuKernelSpec,
    ends: TokenEnds,
    refs: Sequence[Ref],
) -> None:
    """Add a block of queries to the gradients of a block of keys and values.

    Logits are transposed here, [keys, queries], so that statistics are used as the rows in which
    they are stored.

    **Arguments:** `refs`: the operands of `dq_kernel`; the gradients of k and v; scratch: their
    sums.
    """
    q_ref, k_ref, v_ref, grad_ref, log_sum_row, delta_row, *others = refs
    dk_ref, dv_ref, dk, dv = others
    key_block = pl.program_id(1)
    step = pl.program_id(2)
    steps = pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def add_block(masked: bool) -> None:
        q = q_ref[...]
        grad = grad_ref[...]
        logits = spec.scale * _matmul(k_ref[...], q, (1, 1))
        weights = jnp.exp2(logits - log_sum_row[...])
        # Of each weight's gradient, relative to the mean over the query's keys.
        differences = _matmul(v_ref[...], grad, (1, 1)) - delta_row[...]
        if masked:
            real_queries = _is_before(ends.queries, step, weights.shape, 1)
            real_keys = _is_before(ends.keys, key_block, weights.shape, 0)
            real = real_queries & real_keys
            weights = jnp.where(real, weights, 0)
            differences = jnp.where(real, differences, 0)
            # One mask for both, since they have the same tokens.
            rows = _is_before(ends.queries, step, q.shape, 0)
            q = jnp.where(rows, q, jnp.zeros_like(q))
            grad = jnp.where(rows, grad, jnp.zeros_like(grad))
        dv[...] += _matmul(weights.astype(grad.dtype), grad, (1, 0))
        dk[...] += _matmul((weights * differences).astype(q.dtype), q, (1, 0))

    # A mask is needed in a block in which either the queries or the keys end.
    queries_end = _ends_in(ends.queries, step, q_ref.shape[0])
    keys_end = _ends_in(ends.keys, key_block, k_ref.shape[0])
    masked = queries_end | keys_end
    has_keys = _starts_before(ends.keys, key_block, k_ref.shape[0])
    _run_block(add_block, masked, has_keys)

    @pl.when(step == steps - 1)
    def _() -> None:
        scaled = _natural_scale(spec) * dk[...]
        dk_ref[...] = scaled.astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)


def _natural_scale(spec: TpuKernelSpec) -> float:
    """Return the scale of the logits without the factor of log2(e) that is for base 2."""
    return spec.scale / math.log2(math.e)


def _matmul(
    a: Float[Array, "a_rows a_columns"],
    b: Float[Array, "b_rows b_columns"],
    axes: tuple[int, int],
) -> Float[Array, "rows columns"]:
    """Sum over one axis of each matrix, in float32."""
    # The default precision would round float32 operands to bfloat16.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contracted = ((axes[0],), (axes[1],))
    no_batch = ((), ())
    return jax.lax.dot_general(
        a,
        b,
        (contracted, no_batch),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _is_before(
    end: Index | None,
    block: Index,
    shape: tuple[int, ...],
    axis: int,
) -> Bool[Array, "rows columns"]:
    """Return where a block's tokens, along one axis, come before the end; None for no end."""
    if end is None:
        return jnp.full(shape, True)
    indices = block * shape[axis] + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return indices < end


def _zero_padding(
    x: Float[Array, "tokens head_dim"],
    end: Index | None,
    block: Index,
) -> Float[Array, "tokens head_dim"]:
    """Return a block with zeros from its end on.

    The memory there may hold NaN, and 0 times NaN is not 0.
    """
    real = _is_before(end, block, x.shape, 0)
    return jnp.where(real, x, jnp.zeros_like(x))


def _ends_in(end: Index | None, block: Index, size: int) -> Condition:
    """Return whether the end comes before the end of a block of `size` tokens."""
    if end is None:
        # NumPy's bool, unlike Python's, is known in Python and combines with traced ones by `|`.
        return np.bool_(False)
    return (block + 1) * size > end


def _starts_before(end: Index | None, block: Index, size: int) -> Condition:
    """Return whether a block of `size` tokens has any before the end."""
    if end is None:
        return True
    return block * size < end


def _for_key_block(
    end: Index | None,
    block: Index,
    size: int,
    add_block: Callable[[bool], None],
) -> None:
    """Add a block of keys, unless all of it is padding."""
    masked = _ends_in(end, block, size)
    has_keys = _starts_before(end, block, size)
    _run_block(add_block, masked, has_keys)


def _run_block(
    add_block: Callable[[bool], None],
    masked: Condition,
    has_keys: Condition,
) -> None:
    """Add a block if it has keys, with a mask only where one is needed."""
    if isinstance(masked, np.bool_):
        add_block(bool(masked))
        return
    # Two branches: most blocks need no mask, and computing one takes time.
    pl.when(has_keys & masked)(lambda: add_block(True))
    pl.when(has_keys & jnp.logical_not(masked))(lambda: add_block(False))
