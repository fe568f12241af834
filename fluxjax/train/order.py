"""The order of examples: shuffled anew in each epoch, in batches of one image size."""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fluxjax.train.buckets import Size


class EpochPlan(NamedTuple):
    """The batches of one epoch.

    `rows`: numbers of examples, [batches, batch_size]. `counts`: how many rows of each batch are
    examples, [batches]; the rows after these repeat them, only to fill the batch. `ends`: how many
    examples come up to the end of each batch, [batches].
    """

    rows: np.ndarray
    counts: np.ndarray
    ends: np.ndarray


class EpochOrder:
    """Which examples each batch of an endless training has.

    In every epoch each example comes once. A batch has one image size; the last batch of each size
    is filled up. The order depends on the seed and on the epoch's number, and not on the number of
    processes.

    **Arguments:** `sizes`: of each example. `batch_size`: of all processes together. `seed`: at
    least 0.
    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, seed: int):
        groups = defaultdict(list)
        for number, size in enumerate(sizes):
            groups[size].append(number)
        self._groups = [np.array(numbers) for _, numbers in sorted(groups.items())]
        self._seed = seed
        self._plans: OrderedDict[int, EpochPlan] = OrderedDict()
        self._lock = threading.Lock()
        self.examples = len(sizes)
        self.batch_size = batch_size
        self.batches = sum(-(-len(group) // batch_size) for group in self._groups)

    def epoch(self, number: int) -> EpochPlan:
        """Return the batches of an epoch. The last two are kept; threads may call it at once."""
        with self._lock:
            if number not in self._plans:
                self._plans[number] = self._plan(number)
                while len(self._plans) > 2:
                    self._plans.popitem(last=False)
            return self._plans[number]

    def _plan(self, number: int) -> EpochPlan:
        """Return the batches of an epoch: each of one size, in an order of the epoch's own.

        A batch that is not full repeats its examples, which do not count.
        """
        rng = np.random.default_rng((self._seed, number))
        rows, counts = [], []
        for group in self._groups:
            shuffled = rng.permutation(group)
            for start in range(0, len(group), self.batch_size):
                batch = shuffled[start : start + self.batch_size]
                rows.append(np.resize(batch, self.batch_size))
                counts.append(len(batch))
        order = rng.permutation(len(rows))
        sorted_counts = np.array(counts)[order]
        return EpochPlan(np.stack(rows)[order], sorted_counts, np.cumsum(sorted_counts))
