"""Weights from any layout to any other, tensor by tensor."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from jax.typing import DTypeLike

from fluxjax.checkpoint.atomic import check_free
from fluxjax.checkpoint.config_fields import JsonObject
from fluxjax.checkpoint.defaults import defaults_to_json, load_defaults, write_pipeline
from fluxjax.checkpoint.detect import Source, open_source
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.family import family_of_networks, family_of_source, hub_folder
from fluxjax.checkpoint.folders import DEFAULTS_FILE
from fluxjax.checkpoint.gguf_layout import check_written_as
from fluxjax.checkpoint.identify import AnyFoundNetwork
from fluxjax.checkpoint.inspect import list_names
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.layouts import FOLDER_LAYOUTS, NetworkToWrite, check_layout
from fluxjax.checkpoint.locate import find_source
from fluxjax.checkpoint.weights import Weights
from fluxjax.checkpoint.write import Progress, check_target, write_json, write_networks
from fluxjax.zoo import Defaults


@runtime_checkable
class WeightsTransform(Protocol):
    """A change of weights while they are converted, such as merging adapters.

    `networks`: the names of the networks that it changes, such as "flux" for any transformer.
    """

    @property
    def networks(self) -> frozenset[str]: ...

    def __call__(self, network: str, weights: Weights) -> Weights:
        """Return the changed weights of one network, which may be computed when they are read."""

    def metadata(self, network: str) -> Mapping[str, object]:
        """Return what the written file's metadata says of the change, as JSON's types."""


def convert_weights(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "own",
    dtype: DTypeLike | None = None,
    only: str | Sequence[str] | None = None,
    shard_size: int | None = None,
    transform: WeightsTransform | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint in another layout, tensor by tensor.

    Nothing is at the destination until all of it is written.

    **Arguments:** `source`: a zoo name, a file or a folder of any layout, or a hub id.
    `destination`: a new folder, or a new file that ends in .safetensors or .gguf. `to`: "own"
    (leaves stacked as in memory), "diffusers" (a folder), "bfl", "comfy", or "gguf" (a transformer,
    in one file). `dtype`: of the weights; None keeps them bit by bit, and decodes scaled fp8 and
    GGUF's blocks to bfloat16; float8 is for the matrices of the transformer's and the encoders'
    linear layers; with "gguf", "Q8_0", "Q4_K" and "Q4_0" are for the matrices of blocks. `only`:
    one or some of "flux", "t5", "clip", "vae", "controlnet", "siglip", "clip_vision", "redux",
    "ip_adapter". `shard_size`: the most bytes of a file, for a folder of the own or the diffusers
    layout. `transform`: changes the weights on the way, such as `merge_while_converting(loras)`.
    `progress`: is called with the bytes written so far and their total.
    **Returns:** the destination.
    **Raises:** `WeightsError` for weights that are incomplete or that the layout can't hold, a full
    disk, or tensors of none of the networks; `FileExistsError` if there is something at the
    destination, also if it has appeared meanwhile; `ValueError` for a destination that has no
    name, and for a dtype that is not written.
    """
    check_layout("convert_weights(to)", to)
    target = check_target("convert_weights(destination)", destination, to)
    _check_options(to, shard_size, single_file=target.is_file)
    check_free(target.path)
    stored = check_written_as("convert_weights", dtype, to)
    chosen = _chosen_kinds(only)
    path = find_source(source, _folders(source, chosen))
    networks = _chosen_networks(open_source(path), chosen)
    _check_transform(transform, networks)
    names = [network.kind.name for network in networks]
    family = family_of_networks(names)
    to_write = []
    for network in networks:
        folder = family.networks.get(network.kind.name)
        to_write.append(_to_write(network, transform, folder))
    defaults = None
    if not target.is_file and to in FOLDER_LAYOUTS and family.transformer in names:
        # Read before hours of writing, since it may be damaged.
        defaults = load_defaults(source)
    write_networks(
        target,
        to_write,
        to,
        dtype=stored,
        shard_size=shard_size,
        progress=progress,
        write_rest=lambda folder: _write_rest(path, folder, networks, to, defaults),
    )
    return target.path


def _folders(source: str | Path, chosen: Sequence[str] | None) -> Sequence[str]:
    """Return the folders of a source on the hub that hold the chosen networks, or all of them."""
    if chosen is None:
        return [] if Path(source).exists() else family_of_source(source).folders
    return [hub_folder(source, KINDS[name]) for name in chosen]


def _check_options(layout: str, shard_size: int | None, *, single_file: bool) -> None:
    """**Raises:** `ValueError` for shards of a layout that has none."""
    if shard_size is None:
        return
    if single_file or layout not in FOLDER_LAYOUTS or shard_size < 1:
        raise ValueError(
            "Shards need a folder of the own or the diffusers layout as destination, and a size of "
            f"1 byte or more, got {shard_size}. Choose such a destination, or leave out shard_size."
        )


def _chosen_kinds(only: str | Sequence[str] | None) -> list[str] | None:
    """Return the names of the chosen networks in the order of `KINDS`; None for all there are.

    **Raises:** `ValueError` for a name that no network has.
    """
    if only is None:
        return None
    # The letters of a single name would else be taken for names.
    names = {only} if isinstance(only, str) else set(only)
    unknown = sorted(names - KINDS.keys())
    if unknown:
        raise ValueError(f"There is no network {unknown[0]!r}. Choose some of {', '.join(KINDS)}.")
    return [name for name in KINDS if name in names]


def _chosen_networks(source: Source, names: Sequence[str] | None) -> list[AnyFoundNetwork]:
    """Return the networks to convert.

    **Raises:** `WeightsError` if one is missing, or if the source holds what is not converted and
    none was chosen.
    """
    if names is not None:
        return [source.network(KINDS[name]) for name in names]
    # Nothing is left out silently: what is not converted has to be chosen so.
    for problem in source.unknown_files.values():
        raise WeightsError(f"{problem} To convert the rest, choose it with `only`.")
    if source.unknown_tensors:
        raise WeightsError(
            f"{source.path} holds {len(source.unknown_tensors)} tensors of no known network "
            f"({list_names(source.unknown_tensors[:3])} …). To convert the rest, choose it with "
            "`only`."
        )
    if not source.networks:
        raise WeightsError(
            f"{source.path} holds no weights. Pass a .safetensors or .gguf file, or a model's "
            "folder."
        )
    return list(source.networks.values())


def _check_transform(
    transform: WeightsTransform | None, networks: Sequence[AnyFoundNetwork]
) -> None:
    """**Raises:** `WeightsError` for a transform of a network that is not converted."""
    if transform is None:
        return
    converted = {network.kind.role for network in networks}
    unused = sorted(transform.networks - converted)
    if unused:
        raise WeightsError(
            f"`convert_weights(transform)` changes {', '.join(unused)} too, which is not "
            "converted. Convert it as well, or leave out the adapters that change it."
        )


def _to_write(
    network: AnyFoundNetwork, transform: WeightsTransform | None, folder: str | None
) -> NetworkToWrite:
    """Return a network of the source as it is to be written, with its origin.

    `folder`: that its family has for it in the diffusers layout.
    """
    name = network.kind.role
    weights: Weights = network.plan()
    origin: JsonObject = {
        "files": [file.name for file in network.files],
        "names": network.dialect.name,
    }
    if transform is not None and name in transform.networks:
        weights = transform(name, weights)
        origin |= transform.metadata(name)
    return NetworkToWrite(network.kind, weights, origin, folder)


def _write_rest(
    source: Path,
    folder: Path,
    networks: Sequence[AnyFoundNetwork],
    layout: str,
    defaults: Defaults | None,
) -> None:
    """Write what a folder of a whole model holds beside the weights: tokenizers and defaults."""
    if layout not in FOLDER_LAYOUTS:
        return
    names = {network.kind.name for network in networks}
    family = family_of_networks(names)
    copied = []
    if names & {*family.text_encoders}:
        for name in family.tokenizers:
            if (source / name).is_dir():
                _copy_files(source / name, folder / name)
                copied.append(name)
    if defaults is None:
        return
    # diffusers reads its index only together with all of the folders that it names.
    is_complete = family.networks.keys() <= names and len(copied) == len(family.tokenizers)
    if layout == "diffusers" and is_complete:
        write_pipeline(folder, defaults, family)
    else:
        write_json(folder / DEFAULTS_FILE, defaults_to_json(defaults))


def _copy_files(source: Path, target: Path) -> None:
    """Copy the regular files of a folder.

    Its folders are left out, since one may be a link to the folder itself, and pipes, since
    reading one would wait for its writer.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)
