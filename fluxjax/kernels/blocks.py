"""How many tokens a block of attention has: chosen by hand, by a published preset, or for a chip."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Tokens in a block of `attention`: queries and keys of the forward pass, and of the backward kernels.

    `q`, `kv`: of the forward pass; `kv` is as `q` by default. `q_dkv`, `kv_dkv`: of the kernel for the gradients of k and v.
    `q_dq`, `kv_dq`: of that for q's. These are as the forward's by default. flash_tpu takes multiples of 128, flash_gpu
    of 64, on Hopper, and of 128 for `q`, `q_dq` and `kv_dkv`; both cut what is larger than the tokens. On other GPUs flash_gpu
    takes powers of two. xla_chunked takes any `q`, alone.
    **Source:** the names are those of Dao et al. 2022 and of JAX's own TPU kernels.
    """

    q: int
    kv: int | None = None
    q_dkv: int | None = None
    kv_dkv: int | None = None
    q_dq: int | None = None
    kv_dq: int | None = None

    def __post_init__(self):
        wrong = {name: size for name, size in vars(self).items() if size is not None and size < 1}
        if wrong:
            raise ValueError(f"`BlockSizes` needs at least one token a block, got {wrong}.")

    @property
    def forward(self) -> tuple[int, int]:
        """Queries and keys of the forward kernel."""
        return self.q, self.q if self.kv is None else self.kv

    @property
    def dkv(self) -> tuple[int, int]:
        """Queries and keys of the kernel for the gradients of k and v."""
        q, kv = self.forward
        return q if self.q_dkv is None else self.q_dkv, kv if self.kv_dkv is None else self.kv_dkv

    @property
    def dq(self) -> tuple[int, int]:
        """Queries and keys of the kernel for the gradient of q."""
        q, kv = self.forward
        return q if self.q_dq is None else self.q_dq, kv if self.kv_dq is None else self.kv_dq


PRESETS = {
    "trillium": BlockSizes(q=512),
    "trillium-dev": BlockSizes(q=1536),
    "trillium-schnell": BlockSizes(q=2176),
}
"""Sizes published for FLUX on v6e (Trillium): for any count of tokens, for dev's 4608, for schnell's 4352."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU: `vmem`, bytes a core; `block`, the most tokens that a block of flash_tpu has by default."""

    vmem: int
    block: int


CHIPS = {
    "v4": Chip(vmem=16 * 2**20, block=512),
    "v5e": Chip(vmem=128 * 2**20, block=1024),
    "v5p": Chip(vmem=64 * 2**20, block=1024),
    "v6e": Chip(vmem=128 * 2**20, block=2176),
}
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def default_device() -> jax.Device:
    """Return the device that arrays are made on by default."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # made as jax is imported
    return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def chip_of(device: jax.Device) -> str:
    """Return the chip's name; of one that is not known, v4's, whose blocks are the smallest."""
    return _KINDS.get(device.device_kind, "v4")


def named(block_sizes: BlockSizes | str) -> BlockSizes:
    """Return the sizes, those of a preset for its name. **Raises:** `ValueError` for a name that is none."""
    if isinstance(block_sizes, BlockSizes):
        return block_sizes
    if block_sizes not in PRESETS:
        raise ValueError(
            f"There are no block sizes {block_sizes!r}. Choose one of {', '.join(PRESETS)}, or pass `BlockSizes`."
        )
    return PRESETS[block_sizes]


def round_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def even(tokens: int, largest: int) -> int:
    """Return the size of as few blocks as `largest` allows, as even as can be."""
    return -(-tokens // -(-tokens // largest))


def least_padded(tokens: int, largest: int, multiple: int) -> int:
    """Return the size, of the multiples up to `largest`, whose blocks have the fewest tokens in all: with the padding, and 64
    more for what each block costs."""
    sizes = range(min(largest, round_up(tokens, multiple)), 0, -multiple)
    return min(sizes, key=lambda size: -(-tokens // size) * (size + 64))
