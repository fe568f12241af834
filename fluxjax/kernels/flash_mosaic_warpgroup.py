"""What one warpgroup of a Mosaic GPU program works with: rings of tiles, and its operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fluxjax.kernels.flash_gpu_spec import KernelContext, Tile
from fluxjax.kernels.flash_mosaic_blocks import SLOTS
from fluxjax.kernels.pallas_types import Index, Ref
from fluxjax.shapes import Array


@dataclass(frozen=True)
class TileRing:
    """A `TileStream` in shared memory: each tile has slots, which are filled ahead by TMA.

    **Arguments:**

    - `buffers`: of the arrays whose tiles arrive together; their first axis are the slots.
    - `arrived`: barriers, one for each slot, that its tiles have arrived.
    - `freed`: barriers, one for each slot, that its tiles have been read.
    - `commit_reads`: whether others than wgmma read the tiles, as they do vectors, so that the
      reads must be ordered before what TMA writes next.
    """

    buffers: Sequence[Ref]
    arrived: Ref
    freed: Ref
    commit_reads: bool

    def fill(self, step: Index, sources: Sequence[Ref]) -> None:
        """Start to copy the tiles of a step from global memory."""
        for source, buffer in zip(sources, self.buffers, strict=True):
            slot, arrived = buffer.at[_slot(step)], self.arrived.at[_slot(step)]
            plgpu.copy_gmem_to_smem(source, slot, arrived)

    def wait(self, step: Index) -> list[Ref]:
        plgpu.barrier_wait(self.arrived.at[_slot(step)])
        return [buffer.at[_slot(step)] for buffer in self.buffers]

    def free(self, step: Index) -> None:
        if self.commit_reads:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.freed.at[_slot(step)])

    def wait_until_free(self, step: Index) -> None:
        plgpu.barrier_wait(self.freed.at[_slot(step)])


def _slot(step: Array) -> Array:
    return lax.rem(step, jnp.asarray(SLOTS, step.dtype))


@dataclass(frozen=True, kw_only=True)
class InterpretedContext(KernelContext):
    """A warpgroup in JAX's interpreter, which knows neither wgmma nor its register layouts.

    **Arguments:** `worker`: 0 or 1, of the two that compute. `turns`: a barrier at which these two
    meet. The others are as of `KernelContext`.
    """

    worker: Index
    turns: Ref

    def ping_pong(self, *values: Array) -> tuple[Array, ...]:
        if values:
            # Else the compiler could move their computation behind the barrier.
            values = tuple(lax.optimization_barrier(values))
        self._meet()
        return values

    def start_ping_pong(self) -> None:
        pl.when(self.worker == 1)(self._meet)

    def end_ping_pong(self) -> None:
        pl.when(self.worker == 0)(self._meet)

    def _meet(self) -> None:
        plgpu.barrier_arrive(self.turns)
        plgpu.barrier_wait(self.turns)


@dataclass(frozen=True, kw_only=True)
class WarpgroupContext(InterpretedContext):
    """A warpgroup on Hopper: matrices are in registers, in the layout that wgmma leaves them."""

    def zeros(self, *shape: int) -> Array:
        layout = plgpu.Layout.WGMMA
        if len(shape) == 1:
            layout = layout.reduce(1)
        return plgpu.layout_cast(super().zeros(*shape), layout)

    def load_vector(self, tile: Tile, axis: int) -> Array:
        return plgpu.load(tile, (), layout=plgpu.Layout.WGMMA.reduce(1 - axis))

    def iota(self, shape: tuple[int, ...], axis: int) -> Array:
        return plgpu.layout_cast(super().iota(shape, axis), plgpu.Layout.WGMMA)

    def matmul_transposed(
        self, a: Tile, b: Tile, *, overlap: Callable[[], object] | None = None
    ) -> Array:
        def multiply(accumulator: Ref) -> Array:
            plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
            if overlap is not None:
                overlap()
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def add_matmul(self, total: Array, a: Array, b: Tile) -> Array:
        a = a.astype(b.dtype)

        def multiply(accumulator: Ref) -> None:
            plgpu.wgmma(accumulator, a, b)

        return pl.run_state(multiply)(plgpu.ACC.init(total))
