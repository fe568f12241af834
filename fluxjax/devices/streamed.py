"""Weights in the host's memory or in files, copied to the device when they are used."""

from concurrent.futures import Future, ThreadPoolExecutor

import equinox as eqx
import jax
import numpy as np

from fluxjax.checkpoint.load import block_index
from fluxjax.checkpoint.packed_leaves import Stored, read_packed, stored_shape
from fluxjax.checkpoint.plan import Plan
from fluxjax.checkpoint.tensors import BYTES
from fluxjax.nets.mixed import MixedWeight
from fluxjax.nets.packed import PackedWeight
from fluxjax.nets.quantized import QuantizedWeight
from fluxjax.nets.stack import block_name
from fluxjax.nets.weight import Dense, FetchedWeight, Weight
from fluxjax.shapes import Array, Int

StoredWeight = Dense | QuantizedWeight | PackedWeight | MixedWeight
"""Weights whose arrays each have an axis of blocks."""


class HostWeight(FetchedWeight):
    """A weight in the host's memory, copied to the device when it is used.

    In a loop over blocks, each block's is copied while the block before it runs.
    """

    stored: StoredWeight

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def is_remote(self) -> bool:
        return True

    def fetch(self) -> Weight:
        return jax.device_put(self.stored, jax.memory.Space.Device)


class BlockReader:
    """Reads the blocks of a stacked array, the next one in the background while one is used."""

    # One thread for all arrays: blocks' matrices are read in the order in which they are used.
    pool = ThreadPoolExecutor(1, "fluxjax-reader")

    def __init__(
        self,
        plan: Plan,
        name: str,
        shape: tuple[int, ...],
        stored: Stored,
    ):
        """Read the array `name` of a checkpoint.

        **Arguments:** `shape`: of the whole stack. `stored`: the dtype in which blocks are
        returned, or the format in which they stay packed.
        """
        self.plan = plan
        self.name = name
        self.shape = shape
        self.stored = stored
        self.prefetched: tuple[int, Future[np.ndarray]] | None = None

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a block's array."""
        shape = stored_shape(self.stored, self.shape)[1:]
        return jax.ShapeDtypeStruct(shape, BYTES if self.format else self.stored)

    @property
    def format(self) -> str | None:
        """The format in which blocks stay packed; None for a dtype."""
        return self.stored if isinstance(self.stored, str) else None

    def check(self, number: int) -> None:
        """**Raises:** `WeightsError` that names a tensor of a block with NaN or infinity."""
        if isinstance(self.stored, str):
            self.read(number)
        else:
            index = block_index(self.shape, number)
            self.plan.leaf(self.name, self.shape, self.stored, index)

    def read(self, number: int) -> np.ndarray:
        """Return a block, read now."""
        if isinstance(self.stored, str):
            rows = np.empty(self.struct.shape, BYTES)
            read_packed(self.plan, block_name(self.name, number), self.stored, 0, rows)
            return rows
        index = block_index(self.shape, number)
        block = self.plan.region(self.name, self.shape, self.stored, index)[0]
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
        block = jax.pure_callback(self.reader, self.reader.struct, self.number)
        format = self.reader.format
        return Dense(block) if format is None else PackedWeight(block, format)
