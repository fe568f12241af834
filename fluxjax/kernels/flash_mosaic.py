"""The kernels of flash_gpu in Mosaic GPU, for Hopper: one warpgroup fetches and two compute.

Each of the two that compute owns half of a block, and takes the blocks of the other side from a
ring of buffers in shared memory, which the third one fills by TMA. In the forward pass the two
take turns at the tensor cores (ping-pong): one computes its softmax during the other's matmuls.
**Source:** Shah et al. 2024 (2407.08608), algorithm 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fluxjax.kernels.block_sizes import round_up
from fluxjax.kernels.flash_gpu_spec import (
    GpuKernelSpec,
    KernelCall,
    KeyLength,
    Tensor,
    first_tokens,
    pad_tokens,
    with_tokens,
)
from fluxjax.kernels.flash_mosaic_blocks import SLOTS, WORKERS
from fluxjax.kernels.flash_mosaic_warpgroup import (
    InterpretedContext,
    TileRing,
    WarpgroupContext,
)
from fluxjax.kernels.pallas_types import Index, MosaicRef, Step
from fluxjax.shapes import Array

_TMA_TOKENS = 8
"""TMA copies matrices in tiles of so many tokens."""

_HEAD, _BLOCK, _WORKER = "flash_head", "flash_block", "flash_worker"
"""Names of the grid's axes, and of the warpgroups."""

_COMPUTE_REGISTERS, _FETCH_REGISTERS = 232, 40
"""Registers of each thread of a warpgroup: those that compute take over the fetching one's."""

SharedMemory = Any
"""The type of a buffer or barrier in shared memory, which Pallas has no one class for."""


class _RingMemory(NamedTuple):
    """A `TileRing`'s buffers and barriers."""

    buffers: list[SharedMemory]
    arrived: SharedMemory
    freed: SharedMemory


class _Scratch(NamedTuple):
    """A program's shared memory.

    `tiles`: of each worker, for its own block and then for its results. `rings`: one for each group
    of streamed arrays. `loaded`: barriers, one for each worker, that its own block has arrived.
    `turns`: the barrier of `InterpretedContext`.
    """

    tiles: list[SharedMemory]
    rings: list[_RingMemory]
    loaded: SharedMemory
    turns: SharedMemory


_SCRATCH_FIELDS = len(_Scratch._fields)


def launch_mosaic(
    spec: GpuKernelSpec,
    call: KernelCall,
    key_length: KeyLength | None,
) -> tuple[Array, ...]:
    """Run a kernel over a grid of (heads, blocks); vmap adds an axis to the grid.

    **Arguments:** `spec`: of the whole attention. `call`: the kernel and its arrays. `key_length`:
    keys from this index on are padding; None for no padding.
    **Returns:** arrays of the shapes of `call.results`.
    """
    tokens, heads, _ = call.resident[0].shape
    own_size, _ = spec.resident_and_streamed(call.name)
    resident, streamed = jax.tree.map(
        lambda x: pad_tokens(x, _TMA_TOKENS),
        (call.resident, call.streamed),
    )
    operands, tree = jax.tree.flatten((resident, streamed, key_length))
    # Results have whole blocks: TMA could store a part of the last one, but the interpreter can't.
    own_tokens = round_up(tokens, own_size)

    # References to the operands and to the results, then the four trees of the scratch memory.
    def body(*arguments: Any) -> None:
        count = len(operands)
        refs, scratch = arguments[:-_SCRATCH_FIELDS], arguments[-_SCRATCH_FIELDS:]
        own_refs, stream_refs, length_ref = jax.tree.unflatten(tree, refs[:count])
        result_refs = refs[count:]
        program = _Program(
            spec=spec,
            call=call,
            resident=own_refs,
            streamed=stream_refs,
            length=length_ref,
            results=result_refs,
            scratch=_Scratch(*scratch),
        )
        program.run()

    results = plgpu.kernel(
        body,
        out_type=[with_tokens(x, own_tokens) for x in call.results],
        scratch_types=_scratch_types(spec, call, resident, streamed),
        grid=(heads, own_tokens // own_size),
        grid_names=(_HEAD, _BLOCK),
        num_threads=WORKERS + 1,
        thread_name=_WORKER,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=spec.interpret,
        kernel_name=f"flash_{call.name}",
    )(*operands)
    return tuple(first_tokens(x, tokens) for x in results)


def _scratch_types(
    spec: GpuKernelSpec,
    call: KernelCall,
    resident: list[Tensor],
    streamed: list[list[Tensor]],
) -> _Scratch:
    """Return the types of a program's shared memory."""
    own_size, streamed_size = spec.resident_and_streamed(call.name)

    def ring(group: list[Tensor]) -> _RingMemory:
        return _RingMemory(
            buffers=[_buffer(SLOTS, streamed_size, x) for x in group],
            arrived=plgpu.Barrier(num_arrivals=len(group), num_barriers=SLOTS),
            freed=plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
        )

    # Results are stored from the tiles of the worker's own block, which it has read by then, and
    # only if there are more results than resident arrays, from further tiles.
    further_results = call.results[len(resident) :]
    tiles = []
    for x in (*resident, *further_results):
        tiles.append(_buffer(WORKERS, own_size // WORKERS, x))
    return _Scratch(
        tiles=tiles,
        rings=[ring(group) for group in streamed],
        loaded=plgpu.Barrier(num_arrivals=len(resident), num_barriers=WORKERS),
        turns=plgpu.Barrier(num_arrivals=WORKERS),
    )


def _buffer(copies: int, tokens: int, x: Tensor | jax.ShapeDtypeStruct) -> SharedMemory:
    """Return the type of a buffer for tiles of an array."""
    if x.ndim == 2:
        return plgpu.SMEM((copies, tokens), x.dtype)
    # The layout in which wgmma reads matrices: rows of 128 bytes, eight of them a tile.
    columns = 128 // x.dtype.itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    shape = (copies, tokens, x.shape[-1])
    return plgpu.SMEM(shape, x.dtype, transforms=transforms)


@dataclass(frozen=True)
class _Program:
    """One program of the grid, with references to its arrays in global and in shared memory."""

    spec: GpuKernelSpec
    call: KernelCall
    resident: Sequence[MosaicRef]
    streamed: Sequence[Sequence[MosaicRef]]
    length: MosaicRef | None
    results: Sequence[MosaicRef]
    scratch: _Scratch

    def run(self) -> None:
        """Let each warpgroup compute or fetch."""
        head = lax.axis_index(_HEAD)
        block = lax.axis_index(_BLOCK)
        worker = lax.axis_index(_WORKER)
        own_size = self.spec.resident_and_streamed(self.call.name)[0]
        key_end: Index = self.spec.keys
        if self.length is not None:
            key_end = self.length[0]
        streamed_tokens = self.streamed[0][0].shape[0]
        block_start = block * own_size
        steps = self.spec.steps(self.call.name, streamed_tokens, key_end, block_start)
        rings = []
        for memory in self.scratch.rings:
            # Groups of more than a matrix have a vector. The interpreter has no wgmma, so that
            # other operations read its matrices too.
            has_vector = len(memory.buffers) > 1
            commit_reads = bool(self.spec.interpret) or has_vector
            rings.append(TileRing(*memory, commit_reads))

        @pl.when(worker < WORKERS)
        def _() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            self._compute(head, block, worker, key_end, steps, rings)

        @pl.when(worker == WORKERS)
        def _() -> None:
            plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
            self._fetch(head, steps, rings)

    def _compute(
        self,
        head: Index,
        block: Index,
        worker: Index,
        key_end: Index,
        steps: Index,
        rings: list[TileRing],
    ) -> None:
        """Load a worker's part of the block, compute, and store the results."""
        own_size = self.spec.resident_and_streamed(self.call.name)[0]
        tokens = own_size // WORKERS
        first_token = block * own_size + worker * tokens
        tiles = [x.at[worker] for x in self.scratch.tiles]
        loaded = self.scratch.loaded
        # There may be more tiles than resident arrays, for further results.
        for ref, tile in zip(self.resident, tiles, strict=False):
            source = _token_slice(ref, first_token, tokens, head)
            plgpu.copy_gmem_to_smem(source, tile, loaded.at[worker])
        plgpu.barrier_wait(loaded.at[worker])

        context_type = InterpretedContext if self.spec.interpret else WarpgroupContext
        context = context_type(
            spec=self.spec,
            resident=tiles,
            streams=rings,
            first_token=first_token,
            key_end=key_end,
            steps=steps,
            worker=worker,
            turns=self.scratch.turns,
        )
        # There may be more computed than there are results: the log-sum-exp without a gradient.
        for tile, computed in zip(tiles, self.call.compute(context), strict=False):
            tile[...] = computed.astype(tile.dtype)
        # TMA must see what was stored.
        plgpu.commit_smem()
        for tile, ref in zip(tiles, self.results, strict=False):
            target = _token_slice(ref, first_token, tokens, head)
            plgpu.copy_smem_to_gmem(tile, target)
        plgpu.wait_smem_to_gmem(0)

    def _fetch(self, head: Index, steps: Index, rings: list[TileRing]) -> None:
        """Fill each ring's slots as they become free."""
        streamed_size = self.spec.resident_and_streamed(self.call.name)[1]

        # The last iterations only wait: a program must not end before all slots are free.
        @pl.loop(0, steps + SLOTS)
        def _(step: Step) -> None:
            for ring, group in zip(rings, self.streamed, strict=True):

                def fill(ring: TileRing = ring, group: Sequence[MosaicRef] = group) -> None:
                    sources = []
                    for ref in group:
                        start = step * streamed_size
                        sources.append(_token_slice(ref, start, streamed_size, head))
                    ring.fill(step, sources)

                pl.when(step >= SLOTS)(partial(ring.wait_until_free, step))
                pl.when(step < steps)(fill)


def _token_slice(ref: MosaicRef, start: Index, tokens: int, head: Index) -> MosaicRef:
    """Return a reference to some tokens of one head, of a matrix or of a row."""
    part = pl.ds(start, tokens)
    if len(ref.shape) == 3:
        return ref.at[part, head]
    return ref.at[head, part]
