"""Weights in the host's memory or in files, copied to the device when they are used."""

from concurrent.futures import Future, ThreadPoolExecutor

import equinox as eqx
import jax
import numpy as np

from fluxjax.checkpoint.plan import Plan
from fluxjax.nets.weight import Dense, FetchedWeight, Weight
from fluxjax.shapes import Array, Float, Int


class HostWeight(FetchedWeight):
    """A weight in the host's memory, copied to the device when it is used.

    In a loop over blocks, each block's is copied while the block before it runs.
    """

    value: Float[Array, "*depth out features"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def is_remote(self) -> bool:
        return True

    def fetch(self) -> Weight:
        return Dense(jax.device_put(self.value, jax.memory.Space.Device))


class BlockReader:
    """Reads the blocks of a stacked array, the next one in the background while one is used."""

    # One thread for all arrays: blocks' matrices are read in the order in which they are used.
    pool = ThreadPoolExecutor(1, "fluxjax-reader")

    def __init__(
        self,
        plan: Plan,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ):
        """Read the array `name` of a checkpoint.

        **Arguments:** `shape`: of the whole stack. `dtype`: in which blocks are returned.
        """
        self.plan = plan
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.prefetched: tuple[int, Future[np.ndarray]] | None = None

    def read(self, number: int) -> np.ndarray:
        """Return a block, read now."""
        others = tuple(slice(0, size) for size in self.shape[1:])
        region = (slice(number, number + 1), *others)
        block = self.plan.region(self.name, self.shape, self.dtype, region)[0]
        # Copied, so that a memory-mapped file is read here and not by whoever waits for the block.
        return np.array(block)

    def __call__(self, number: Int[Array, ""] | np.ndarray | int) -> np.ndarray:
        """Return a block, and start to read the one after it."""
        wanted = int(number)
        prefetched = self.prefetched
        # Dropped first: its memory would be kept while the following block is read.
        self.prefetched = None
        if prefetched is not None and prefetched[0] == wanted:
            block = prefetched[1].result()
        else:
            block = self.read(wanted)
        # After the last block comes the first, of the network's next evaluation.
        following = (wanted + 1) % self.shape[0]
        self.prefetched = (following, self.pool.submit(self.read, following))
        return block


class FileWeight(FetchedWeight):
    """A weight that stays in its file, of which a callback reads a block when it is used.

    `number`: of the block, or of each of the stack. It is not remote: its reader prefetches.
    """

    number: Int[Array, "*depth"]
    reader: BlockReader = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.number.shape, *self.reader.shape[1:])

    @property
    def is_remote(self) -> bool:
        return False

    def fetch(self) -> Weight:
        # A callback, since the number of the block is known only when the program runs.
        block = jax.ShapeDtypeStruct(self.reader.shape[1:], self.reader.dtype)
        return Dense(jax.pure_callback(self.reader, block, self.number))
