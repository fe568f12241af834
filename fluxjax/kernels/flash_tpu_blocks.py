"""The block sizes of flash_tpu, bounded by the VMEM that its kernels take."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from fluxjax.kernels.block_sizes import (
    KERNELS,
    Block,
    BlockSizes,
    KernelBlocks,
    least_padded_block_size,
    round_up,
)
from fluxjax.kernels.chips import TPU_CHIPS

LANES = 128
"""Columns of a vector register; a head is padded to a multiple of it."""

_BYTES_PER_LOGIT = {"forward": {2: 6, 4: 12}, "dq": {2: 6, 4: 16}, "dkv": {2: 12, 4: 24}}
"""Bytes of intermediate values for each logit of a block, by the item size of the operands."""


def tpu_block_sizes(
    queries: int,
    keys: int,
    head_dim: int,
    dtype: DTypeLike,
    chip: str,
    block_sizes: BlockSizes | None = None,
) -> KernelBlocks:
    """Return the block of each kernel of flash_tpu.

    **Arguments:** `queries`, `keys`: numbers of tokens. `dtype`: of q, k and v. `chip`: a key of
    `TPU_CHIPS`. `block_sizes`: sizes to use, reduced where they are larger than the tokens; None
    for those with the least padding of the sizes that fit into the chip's VMEM.
    **Returns:** (queries, keys) for "forward", "dq" and "dkv".
    **Raises:** `ValueError` for sizes that are not multiples of 128, or that take more than the
    chip's VMEM.
    """
    blocks = {}
    for kernel in KERNELS:
        if block_sizes is None:
            block = _default_block(kernel, queries, keys, head_dim, dtype, chip)
        else:
            block = _requested_block(kernel, queries, keys, block_sizes)
        _check_vmem(kernel, block, head_dim, dtype, chip)
        blocks[kernel] = block
    return blocks


def _default_block(
    kernel: str,
    queries: int,
    keys: int,
    head_dim: int,
    dtype: DTypeLike,
    chip: str,
) -> Block:
    """Return the largest block that fits in the chip's VMEM and wastes little on padding."""
    limits = TPU_CHIPS[chip]
    largest = limits.largest_block
    while largest > LANES:
        if flash_vmem_bytes(kernel, (largest, largest), head_dim, dtype) <= limits.vmem_bytes:
            break
        largest -= LANES
    return (
        least_padded_block_size(queries, largest, LANES),
        least_padded_block_size(keys, largest, LANES),
    )


def _requested_block(kernel: str, queries: int, keys: int, block_sizes: BlockSizes) -> Block:
    """Return the block of a kernel that was asked for, no larger than the tokens need.

    **Raises:** `ValueError` for sizes that are not whole lanes.
    """
    q, kv = getattr(block_sizes, kernel)
    if q % LANES or kv % LANES:
        raise ValueError(
            f"`flash_tpu` needs blocks in multiples of {LANES} tokens, got {(q, kv)} for {kernel}. "
            "Choose other block sizes."
        )
    return min(q, round_up(queries, LANES)), min(kv, round_up(keys, LANES))


def _check_vmem(kernel: str, block: Block, head_dim: int, dtype: DTypeLike, chip: str) -> None:
    """**Raises:** `ValueError` for a block that does not fit in the chip's VMEM."""
    needed, limit = flash_vmem_bytes(kernel, block, head_dim, dtype), TPU_CHIPS[chip].vmem_bytes
    if needed > limit:
        raise ValueError(
            f"`flash_tpu` with blocks of {block[0]} queries and {block[1]} keys takes {needed:,} "
            f"bytes of VMEM ({kernel}), of {limit:,} that {chip} has. Choose smaller block sizes."
        )


def flash_vmem_bytes(kernel: str, block: Block, head_dim: int, dtype: DTypeLike) -> int:
    """Return an upper bound of the VMEM that one kernel takes.

    It is fitted to what the compiler allocates for v4 to v6e.

    **Arguments:** `kernel`: "forward", "dq" or "dkv". `block`: (queries, keys). `dtype`: of q, k
    and v.
    **Returns:** bytes.
    """
    queries, keys = block
    dim, itemsize = round_up(head_dim, LANES), jnp.dtype(dtype).itemsize
    # Tokens of the matrices, [tokens, head_dim], by what happens to them.
    read = 2 * keys + (queries if kernel == "forward" else 2 * queries)
    written = 2 * keys if kernel == "dkv" else queries
    masked = 2 * queries if kernel == "dkv" else keys
    # Twice, since the next blocks are fetched while these are used.
    windows = 2 * itemsize * dim * (read + written)
    accumulators = 4 * dim * written
    # Products before they are added, and operands that are masked at the last token.
    temporaries = dim * (4 * written + itemsize * masked)
    if itemsize == 4:  # float32 is multiplied in several bfloat16 parts
        temporaries += dim * 4 * read
    logits = _BYTES_PER_LOGIT[kernel][itemsize] * queries * keys
    return windows + accumulators + _statistics_bytes(kernel, queries) + temporaries + logits


def _statistics_bytes(kernel: str, queries: int) -> int:
    """Return the bytes of what softmax has for each query: rows fill 8 sublanes, columns 128 lanes.

    The log-sum-exp is one row and, in the backward kernels, delta another; both have two windows.
    The forward kernel and that of q's gradient also keep two columns.
    """
    rows = 2 if kernel == "forward" else 4
    columns = 0 if kernel == "dkv" else 2
    return 4 * queries * (8 * rows + LANES * columns)
