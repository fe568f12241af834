"""Adapters as the command line names them: on this machine, on the hub, or in the package."""

from pathlib import Path

from fluxjax.checkpoint.locate import download_file
from fluxjax.checkpoint.shipped import shipped_lora
from fluxjax.cli.console import complain, interruptible
from fluxjax.cli.options import Adapter
from fluxjax.lora.adapter import Lora
from fluxjax.lora.read import read_lora


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
