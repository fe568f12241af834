"""The block sizes of flash_gpu on Hopper, bounded by the shared memory that its kernels take."""

from fluxjax.kernels.block_sizes import KERNELS, Block, BlockSizes, KernelBlocks, round_up

SMEM_BYTES = 227 * 2**10
"""Shared memory of one program on Hopper."""

WORKERS = 2
"""Warpgroups of a program that compute; one more fetches."""

SLOTS = 2
"""Blocks of each streamed array that are in shared memory at a time."""

_WARPGROUP_ROWS = 64
"""Rows that a warpgroup multiplies at once."""

_DEFAULT_SIZES = BlockSizes(q=128, q_dkv=64)


def mosaic_block_sizes(
    queries: int,
    keys: int,
    head_dim: int,
    block_sizes: BlockSizes | None = None,
) -> KernelBlocks:
    """Return the block of each kernel.

    **Arguments:** `queries`, `keys`: numbers of tokens. `block_sizes`: sizes to use, or None for
    the default ones; reduced where they are larger than the tokens.
    **Returns:** (queries, keys) for "forward", "dq" and "dkv".
    **Raises:** `ValueError` for sizes that are not multiples of 64, or of 128 where two warpgroups
    share a block (`q`, `q_dq`, `kv_dkv`), or that take more than the shared memory.
    """
    sizes = block_sizes or _DEFAULT_SIZES
    shared = _WARPGROUP_ROWS * WORKERS
    blocks = {}
    for kernel in KERNELS:
        requested = getattr(sizes, kernel)
        # The program's own side is shared by two warpgroups: keys in dkv, queries elsewhere.
        units = (_WARPGROUP_ROWS, shared) if kernel == "dkv" else (shared, _WARPGROUP_ROWS)
        if requested[0] % units[0] or requested[1] % units[1]:
            raise ValueError(
                "`flash_gpu` needs blocks of queries and keys in multiples of "
                f"{units[0]} and {units[1]} for {kernel}, got {requested}. "
                "Choose other block sizes."
            )
        q = min(requested[0], round_up(queries, units[0]))
        kv = min(requested[1], round_up(keys, units[1]))
        needed = smem_bytes(kernel, (q, kv), head_dim)
        if needed > SMEM_BYTES:
            raise ValueError(
                f"`flash_gpu` with blocks of {q} queries and {kv} keys takes {needed:,} bytes of "
                f"shared memory ({kernel}), of {SMEM_BYTES:,} that Hopper has. "
                "Choose smaller block sizes."
            )
        blocks[kernel] = q, kv
    return blocks


def smem_bytes(kernel: str, block: Block, head_dim: int) -> int:
    """Return an upper bound of the shared memory that one program of a kernel takes.

    **Arguments:** `kernel`: "forward", "dq" or "dkv". `block`: (queries, keys).
    **Returns:** bytes: the resident block, the slots of streamed blocks, the vectors of log-sum-exp
    and delta, and 3 KiB for barriers, reductions and alignment.
    """
    queries, keys = block
    bytes_per_token = 2 * round_up(head_dim, 64)
    if kernel == "forward":  # q; k and v; log-sum-exp
        matrix_tokens = queries + 2 * SLOTS * keys
        vector_tokens = queries
    elif kernel == "dq":  # q and the gradient; k and v; log-sum-exp and delta
        matrix_tokens = 2 * queries + 2 * SLOTS * keys
        vector_tokens = 2 * queries
    else:  # k and v; q and the gradient; log-sum-exp and delta, which are streamed
        matrix_tokens = 2 * keys + 2 * SLOTS * queries
        vector_tokens = 2 * SLOTS * queries
    return bytes_per_token * matrix_tokens + 4 * vector_tokens + 3 * 2**10
