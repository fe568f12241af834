"""Checkpoints of any layout for the tests: arrays by name, and files of them."""

from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from fluxjax.checkpoint import safetensors_writer as files
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.names import Dialect
from fluxjax.checkpoint.plan import InMemoryWeights
from fluxjax.checkpoint.write import NetworkToWrite, outs


def export(network, dialect: Dialect) -> dict[str, np.ndarray]:
    """Return a network's weights as a dialect names and lays them out."""
    kind = next(kind for kind in KINDS.values() if isinstance(network, kind.network))
    found = outs(NetworkToWrite(kind, network.config, InMemoryWeights(network), {}), dialect, None)
    return {name: next(iter(out.chunks())) for name, out in found.items()}


def write(
    path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file, in the place of an existing one."""
    outs = {
        name: files.OutputTensor.from_array(np.asarray(tensor)) for name, tensor in tensors.items()
    }
    files.write_safetensors(path, outs, metadata, overwrite=True)


def random_network(make, config):
    """Return a network with random NumPy weights; no initialization is compiled."""
    rng = np.random.default_rng(0)
    shapes = eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
