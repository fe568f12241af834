"""Checkpoints of any layout for the tests: random networks, arrays by key, and files of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.kinds import kind_of_network
from fluxjax.checkpoint.layouts import NetworkToWrite, dialect_tensors
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.checkpoint.weights import InMemoryWeights
from fluxjax.nets.stack import leaf_names

Arrays = dict[str, np.ndarray]


def random_network(make: Callable, config, *, seed: int = 0, scale: float = 1.0):
    """Return a network whose leaves are all random; NumPy draws them, so nothing is compiled."""
    network = eqx.filter_eval_shape(make, config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(network)
    rng = np.random.default_rng(seed)
    drawn = [scale * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(values, jnp.float32) for values in drawn])


def assert_same_network(found, expected) -> None:
    """Check that two networks have the same structure, and the same leaves bit by bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for name, (one, other) in zip(leaf_names(found), leaves, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.tobytes() == other.tobytes(), name


def cast_network(network, dtype):
    """Return a network with its leaves in another dtype; NumPy casts them."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype), dtype), network)


def export(network, dialect: Dialect) -> Arrays:
    """Return a network's weights by the keys and in the layout of a dialect."""
    to_write = NetworkToWrite(kind_of_network(network), InMemoryWeights(network), {})
    tensors = dialect_tensors(to_write, dialect, None)
    return {key: next(iter(tensor.chunks())) for key, tensor in tensors.items()}


def write(path: Path, tensors: Arrays, metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file, in the place of an existing one."""
    outputs = {name: OutputTensor.from_array(np.asarray(array)) for name, array in tensors.items()}
    write_safetensors(path, outputs, metadata, overwrite=True)


def write_gguf(path: Path, arch: str, tensors: Arrays, kinds: Mapping[str, str]) -> None:
    """Write a GGUF file; a tensor that has a kind is passed as the bytes of this kind's blocks."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for name, tensor in tensors.items():
        if name in kinds:
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
