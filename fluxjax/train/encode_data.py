"""Encoding the examples of a training once, into a folder of shards that training reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.printable import printable_path
from fluxjax.train.cache_files import (
    DESCRIPTION_FILE,
    EMPTY_FILE,
    CacheDescription,
    ShardEntry,
    is_undamaged_shard,
    read_cache_description,
    read_entry,
    write_cache_description,
    write_empty_text,
    write_shard,
)
from fluxjax.train.catalog import Catalog, check_broken, data_digest, make_catalog
from fluxjax.train.data_settings import DataSettings, for_model
from fluxjax.train.encode_shard import EncodingJob, encode_shard, plan_shards, read_shards
from fluxjax.train.encoders import Encoders, encode_captions, fingerprint
from fluxjax.train.examples import BrokenExample
from fluxjax.train.ordered import WHOLE_SHARE, ProcessShare

_CONTENT_SETTINGS = (
    "size",
    "max_ratio",
    "size_step",
    "condition",
    "masked_loss",
    "flip",
    "sample_posterior",
    "max_length",
    "text_dtype",
)
"""The settings that what is encoded depends on."""


@dataclass(frozen=True)
class EncodeReport:
    """What `encode_examples` did.

    `written`, `kept`: how many shards it wrote, and found finished. `examples`: in all of these.
    `broken`: what was left out.
    """

    written: int
    kept: int
    examples: int
    broken: tuple[str, ...]


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How examples are encoded.

    `batch_size`: images and captions that are encoded at once. `shard_examples`: in one file.
    `part`: which shards are encoded here, where several processes share them.
    """

    batch_size: int = 8
    shard_examples: int = 128
    part: ProcessShare = WHOLE_SHARE

    def __post_init__(self):
        part = self.part
        has_counts = self.batch_size >= 1 and self.shard_examples >= 1
        if not has_counts or not 0 <= part.index < part.count:
            raise ValueError(
                "`EncodeOptions` needs a batch_size and shard_examples of at least 1 and a part "
                f"from 0 to below its count, got {self.batch_size}, {self.shard_examples} and "
                f"{part.index} of {part.count}. Change them."
            )


@convert_arguments
def encode_examples(
    settings: DataSettings,
    encoders: Encoders,
    folder: Path | str,
    *,
    options: EncodeOptions = EncodeOptions(),
    report: Callable[[int, int], object] = lambda done, total: None,
) -> EncodeReport:
    """Encode images and captions into a folder of shards, and continue what was interrupted.

    Each shard appears complete or not at all, and so does its entry of the index, after it.
    Finished shards are verified by their checksums and kept; the others are written. The result is
    bitwise the same as without the interruption.

    **Arguments:** `settings`: of the data. `encoders`: from `load_encoders`. `folder`: a new one,
    or one that the same call has begun. `report`: called with how many examples are done, and how
    many there are.
    **Raises:** as `make_catalog`; `ValueError` for a folder of other settings, another model or
    other data; `FileExistsError` for one with other files.
    """
    folder = Path(folder)
    length = encoders.defaults.max_length
    settings = for_model(settings, side=encoders.side, max_length=length)
    catalog = make_catalog(settings)
    plans = plan_shards(catalog, options.shard_examples)
    _begin(folder, _describe(settings, encoders, catalog, options, len(plans)))
    if not (folder / EMPTY_FILE).is_file():
        write_empty_text(folder, encode_captions(encoders, [""], settings))
    mine = range(options.part.index, len(plans), options.part.count)
    entries = _finished(folder, mine)
    kept = len(entries)
    total = sum(len(plans[number].numbers) for number in mine)
    done = sum(len(plans[number].numbers) for number in entries)
    report(done, total)
    job = EncodingJob(settings, encoders, catalog, options.batch_size)
    todo = [number for number in mine if number not in entries]
    reader = read_shards(job, [plans[number] for number in todo])
    try:
        for number in todo:
            tensors, entry = encode_shard(job, plans[number], reader)
            broken = [*catalog.broken, *_broken_in(entries), *_broken_in({number: entry})]
            check_broken(broken, settings.max_broken)
            entries[number] = write_shard(folder, number, tensors, entry)
            done += len(plans[number].numbers)
            report(done, total)
    finally:
        reader.close()
    broken = [*catalog.broken, *_broken_in(entries)]
    return EncodeReport(
        written=len(todo),
        kept=kept,
        examples=sum(len(entry.numbers) for entry in entries.values()),
        broken=tuple(str(one) for one in broken),
    )


def _finished(folder: Path, numbers: Sequence[int]) -> dict[int, ShardEntry]:
    """Return the entries of the shards that are there and undamaged, by number."""
    entries: dict[int, ShardEntry] = {}
    for number in numbers:
        entry = read_entry(folder, number)
        if entry is not None and is_undamaged_shard(folder, number, entry):
            entries[number] = entry
    return entries


def _describe(
    settings: DataSettings,
    encoders: Encoders,
    catalog: Catalog,
    options: EncodeOptions,
    shards: int,
) -> CacheDescription:
    """Return what the content of a folder depends on."""
    content = {name: getattr(settings, name) for name in _CONTENT_SETTINGS}
    content["dtype"] = str(jnp.dtype(encoders.dtype))
    content["batch_size"] = options.batch_size
    content["shard_examples"] = options.shard_examples
    if settings.condition == "fill":  # random masks depend on it
        content["seed"] = settings.seed
    return CacheDescription(
        model=encoders.model,
        encoders=fingerprint(encoders),
        data=data_digest(catalog.names, catalog.sizes),
        examples=len(catalog.examples),
        shards=shards,
        settings=content,
    )


def _begin(folder: Path, description: CacheDescription) -> None:
    """Write a folder's description, or check the one that is there."""
    if not (folder / DESCRIPTION_FILE).is_file():
        if folder.exists() and any(folder.glob("[!.]*")):
            raise FileExistsError(
                f"{printable_path(folder)} holds other files. Choose a new folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_cache_description(folder, description)
        return
    differences = read_cache_description(folder).differences(description)
    if differences:
        raise ValueError(
            f"{printable_path(folder)} was encoded with {', '.join(differences)}. Use the same "
            "settings, model and data, or choose another folder."
        )


def _broken_in(entries: dict[int, ShardEntry]) -> list[BrokenExample]:
    """Return the broken examples of shards, in order."""
    found = []
    for _, entry in sorted(entries.items()):
        found += [BrokenExample(name, reason) for name, reason in entry.broken]
    return found
