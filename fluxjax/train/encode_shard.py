"""One shard of encoded examples: its examples read in threads, and encoded batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fluxjax.train.buckets import Size
from fluxjax.train.cache_files import ShardEntry, text_tensors
from fluxjax.train.catalog import Catalog
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.encoders import Encoders, ImageStates, encode_captions, encode_prepared
from fluxjax.train.examples import BrokenExample
from fluxjax.train.prepare import PreparedExample, blank_example, prepare_example
from fluxjax.train.read_ahead import ReadAhead

Variants = list[PreparedExample] | BrokenExample
"""An example as it is and, if some are mirrored, mirrored."""


class ShardPlan(NamedTuple):
    """The examples of a shard, all of one size."""

    size: Size
    numbers: tuple[int, ...]


class EncodingJob(NamedTuple):
    """What all shards are encoded with.

    `batch_size`: images and captions that are encoded at once.
    """

    settings: DataSettings
    encoders: Encoders
    catalog: Catalog
    batch_size: int

    @property
    def variants(self) -> tuple[bool, ...]:
        """Whether each variant of an example is mirrored."""
        return (False, True) if self.settings.flip else (False,)


def plan_shards(catalog: Catalog, count: int) -> list[ShardPlan]:
    """Return the examples of each shard: `count` of one size, in order of their numbers.

    The last shard of each size may have fewer.
    """
    plans = []
    sizes = np.array(catalog.sizes)
    for size in sorted(set(catalog.sizes)):
        numbers = np.flatnonzero((sizes == size).all(axis=1)).tolist()
        for start in range(0, len(numbers), count):
            plans.append(ShardPlan(size, tuple(numbers[start : start + count])))
    return plans


def read_shards(job: EncodingJob, plans: Sequence[ShardPlan]) -> ReadAhead[Variants]:
    """Read the examples of shards, one shard after another.

    **Returns:** an iterator over the examples, which threads read ahead; to be closed.
    """
    numbers = [number for plan in plans for number in plan.numbers]

    def read(index: int) -> Variants:
        number = numbers[index]
        variants = []
        try:
            for flip in job.variants:
                variants.append(prepare_example(job.catalog, job.settings, number, 0, flip=flip))
        except (OSError, ValueError) as error:
            return BrokenExample(job.catalog.examples[number].name, str(error))
        return variants

    threads = job.settings.threads
    buffer = max(threads, 2 * job.batch_size)
    return ReadAhead(read, stop=len(numbers), threads=threads, buffer=buffer)


def encode_shard(
    job: EncodingJob, plan: ShardPlan, reader: Iterator[Variants]
) -> tuple[dict[str, np.ndarray], ShardEntry]:
    """Encode the examples of a shard, as soon as those of a batch are read.

    **Arguments:** `reader`: from `read_shards`, at the first example of the shard.
    **Returns:** the tensors of the shard, none if all of its examples are broken; and its entry.
    """
    numbers, captions, weights, broken = [], [], [], []
    states: list[ImageStates] = []
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
    tensors = _image_tensors(images) | _encode_texts(job, unique)
    return tensors, entry


def _encode_variants(
    job: EncodingJob, waiting: list[list[PreparedExample]], size: Size
) -> ImageStates:
    """Encode at most a batch of examples.

    **Returns:** arrays with axes of examples and of variants.
    """
    blank = blank_example(job.settings, size)
    by_variant = []
    for variant in range(len(job.variants)):
        rows = [variants[variant] for variants in waiting]
        # Always as many, so that one program is compiled for each size.
        rows += [blank] * (job.batch_size - len(rows))
        sample = job.settings.sample_posterior
        by_variant.append(encode_prepared(job.encoders, rows, sample_posterior=sample))
    stacked = jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *by_variant)
    return jax.tree.map(lambda array: array[: len(waiting)], stacked)


def _image_tensors(images: ImageStates) -> dict[str, np.ndarray]:
    """Return the arrays that there are, by their names in the file."""
    tensors: dict[str, Any] = images._asdict()
    return {name: array for name, array in tensors.items() if array is not None}


def _encode_texts(job: EncodingJob, captions: list[str]) -> dict[str, np.ndarray]:
    """Encode captions, a batch at a time."""
    parts = []
    for start in range(0, len(captions), job.batch_size):
        some = captions[start : start + job.batch_size]
        padded = some + [""] * (job.batch_size - len(some))
        states = encode_captions(job.encoders, padded, job.settings)
        tensors = text_tensors(states)
        parts.append({name: array[: len(some)] for name, array in tensors.items()})
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
