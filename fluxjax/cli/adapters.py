"""Adapters as the command line names them: on this machine, on the hub, or in the package."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from fluxjax.checkpoint.locate import download_file
from fluxjax.checkpoint.shipped import shipped_lora
from fluxjax.cli.compound_options import Adapter
from fluxjax.cli.console import complain, interruptible
from fluxjax.lora.adapter import Lora
from fluxjax.lora.read import read_lora
from fluxjax.zoo import named_model


def read_adapter(adapter: Adapter) -> Lora:
    """Read an adapter, and print which of its contents have no effect.

    A file on the hub is downloaded if it is not in the cache.
    """
    lora = read_lora(interruptible(adapter_file, adapter.place))
    for note in lora.notes:
        complain(f"{adapter.name}: {note}")
    return lora


def adapter_file(place: str) -> Path:
    """Return the file of an adapter, which is downloaded if it is on the hub.

    **Arguments:** `place`: a path, "hub:OWNER/REPO/FILE", or "tiny:STYLE".
    """
    kind, _, rest = place.partition(":")
    if kind == "tiny":
        return shipped_lora(rest)
    if kind != "hub":
        return Path(place)
    owner, repository, file = rest.split("/", 2)
    return download_file(f"{owner}/{repository}", file)


def with_shipped_adapters(
    model: str, adapters: Sequence[Adapter], takes: Iterable[str | None]
) -> list[Adapter]:
    """Return adapters, with those that ship with a model for what it is to be conditioned on.

    They are left out where an adapter of another source is given, which may be for the same.

    **Arguments:** `takes`: as in `fluxjax.zoo.Model`, each of them or None.
    """
    named = named_model(model)
    joined = list(adapters)
    if named is None or any(not adapter.place.startswith("tiny:") for adapter in adapters):
        return joined
    for what in takes:
        name = named.adapters.get(what or "")
        if name is not None and f"tiny:{name}" not in [adapter.place for adapter in joined]:
            joined.append(Adapter(name, f"tiny:{name}", 1.0))
            _note_shipped(f"tiny:{name}")
    return joined


@cache  # so that a file of pictures has one note, not one for each of its lines
def _note_shipped(place: str) -> None:
    complain(f"with --lora {place}, which ships with the model for this")
