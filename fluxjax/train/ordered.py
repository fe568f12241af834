"""Batches in the order of the epochs: what streams of raw and of encoded examples share."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from fluxjax.shapes import Array
from fluxjax.train.batch import AbstractBatches, StreamState, TrainBatch
from fluxjax.train.buckets import Size
from fluxjax.train.catalog import data_digest
from fluxjax.train.collate import BatchRows
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.order import EpochOrder
from fluxjax.train.read_ahead import ReadAhead

Element = TypeVar("Element")
"""What is read of one example."""


@dataclass(frozen=True)
class ProcessShare:
    """Which of the processes that train together this is."""

    index: int = 0
    count: int = 1


WHOLE_SHARE = ProcessShare()
"""The share of a process that trains alone."""


class OrderedBatches(AbstractBatches, Generic[Element]):
    """Batches in the order of `EpochOrder`, whose examples are read ahead.

    **Arguments:** `settings`: of the data. `names`, `sizes`: of all examples. `batch_size`: of all
    processes together. `share`: whose rows are read.
    **Raises:** `ValueError` for a batch that the processes can't share evenly.
    """

    def __init__(
        self,
        settings: DataSettings,
        names: Sequence[str],
        sizes: Sequence[Size],
        *,
        batch_size: int,
        share: ProcessShare,
    ):
        if batch_size < 1 or batch_size % share.count or not 0 <= share.index < share.count:
            raise ValueError(
                f"A batch of {batch_size} can't be shared evenly by {share.count} processes, of "
                f"which this is number {share.index}. Choose a multiple of their number."
            )
        self._settings, self._names, self._sizes = settings, names, sizes
        self._share = share
        self._order = EpochOrder(sizes, batch_size, settings.seed)
        self._local = batch_size // share.count
        self._digest = data_digest(names, sizes)
        self._step = 0
        self._reader: ReadAhead[Element] | None = None

    @abstractmethod
    def _load(self, number: int, epoch: int) -> Element:
        """Read an example; called in threads."""

    @abstractmethod
    def _assemble(self, elements: list[Element], rows: BatchRows) -> TrainBatch:
        """Return a batch of examples that are read."""

    def _rows(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the examples of this process's rows, which of them count, and the epoch."""
        epoch, batch = divmod(step, self._order.batches)
        plan = self._order.epoch(epoch)
        first = self._share.index * self._local
        mine = slice(first, first + self._local)
        counts = np.arange(self._order.batch_size) < plan.counts[batch]
        return plan.rows[batch, mine], counts[mine], epoch

    def _element(self, index: int) -> Element:
        step, row = divmod(index, self._local)
        numbers, _, epoch = self._rows(step)
        return self._load(int(numbers[row]), epoch)

    def __next__(self) -> TrainBatch:
        """Return the next batch."""
        if self._reader is None:
            threads = self._settings.threads
            self._reader = ReadAhead(
                self._element,
                start=self._step * self._local,
                threads=threads,
                buffer=max(threads, 2 * self._local),
            )
        elements = [next(self._reader) for _ in range(self._local)]
        numbers, counts, epoch = self._rows(self._step)
        rows = BatchRows(numbers, counts.astype(np.float32), self._sizes[numbers[0]], epoch)
        batch = self._assemble(elements, rows)
        self._step += 1
        return batch

    def state(self) -> StreamState:
        """Return the place behind the last batch."""
        epoch, batch = divmod(self._step, self._order.batches)
        used = int(self._order.epoch(epoch).ends[batch - 1]) if batch else 0
        return {"epoch": epoch, "examples": used, **self._identity()}

    def _identity(self) -> StreamState:
        """Return what the order depends on."""
        return {
            "batch_size": self._order.batch_size,
            "seed": self._settings.seed,
            "data": self._digest,
            "data_examples": self._order.examples,
        }

    def restore(self, state: StreamState) -> None:
        """Continue at a place that `state` returned."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"The saved place in the data has {name} {state.get(name)}, not {value}. "
                    "Continue with the same data, seed and global batch, or begin anew."
                )
        epoch, used = int(state["epoch"]), int(state["examples"])
        ends = self._order.epoch(epoch).ends
        batch = int(np.searchsorted(ends, used, side="right")) if used else 0
        if used and (batch == 0 or ends[batch - 1] != used):
            raise ValueError(
                f"The saved place in the data, {used} examples, is not the end of a batch. It is "
                "damaged: begin anew."
            )
        self.close()
        self._step = epoch * self._order.batches + batch

    def names(self, numbers: Sequence[int] | Array) -> list[str]:
        """Return the names of examples."""
        return [self._names[number] for number in np.asarray(numbers).tolist()]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
