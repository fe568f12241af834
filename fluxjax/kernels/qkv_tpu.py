"""One TPU kernel from projections to queries, keys and values: cut out, joined, normed, rotated.

XLA would bring the tokens to the lanes to rotate adjacent features, and so transpose q and k there
and back. Here a head stays what it is in the projection: a column of 128 lanes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from fluxjax.kernels.block_sizes import ceil_div, least_padded_block_size
from fluxjax.kernels.chips import TPU_CHIPS
from fluxjax.kernels.pallas_types import Index, Ref, Step
from fluxjax.shapes import Array, Float

LANES = 128
"""Columns of a vector register, and features of a head."""

_TILE_ROWS = 16
"""Tokens of a tile of 16-bit numbers."""

_LARGEST_BLOCK = 128
"""Most tokens of a block: to move them takes much longer than one more program of the grid."""

Part = tuple[Float[Array, "_ columns"], Float[Array, " head_dim"], Float[Array, " head_dim"]]
"""One modality: its projection, [tokens, columns], and the RMS norms' scales of q and of k."""

RotationFactors = tuple[Float[Array, "all_tokens head_dim"], Float[Array, "all_tokens head_dim"]]
"""Factors of each feature, and of its neighbour in the pair, in float32."""

Matrix = Float[Array, "all_tokens width"]
"""q, k or v of all parts: heads are columns."""


def rotation_factors(
    cos: Float[Array, "all_tokens pairs"],
    sin: Float[Array, "all_tokens pairs"],
) -> RotationFactors:
    """Return what the kernel multiplies features with to rotate them.

    A rotated feature is itself times the first factor, plus its neighbour times the second.

    **Arguments:** `cos`, `sin`: of each token's angles, one for each pair of adjacent features.
    **Returns:** both factors.
    """
    of_feature = jnp.repeat(cos, 2, axis=-1)
    of_neighbour = jnp.stack([-sin, sin], axis=-1).reshape(len(sin), -1)
    # Without the barrier the compiler computes them in every iteration of a loop over blocks,
    # in another layout.
    return jax.lax.optimization_barrier((of_feature, of_neighbour))


def fused_qkv_tpu(
    parts: Sequence[Part],
    factors: RotationFactors,
    *,
    width: int,
    eps: float,
    chip: str,
    interpret: bool = False,
) -> tuple[Matrix, Matrix, Matrix]:
    """Return q, k and v of one or two modalities, one after the other.

    q and k are normed (RMS) and rotated (RoPE). It has no derivatives.

    **Arguments:**

    - `parts`: such that `fused_qkv_supported`. The first 3 x `width` columns of each projection
      are q, k and v.
    - `factors`: from `rotation_factors`.
    - `width`: heads x head_dim.
    - `eps`: added to the mean square in the norm.
    - `chip`: a key of `TPU_CHIPS`.
    - `interpret`: whether to interpret the kernel, slowly, on any platform.

    **Returns:** [tokens, width] each, in the dtype of the projections.
    """
    counts = [len(projected) for projected, _, _ in parts]
    tokens = sum(counts)
    dtype = parts[0][0].dtype
    size = qkv_block_tokens(counts, width, dtype, chip)
    # The blocks at which each part begins. The first of two parts fills whole blocks.
    first_blocks = [0] if len(parts) == 1 else [0, counts[0] // size]

    factor_spec = pl.BlockSpec((size, LANES), _rows)
    in_specs = [factor_spec, factor_spec]
    operands = [*factors]
    for count, first_block, part in zip(counts, first_blocks, parts, strict=True):
        last_block = ceil_div(count, size) - 1
        in_specs += _part_specs(size, width, first_block, last_block)
        projected, q_scale, k_scale = part
        operands += [projected, projected, projected, q_scale[None], k_scale[None]]

    call = pl.pallas_call(
        partial(_kernel, first_blocks, eps),
        grid=(ceil_div(tokens, size),),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((size, width), _rows)] * 3,
        out_shape=[jax.ShapeDtypeStruct((tokens, width), dtype)] * 3,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=qkv_vmem_bytes(size, width, dtype, len(parts)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,  # only those of matmuls are counted
            transcendentals=2 * tokens * width // LANES,
            bytes_accessed=6 * tokens * width * dtype.itemsize,
        ),
        interpret=interpret,
        name="heads",
    )
    q, k, v = call(*operands)
    return q, k, v


def _part_specs(
    size: int,
    width: int,
    first_block: int,
    last_block: int,
) -> list[pl.BlockSpec]:
    """Return the blocks of one part: q, k and v, cut out of its projection, and both scales."""
    specs = []
    for column in range(3):
        index_map = partial(_part_rows, first_block, last_block, column)
        specs.append(pl.BlockSpec((size, width), index_map))
    scale_spec = pl.BlockSpec((1, LANES), lambda i: (0, 0))
    return [*specs, scale_spec, scale_spec]


def _rows(i: Index) -> tuple[Index, int]:
    """Return the block that program `i` has of all tokens."""
    return i, 0


def _part_rows(
    first_block: int,
    last_block: int,
    column: int,
    i: Index,
) -> tuple[Index, int]:
    """Return the block that program `i` has of q, k or v (column 0 to 2) of one part.

    For programs before and after the part's own tokens the block does not change, so that nothing
    is fetched.
    """
    row = jnp.clip(i - first_block, 0, last_block)
    return row, column


def fused_qkv_supported(
    counts: Sequence[int],
    width: int,
    head_dim: int,
    dtype: DTypeLike,
    chip: str,
) -> bool:
    """Return whether `fused_qkv_tpu` supports these parts.

    It supports heads of 128 features, in bfloat16 or float32, and one or two parts. The first of
    two parts must have a multiple of 16 tokens.

    **Arguments:** `counts`: tokens of each part. `width`: heads x head_dim. `dtype`: of the
    projections. `chip`: a key of `TPU_CHIPS`.
    """
    if head_dim != LANES or dtype not in (jnp.bfloat16, jnp.float32):
        return False
    if len(counts) not in (1, 2):
        return False
    return qkv_block_tokens(counts, width, dtype, chip) > 0


def qkv_block_tokens(counts: Sequence[int], width: int, dtype: DTypeLike, chip: str) -> int:
    """Return the tokens of one block, or 0 if there is no suitable number.

    The first of two parts fills whole blocks, so that no block has tokens of both.

    **Arguments:** as of `fused_qkv_supported`.
    """
    limit = TPU_CHIPS[chip].vmem_bytes
    fitting = []
    for size in range(_TILE_ROWS, _LARGEST_BLOCK + 1, _TILE_ROWS):
        if qkv_vmem_bytes(size, width, dtype, len(counts)) <= limit:
            fitting.append(size)
    if not fitting:
        return 0
    if len(counts) == 1:
        return least_padded_block_size(counts[0], max(fitting), _TILE_ROWS)
    dividing = [size for size in fitting if counts[0] % size == 0]
    return max(dividing, default=0)


def qkv_vmem_bytes(size: int, width: int, dtype: DTypeLike, parts: int) -> int:
    """Return an upper bound of the VMEM that the kernel takes.

    **Arguments:** `size`: tokens of a block. `width`, `dtype`: as of `fused_qkv_supported`.
    `parts`: how many there are, 1 or 2.
    **Returns:** bytes.
    """
    matrix = size * width * jnp.dtype(dtype).itemsize
    # q, k and v of each part and of the result; twice, since the next are fetched meanwhile.
    windows = 2 * 3 * (parts + 1) * matrix
    # Room for twelve float32 values of each of a head's features.
    temporaries = 12 * 4 * size * LANES
    reserve = 2**20
    return windows + temporaries + reserve


def _kernel(first_blocks: list[int], eps: float, *refs: Ref) -> None:
    """Write one block of q, k and v, from the part that its tokens belong to."""
    cos, sin, *operands, q_out, k_out, v_out = refs

    def writer(part: int) -> Callable[[], None]:
        q, k, v, q_scale, k_scale = operands[5 * part : 5 * part + 5]

        def write() -> None:
            _norm_and_rotate(q, q_scale, cos, sin, q_out, eps)
            _norm_and_rotate(k, k_scale, cos, sin, k_out, eps)
            v_out[...] = v[...]

        return write

    if len(first_blocks) == 1:
        writer(0)()
        return
    # No block has tokens of both parts.
    second = first_blocks[1]
    pl.when(pl.program_id(0) < second)(writer(0))
    pl.when(pl.program_id(0) >= second)(writer(1))


def _norm_and_rotate(
    x_ref: Ref,
    scale_ref: Ref,
    cos: Ref,
    sin: Ref,
    out_ref: Ref,
    eps: float,
) -> None:
    """Write x, [tokens, width], normed and rotated.

    It goes head by head, so that what is computed takes little memory.
    """
    scale = scale_ref[...].astype(jnp.float32)

    def one_head(head: Step, _: None) -> None:
        lanes = pl.ds(pl.multiple_of(head * LANES, LANES), LANES)
        x = x_ref[:, lanes].astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        inverse_rms = jax.lax.rsqrt(mean_square + eps)
        # Rounded as the norm's result is where this is not fused.
        normed = (x * inverse_rms * scale).astype(out_ref.dtype)
        x = normed.astype(jnp.float32)

        # Each feature's neighbour in its pair: the next one of the first, the previous one of the
        # second. Rolling by LANES - 1 is rolling by -1.
        is_first = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
        following = pltpu.roll(x, LANES - 1, 1)
        preceding = pltpu.roll(x, 1, 1)
        neighbour = jnp.where(is_first, following, preceding)
        rotated = x * cos[...] + neighbour * sin[...]
        out_ref[:, lanes] = rotated.astype(out_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[1] // LANES, one_head, None)
