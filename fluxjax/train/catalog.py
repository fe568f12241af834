"""The list of all examples of a training: their sizes, and what is left out of it."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fluxjax.train.buckets import Size, nearest_bucket
from fluxjax.train.data_settings import DataSettings
from fluxjax.train.examples import NO_CAPTION, BrokenExample, Example, split_broken
from fluxjax.train.sources import find_examples

_SHOWN = 5
"""Examples that an error names."""
_NEEDED = {"control": "control", "reference": "source"}
"""The image that each example must have, by the condition."""


@dataclass(frozen=True)
class Catalog:
    """The examples of a training, by number.

    `sizes`: to which their images are resized. `broken`: what is left out. `enlarged`: how many
    images are smaller than their size. `unused`: images beside the examples' own that the settings
    have no use for, and how many there are.
    """

    examples: tuple[Example, ...]
    sizes: tuple[Size, ...]
    broken: tuple[BrokenExample, ...]
    enlarged: int
    unused: Counter[str]

    @property
    def names(self) -> list[str]:
        """The names of the examples."""
        return [example.name for example in self.examples]

    def summary(self) -> list[str]:
        """Return lines that say what was found."""
        lines = []
        for (height, width), count in sorted(Counter(self.sizes).items()):
            lines.append(f"{width}x{height}: {_counted(count, 'image')}")
        if self.enlarged:
            lines.append(f"{_counted(self.enlarged, 'image')} smaller than that and enlarged")
        for role, count in sorted(self.unused.items()):
            lines.append(f"{_counted(count, role)} unused with these settings")
        lines += [f"left out: {one}" for one in self.broken]
        return lines


def _counted(count: int, noun: str) -> str:
    """Return a number of things in words."""
    ending = "" if count == 1 else "s"
    return f"{count:,} {noun}{ending}"


def make_catalog(settings: DataSettings) -> Catalog:
    """Find the examples of a training, and read the headers of their images.

    **Arguments:** `settings`: with a size.
    **Raises:** `FileNotFoundError` and `ValueError` as `find_examples`; `ValueError` if no example
    is left, or more are broken than `settings.max_broken`.
    """
    sizes = settings.sizes()
    if not sizes:
        raise ValueError("`make_catalog(settings)` needs a size. Pass them through `for_model`.")
    candidates, broken = split_broken(find_examples(settings.sources, settings.fields))
    with ThreadPoolExecutor(settings.threads) as pool:
        measured = list(pool.map(lambda one: _measure(one, settings), candidates))
    examples, buckets = [], []
    enlarged = 0
    unused: Counter[str] = Counter()
    for example, size in zip(candidates, measured, strict=True):
        if isinstance(size, BrokenExample):
            broken.append(size)
            continue
        bucket = nearest_bucket(*size, sizes)
        examples.append(example)
        buckets.append(bucket)
        enlarged += size[0] < bucket[0] or size[1] < bucket[1]
        unused.update(_unused(example, settings))
    _check_captions(broken, len(candidates) + len(broken))
    check_broken(broken, settings.max_broken)
    if not examples:
        raise ValueError(f"There are no examples in {_places(settings)}. Put some there.")
    return Catalog(
        examples=tuple(examples),
        sizes=tuple(buckets),
        broken=tuple(broken),
        enlarged=enlarged,
        unused=unused,
    )


def _measure(example: Example, settings: DataSettings) -> Size | BrokenExample:
    """Return the size of an example's image, or why it can't be used."""
    role = _NEEDED.get(settings.condition or "")
    if role is not None and getattr(example, role) is None:
        return BrokenExample(example.name, f"it has no {role} image, which the condition needs")
    if example.size is not None:
        return example.size
    try:
        return example.image.image_size()
    except (OSError, ValueError) as error:
        return BrokenExample(example.name, str(error))


def _unused(example: Example, settings: DataSettings) -> list[str]:
    """Return what an example has beside its image that these settings have no use for."""
    used = {_NEEDED.get(settings.condition or "")}
    if settings.masked_loss or settings.condition == "fill":
        used.add("mask")
    nouns = {"control": "control image", "source": "source image", "mask": "mask"}
    found = []
    for role, noun in nouns.items():
        if getattr(example, role) is not None and role not in used:
            found.append(noun)
    return found


def _check_captions(broken: Sequence[BrokenExample], count: int) -> None:
    """**Raises:** `ValueError` if no image has a caption."""
    if not broken or count != len(broken):
        return
    if all(one.reason == NO_CAPTION for one in broken):
        raise ValueError(
            f"None of the {_counted(count, 'image')} has a caption, as {broken[0].name}. Write "
            "captions to text files of the same stem, or to metadata.jsonl or other JSON lines."
        )


def check_broken(broken: Sequence[BrokenExample], limit: int) -> None:
    """Check that not too many examples can't be used.

    **Arguments:** `limit`: how many may be broken.
    **Raises:** `ValueError` that names some of them.
    """
    if len(broken) <= limit:
        return
    shown = "; ".join(str(one).rstrip(".") for one in broken[:_SHOWN])
    more = f"; and {len(broken) - _SHOWN:,} more" if len(broken) > _SHOWN else ""
    raise ValueError(
        f"{_counted(len(broken), 'example')} can't be used, more than max_broken = {limit}: "
        f"{shown}{more}. Repair or remove them, or raise max_broken."
    )


def _places(settings: DataSettings) -> str:
    return ", ".join(settings.sources)


def data_digest(names: Sequence[str], sizes: Sequence[Size]) -> str:
    """Return a hash of the names and sizes of all examples, which their order depends on.

    **Returns:** 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, (height, width) in zip(names, sizes, strict=True):
        entry = f"{name}\0{height}x{width}\0"
        digest.update(entry.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
