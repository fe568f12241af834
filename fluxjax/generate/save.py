"""Networks and whole models in memory, written as files that load again."""

from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.atomic import check_free
from fluxjax.checkpoint.defaults import defaults_to_json, write_pipeline
from fluxjax.checkpoint.dtypes import check_written_dtype
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.family import family_of_networks
from fluxjax.checkpoint.folders import DEFAULTS_FILE
from fluxjax.checkpoint.gguf_layout import check_written_as
from fluxjax.checkpoint.kinds import AnyKind, Network, kind_of_network
from fluxjax.checkpoint.layouts import FOLDER_LAYOUTS, LAYOUTS, NetworkToWrite, check_layout
from fluxjax.checkpoint.weights import InMemoryWeights, Weights, parameter_names
from fluxjax.checkpoint.write import check_target, write_json, write_networks
from fluxjax.devices.streamed import HostWeight
from fluxjax.generate.load_models import Models
from fluxjax.lora.adapter import Change, Lora
from fluxjax.lora.changes import changes_of
from fluxjax.lora.merge import MergedWeights
from fluxjax.lora.terms import LowRankTerm
from fluxjax.nets.stack import Unrolled, path_name
from fluxjax.nets.weight import AdaptedWeight, Dense, Weight


@convert_arguments
def save(
    network: eqx.Module, path: str | Path, *, to: str = "own", dtype: DTypeLike | None = None
) -> Path:
    """Write a network as files that `load_flux`, `load_clip`, `load_t5` or `load_vae` read.

    Nothing is at the path until all of it is written.

    **Arguments:** `network`: a `Flux`, `Clip`, `T5` or `Vae`, in the host's memory or on devices;
    attached adapters are merged as by `merge`. `path`: a new file that ends in .safetensors, or a
    new folder. `to`: "own", "diffusers" (a folder), "bfl" (the transformer or the VAE), "comfy", or
    "gguf" (the transformer, to a file that ends in .gguf). `dtype`: of the weights; None keeps
    theirs; float8 is for the matrices of linear layers; with "gguf" also "Q8_0", "Q4_K", "Q4_0".
    **Returns:** the path.
    **Raises:** `FileExistsError` if there is something at the path; `ValueError` for another layout
    or dtype, or a path without a name; `WeightsError` for weights that are 8-bit, streamed,
    unrolled or split over `tensor`, for values that the dtype can't hold, for a network that the
    layout has no names for, and for a full disk.
    """
    check_layout("save(to)", to, LAYOUTS)
    target = check_target("save(path)", path, to)
    check_free(target.path)
    to_write = _to_write("save", network)
    stored = check_written_as("save", dtype, to)
    write_networks(target, [to_write], to, dtype=stored)
    return target.path


@convert_arguments
def save_models(
    models: Models, folder: str | Path, *, to: str = "own", dtype: DTypeLike | None = None
) -> Path:
    """Write a whole model as a folder that `load_models` reads.

    It holds the networks, the tokenizers and how the model is meant to be sampled. The tokenizers'
    files are those that the model was loaded with, even if their source is gone by now.

    **Arguments:** `folder`: a new one. `to`: "own", or "diffusers", which diffusers loads too.
    `dtype`: as for `save`.
    **Returns:** the folder.
    **Raises:** as `save`, and `WeightsError` for tokenizers that were not read from files.
    """
    target = check_target("save_models(folder)", folder)
    if target.is_file:
        raise ValueError(
            f"`save_models(folder)` writes a folder, got {str(folder)!r}. Leave out the ending."
        )
    check_layout("save_models(to)", to, FOLDER_LAYOUTS)
    check_free(target.path)
    stored = check_written_dtype("save_models", dtype)
    if not models.tokenizers.files:
        raise WeightsError(
            "These tokenizers were not read from files, so none can be written. "
            "Take those of `load_tokenizers`."
        )
    networks = [_to_write("save_models", network) for network in models.networks]
    family = family_of_networks(network.kind.name for network in networks)
    networks = [
        replace(network, family_folder=family.networks.get(network.kind.name))
        for network in networks
    ]

    def write_rest(temporary: Path) -> None:
        models.tokenizers.write(temporary)
        if to == "diffusers":
            write_pipeline(temporary, models.defaults, family)
        else:
            write_json(temporary / DEFAULTS_FILE, defaults_to_json(models.defaults))

    write_networks(target, networks, to, dtype=stored, write_rest=write_rest)
    return target.path


def _to_write(call: str, network: eqx.Module) -> NetworkToWrite:
    """Return a network as it can be written.

    **Raises:** `ValueError` or `WeightsError` for one that can't be.
    """
    if not isinstance(network, Network):
        raise ValueError(
            f"`{call}` needs a network of FLUX, got {type(network).__name__}. "
            "Save the networks one by one."
        )
    kind = kind_of_network(network)
    if any(isinstance(child, Unrolled) for child in vars(network).values()):
        raise WeightsError(
            f"`{call}` takes stacked blocks, and this {kind.title} is unrolled. "
            "Save it before `unroll`."
        )
    for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_array)):
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(f"`{call}` writes arrays, got traced ones. Call it outside of jit.")
        _check_placement(call, leaf)
    return NetworkToWrite(kind, _weights_of(call, network, kind), {})


def _check_placement(call: str, leaf: jax.Array | np.ndarray) -> None:
    """**Raises:** `WeightsError` for an array whose rows are reordered, or partly elsewhere."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and "tensor" in str(sharding.spec):
        # `shard` reorders the rows of fused weights, so that each device gets whole heads.
        raise WeightsError(
            f"`{call}` got a network split over the mesh's axis tensor, where rows have changed "
            "places. Save it before `shard`."
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise WeightsError(
            f"`{call}` got a network of which this process holds only a part. "
            "Gather it on one process first."
        )


def _weights_of(call: str, network: Network, kind: AnyKind) -> Weights:
    """Return a network's weights, with attached adapters merged as the weights are read.

    So each sum is rounded only once, to the dtype that is written.
    """
    changes: dict[str, list[Change]] = {}

    def without_adapters(path: KeyPath, node: object) -> object:
        if not isinstance(node, Weight):
            return node
        name = path_name(path)
        # Adapters that were attached one after the other are nested.
        while isinstance(node, AdaptedWeight):
            _add_changes(changes, parameter_names(name, node.shape), node)
            node = node.base
        if isinstance(node, HostWeight):
            node = node.stored
        if not isinstance(node, Dense):
            raise WeightsError(
                f"`{call}` writes weights as they are, and {name} is stored as "
                f"{type(node).__name__}. Save the network that was quantized, or load it again "
                "without `stream` and `quantize`, and from a file of packed blocks with a `dtype`."
            )
        return node

    plain = jax.tree_util.tree_map_with_path(
        without_adapters, network, is_leaf=lambda node: isinstance(node, Weight)
    )
    weights = InMemoryWeights(plain)
    if not changes:
        return weights
    adapter = Lora({kind.role: {name: tuple(of) for name, of in changes.items()}}, "attached")
    return MergedWeights(weights, changes_of(plain, [adapter], None))


def _add_changes(changes: dict[str, list[Change]], names: list[str], weight: AdaptedWeight) -> None:
    """Add the low-rank change of an adapted weight to those of each of its parameters."""
    # `attach` has put the scales into `up`, so that the factor is 1 here.
    is_stack = weight.up.ndim == 3
    for number, name in enumerate(names):
        up, down = weight.up, weight.down
        if is_stack:
            up, down = up[number], down[number]
        term = LowRankTerm(up, down, jnp.float32(1.0))
        changes.setdefault(name, []).append(Change(term, None, False))
