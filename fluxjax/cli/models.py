"""The command `fluxjax models`: the models that can be named, and what is known of each."""

import argparse
import json
from typing import Any

import equinox as eqx
import jax

from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.locate import download
from fluxjax.generate.limits import known_flux_config
from fluxjax.zoo import FAMILIES, Family, Model

_COLUMNS = ("name", "transformer", "licence", "takes", "steps", "guidance", "files")


def run_models(options: argparse.Namespace) -> None:
    """Print a row for each named model, or with --json an object for each."""
    rows = []
    for family in FAMILIES:
        for name, model in family.models.items():
            rows.append(_describe(family, name, model))
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return
    table = [_COLUMNS, *(tuple(map(_shown, (row[name] for name in _COLUMNS))) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  ".join(padded).rstrip())


def _describe(family: Family, name: str, model: Model) -> dict[str, Any]:
    """Return what is known of a model without a download."""
    defaults = model.defaults
    return {
        "name": name,
        "family": family.name,
        "repository": model.repository,
        "transformer": _parameters(family, name),
        "licence": model.licence,
        "takes": model.takes,
        "adapters": dict(model.adapters),
        "steps": defaults.steps,
        "guidance": defaults.guidance,
        "cfg": defaults.cfg,
        "height": defaults.height,
        "width": defaults.width,
        "files": _place(family, name, model),
    }


def _parameters(family: Family, name: str) -> int:
    """Return the number of parameters of a model's transformer."""
    network = KINDS[family.transformer].network
    config = known_flux_config(name)
    shapes = eqx.filter_eval_shape(network, config, key=jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "size"))


def _place(family: Family, name: str, model: Model) -> str:
    """Return where a model's files are: in the package, in the hub's cache, or on the hub."""
    if model.repository is None:
        return "in the package"
    try:
        folder = download(name, family.folders, cached=True)
    except OSError:  # among them those of the hub for what is not in its cache
        return "on the hub"
    missing = [part for part in family.folders if not (folder / part).is_dir()]
    return "partly in the cache" if missing else "in the cache"


def _shown(value: object) -> str:
    """Return a value as a cell of the table: numbers of parameters in millions or billions."""
    if value is None:
        return "-"
    if isinstance(value, int) and value >= 1_000_000:
        billions = value / 1e9
        return f"{billions:.1f} B" if billions >= 1 else f"{value / 1e6:.1f} M"
    return str(value)
