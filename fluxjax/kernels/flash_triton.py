"""The kernels of flash_gpu in Triton, for NVIDIA GPUs other than Hopper: a program has a block, and loads others in turn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from fluxjax.kernels.blocks import BlockSizes
from fluxjax.kernels.flash_work import Call, Worker, cut, padded
from fluxjax.shapes import Array

_DEFAULT = BlockSizes(q=128, kv=64, q_dkv=64, q_dq=64)


def blocks(
    queries: int, keys: int, head_dim: int, block_sizes: BlockSizes | None = None
) -> dict[str, tuple[int, int]]:
    """Return the (queries, keys) of a block of each kernel, forward, dq and dkv.

    **Raises:** `ValueError` for sizes that are no powers of two from 16 on.
    """
    found = {
        kernel: getattr(block_sizes or _DEFAULT, kernel) for kernel in ("forward", "dq", "dkv")
    }
    for kernel, block in found.items():
        if any(size < 16 or size & (size - 1) for size in block):
            raise ValueError(
                f"`flash_gpu` needs blocks in powers of two on this GPU, 16 at least, got {block} for {kernel}."
            )
    return found


def run(
    call: Call,
    name: str,
    work: Callable[[Worker], tuple[Array, ...]],
    own: list[Array],
    streams: list[list[Array]],
    length: Array | None,
    results: list[Any],
) -> tuple[Array, ...]:
    """Run the named kernel, as `fluxjax.kernels.flash_mosaic.run` does; tokens are padded to whole blocks."""
    (tokens, heads, _), (mine, theirs) = own[0].shape, call.sides(name)
    own, streams = (
        [padded(x, mine) for x in own],
        jax.tree.map(lambda x: padded(x, theirs), streams),
    )
    operands, tree = jax.tree.flatten((own, streams, length))
    whole, others = len(own[0]), len(streams[0][0])

    def spec(x: Any, size: int, index: Callable[[Any], Any] = lambda i: i) -> pl.BlockSpec:
        if x.ndim == 3:
            return pl.BlockSpec((size, None, x.shape[-1]), lambda i, head: (index(i), head, 0))
        return pl.BlockSpec((None, size), lambda i, head: (head, index(i)))

    def program(*refs: Any) -> None:
        mine_refs, stream_refs, length = jax.tree.unflatten(tree, refs[: len(operands)])
        first, seen = pl.program_id(0) * mine, call.keys if length is None else length[0]
        at = Worker(
            call=call,
            own=[x[...] for x in mine_refs],
            streams=[_Stream(group, theirs) for group in stream_refs],
            first=first,
            seen=seen,
            steps=call.steps(name, others, seen, first),
        )
        for x, result in zip(refs[len(operands) :], work(at), strict=False):
            x[...] = result.astype(x.dtype)

    found = pl.pallas_call(
        program,
        grid=(whole // mine, heads),
        in_specs=[
            *(spec(x, mine) for x in own),
            *(spec(x, others, lambda i: 0) for group in streams for x in group),
            *([] if length is None else [pl.BlockSpec((1,), lambda i, head: (0,))]),
        ],
        out_specs=[spec(x, mine) for x in results],
        out_shape=[
            jax.ShapeDtypeStruct((whole, *x.shape[1:]) if x.ndim == 3 else (heads, whole), x.dtype)
            for x in results
        ],
        compiler_params=pltriton.CompilerParams(num_warps=4 if mine == 64 else 8, num_stages=2),
        interpret=bool(call.interpret),
        name=f"flash_{name}",
    )(*operands)
    return tuple(cut(x, tokens) for x in found)


@dataclass(frozen=True)
class _Stream:
    """What is loaded together, a block a step."""

    arrays: list
    size: int

    def wait(self, step: Any) -> list[Array]:
        return [x[pl.ds(step * self.size, self.size)] for x in self.arrays]

    def free(self, step: Any) -> None:
        """There is nothing to free."""
