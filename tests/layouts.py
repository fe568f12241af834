"""Checkpoints of any layout for the tests: arrays by name, and files of them."""

from pathlib import Path

import numpy as np

from fluxjax.checkpoint import safetensors as files
from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.kinds import kind_of_network
from fluxjax.checkpoint.layouts import NetworkToWrite, dialect_tensors
from fluxjax.checkpoint.weights import InMemoryWeights


def export(network, dialect: Dialect) -> dict[str, np.ndarray]:
    """Return a network's weights by the keys and in the layout of a dialect."""
    to_write = NetworkToWrite(kind_of_network(network), InMemoryWeights(network), {})
    tensors = dialect_tensors(to_write, dialect, None)
    return {key: next(iter(tensor.chunks())) for key, tensor in tensors.items()}


def write(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file, in the place of an existing one."""
    outputs = {name: files.OutputTensor.of(np.asarray(tensor)) for name, tensor in tensors.items()}
    files.write(path, outputs, metadata, overwrite=True)
