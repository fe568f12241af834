"""Batches of examples that `fluxjax encode` has encoded."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from fluxjax.generate.text import TextStates
from fluxjax.printable import printable_path
from fluxjax.train.batch import TrainBatch
from fluxjax.train.cache_files import (
    CacheDescription,
    ShardEntry,
    ShardReader,
    read_cache_description,
    read_empty_text,
    read_entry,
    shard_path,
    text_states,
)
from fluxjax.train.collate import BatchRows, collate
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.encoders import ImageStates
from fluxjax.train.ordered import WHOLE_SHARE, OrderedBatches, ProcessShare
from fluxjax.train.prepare import is_flipped

_FROM_CACHE = ("max_ratio", "size_step", "max_length", "text_dtype")
"""Settings that only encoding uses."""
_SHOWN = 5
"""Shards that an error names."""


class CachedExample(NamedTuple):
    """An example of the cache: its arrays, and those of its caption by name, without an axis of
    examples."""

    images: ImageStates
    text: dict[str, np.ndarray]


class _Place(NamedTuple):
    """Where an example lies: its shard, its row there, and the row of its caption."""

    shard: int
    row: int
    text_row: int


class CachedBatches(OrderedBatches[CachedExample]):
    """Batches of examples from a folder that `encode_examples` has written. No encoder is needed.

    **Arguments:** `settings`: of the data; with a `cache`. Those that only encoding uses are the
    folder's, and its size, if the settings have none. `batch_size`: of all processes together.
    `share`: whose rows are read.
    **Raises:** `FileNotFoundError` for no such folder; `ValueError` for one that is unfinished or
    was encoded with other settings, and for a batch that processes can't share evenly.
    """

    def __init__(
        self,
        settings: DataSettings,
        *,
        batch_size: int,
        share: ProcessShare = WHOLE_SHARE,
    ):
        if settings.cache is None:
            raise ValueError("`CachedBatches(settings)` needs a cache. Pass DataSettings(cache=).")
        self._folder = Path(settings.cache)
        self.description = read_cache_description(self._folder)
        settings = _checked_settings(settings, self.description)
        self._entries = _entries(self._folder, self.description)
        self._empty = read_empty_text(self._folder)
        self._readers: dict[int, ShardReader] = {}
        rows = []
        for shard, entry in enumerate(self._entries):
            for row, number in enumerate(entry.numbers):
                rows.append((number, _Place(shard, row, entry.text_rows[row])))
        # In the order of the catalog, as raw examples.
        self._places = [place for _, place in sorted(rows)]
        names, sizes, weights = [], [], []
        for place in self._places:
            entry = self._entries[place.shard]
            names.append(entry.names[place.row])
            sizes.append(entry.size)
            weights.append(entry.weights[place.row])
        self._weights = np.array(weights, np.float32)
        super().__init__(settings, names, sizes, batch_size=batch_size, share=share)

    def _load(self, number: int, epoch: int) -> CachedExample:
        """Read an example."""
        place = self._places[number]
        reader = self._reader_of(place.shard)
        variant = int(is_flipped(self._settings, epoch, number))
        arrays = reader.row(self._used_arrays(), (place.row, variant))
        text = reader.row(("txt", "vec", "txt_length"), (place.text_row,))
        return CachedExample(ImageStates(**arrays), text)

    def _used_arrays(self) -> list[str]:
        used = ["latent", "condition", "hidden"]
        if self._settings.sample_posterior:
            used.append("log_variance")
        if self._settings.masked_loss:
            used.append("counted")
        return used

    def _reader_of(self, shard: int) -> ShardReader:
        # Two threads may make the same one, which does no harm.
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers[shard] = ShardReader(shard_path(self._folder, shard))
        return reader

    def _assemble(self, elements: list[CachedExample], rows: BatchRows) -> TrainBatch:
        """Stack examples."""
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *elements)
        rows = rows._replace(weight=rows.weight * self._weights[rows.numbers])
        return collate(stacked.images, text_states(stacked.text), rows, self._settings)

    def empty_text(self) -> TextStates:
        """Return the states of the empty caption, with a batch axis of 1."""
        return self._empty

    def broken(self) -> tuple[str, ...]:
        """Return what was left out when the examples were encoded."""
        lines = []
        for entry in self._entries:
            lines += [f"{name}: {reason}" for name, reason in entry.broken]
        return tuple(lines)


def _checked_settings(settings: DataSettings, description: CacheDescription) -> DataSettings:
    """Return settings with what the cache says for those that only encoding uses.

    **Raises:** `ValueError` if the cache can't serve them.
    """
    theirs = description.settings
    wrong: list[tuple[str, object]] = []
    if settings.size not in (None, theirs["size"]):
        wrong.append(("size", settings.size))
    if settings.condition != theirs["condition"]:
        wrong.append(("condition", settings.condition))
    for name in ("masked_loss", "flip", "sample_posterior"):
        if getattr(settings, name) and not theirs[name]:
            wrong.append((name, True))
    if wrong:
        texts = [f"{name} {theirs[name]}, not {value}" for name, value in wrong]
        raise ValueError(
            f"The examples in {settings.cache} were encoded with {', '.join(texts)}. Use the same "
            "settings, or encode them into another folder."
        )
    changes = {name: theirs[name] for name in ("size", *_FROM_CACHE)}
    return replace(settings, **changes)


def _entries(folder: Path, description: CacheDescription) -> list[ShardEntry]:
    """Return the entries of all shards. **Raises:** `ValueError` if some are unfinished."""
    entries, missing = [], []
    for number in range(description.shards):
        entry = read_entry(folder, number)
        if entry is None:
            missing.append(shard_path(folder, number).name)
        else:
            entries.append(entry)
    if missing:
        more = ", …" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{len(missing)} of {description.shards} files in {printable_path(folder)} are missing "
            f"or unfinished: {', '.join(missing[:_SHOWN])}{more}. Run `fluxjax encode` again: "
            "it writes these."
        )
    if not any(entry.numbers for entry in entries):
        raise ValueError(
            f"No example in {printable_path(folder)} could be read. Repair the images, and encode "
            "them into another folder."
        )
    return entries
