"""What a training reads, and how: the settings that a configuration's table `data` holds."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fluxjax.arguments import convert_arguments
from fluxjax.printable import printable
from fluxjax.train.buckets import Size, bucket_sizes
from fluxjax.train.examples import check_fields

CONDITIONS = ("control", "fill", "reference")
"""What examples may be conditioned on beside their captions: as the zoo's models."""
TEXT_DTYPES = ("float32", "bfloat16")


@convert_arguments
@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The data of a training.

    - `sources`: folders, `.jsonl`, `.tar` or `.parquet` files, or patterns of such.
    - `cache`: the folder of the encoded examples; None: images are encoded while it trains.
    - `size`: images have about size * size pixels; None for the model's own size.
    - `max_ratio`, `size_step`: as for `bucket_sizes`.
    - `condition`: "control" for a control image, "fill" for a mask, "reference" for the image that
      an instruction edits; None for none of them.
    - `masked_loss`: whether the examples' masks say where the loss counts.
    - `flip`: whether half of the images, drawn anew in each epoch, are mirrored.
    - `sample_posterior`: draw latents from the VAE's posterior; otherwise they are its mean.
    - `max_length`: T5 tokens of a caption; None for the model's own.
    - `text_dtype`: in which text states are kept, "float32" or "bfloat16"; None for that of the
      computation.
    - `fields`: names of fields or columns, by "image", "prompt", "control", "source", "mask" and
      "weight".
    - `max_broken`: how many examples that can't be read are left out; one more is an error.
    - `threads`: that read and decode images.
    - `seed`: of the order, of flips, of random masks, and of latents that are drawn.
    """

    sources: tuple[str, ...] = ()
    cache: str | None = None
    size: int | None = None
    max_ratio: float = 2.0
    size_step: int | None = None
    condition: str | None = None
    masked_loss: bool = False
    flip: bool = False
    sample_posterior: bool = False
    max_length: int | None = None
    text_dtype: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    max_broken: int = 10
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    seed: int = 0

    def __post_init__(self):
        check_fields(self.fields)
        self.sizes()
        if self.condition is not None and self.condition not in CONDITIONS:
            raise _wrong("condition", f"one of {', '.join(CONDITIONS)}", self.condition)
        if self.text_dtype is not None and self.text_dtype not in TEXT_DTYPES:
            raise _wrong("text_dtype", " or ".join(TEXT_DTYPES), self.text_dtype)
        for name, least in (("max_broken", 0), ("threads", 1), ("seed", 0), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise _wrong(name, f"a whole number from {least} on", value)

    def sizes(self) -> tuple[Size, ...]:
        """Return the image sizes; without a size of their own, none."""
        if self.size is None:
            return ()
        return bucket_sizes(self.size, max_ratio=self.max_ratio, step=self.size_step)


def data_settings(table: Mapping[str, Any], folder: Path = Path()) -> DataSettings:
    """Return the settings of a configuration's table.

    **Arguments:** `table`: names and values, as TOML has them. `folder`: where its paths begin.
    **Raises:** `ValueError` for an unknown name, or a value of another type.
    """
    values = dict(table)
    known = [one.name for one in fields(DataSettings)]
    for name in values:
        if name not in known:
            raise ValueError(
                f"There is no setting {printable(name)!r} of data. Choose from {', '.join(known)}."
            )
    sources = values.get("sources", ())
    if isinstance(sources, str):
        sources = [sources]
    if isinstance(sources, list):
        sources = tuple(_below(folder, source) for source in sources)
    values["sources"] = sources
    if "cache" in values:
        values["cache"] = _below(folder, values["cache"])
    return DataSettings(**values)


def _below(folder: Path, place: Any) -> Any:
    """Return a path that begins at a folder; what is no text stays, for the check of its type."""
    return str(folder / place) if isinstance(place, str) else place


def for_model(settings: DataSettings, *, side: int, max_length: int) -> DataSettings:
    """Return settings in which a model's own size and length of captions replace None."""
    changes: dict[str, Any] = {}
    if settings.size is None:
        changes["size"] = side
    if settings.max_length is None:
        changes["max_length"] = max_length
    return replace(settings, **changes)


def _wrong(name: str, needed: str, value: object) -> ValueError:
    return ValueError(
        f"`DataSettings({name})` needs {needed}, got {printable(repr(value))}. Change it."
    )
