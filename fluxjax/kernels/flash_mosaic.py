"""The kernels of flash_gpu in Mosaic GPU, for Hopper: of a program's three warpgroups, one fetches and two multiply.

Each of the two owns a block, and takes the other side's blocks as they come, by TMA, into a ring of buffers. In the forward
pass they take turns at the tensor cores: one's softmax is computed under the other's matmuls.
**Source:** Shah et al. 2024 (2407.08608), algorithm 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fluxjax.kernels.blocks import BlockSizes, round_up
from fluxjax.kernels.flash_work import Call, Worker, cut, padded
from fluxjax.shapes import Array

SMEM = 227 * 2**10
"""Bytes of shared memory that a program has."""
_ROWS = 64  # that a warpgroup multiplies at once
_WORKERS = 2
_SLOTS = 2
_TOKENS = 8  # that TMA cuts a matrix by
_DEFAULT = BlockSizes(q=128, q_dkv=64)
_HEAD, _BLOCK, _WORKER = "flash_head", "flash_block", "flash_worker"


def blocks(
    queries: int, keys: int, head_dim: int, block_sizes: BlockSizes | None = None
) -> dict[str, tuple[int, int]]:
    """Return the (queries, keys) of a block of each kernel, forward, dq and dkv: as given, but no larger than the tokens.

    **Raises:** `ValueError` for sizes that are no multiples of 64, or of 128 where two warpgroups share a block (`q`, `q_dq`,
    `kv_dkv`), or that take more than the shared memory.
    """
    sizes, found = block_sizes or _DEFAULT, {}
    for kernel in ("forward", "dq", "dkv"):
        given, shared = getattr(sizes, kernel), _ROWS * _WORKERS
        units = (_ROWS, shared) if kernel == "dkv" else (shared, _ROWS)
        if any(size % unit for size, unit in zip(given, units, strict=True)):
            raise ValueError(
                "`flash_gpu` needs blocks of queries and keys in multiples of "
                f"{units[0]} and {units[1]} for {kernel}, got {given}."
            )
        q, kv = (
            min(size, round_up(n, unit))
            for size, n, unit in zip(given, (queries, keys), units, strict=True)
        )
        needed = smem_bytes(kernel, (q, kv), head_dim)
        if needed > SMEM:
            raise ValueError(
                f"`flash_gpu` with blocks of {q} queries and {kv} keys takes {needed:,} bytes of shared memory ({kernel}), "
                f"of {SMEM:,} that Hopper has. Choose smaller block sizes."
            )
        found[kernel] = q, kv
    return found


def smem_bytes(kernel: str, block: tuple[int, int], head_dim: int) -> int:
    """Return the bytes of shared memory that a kernel (forward, dq or dkv) takes at a block of (queries, keys), at most.

    What the two warpgroups own, a ring of what is streamed, float32 a row of log-sum-exp (and of the backward pass's other
    sums), and 3 KiB for barriers, reductions and alignment.
    """
    own, streamed = reversed(block) if kernel == "dkv" else block
    matrices = (
        2
        * round_up(head_dim, 64)
        * (own * (1 if kernel == "forward" else 2) + 2 * _SLOTS * streamed)
    )
    rows = 4 * {"forward": own, "dq": 2 * own, "dkv": 2 * _SLOTS * streamed}[kernel]
    return matrices + rows + 3 * 2**10


def run(
    call: Call,
    name: str,
    work: Callable[[Worker], tuple[Array, ...]],
    own: list[Array],
    streams: list[list[Array]],
    length: Array | None,
    results: list[Any],
) -> tuple[Array, ...]:
    """Run the named kernel, a program for each head and block of what is owned; vmap makes a further axis of programs.

    Arrays are matrices, [tokens, heads, head_dim], or rows, [heads, tokens]. Of each of `own` a worker has a block to itself;
    streams come by groups, whose arrays arrive together. Results have the shapes of `results`.
    """
    (tokens, heads, _), (mine, _) = own[0].shape, call.sides(name)
    own, streams = jax.tree.map(lambda x: padded(x, _TOKENS), (own, streams))
    operands, tree = jax.tree.flatten((own, streams, length))
    # Of the last block TMA would store the tokens that there are, the interpreter none.
    whole = round_up(tokens, mine)
    shapes = [(whole, *x.shape[1:]) if x.ndim == 3 else (heads, whole) for x in results]

    def program(*refs: Any) -> None:
        own, streams, length = jax.tree.unflatten(tree, refs[: len(operands)])
        written, scratch = refs[len(operands) : -4], refs[-4:]
        _program(call, name, work, own, streams, length, written, *scratch)

    found = plgpu.kernel(
        program,
        out_type=[
            jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, results, strict=True)
        ],
        scratch_types=_scratch(call, name, own, streams, results),
        grid=(heads, whole // mine),
        grid_names=(_HEAD, _BLOCK),
        num_threads=_WORKERS + 1,
        thread_name=_WORKER,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=call.interpret,
        kernel_name=f"flash_{name}",
    )(*operands)
    return tuple(cut(x, tokens) for x in found)


def _scratch(
    call: Call, name: str, own: list[Array], streams: list[list[Array]], results: list[Any]
) -> list:
    """Return what a program has in shared memory, as `_program` takes it."""
    mine, theirs = call.sides(name)

    def buffer(copies: int, tokens: int, x: Any) -> Any:
        if x.ndim == 2:
            return plgpu.SMEM((copies, tokens), x.dtype)
        # As wgmma reads matrices: in rows of 128 bytes, eight by eight.
        transforms = (
            plgpu.TilingTransform((8, 128 // x.dtype.itemsize)),
            plgpu.SwizzleTransform(128),
        )
        return plgpu.SMEM((copies, tokens, x.shape[-1]), x.dtype, transforms=transforms)

    def ring(group: list[Array]) -> tuple:
        arrived = plgpu.Barrier(num_arrivals=len(group), num_barriers=_SLOTS)
        freed = plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=_SLOTS)
        return [buffer(_SLOTS, theirs, x) for x in group], arrived, freed

    return [
        # Results leave by the buffers of what was owned, and those that are more by their own.
        [buffer(_WORKERS, mine // _WORKERS, x) for x in (*own, *results[len(own) :])],
        [ring(group) for group in streams],
        plgpu.Barrier(num_arrivals=len(own), num_barriers=_WORKERS),
        plgpu.Barrier(num_arrivals=_WORKERS),
    ]


def _program(
    call, name, work, own, streams, length, results, buffers, rings, loaded, turns
) -> None:
    head, index, worker = (lax.axis_index(axis) for axis in (_HEAD, _BLOCK, _WORKER))
    mine, theirs = call.sides(name)
    seen = call.keys if length is None else length[0]
    steps = call.steps(name, streams[0][0].shape[0], seen, index * mine)
    rings = [
        _Ring(x, arrived, freed, bool(call.interpret) or len(x) > 1) for x, arrived, freed in rings
    ]

    def part(ref: Any, start: Any, tokens: int) -> Any:
        return (
            ref.at[pl.ds(start, tokens), head]
            if len(ref.shape) == 3
            else ref.at[head, pl.ds(start, tokens)]
        )

    @pl.when(worker < _WORKERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = mine // _WORKERS
        first = index * mine + worker * rows
        blocks = [x.at[worker] for x in buffers]
        for ref, x in zip(own, blocks, strict=False):
            plgpu.copy_gmem_to_smem(part(ref, first, rows), x, loaded.at[worker])
        plgpu.barrier_wait(loaded.at[worker])
        kind = _Interpreted if call.interpret else _Warpgroup
        at = kind(
            call=call,
            own=blocks,
            streams=rings,
            first=first,
            seen=seen,
            steps=steps,
            index=worker,
            turns=turns,
        )
        for x, result in zip(blocks, work(at), strict=False):
            x[...] = result.astype(x.dtype)
        plgpu.commit_smem()
        for x, ref in zip(blocks, results, strict=False):
            plgpu.copy_smem_to_gmem(x, part(ref, first, rows))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(worker == _WORKERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        # A slot is filled as soon as it is free, and none is left before all are.
        @pl.loop(0, steps + _SLOTS)
        def _(step: Any) -> None:
            for ring, group in zip(rings, streams, strict=True):
                pl.when(step >= _SLOTS)(partial(ring.await_free, step))
                pl.when(step < steps)(
                    lambda: ring.fill(step, [part(ref, step * theirs, theirs) for ref in group])
                )  # noqa: B023


@dataclass(frozen=True)
class _Ring:
    """Buffers of what arrives together, each with slots for the next steps, and barriers: a slot has arrived, or is free.

    `read`: not by wgmma alone, as rows are, so that TMA must be kept from writing before.
    """

    buffers: list
    arrived: Any
    freed: Any
    read: bool

    def fill(self, step: Any, parts: list) -> None:
        for part, x in zip(parts, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(part, x.at[_slot(step)], self.arrived.at[_slot(step)])

    def wait(self, step: Any) -> list:
        plgpu.barrier_wait(self.arrived.at[_slot(step)])
        return [x.at[_slot(step)] for x in self.buffers]

    def free(self, step: Any) -> None:
        if self.read:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.freed.at[_slot(step)])

    def await_free(self, step: Any) -> None:
        plgpu.barrier_wait(self.freed.at[_slot(step)])


def _slot(step: Any) -> Any:
    return lax.rem(step, jnp.asarray(_SLOTS, step.dtype))


@dataclass(frozen=True, kw_only=True)
class _Interpreted(Worker):
    """A warpgroup without registers and tensor cores: the interpreter multiplies neither registers nor what is transposed."""

    index: Any
    turns: Any

    def turn(self, *done: Array) -> tuple[Array, ...]:
        if done:
            done = tuple(lax.optimization_barrier(done))
        self._meet()
        return done

    def begin(self) -> None:  # the second worker half a step after the first
        pl.when(self.index == 1)(self._meet)

    def end(self) -> None:
        pl.when(self.index == 0)(self._meet)

    def _meet(self) -> None:
        plgpu.barrier_arrive(self.turns)
        plgpu.barrier_wait(self.turns)


@dataclass(frozen=True, kw_only=True)
class _Warpgroup(_Interpreted):
    """A warpgroup, whose matrices lie in registers as wgmma leaves them."""

    def zeros(self, *shape: int) -> Array:
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return plgpu.layout_cast(super().zeros(*shape), layout)

    def row(self, x: Any, axis: int) -> Array:
        return plgpu.load(x, (), layout=plgpu.Layout.WGMMA.reduce(1 - axis))

    def numbered(self, shape: tuple[int, ...], axis: int) -> Array:
        return plgpu.layout_cast(super().numbered(shape, axis), plgpu.Layout.WGMMA)

    def product(self, a: Any, b: Any, *, meanwhile: Callable[[], Any] = lambda: None) -> Array:
        def multiply(total: Any) -> Array:
            plgpu.wgmma(total, a, b.transpose((1, 0)))
            meanwhile()
            return total[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def added(self, total: Array, a: Array, b: Any) -> Array:
        a = a.astype(b.dtype)
        return pl.run_state(lambda total: plgpu.wgmma(total, a, b))(plgpu.ACC.init(total))
