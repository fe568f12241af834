"""Flash attention for TPUs: blocks of keys go by a block of queries in VMEM, and no matrix of logits leaves it.

The backward pass computes the logits again, from the forward's log-sum-exp: once for q's gradient, once for those of k and v.
**Source:** Dao et al. 2022 (2205.14135), algorithms 1 and 4; Dao 2023 (2307.08691).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fluxjax.kernels.blocks import CHIPS, BlockSizes, least_padded, round_up
from fluxjax.shapes import Array, Float, Int

LANES = 128
_DTYPES = (jnp.bfloat16, jnp.float32)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static in a call: `head_dim` in whole lanes; a `scale` to base 2; blocks of (queries, keys) a kernel."""

    head_dim: int
    scale: float
    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]
    chip: str
    interpret: bool


def flash(
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
    """Return softmax(scale * q k^T) v, of any number of tokens; a head_dim that is no multiple of 128 is padded to one.

    **Arguments:** `q`, `k`, `v`: bfloat16, or float32 at the matmul's highest precision. `key_length`: keys that are seen.
    `chip`: of `CHIPS`; chooses the blocks unless `block_sizes` are given, and bounds them by its VMEM. `interpret`: run on any
    platform, slowly.
    **Raises:** `ValueError` for another dtype, blocks that are no multiples of 128, or blocks too large for the chip's VMEM.
    """
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"`flash_tpu` needs bfloat16 or float32, got {q.dtype}. Pass implementation=None."
        )
    (queries, _, dim), keys = q.shape, len(k)
    lanes = round_up(dim, LANES)
    sizes = blocks(queries, keys, dim, q.dtype, chip, block_sizes)
    call = _Call(
        head_dim=lanes,
        # Exponentials are to base 2, so that the scale's multiplication is the only one.
        scale=scale * math.log2(math.e),
        **sizes,
        chip=chip,
        interpret=interpret,
    )
    # A head is a column of 128 lanes, so that a block of one head is cut from [tokens, width] and nothing is transposed.
    columns = [
        rearrange(_pad(x, lanes), "tokens heads dim -> tokens (heads dim)") for x in (q, k, v)
    ]
    length = (
        None
        if key_length is None
        else jnp.minimum(key_length.astype(jnp.int32), keys).reshape(1, 1)
    )
    mixed = _flash(call, *columns, length)
    return rearrange(mixed, "tokens (heads dim) -> tokens heads dim", dim=lanes)[..., :dim]


def _pad(x: Array, lanes: int) -> Array:
    return x if x.shape[-1] == lanes else jnp.pad(x, ((0, 0), (0, 0), (0, lanes - x.shape[-1])))


def blocks(
    queries: int,
    keys: int,
    head_dim: int,
    dtype: Any,
    chip: str,
    block_sizes: BlockSizes | None = None,
) -> dict[str, tuple[int, int]]:
    """Return the (queries, keys) of a block of each kernel, forward, dq and dkv.

    They are as given, but no larger than the tokens; or else, of the sizes that the chip holds, those that are least padded.

    **Raises:** `ValueError` for sizes that are no multiples of 128, or take more than the chip's VMEM.
    """
    found = {}
    for kernel in ("forward", "dq", "dkv"):
        if block_sizes is None:
            largest = CHIPS[chip].block
            while (
                largest > LANES
                and vmem_bytes(kernel, (largest, largest), head_dim, dtype) > CHIPS[chip].vmem
            ):
                largest -= LANES
            block = least_padded(queries, largest, LANES), least_padded(keys, largest, LANES)
        else:
            q, kv = getattr(block_sizes, kernel)
            if q % LANES or kv % LANES:
                raise ValueError(
                    f"`flash_tpu` needs blocks in multiples of {LANES} tokens, got {(q, kv)} for {kernel}."
                )
            block = min(q, round_up(queries, LANES)), min(kv, round_up(keys, LANES))
        _check_vmem(kernel, block, head_dim, dtype, chip)
        found[kernel] = block
    return found


def vmem_bytes(kernel: str, block: tuple[int, int], head_dim: int, dtype: Any) -> int:
    """Return the bytes of VMEM that a kernel (forward, dq or dkv) takes at a block of (queries, keys), at most.

    Operands and results, twice, since the next are fetched meanwhile; sums; and what is made of a block, as many bytes as the
    compiler needs for v4 to v6e.
    """
    (queries, keys), dim, size = block, round_up(head_dim, LANES), jnp.dtype(dtype).itemsize
    read = (queries if kernel == "forward" else 2 * queries) + 2 * keys
    written, masked = (2 * keys, 2 * queries) if kernel == "dkv" else (queries, keys)
    windows = 2 * size * dim * (read + written)
    # Softmax's statistics: columns fill 128 lanes, rows 8 sublanes.
    statistics = 8 * 4 * queries * (2 if kernel == "forward" else 4) + (
        0 if kernel == "dkv" else 4 * 2 * LANES * queries
    )
    sums = 4 * dim * written
    # Products before they are added, operands cut at the last token, and the parts that float32 is multiplied in.
    made = dim * (4 * written + size * masked + (4 * read if size == 4 else 0))
    return windows + sums + statistics + made + _LOGIT[kernel][size] * queries * keys


_LOGIT = {"forward": {2: 6, 4: 12}, "dq": {2: 6, 4: 16}, "dkv": {2: 12, 4: 24}}
"""Bytes a logit, by the operands' itemsize."""


def _check_vmem(kernel: str, block: tuple[int, int], head_dim: int, dtype: Any, chip: str) -> None:
    needed, limit = vmem_bytes(kernel, block, head_dim, dtype), CHIPS[chip].vmem
    if needed > limit:
        raise ValueError(
            f"`flash_tpu` with blocks of {block[0]} queries and {block[1]} keys takes {needed:,} bytes of VMEM ({kernel}), "
            f"of {limit:,} that {chip} has. Choose smaller block sizes."
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(call: _Call, q: Array, k: Array, v: Array, length: Array | None) -> Array:
    return _forward(call, q, k, v, length, residual=False)[0]


def _flash_fwd(
    call: _Call, q: Array, k: Array, v: Array, length: Array | None
) -> tuple[Array, tuple]:
    mixed, residual = _forward(call, q, k, v, length, residual=True)
    return mixed, (q, k, v, length, mixed, residual)


def _flash_bwd(call: _Call, kept: tuple, grad: Array) -> tuple:
    q, k, v, length, mixed, residual = kept
    products = (mixed.astype(jnp.float32) * grad.astype(jnp.float32)).reshape(
        len(q), -1, call.head_dim
    )
    delta = products.sum(-1).T[:, None]
    inputs = (length, q, k, v, grad, residual, delta)
    return _dq(call, *inputs), *_dkv(call, *inputs), None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _pallas(
    call: _Call,
    name: str,
    kernel: Callable,
    length: Array | None,
    operands: list[tuple[Array, str]],
    results: list[tuple[jax.ShapeDtypeStruct, str]],
    scratch: list[tuple[int, int]],
    *,
    matmuls: int,
    keys_first: bool = False,
) -> tuple[Array, ...]:
    """Run the named kernel over a grid of (heads, queries, keys), the last two the other way round for `keys_first`.

    Each operand and result comes with what its blocks go along: "queries" or "keys" of [tokens, width], or "row" for the
    queries of [heads, 1, tokens]. Everything is one example's: vmap makes a further, parallel axis of the grid.
    """
    block: tuple[int, int] = getattr(call, name)
    queries, keys = len(operands[0][0]), len(operands[1][0])
    heads, dim = operands[0][0].shape[1] // call.head_dim, call.head_dim

    def spec(along: str) -> pl.BlockSpec:
        def place(head: Any, *at: Any) -> tuple:
            i, j = reversed(at) if keys_first else at
            return (head, 0, i) if along == "row" else (i if along == "queries" else j, head)

        shape = (
            (None, 1, block[0])
            if along == "row"
            else (block[0] if along == "queries" else block[1], dim)
        )
        return pl.BlockSpec(shape, place)

    steps = (pl.cdiv(queries, block[0]), pl.cdiv(keys, block[1]))
    ends = {
        "queries": queries if queries % block[0] else None,
        "keys": keys if keys % block[1] else None,
    }
    lengths = [] if length is None else [length]
    needed = vmem_bytes(name, block, dim, operands[0][0].dtype)
    shapes: list[Any] = [x for x, _ in (*operands, *results)]

    def body(*refs: Any) -> None:
        seen = refs[0][0, 0] if lengths else ends["keys"]
        kernel(call, ends["queries"], seen, *refs[len(lengths) :])

    run = pl.pallas_call(
        body,
        grid=(heads, *(reversed(steps) if keys_first else steps)),
        in_specs=[
            *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in lengths),
            *(spec(along) for _, along in operands),
        ],
        out_specs=[spec(along) for _, along in results],
        out_shape=[shape for shape, _ in results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(CHIPS[call.chip].vmem, needed * 5 // 4),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * heads * queries * keys * dim,
            transcendentals=heads * queries * keys,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes),
        ),
        interpret=call.interpret,
        name=f"flash_{name}",
    )
    return tuple(run(*lengths, *(x for x, _ in operands)))


def _forward(
    call: _Call, q: Array, k: Array, v: Array, length: Array | None, *, residual: bool
) -> tuple[Array, ...]:
    """Return the mixed values and, if asked for, log2 of the sum of 2^logit of each query: [heads, 1, queries]."""
    rows = jax.ShapeDtypeStruct((q.shape[1] // call.head_dim, 1, len(q)), jnp.float32)
    results = [(jax.ShapeDtypeStruct(q.shape, q.dtype), "queries"), (rows, "row")]
    size = call.forward[0]
    return _pallas(
        call,
        "forward",
        _forward_kernel,
        length,
        [(q, "queries"), (k, "keys"), (v, "keys")],
        results if residual else results[:1],
        [(size, LANES), (size, LANES), (size, call.head_dim)],
        matmuls=2,
    )


def _forward_kernel(call, queries, keys, q_ref, k_ref, v_ref, out_ref, *rest) -> None:
    *row_ref, largest, total, values = rest
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        values[...] = jnp.zeros_like(values)

    def take(at_end: bool) -> None:
        logits = call.scale * _dot(q_ref[...], k_ref[...], (1, 1))
        v = v_ref[...]
        if at_end:
            logits = jnp.where(_before(keys, step, logits.shape, 1), logits, -jnp.inf)
            # Beyond the last key stands anything, and 0 times it need not be 0.
            v = jnp.where(_before(keys, step, v.shape, 0), v, jnp.zeros_like(v))
        before = largest[...]
        now = jnp.maximum(before, logits.max(1, keepdims=True))
        weights, kept = jnp.exp2(logits - now[:, :1]), jnp.exp2(before - now)
        largest[...] = now
        total[...] = kept * total[...] + weights.sum(1, keepdims=True)
        values[...] = kept[:, :1] * values[...] + _dot(weights.astype(v.dtype), v, (1, 0))

    _up_to(keys, step, k_ref.shape[0], take)

    @pl.when(step == steps - 1)
    def _():
        # No key seen: no values, rather than 0 / 0.
        sums = total[...]
        out_ref[...] = (values[...] / jnp.where(sums == 0, 1, sums)[:, :1]).astype(out_ref.dtype)
        for row in row_ref:
            row[...] = (largest[...] + jnp.log2(sums)).T[:1]


def _dq(call: _Call, length: Array | None, q, k, v, grad, residual, delta) -> Array:
    size = call.dq[0]
    operands = [
        (q, "queries"),
        (k, "keys"),
        (v, "keys"),
        (grad, "queries"),
        (residual, "row"),
        (delta, "row"),
    ]
    scratch = [(size, LANES), (size, LANES), (size, call.head_dim)]
    results = [(jax.ShapeDtypeStruct(q.shape, q.dtype), "queries")]
    return _pallas(call, "dq", _dq_kernel, length, operands, results, scratch, matmuls=3)[0]


def _dq_kernel(
    call,
    queries,
    keys,
    q_ref,
    k_ref,
    v_ref,
    grad_ref,
    residual_ref,
    delta_ref,
    dq_ref,
    residual,
    delta,
    total,
) -> None:
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        # Rows are stored, columns are needed.
        for column, row in ((residual, residual_ref), (delta, delta_ref)):
            column[...] = jnp.broadcast_to(row[...], (LANES, row.shape[-1])).T
        total[...] = jnp.zeros_like(total)

    def take(at_end: bool) -> None:
        k = k_ref[...]
        weights = jnp.exp2(call.scale * _dot(q_ref[...], k, (1, 1)) - residual[:, :1])
        slopes = weights * (_dot(grad_ref[...], v_ref[...], (1, 1)) - delta[:, :1])
        if at_end:
            slopes = jnp.where(_before(keys, step, slopes.shape, 1), slopes, 0)
            k = jnp.where(_before(keys, step, k.shape, 0), k, jnp.zeros_like(k))
        total[...] += _dot(slopes.astype(k.dtype), k, (1, 0))

    _up_to(keys, step, k_ref.shape[0], take)

    @pl.when(step == steps - 1)
    def _():
        dq_ref[...] = (call.scale / math.log2(math.e) * total[...]).astype(dq_ref.dtype)


def _dkv(call: _Call, length: Array | None, q, k, v, grad, residual, delta) -> tuple[Array, ...]:
    operands = [
        (q, "queries"),
        (k, "keys"),
        (v, "keys"),
        (grad, "queries"),
        (residual, "row"),
        (delta, "row"),
    ]
    scratch = [(call.dkv[1], call.head_dim)] * 2
    results = [(jax.ShapeDtypeStruct(x.shape, x.dtype), "keys") for x in (k, v)]
    return _pallas(
        call, "dkv", _dkv_kernel, length, operands, results, scratch, matmuls=4, keys_first=True
    )


def _dkv_kernel(
    call,
    queries,
    keys,
    q_ref,
    k_ref,
    v_ref,
    grad_ref,
    residual_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    dk,
    dv,
) -> None:
    """All is transposed here, [keys, queries], so that the rows of statistics lie as they are stored."""
    block, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def take(at_end: bool) -> None:
        q, grad = q_ref[...], grad_ref[...]
        weights = jnp.exp2(call.scale * _dot(k_ref[...], q, (1, 1)) - residual_ref[...])
        differences = _dot(v_ref[...], grad, (1, 1)) - delta_ref[...]
        if at_end:
            real = _before(queries, step, weights.shape, 1) & _before(keys, block, weights.shape, 0)
            weights, differences = jnp.where(real, weights, 0), jnp.where(real, differences, 0)
            rows = _before(queries, step, q.shape, 0)
            q, grad = (
                jnp.where(rows, q, jnp.zeros_like(q)),
                jnp.where(rows, grad, jnp.zeros_like(grad)),
            )
        dv[...] += _dot(weights.astype(grad.dtype), grad, (1, 0))
        dk[...] += _dot((weights * differences).astype(q.dtype), q, (1, 0))

    # Of the queries and of the keys, either may end in this block.
    cut = _ends_in(queries, step, q_ref.shape[0]) | _ends_in(keys, block, k_ref.shape[0])
    _run(take, cut, True if keys is None else block * k_ref.shape[0] < keys)

    @pl.when(step == steps - 1)
    def _():
        dk_ref[...] = (call.scale / math.log2(math.e) * dk[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _before(end: Any, block: Any, shape: tuple[int, ...], axis: int) -> Any:
    """Return where the tokens of a block, along an axis, are before the end; None is no end."""
    if end is None:
        return jnp.full(shape, True)
    return block * shape[axis] + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < end


def _ends_in(end: Any, block: Any, size: int) -> Any:
    return np.bool_(False) if end is None else (block + 1) * size > end


def _up_to(end: Any, block: Any, size: int, take: Callable[[bool], None]) -> None:
    _run(take, _ends_in(end, block, size), True if end is None else block * size < end)


def _run(take: Callable[[bool], None], cut: Any, seen: Any) -> None:
    """Take a block that is seen, masked only if it is cut."""
    if isinstance(cut, np.bool_):
        take(bool(cut))
        return
    pl.when(seen & cut)(lambda: take(True))
    pl.when(seen & jnp.logical_not(cut))(lambda: take(False))
