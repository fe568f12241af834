"""How many tokens one block of an attention kernel covers."""

from dataclasses import dataclass

Block = tuple[int, int]
"""Tokens of one block of logits: (queries, keys)."""

KERNELS = ("forward", "dq", "dkv")
"""The kernels of flash attention: forward pass, gradient of q, gradients of k and v."""

KernelBlocks = dict[str, Block]
"""The block of each kernel, by the names in `KERNELS`."""


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Tokens in one block of `attention`, for the forward kernel and for the backward kernels.

    Which sizes an implementation accepts:

    - flash_tpu: multiples of 128.
    - flash_gpu on Hopper: multiples of 64, and of 128 for `q`, `q_dq` and `kv_dkv`.
    - flash_gpu on other GPUs: powers of two, at least 16.
    - xla_chunked: any `q`, and nothing else.

    flash_tpu, and flash_gpu on Hopper, reduce a block that is larger than the number of tokens.

    **Arguments:**

    - `q`, `kv`: queries and keys of the forward kernel; `kv` is `q` by default.
    - `q_dkv`, `kv_dkv`: of the kernel for the gradients of k and v; the forward kernel's by
      default.
    - `q_dq`, `kv_dq`: of the kernel for the gradient of q; the forward kernel's by default.

    **Raises:** `ValueError` for a size below 1.
    **Source:** the names are those of Dao et al. 2022 and of JAX's own TPU kernels.
    """

    q: int
    kv: int | None = None
    q_dkv: int | None = None
    kv_dkv: int | None = None
    q_dq: int | None = None
    kv_dq: int | None = None

    def __post_init__(self):
        wrong = {}
        for name, size in vars(self).items():
            if size is not None and size < 1:
                wrong[name] = size
        if wrong:
            raise ValueError(
                f"`BlockSizes` needs at least one token in a block, got {wrong}. "
                "Pass positive numbers."
            )

    @property
    def forward(self) -> Block:
        """Queries and keys of the forward kernel."""
        return self.q, _or_default(self.kv, self.q)

    @property
    def dkv(self) -> Block:
        """Queries and keys of the kernel for the gradients of k and v."""
        q, kv = self.forward
        return _or_default(self.q_dkv, q), _or_default(self.kv_dkv, kv)

    @property
    def dq(self) -> Block:
        """Queries and keys of the kernel for the gradient of q."""
        q, kv = self.forward
        return _or_default(self.q_dq, q), _or_default(self.kv_dq, kv)


def _or_default(size: int | None, default: int) -> int:
    if size is None:
        return default
    return size


PRESETS = {
    "trillium": BlockSizes(q=512),
    "trillium-dev": BlockSizes(q=1536),
    "trillium-schnell": BlockSizes(q=2176),
}
"""Sizes published for FLUX on TPU v6e (Trillium).

They are for any number of tokens, for the 4608 tokens of dev, and for the 4352 of schnell.
"""


def resolve_block_sizes(block_sizes: BlockSizes | str) -> BlockSizes:
    """Return block sizes, given as such or as the name of a preset.

    **Arguments:** `block_sizes`: sizes, or a key of `PRESETS`.
    **Returns:** the sizes.
    **Raises:** `ValueError` for an unknown name.
    """
    if isinstance(block_sizes, BlockSizes):
        return block_sizes
    if block_sizes not in PRESETS:
        raise ValueError(
            f"There are no block sizes {block_sizes!r}. "
            f"Choose one of {', '.join(PRESETS)}, or pass `BlockSizes`."
        )
    return PRESETS[block_sizes]


def ceil_div(tokens: int, size: int) -> int:
    """Return how many blocks cover some tokens.

    **Arguments:** `tokens`: to cover. `size`: tokens of a block.
    """
    return -(-tokens // size)


def round_up(tokens: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a number of tokens.

    **Arguments:** `tokens`: to cover. `multiple`: what the result is a multiple of.
    """
    return ceil_div(tokens, multiple) * multiple


def balanced_block_size(tokens: int, largest: int) -> int:
    """Return a block size that covers the tokens with the fewest blocks, of nearly equal size.

    **Arguments:** `tokens`: to cover, at least 1. `largest`: upper bound of the size.
    **Returns:** tokens of one block; the last block may have fewer real ones.
    """
    blocks = ceil_div(tokens, largest)
    return ceil_div(tokens, blocks)


_BLOCK_OVERHEAD = 64
"""Tokens whose computation costs about as much as starting one more block."""


def least_padded_block_size(tokens: int, largest: int, multiple: int) -> int:
    """Return the block size that costs least, in padding and in overhead of each block.

    **Arguments:** `tokens`: to cover. `largest`: upper bound of the size. `multiple`: the size is
    a multiple of it.
    **Returns:** tokens of one block.
    """
    # From large to small: of two sizes that cost the same, the larger one is taken.
    sizes = range(min(largest, round_up(tokens, multiple)), 0, -multiple)

    def cost(size: int) -> int:
        return ceil_div(tokens, size) * (size + _BLOCK_OVERHEAD)

    return min(sizes, key=cost)
