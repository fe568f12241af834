"""The named models, as data."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a model is meant to be sampled. `guidance`: None if it takes none. `height`, `width`: in pixels. `max_length`: T5
    tokens. `shift`: whether the times are shifted by resolution, from `base_shift` to `max_shift`."""

    steps: int = 28
    guidance: float | None = 3.5
    height: int = 1024
    width: int = 1024
    max_length: int = 512
    shift: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named model: its hub id, or None for the one that ships with the package."""

    repository: str | None
    defaults: Defaults


# Its latents are so redundant that the layout is decided at high noise, so it is shifted more than dev.
_TINY = Defaults(steps=20, height=128, width=128, max_length=24, base_shift=2.0, max_shift=2.65)
ZOO: Mapping[str, Entry] = {
    "tiny": Entry(repository=None, defaults=_TINY),
    "dev": Entry(repository="black-forest-labs/FLUX.1-dev", defaults=Defaults()),
    "schnell": Entry(
        repository="black-forest-labs/FLUX.1-schnell",
        defaults=Defaults(steps=4, guidance=None, max_length=256, shift=False),
    ),
    "krea": Entry(repository="black-forest-labs/FLUX.1-Krea-dev", defaults=Defaults(guidance=4.5)),
}
