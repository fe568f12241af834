"""Members of FLUX.1 that the shapes of their weights do not tell apart: by name, or by hash.

Kontext and Krea have the shapes of dev, and Canny those of Depth. A file or folder that keeps the
name it was published under says which it is, and so does the hub's cache, where a file is named by
the SHA-256 of what it holds.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fluxjax.checkpoint.detect import open_source
from fluxjax.checkpoint.folders import TRANSFORMER_FOLDER
from fluxjax.checkpoint.kinds import FLUX, flux_variant
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.zoo import APPENDED_FEATURES, FLUX1, ZOO

_HASHES: Mapping[str, str] = {
    "843a26dc": "kontext",
    "03e289f5": "fill",
    "99687667": "canny",
    "41360d16": "depth",
}
"""The first digits of the SHA-256 of Black Forest Labs' files, and whose they are."""
_PATTERNS: Mapping[str, str] = {
    "openflux": "open[-_]?flux",
    "libreflux": "libre[-_]?flux",
    "de-distilled": "de[-_]?distill",
}
"""How those write their names that are not one word."""
_TITLES: Mapping[str, str] = {"lite": "lite-8B", "openflux": "OpenFLUX", "libreflux": "LibreFLUX"}
_HASH = re.compile(r"[0-9a-f]{64}")


def member_of_file(path: Path, config: FluxConfig) -> str | None:
    """Return the name in the zoo of the model that a file of a transformer is of.

    **Arguments:** `path`: of the file, or of the first of its shards. `config`: of the transformer.
    **Returns:** None if neither the shapes nor a name or hash tell.
    """
    features = config.in_channels - config.out_channels
    if features == APPENDED_FEATURES["fill"]:
        return "fill"
    if config == FluxConfig.lite():
        return "lite"
    possible = []
    for name, model in FLUX1.models.items():
        takes_guidance = model.defaults.guidance is not None
        same = (model.appended_features, takes_guidance) == (features, config.guidance_embed)
        # The names "dev" and "schnell" are part of those of others.
        if same and name not in ("tiny", "dev", "schnell", "lite"):
            possible.append(name)
    if features == 0:
        # Their layer for the guidance scale is gone, or has no effect.
        possible += FLUX1.variants
    hashed = path.resolve().name
    if _HASH.fullmatch(hashed) and _HASHES.get(hashed[:8]) in possible:
        return _HASHES[hashed[:8]]
    for text in _names(path):
        for name in possible:
            if re.search(_PATTERNS.get(name, rf"(?<![a-z0-9]){name}(?![a-z0-9])"), text.lower()):
                return name
    return None


def _names(path: Path) -> Iterator[str]:
    """Yield the names that may say what a file is: its own, its model's folder, its repository."""
    yield path.stem
    folder = path.parent
    if folder.name == TRANSFORMER_FOLDER:
        folder = folder.parent
    yield folder.name
    for parent in path.parents:
        if parent.name.startswith("models--"):  # a repository in the hub's cache
            yield parent.name


def member_of_source(source: str | Path) -> str | None:
    """Return the name in the zoo of a model, as far as it is known without a download.

    **Arguments:** `source`: a name, a hub id, a folder or a file.
    """
    for name, model in ZOO.items():
        if str(source) in (name, model.repository):
            return name
    path = Path(source)
    if not path.exists():
        return None
    network = open_source(path).network(FLUX)
    return member_of_file(network.files[0], network.config)


def described_variant(path: Path, config: FluxConfig) -> str:
    """Return which transformer of FLUX.1 a file is of, for people."""
    variant = flux_variant(config) or ""
    member = member_of_file(path, config)
    if member is None:
        return variant
    _, comma, size = variant.partition(",")
    return _TITLES.get(member, member.capitalize()) + comma + size
