"""The kernels of flash_gpu in Triton, for NVIDIA GPUs other than Hopper.

A program loads its own block once, and the blocks of the other side one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from fluxjax.kernels.block_sizes import KERNELS, BlockSizes, KernelBlocks
from fluxjax.kernels.flash_gpu_spec import (
    GpuKernelSpec,
    KernelCall,
    KernelContext,
    KeyLength,
    Tensor,
    first_tokens,
    pad_tokens,
    token_axis,
    with_tokens,
)
from fluxjax.kernels.pallas_types import Index, Ref, Step
from fluxjax.shapes import Array

_DEFAULT_SIZES = BlockSizes(q=128, kv=64, q_dkv=64, q_dq=64)


def triton_block_sizes(
    queries: int,
    keys: int,
    head_dim: int,
    block_sizes: BlockSizes | None = None,
) -> KernelBlocks:
    """Return the block of each kernel, as `mosaic_block_sizes` does.

    **Arguments:** `block_sizes`: sizes to use, or None for the default ones. They do not depend on
    the others, which are those of `mosaic_block_sizes`.
    **Returns:** (queries, keys) for "forward", "dq" and "dkv".
    **Raises:** `ValueError` for sizes that are not powers of two, or below 16.
    """
    sizes = block_sizes or _DEFAULT_SIZES
    blocks = {}
    for kernel in KERNELS:
        block = getattr(sizes, kernel)
        for size in block:
            # A power of two has a single bit, which it does not share with the number before.
            is_power_of_two = size & (size - 1) == 0
            if size < 16 or not is_power_of_two:
                raise ValueError(
                    "`flash_gpu` needs blocks in powers of two on this GPU, at least 16, got "
                    f"{block} for {kernel}. Choose other block sizes."
                )
        blocks[kernel] = block
    return blocks


def launch_triton(
    spec: GpuKernelSpec,
    call: KernelCall,
    key_length: KeyLength | None,
) -> tuple[Array, ...]:
    """Run a kernel over a grid of (blocks, heads); tokens are padded to whole blocks.

    **Arguments:** as of `launch_mosaic`.
    **Returns:** arrays of the shapes of `call.results`.
    """
    tokens, heads, _ = call.resident[0].shape
    own_size, streamed_size = spec.resident_and_streamed(call.name)
    # Triton loads and stores whole blocks only.
    resident = [pad_tokens(x, own_size) for x in call.resident]
    streamed = jax.tree.map(lambda x: pad_tokens(x, streamed_size), call.streamed)
    operands, tree = jax.tree.flatten((resident, streamed, key_length))
    own_tokens = len(resident[0])
    streamed_tokens = len(streamed[0][0])

    def program(*refs: Ref) -> None:
        operand_refs = refs[: len(operands)]
        result_refs = refs[len(operands) :]
        own_refs, stream_refs, length_ref = jax.tree.unflatten(tree, operand_refs)
        first_token = pl.program_id(0) * own_size
        key_end: Index = spec.keys
        if length_ref is not None:
            key_end = length_ref[0]
        context = KernelContext(
            spec=spec,
            resident=[ref[...] for ref in own_refs],
            streams=[_LoadedTiles(group, streamed_size) for group in stream_refs],
            first_token=first_token,
            key_end=key_end,
            steps=spec.steps(call.name, streamed_tokens, key_end, first_token),
        )
        # The forward pass without a gradient has no use for the second tile, the log-sum-exp.
        for ref, tile in zip(result_refs, call.compute(context), strict=False):
            ref[...] = tile.astype(ref.dtype)

    # For blocks of 64 and 128 tokens a warp has 16 of them.
    num_warps = 4 if own_size == 64 else 8
    results = pl.pallas_call(
        program,
        grid=(own_tokens // own_size, heads),
        in_specs=_operand_blocks(resident, streamed, key_length, own_size),
        out_specs=[_own_block(x, own_size) for x in call.results],
        out_shape=[with_tokens(x, own_tokens) for x in call.results],
        compiler_params=pltriton.CompilerParams(
            num_warps=num_warps,
            num_stages=2,  # the next block is loaded while this one is multiplied
        ),
        interpret=bool(spec.interpret),
        name=f"flash_{call.name}",
    )(*operands)
    return tuple(first_tokens(x, tokens) for x in results)


def _operand_blocks(
    resident: list[Tensor],
    streamed: list[list[Tensor]],
    key_length: KeyLength | None,
    own_size: int,
) -> list[pl.BlockSpec]:
    """Return what each program gets of the operands, in their order."""
    blocks = [_own_block(x, own_size) for x in resident]
    for group in streamed:
        for x in group:
            blocks.append(_all_tokens(x))
    if key_length is not None:
        blocks.append(pl.BlockSpec((1,), lambda i, head: (0,)))
    return blocks


def _own_block(x: Tensor | jax.ShapeDtypeStruct, size: int) -> pl.BlockSpec:
    """Return the block of a program's own tokens, of one head of a matrix or of a row."""
    if x.ndim == 3:
        shape = (size, None, x.shape[-1])
        return pl.BlockSpec(shape, lambda i, head: (i, head, 0))
    return pl.BlockSpec((None, size), lambda i, head: (head, i))


def _all_tokens(x: Tensor) -> pl.BlockSpec:
    """Return all tokens of one head, of a matrix or of a row.

    It is only a reference: `_LoadedTiles` loads the blocks.
    """
    tokens = x.shape[token_axis(x)]
    if x.ndim == 3:
        shape = (tokens, None, x.shape[-1])
        return pl.BlockSpec(shape, lambda i, head: (0, head, 0))
    return pl.BlockSpec((None, tokens), lambda i, head: (head, 0))


@dataclass(frozen=True)
class _LoadedTiles:
    """A `TileStream` of references to all tokens, from which one block is loaded at each step."""

    refs: Sequence[Ref]
    size: int

    def wait(self, step: Step) -> list[Array]:
        tiles = []
        for ref in self.refs:
            tokens = pl.ds(step * self.size, self.size)
            tiles.append(ref[tokens])
        return tiles

    def free(self, step: Step) -> None:
        """Do nothing: what was loaded is in registers."""
