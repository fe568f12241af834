"""Batches of images and captions that are encoded when they are used."""

import numpy as np

from fluxjax.generate.text import TextStates
from fluxjax.train.batch import TrainBatch
from fluxjax.train.catalog import Catalog, check_broken, make_catalog
from fluxjax.train.collate import BatchRows, collate
from fluxjax.train.data_settings import DataSettings, for_model
from fluxjax.train.encoders import Encoders, encode_captions, encode_prepared
from fluxjax.train.examples import BrokenExample
from fluxjax.train.ordered import WHOLE_SHARE, OrderedBatches, ProcessShare
from fluxjax.train.prepare import PreparedExample, blank_example, is_flipped, prepare_example

RawExample = PreparedExample | BrokenExample
"""An example that is read, or why it can't be."""


class RawBatches(OrderedBatches[RawExample]):
    """Batches of examples that threads read and resize, and the device encodes.

    An example that can't be read is replaced by a row without weight, and counted; random masks
    differ from epoch to epoch.

    **Arguments:** `settings`: of the data; the size and the length of captions are the model's by
    default. `encoders`: from `load_encoders`. `batch_size`: of all processes together. `share`:
    whose rows are read.
    **Raises:** as `make_catalog`; `ValueError` for a batch that processes can't share evenly.
    """

    def __init__(
        self,
        settings: DataSettings,
        encoders: Encoders,
        *,
        batch_size: int,
        share: ProcessShare = WHOLE_SHARE,
    ):
        length = encoders.defaults.max_length
        settings = for_model(settings, side=encoders.side, max_length=length)
        self.catalog: Catalog = make_catalog(settings)
        self._encoders = encoders
        self._unreadable: dict[int, BrokenExample] = {}
        super().__init__(
            settings, self.catalog.names, self.catalog.sizes, batch_size=batch_size, share=share
        )

    def _load(self, number: int, epoch: int) -> RawExample:
        """Read an example, or return why it can't be read."""
        flip = is_flipped(self._settings, epoch, number)
        try:
            return prepare_example(self.catalog, self._settings, number, epoch, flip=flip)
        except (OSError, ValueError) as error:
            return BrokenExample(self._names[number], str(error))

    def _assemble(self, elements: list[RawExample], rows: BatchRows) -> TrainBatch:
        """Encode examples."""
        prepared = []
        for number, element in zip(rows.numbers, elements, strict=True):
            if isinstance(element, BrokenExample):
                self._unreadable[int(number)] = element
                element = blank_example(self._settings, rows.size)
            prepared.append(element)
        check_broken(self._all_broken(), self._settings.max_broken)
        images = encode_prepared(
            self._encoders, prepared, sample_posterior=self._settings.sample_posterior
        )
        captions = [one.caption for one in prepared]
        text = encode_captions(self._encoders, captions, self._settings)
        weights = np.array([one.weight for one in prepared], np.float32)
        rows = rows._replace(weight=rows.weight * weights)
        return collate(images, text, rows, self._settings)

    def _all_broken(self) -> list[BrokenExample]:
        unreadable = [one for _, one in sorted(self._unreadable.items())]
        return [*self.catalog.broken, *unreadable]

    def empty_text(self) -> TextStates:
        """Return the states of the empty caption, with a batch axis of 1."""
        return encode_captions(self._encoders, [""], self._settings)

    def broken(self) -> tuple[str, ...]:
        """Return what was left out so far."""
        return tuple(str(one) for one in self._all_broken())
