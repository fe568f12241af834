"""Networks and whole models in memory to files that load again: what was fine-tuned, merged or
trained.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fluxjax.arguments import convert_arguments
from fluxjax.checkpoint.atomic import check_free, new_folder
from fluxjax.checkpoint.defaults import write_pipeline
from fluxjax.checkpoint.disk import explain_full_disk
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.folders import DEFAULTS_FILE
from fluxjax.checkpoint.kinds import KINDS, Kind
from fluxjax.checkpoint.load import check_written_dtype
from fluxjax.checkpoint.plan import InMemoryWeights, Weights, slots_of_leaf
from fluxjax.checkpoint.write import (
    LAYOUTS,
    NetworkToWrite,
    check_target,
    output_files,
    write_files,
    write_json,
)
from fluxjax.devices.weights import HostWeight
from fluxjax.generate.load import Models
from fluxjax.lora.merge import MergedWeights, changes_of
from fluxjax.lora.read import Change, Lora
from fluxjax.lora.terms import LowRankTerm
from fluxjax.nets.stack import Unrolled
from fluxjax.nets.weight import AdaptedWeight, Dense, Weight

WHOLE_LAYOUTS = ("own", "diffusers")
"""The layouts that hold a whole model with its tokenizers."""


@convert_arguments
def save(
    network: eqx.Module, path: str | Path, *, to: str = "own", dtype: DTypeLike | None = None
) -> Path:
    """Write a network as files that `load_flux`, `load_clip`, `load_t5` or `load_vae` read, whole
    or not at all.

    **Arguments:** `network`: a `Flux`, `Clip`, `T5` or `Vae`, in the host's memory or on devices;
    attached adapters are merged as by `merge`. `path`: a new file that ends in .safetensors, or a
    new folder. `to`: "own", "diffusers" (a folder), "bfl" (the transformer or the VAE) or "comfy".
    `dtype`: of the weights; None keeps theirs; float8 is for the matrices of linear layers.
    **Returns:** the path.
    **Raises:** `FileExistsError` if there is something at the path; `ValueError` for another layout
    or dtype, or a path without a name; `WeightsError` for weights that are 8-bit, streamed,
    unrolled or split over `tensor`, for values that the dtype can't hold, for a network that the
    layout has no names for, and for a full disk.
    """
    target, single = check_target("save(path)", path)
    _check(target, to, LAYOUTS)
    given, stored = _given("save", network), check_written_dtype("save", dtype)
    if single:
        write_files(target.parent, output_files([given], to, dtype=stored, name=target.name))
        return target
    _write_folder(target, [given], to, stored, lambda folder: None)
    return target


@convert_arguments
def save_models(
    models: Models, folder: str | Path, *, to: str = "own", dtype: DTypeLike | None = None
) -> Path:
    """Write a whole model as a folder that `load_models` reads: networks, tokenizers and how it is
    meant to be sampled.

    The tokenizers' files are those that the model was loaded with; their source may be gone by now.

    **Arguments:** `folder`: a new one. `to`: "own", or "diffusers", which diffusers loads too.
    `dtype`: as for `save`.
    **Returns:** the folder.
    **Raises:** as `save`, and `WeightsError` for tokenizers that were not read from files.
    """
    target, single = check_target("save_models(folder)", folder)
    if single:
        raise ValueError(
            f"`save_models(folder)` writes a folder, got {str(folder)!r}. Leave out the ending."
        )
    _check(target, to, WHOLE_LAYOUTS)
    stored = check_written_dtype("save_models", dtype)
    if not models.tokenizers.files:
        raise WeightsError(
            "These tokenizers were not read from files, so none can be written. Take those of `load_tokenizers`."
        )
    given = [
        _given("save_models", network)
        for network in (models.flux, models.t5, models.clip, models.vae)
    ]

    def write_rest(temporary: Path) -> None:
        models.tokenizers.write(temporary)
        if to == "diffusers":
            write_pipeline(temporary, models.defaults)
        else:
            write_json(temporary / DEFAULTS_FILE, asdict(models.defaults))

    _write_folder(target, given, to, stored, write_rest)
    return target


def _check(target: Path, layout: str, layouts: tuple[str, ...]) -> None:
    if layout not in layouts:
        raise ValueError(f"There is no layout {layout!r} here. Choose one of {', '.join(layouts)}.")
    check_free(target)


def _write_folder(
    target: Path,
    given: list[NetworkToWrite],
    layout: str,
    dtype: np.dtype | None,
    write_rest: Callable[[Path], Any],
) -> None:
    files = output_files(given, layout, dtype=dtype)
    with (
        explain_full_disk(target, sum(sheet.nbytes for sheet in files)),
        new_folder(target) as temporary,
    ):
        write_files(temporary, files)
        if layout == "diffusers":
            for one in given:
                write_json(
                    temporary / one.kind.folder / "config.json", one.kind.to_json(one.config)
                )
        write_rest(temporary)


def _given(call: str, network: Any) -> NetworkToWrite:
    """Return a network as it can be written.

    **Raises:** `ValueError` or `WeightsError` for one that can't.
    """
    kind = _kind(call, network)
    if any(isinstance(child, Unrolled) for child in vars(network).values()):
        raise WeightsError(
            f"`{call}` takes stacked blocks, and this {kind.title} is unrolled. Save it before `unroll`."
        )
    for leaf in jax.tree.leaves(eqx.filter(network, eqx.is_array)):
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(f"`{call}` writes arrays, got traced ones. Call it outside of jit.")
        _check_placed(call, leaf)
    return NetworkToWrite(kind, network.config, _weights(call, network, kind), {})


def _kind(call: str, network: Any) -> Kind:
    for kind in KINDS.values():
        if isinstance(network, kind.network):
            return kind
    raise ValueError(
        f"`{call}` needs a Flux, Clip, T5 or Vae, got {type(network).__name__}. Save the networks one by one."
    )


def _check_placed(call: str, leaf: Any) -> None:
    """**Raises:** `WeightsError` for an array whose values, or whose order, are not those of the
    network.
    """
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and "tensor" in str(sharding.spec):
        raise WeightsError(
            f"`{call}` got a network split over the mesh's axis tensor, where rows have changed places. Save it before `shard`."
        )
    if sharding is not None and not leaf.is_fully_addressable:
        raise WeightsError(
            f"`{call}` got a network of which this process holds a part only. Gather it on one process first."
        )


def _weights(call: str, network: Any, kind: Kind) -> Weights:
    """Return a network's weights, with attached adapters added as they are read: rounded once, to
    the dtype written.
    """
    changes: dict[str, list[Change]] = {}

    def plain(path: Any, node: Any) -> Any:
        if not isinstance(node, Weight):
            return node
        name = ".".join(str(entry.name if hasattr(entry, "name") else entry.idx) for entry in path)
        while isinstance(node, AdaptedWeight):
            _collect(changes, slots_of_leaf(name, node.shape), node)
            node = node.base
        if isinstance(node, HostWeight):
            return Dense(node.value)
        if not isinstance(node, Dense):
            raise WeightsError(
                f"`{call}` writes weights as they are, and {name} is stored as {type(node).__name__}. Save the network that "
                "was quantized, or load it again without `stream` and `quantize`."
            )
        return node

    found = jax.tree_util.tree_map_with_path(
        plain, network, is_leaf=lambda node: isinstance(node, Weight)
    )
    if not changes:
        return InMemoryWeights(found)
    lora = Lora({kind.name: {name: tuple(mine) for name, mine in changes.items()}}, "attached")
    return MergedWeights(InMemoryWeights(found), changes_of(found, [lora], None))


def _collect(changes: dict[str, list[Change]], slots: list[str], weight: AdaptedWeight) -> None:
    """Add the low-rank changes of an adapted weight to those of each of its slots."""
    stacked = weight.up.ndim == 3
    for number, slot in enumerate(slots):
        up, down = (weight.up[number], weight.down[number]) if stacked else (weight.up, weight.down)
        changes.setdefault(slot, []).append(
            Change(LowRankTerm(up, down, jnp.float32(1.0)), None, False)
        )
