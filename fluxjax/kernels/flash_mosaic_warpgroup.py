"""What one warpgroup of a Mosaic GPU program works with: rings of tiles, and its operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fluxjax.kernels.flash_gpu_spec import KernelContext
from fluxjax.kernels.flash_mosaic_blocks import SLOTS
from fluxjax.kernels.pallas_types import Index, MosaicRef, Step
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

    buffers: Sequence[MosaicRef]
    arrived: MosaicRef
    freed: MosaicRef
    commit_reads: bool

    def fill(self, step: Step, sources: Sequence[MosaicRef]) -> None:
        """Start to copy the tiles of a step from global memory."""
        for source, buffer in zip(sources, self.buffers, strict=True):
            target = buffer.at[_slot(step)]
            arrived = self.arrived.at[_slot(step)]
            plgpu.copy_gmem_to_smem(source, target, arrived)

    def wait(self, step: Step) -> list[MosaicRef]:
        """Return the tiles of a step, once they have arrived."""
        plgpu.barrier_wait(self.arrived.at[_slot(step)])
        return [buffer.at[_slot(step)] for buffer in self.buffers]

    def free(self, step: Step) -> None:
        """Let the slot of a step be filled again, when both warpgroups have called this."""
        if self.commit_reads:
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.freed.at[_slot(step)])

    def wait_until_free(self, step: Step) -> None:
        """Wait until the slot that a step is to fill has been freed."""
        plgpu.barrier_wait(self.freed.at[_slot(step)])


def _slot(step: Step) -> Array:
    # In the dtype of the step, which is int64 where JAX has 64-bit numbers switched on.
    return lax.rem(step, jnp.asarray(SLOTS, step.dtype))


@dataclass(frozen=True, kw_only=True)
class InterpretedContext(KernelContext):
    """A warpgroup in JAX's interpreter, which knows neither wgmma nor its register layouts.

    **Arguments:** `worker`: 0 or 1, of the two that compute. `turns`: a barrier at which these two
    meet. The others are as of `KernelContext`.
    """

    worker: Index
    turns: MosaicRef

    def ping_pong(self, *values: Array) -> tuple[Array, ...]:
        if values:
            # Else the compiler could move their computation behind the barrier.
            values = tuple(lax.optimization_barrier(values))
        self._meet()
        return values

    # The second worker waits once more at the start, and the first once more at the end, so that
    # they are half a step apart in between.
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
        zeros = super().zeros(*shape)
        if len(shape) == 1:
            return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
        return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def load_vector(self, tile: MosaicRef, axis: int) -> Array:
        return plgpu.load(tile, (), layout=plgpu.Layout.WGMMA.reduce(1 - axis))

    def iota(self, shape: tuple[int, ...], axis: int) -> Array:
        return plgpu.layout_cast(super().iota(shape, axis), plgpu.Layout.WGMMA)

    def matmul_transposed(
        self,
        a: MosaicRef,
        b: MosaicRef,
        *,
        overlap: Callable[[], object] | None = None,
    ) -> Array:
        def multiply(accumulator: MosaicRef) -> Array:
            plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
            # Reading the accumulator waits for wgmma, so that this happens before.
            if overlap is not None:
                overlap()
            return accumulator[...]

        accumulator_type = plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32)
        return pl.run_scoped(multiply, accumulator_type)

    def add_matmul(self, total: Array, a: Array, b: MosaicRef) -> Array:
        a = a.astype(b.dtype)

        def multiply(accumulator: MosaicRef) -> None:
            plgpu.wgmma(accumulator, a, b)

        return pl.run_state(multiply)(plgpu.ACC.init(total))
