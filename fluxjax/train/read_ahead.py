"""Reading ahead in threads, by grain."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TypeVar

Element = TypeVar("Element")
_ENDLESS = 2**62
"""More elements than any training reads."""


class ReadAhead(Iterator[Element]):
    """The values of a function of 0, 1, 2, … in this order, computed ahead by threads.

    **Arguments:** `function`: of an index. Its errors are raised where its value is due. `start`:
    the first index. `stop`: the index after the last one; None for no end. `threads`: how many.
    `buffer`: how many values are computed ahead, at least as many as there are threads.
    """

    def __init__(
        self,
        function: Callable[[int], Element],
        *,
        start: int = 0,
        stop: int | None = None,
        threads: int,
        buffer: int,
    ):
        grain = import_grain()
        indices = grain.MapDataset.range(start, _ENDLESS if stop is None else stop)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads))
        self._iterator = iter(indices.map(function).to_iter_dataset(options))

    def __next__(self) -> Element:
        return next(self._iterator)

    def close(self) -> None:
        """Stop computing ahead."""
        self._iterator.close()


def import_grain() -> ModuleType:
    """**Raises:** `ImportError` that names the extra, without grain."""
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "Training data are read by grain. Install it with `pip install 'fluxjax[train]'`."
        ) from error
    return grain
