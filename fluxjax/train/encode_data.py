"""Encoding the examples of a training once, into a folder of shards that training reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.printable import printable_path
from fluxjax.train.buckets import Size
from fluxjax.train.cache_files import (
    DESCRIPTION_FILE,
    EMPTY_FILE,
    CacheDescription,
    ShardEntry,
    is_undamaged_shard,
    read_cache_description,
    read_entry,
    text_tensors,
    write_cache_description,
    write_empty_text,
    write_shard,
)
from fluxjax.train.catalog import Catalog, check_broken, data_digest, make_catalog
from fluxjax.train.data_settings import DataSettings, for_model
from fluxjax.train.encoders import (
    Encoders,
    ImageStates,
    encode_captions,
    encode_prepared,
    fingerprint,
)
from fluxjax.train.examples import BrokenExample
from fluxjax.train.ordered import WHOLE_SHARE, ProcessShare
from fluxjax.train.prepare import PreparedExample, blank_example, prepare_example
from fluxjax.train.read_ahead import ReadAhead

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


class ShardPlan(NamedTuple):
    """The examples of a shard, all of one size."""

    size: Size
    numbers: tuple[int, ...]


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
        if self.batch_size < 1 or self.shard_examples < 1 or not 0 <= part.index < part.count:
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
    entries: dict[int, ShardEntry] = {}
    for number in mine:
        entry = read_entry(folder, number)
        if entry is not None and is_undamaged_shard(folder, number, entry):
            entries[number] = entry
    kept, total = len(entries), sum(len(plans[number].numbers) for number in mine)
    done = sum(len(plans[number].numbers) for number in entries)
    report(done, total)
    job = _Job(settings, encoders, catalog, options.batch_size)
    todo = [number for number in mine if number not in entries]
    reader = _read_shards(job, [plans[number] for number in todo])
    try:
        for number in todo:
            tensors, entry = _encode_shard(job, plans[number], reader)
            broken = [*catalog.broken, *_broken_in(entries), *_broken_in({number: entry})]
            check_broken(broken, settings.max_broken)
            entries[number] = write_shard(folder, number, tensors, entry)
            done += len(plans[number].numbers)
            report(done, total)
    finally:
        reader.close()
    lines = [str(one) for one in (*catalog.broken, *_broken_in(entries))]
    count = sum(len(entry.numbers) for entry in entries.values())
    return EncodeReport(len(todo), kept, count, tuple(lines))


class _Job(NamedTuple):
    settings: DataSettings
    encoders: Encoders
    catalog: Catalog
    batch_size: int

    @property
    def variants(self) -> tuple[bool, ...]:
        """Whether each variant of an example is mirrored."""
        return (False, True) if self.settings.flip else (False,)


Variants = list[PreparedExample] | BrokenExample
"""An example as it is and, if some are mirrored, mirrored."""


def plan_shards(catalog: Catalog, count: int) -> list[ShardPlan]:
    """Return the examples of each shard: `count` of one size, in order of their numbers."""
    plans = []
    sizes = np.array(catalog.sizes)
    for size in sorted(set(catalog.sizes)):
        numbers = np.flatnonzero((sizes == size).all(axis=1)).tolist()
        for start in range(0, len(numbers), count):
            plans.append(ShardPlan(size, tuple(numbers[start : start + count])))
    return plans


def _describe(
    settings: DataSettings,
    encoders: Encoders,
    catalog: Catalog,
    options: EncodeOptions,
    shards: int,
) -> CacheDescription:
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


def _read_shards(job: _Job, plans: Sequence[ShardPlan]) -> ReadAhead[Variants]:
    """Read the examples of shards, one shard after another."""
    numbers = [number for plan in plans for number in plan.numbers]

    def read(index: int) -> Variants:
        number = numbers[index]
        try:
            return [
                prepare_example(job.catalog, job.settings, number, 0, flip=flip)
                for flip in job.variants
            ]
        except (OSError, ValueError) as error:
            return BrokenExample(job.catalog.examples[number].name, str(error))

    threads = job.settings.threads
    buffer = max(threads, 2 * job.batch_size)
    return ReadAhead(read, stop=len(numbers), threads=threads, buffer=buffer)


def _encode_shard(
    job: _Job, plan: ShardPlan, reader: Iterator[Variants]
) -> tuple[dict[str, np.ndarray], ShardEntry]:
    """Encode the examples of a shard."""
    numbers, captions, weights, broken, states = [], [], [], [], []
    waiting: list[list[PreparedExample]] = []
    for number in plan.numbers:
        variants = next(reader)
        if isinstance(variants, BrokenExample):
            broken.append([variants.name, variants.reason])
            continue
        numbers.append(number)
        captions.append(variants[0].caption)
        weights.append(variants[0].weight)
        waiting.append(variants)
        if len(waiting) == job.batch_size:
            states.append(_encode_variants(job, waiting, plan.size))
            waiting = []
    if waiting:
        states.append(_encode_variants(job, waiting, plan.size))
    unique = list(dict.fromkeys(captions))
    names = [job.catalog.examples[number].name for number in numbers]
    entry = ShardEntry(
        size=plan.size,
        numbers=numbers,
        names=names,
        weights=weights,
        text_rows=[unique.index(caption) for caption in captions],
        broken=broken,
    )
    if not numbers:
        return {}, entry
    images = jax.tree.map(lambda *parts: np.concatenate(parts), *states)
    return {**_image_tensors(images), **_encode_texts(job, unique)}, entry


def _encode_variants(job: _Job, waiting: list[list[PreparedExample]], size: Size) -> ImageStates:
    """Encode at most a batch of examples.

    **Returns:** arrays with axes of examples and of variants.
    """
    blank = blank_example(job.settings, size)
    by_variant = []
    for variant in range(len(job.variants)):
        rows = [variants[variant] for variants in waiting]
        # Always as many, so that one program is compiled for each size.
        rows += [blank] * (job.batch_size - len(rows))
        states = encode_prepared(job.encoders, rows, sample_posterior=job.settings.sample_posterior)
        by_variant.append(states)
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *by_variant)
    return jax.tree.map(lambda array: array[: len(waiting)], stacked)


def _image_tensors(images: ImageStates) -> dict[str, np.ndarray]:
    tensors: dict[str, Any] = images._asdict()
    return {name: array for name, array in tensors.items() if array is not None}


def _encode_texts(job: _Job, captions: list[str]) -> dict[str, np.ndarray]:
    """Encode captions, a batch at a time."""
    parts = []
    for start in range(0, len(captions), job.batch_size):
        some = captions[start : start + job.batch_size]
        padded = some + [""] * (job.batch_size - len(some))
        tensors = text_tensors(encode_captions(job.encoders, padded, job.settings))
        parts.append({name: array[: len(some)] for name, array in tensors.items()})
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _broken_in(entries: dict[int, ShardEntry]) -> list[BrokenExample]:
    found = []
    for _, entry in sorted(entries.items()):
        found += [BrokenExample(name, reason) for name, reason in entry.broken]
    return found
