"""Queries, keys and values for TPUs, from projections to what flash_tpu takes, in one pass: cut, joined, normed and rotated.

XLA turns adjacent features with the tokens along the lanes, to where it transposes q and k, and back. Here a head stays what it
is in the projection, a column of 128 lanes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fluxjax.kernels.blocks import CHIPS, least_padded
from fluxjax.shapes import Array, Float

LANES = 128
_ROWS = 16
"""Tokens of a tile of 16-bit numbers."""
_LARGEST = 128
"""Tokens of a block, at most; to move them takes much longer than a turn of the grid costs."""

Part = tuple[Float[Array, "tokens columns"], Float[Array, " head_dim"], Float[Array, " head_dim"]]


Factors = tuple[Float[Array, "all_tokens head_dim"], Float[Array, "all_tokens head_dim"]]


def factors_of(
    cos: Float[Array, "all_tokens pairs"], sin: Float[Array, "all_tokens pairs"]
) -> Factors:
    """Return what each feature is multiplied with to be rotated, and what its neighbour is, made once and kept."""
    wide = jnp.repeat(cos, 2, axis=-1), jnp.stack([-sin, sin], axis=-1).reshape(len(sin), -1)
    # Without it the compiler makes them again in each turn of a loop, in another layout.
    return jax.lax.optimization_barrier(wide)


def heads(
    parts: Sequence[Part],
    factors: Factors,
    *,
    width: int,
    eps: float,
    chip: str,
    interpret: bool = False,
) -> list[Float[Array, "all_tokens width"]]:
    """Return q, k and v of the parts' tokens, a part after the other; q and k normed (RMS) and rotated (RoPE). No derivatives.

    **Arguments:** `parts`: one or two that suit, as `suits` says: a projection whose first 3 x `width` columns are q, k and v,
    and the norms' scales for q and k. `factors`: as `factors_of` makes them of each token's angles. `chip`: of
    `fluxjax.kernels.blocks.CHIPS`. `interpret`: run on any platform, slowly.
    """
    counts, dtype = [len(x) for x, *_ in parts], parts[0][0].dtype
    size = block(counts, width, dtype, chip)
    starts = [0, counts[0] // size][: len(parts)]

    def column(part: int, number: int) -> pl.BlockSpec:
        last = pl.cdiv(counts[part], size) - 1
        # Before and after its own tokens a part stays where it is, so that nothing is fetched.
        return pl.BlockSpec((size, width), lambda i: (jnp.clip(i - starts[part], 0, last), number))

    row = pl.BlockSpec((1, LANES), lambda i: (0, 0))
    angle, whole = (
        pl.BlockSpec((size, LANES), lambda i: (i, 0)),
        pl.BlockSpec((size, width), lambda i: (i, 0)),
    )
    specs = [
        spec
        for part in range(len(parts))
        for spec in (*(column(part, number) for number in range(3)), row, row)
    ]
    run = pl.pallas_call(
        partial(_kernel, starts, eps),
        grid=(pl.cdiv(sum(counts), size),),
        in_specs=[angle, angle, *specs],
        out_specs=[whole] * 3,
        out_shape=[jax.ShapeDtypeStruct((sum(counts), width), dtype)] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=vmem_bytes(size, width, dtype, len(parts)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,  # of matmuls, which are what is counted
            transcendentals=2 * sum(counts) * width // LANES,
            bytes_accessed=6 * sum(counts) * width * dtype.itemsize,
        ),
        interpret=interpret,
        name="heads",
    )
    return run(
        *factors,
        *(operand for x, *scales in parts for operand in (x, x, x, *(s[None] for s in scales))),
    )


def suits(counts: Sequence[int], width: int, head_dim: int, dtype: Any, chip: str) -> bool:
    """Return whether `heads` takes parts of so many tokens: heads of 128 features in bfloat16 or float32, and, of two parts, a
    first of a multiple of 16 tokens."""
    known = head_dim == LANES and dtype in (jnp.bfloat16, jnp.float32)
    return known and 1 <= len(counts) <= 2 and block(counts, width, dtype, chip) > 0


def block(counts: Sequence[int], width: int, dtype: Any, chip: str) -> int:
    """Return the tokens of a block, of which the first of two parts has a whole number, or 0."""
    sizes = range(_ROWS, _LARGEST + 1, _ROWS)
    fitting = [
        size for size in sizes if vmem_bytes(size, width, dtype, len(counts)) <= CHIPS[chip].vmem
    ]
    if len(counts) > 1:
        return max((size for size in fitting if counts[0] % size == 0), default=0)
    return least_padded(counts[0], max(fitting), _ROWS) if fitting else 0


def vmem_bytes(size: int, width: int, dtype: Any, parts: int) -> int:
    """Return the bytes of VMEM that a block of so many tokens takes, at most: operands and results, twice, since the next are
    fetched meanwhile, and what is made of a head."""
    moved = 2 * 3 * (parts + 1) * size * width * jnp.dtype(dtype).itemsize
    return moved + 12 * 4 * size * LANES + 2**20


def _kernel(starts: list[int], eps: float, cos: Any, sin: Any, *refs: Any) -> None:
    *operands, q_out, k_out, v_out = refs
    for number, start in enumerate(starts):
        q, k, v, query_scale, key_scale = operands[5 * number : 5 * number + 5]

        def write(q=q, k=k, v=v, query_scale=query_scale, key_scale=key_scale) -> None:
            _normed_and_turned(q, query_scale, cos, sin, q_out, eps)
            _normed_and_turned(k, key_scale, cos, sin, k_out, eps)
            v_out[...] = v[...]

        if len(starts) == 1:
            write()
        else:
            pl.when(pl.program_id(0) >= start if number else pl.program_id(0) < starts[1])(write)


def _normed_and_turned(
    x_ref: Any, scale_ref: Any, cos: Any, sin: Any, out_ref: Any, eps: float
) -> None:
    scale = scale_ref[...].astype(jnp.float32)

    def head(number: Any, _: None) -> None:
        lanes = pl.ds(pl.multiple_of(number * LANES, LANES), LANES)
        x = x_ref[:, lanes].astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        x = (x * inverse * scale).astype(out_ref.dtype).astype(jnp.float32)
        first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
        other = jnp.where(first, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))
        out_ref[:, lanes] = (x * cos[...] + other * sin[...]).astype(out_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[1] // LANES, head, None)
