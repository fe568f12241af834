"""Checkpoints of any layout for the tests: arrays by name, and files of them."""

from pathlib import Path

import numpy as np

from fluxjax.convert import files
from fluxjax.convert.layouts import Given, outs
from fluxjax.convert.load import Held
from fluxjax.convert.source import KINDS
from fluxjax.convert.tables import Dialect


def export(network, dialect: Dialect) -> dict[str, np.ndarray]:
    """Return a network's weights as a dialect names and lays them out."""
    kind = next(kind for kind in KINDS.values() if isinstance(network, kind.network))
    found = outs(Given(kind, network.config, Held(network), {}), dialect, None)
    return {name: next(iter(out.chunks())) for name, out in found.items()}


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file, in the place of an existing one."""
    outs = {name: files.Out.of(np.asarray(tensor)) for name, tensor in tensors.items()}
    files.write(path, outs, metadata, overwrite=True)
