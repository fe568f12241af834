"""Which family of models a source is of, and which folders of it hold what."""

from collections.abc import Iterable
from pathlib import Path

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.folders import TRANSFORMER_FOLDER
from fluxjax.checkpoint.kinds import AnyKind
from fluxjax.checkpoint.locate import family_of_index, find_part, find_source
from fluxjax.zoo import FAMILIES, FLUX1, Family, family_of, named_model


def family_of_source(source: str | Path, *, cached: bool = False) -> Family:
    """Return the family of a model: by its name, its transformer, or its index on the hub.

    **Arguments:** `source`: as for `find_source`. `cached`: only look in the hub's cache.
    **Returns:** FLUX.1 where nothing says which it is.
    **Raises:** as `find_source`, and `WeightsError` for files that can't be read.
    """
    if named_model(str(source)) is not None:
        return family_of(str(source))
    if Path(source).exists():
        # By what it holds: an index says what a folder is meant to hold.
        return family_of_networks(open_source(find_part(source, TRANSFORMER_FOLDER)).networks)
    return family_of_index(find_source(source, [], cached=cached))


def family_of_networks(names: Iterable[str]) -> Family:
    """Return the family whose transformer is among networks; FLUX.1 if none is.

    **Arguments:** `names`: of the networks' kinds.
    """
    present = set(names)
    for family in FAMILIES:
        if family.transformer in present:
            return family
    return FLUX1


def hub_folder(source: str | Path, kind: AnyKind) -> str:
    """Return the folder in which a source has a network; "" for its root.

    **Arguments:** `source`: as for `find_source`.
    """
    places = {family.networks.get(kind.name, kind.hub_folder) for family in FAMILIES}
    # Where a folder of a local source lies elsewhere, all of the source is searched.
    if Path(source).exists() or len(places) == 1:
        return kind.hub_folder
    return family_of_source(source).networks.get(kind.name, kind.hub_folder)
