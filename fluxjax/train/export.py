"""The result of a training as files: an adapter, a network, or a whole model."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

from fluxjax.checkpoint.atomic import check_free
from fluxjax.checkpoint.defaults import load_defaults
from fluxjax.checkpoint.family import family_of_source
from fluxjax.checkpoint.layouts import FOLDER_LAYOUTS, LAYOUTS, check_layout
from fluxjax.devices.shard import in_device_order
from fluxjax.generate.load import load_tokenizers
from fluxjax.generate.load_models import assemble_models
from fluxjax.generate.load_network import LoadOptions, load_network
from fluxjax.generate.save import save, save_models
from fluxjax.lora.adapter import Lora
from fluxjax.lora.write import FORMATS, write_lora
from fluxjax.nets.flux_config import FluxConfig
from fluxjax.nets.transformer import AbstractTransformer
from fluxjax.shapes import Array
from fluxjax.train.config import TrainConfig
from fluxjax.train.named_leaves import WeightArrays, with_named_leaves
from fluxjax.train.parts import TrainedAdapter
from fluxjax.train.setup import TrainingSetup


def check_output(config: TrainConfig) -> None:
    """Check that the result can be written, before a training begins.

    **Raises:** `FileExistsError` if there is something at the output; `ValueError` for a format
    that is not of what is trained, or an adapter that is no .safetensors file.
    """
    path = Path(config.output)
    check_free(path)
    is_file = path.suffix.lower() == ".safetensors"
    if config.train.is_adapter:
        if not is_file:
            raise ValueError(
                f"An adapter is written to a .safetensors file, and output is {config.output!r}. "
                "End it in .safetensors."
            )
        if config.format is not None and config.format not in FORMATS:
            raise ValueError(
                f"format is one of {', '.join(FORMATS)} for an adapter, got {config.format!r}. "
                "Choose one."
            )
    elif config.format is not None:
        check_layout("format", config.format, LAYOUTS if is_file else FOLDER_LAYOUTS)


def write_result(config: TrainConfig, setup: TrainingSetup, weights: WeightArrays) -> Path:
    """Write what a training results in. Call it in all processes; the first one writes.

    An adapter is one file. A network is one too, or a folder of the whole model with the encoders,
    the VAE and the tokenizers that it was trained with, which `load_models` and diffusers open.

    **Arguments:** `weights`: from `weights_to_write`.
    **Returns:** the path.
    **Raises:** as `write_lora`, `save` and `save_models`.
    """
    path = Path(config.output)
    to_host = partial(_on_host, mesh=setup.mesh)
    is_writer = jax.process_index() == 0
    if isinstance(setup.step.part, TrainedAdapter):
        lora = jax.tree.map(to_host, trained_adapter(setup, weights))
        dtype = jnp.dtype(config.output_dtype or "float32")
        if is_writer:
            own = setup.network.config
            # Only a Flux has widths that an adapter may not show.
            widths = own if isinstance(own, FluxConfig) else None
            write_lora(path, lora, to=config.format or "peft", dtype=dtype, config=widths)
        return path
    network = jax.tree.map(to_host, trained_network(setup, weights))
    if not is_writer:
        return path
    if path.suffix.lower() == ".safetensors":
        to = config.format or "own"
        return save(network, path, to=to, dtype=_dtype(config.output_dtype))
    return _write_model(config, network, path)


def trained_adapter(setup: TrainingSetup, weights: Mapping[str, PyTree]) -> Lora:
    """Return the adapter of trained weights, arrays of JAX or of NumPy."""
    return with_named_leaves(setup.frozen[1], weights)


def trained_network(setup: TrainingSetup, weights: WeightArrays) -> AbstractTransformer:
    """Return the whole network of trained weights, in the order of files.

    Weights are in the dtype that they were trained in, also if they are an average in float32.
    """
    tensor = setup.mesh.shape["tensor"]

    def join(weights: WeightArrays, frozen: PyTree) -> AbstractTransformer:
        stored = {}
        for name, leaf in weights.items():
            stored[name] = leaf.astype(setup.weights[name].dtype)
        network = setup.step.part.join(stored, frozen, tensor)

        def reorder(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
            return in_device_order(path, leaf, network.config, tensor, inverse=True)

        return jax.tree_util.tree_map_with_path(reorder, network)

    return jax.jit(join)(weights, setup.frozen)


def _write_model(config: TrainConfig, network: AbstractTransformer, path: Path) -> Path:
    """Write the whole model: the trained network, and what it was trained beside.

    It is sampled with captions of the length that it was trained with.

    **Arguments:** `network`: in the memory of this process. `path`: of a new folder.
    **Returns:** the path.
    """
    family = family_of_source(config.model)
    networks: dict[str, Any] = {family.transformer: network}
    for name in family.networks:
        if name != family.transformer:
            networks[name] = load_network(name, config.model, LoadOptions())
    tokenizers = load_tokenizers(config.model)
    defaults = load_defaults(config.model)
    if config.data.max_length is not None:
        defaults = replace(defaults, max_length=config.data.max_length)
    models = assemble_models(tokenizers, networks, family=family, defaults=defaults, mesh=None)
    to = config.format or "diffusers"
    return save_models(models, path, to=to, dtype=_dtype(config.output_dtype))


def _on_host(leaf: Array, mesh: jax.sharding.Mesh) -> Any:
    """Return an array in the host's memory, gathered from all processes.

    One array at a time, so that no accelerator has to hold the whole network.
    """
    if not leaf.is_fully_addressable:
        whole = NamedSharding(mesh, PartitionSpec())
        leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
    return jax.device_put(np.asarray(leaf), jax.local_devices(backend="cpu")[0])


def _dtype(name: str | None) -> DTypeLike | None:
    return None if name is None else jnp.dtype(name)
