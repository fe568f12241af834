"""The layouts that fluxjax writes: the files of each, and the tensors of each file."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import jax
import numpy as np

from fluxjax.checkpoint import own_configs
from fluxjax.checkpoint.config_fields import JsonObject
from fluxjax.checkpoint.dialect import Dialect, Row
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.fused import fused_parts
from fluxjax.checkpoint.kinds import (
    CONTROLNET,
    OWN_METADATA,
    VAE,
    AnyKind,
    dialect_for,
    flux_variant,
)
from fluxjax.checkpoint.own_configs import NetworkConfig
from fluxjax.checkpoint.safetensors_writer import OutputTensor
from fluxjax.checkpoint.tensor_layout import shape_in_file, to_file
from fluxjax.checkpoint.weights import Weights, parameter_names, parameters_of, widest
from fluxjax.nets.stack import is_stacked, leaf_names

LAYOUTS = ("own", "diffusers", "bfl", "comfy", "gguf")
"""fluxjax's own, with leaves as in memory; diffusers' folder; BFL's and ComfyUI's files; GGUF."""
FOLDER_LAYOUTS = ("own", "diffusers")
"""The layouts of which a folder can hold a whole model, with its tokenizers."""
_TABLES = frozenset(("tokens.weight", "positions.weight", "position_bias.weight", "mode_in.weight"))


@dataclass(frozen=True)
class NetworkToWrite:
    """A network to be written.

    `origin`: what the metadata says of where it came from. `family_folder`: its folder in a
    diffusers checkpoint, where its family has another one than its kind.
    """

    kind: AnyKind
    weights: Weights
    origin: JsonObject
    family_folder: str | None = None

    @property
    def folder(self) -> str:
        """Its folder in a diffusers checkpoint."""
        return self.kind.folder if self.family_folder is None else self.family_folder

    @property
    def config(self) -> NetworkConfig:
        """The network's config; a transform may have changed that of its source."""
        return self.weights.config


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written. `path`: relative to the folder that it goes to."""

    path: str
    tensors: Mapping[str, OutputTensor]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def check_layout(call: str, layout: str, choices: Sequence[str] = LAYOUTS) -> None:
    """Check the layout that a function was called with.

    **Arguments:** `call`: the function and its argument, for the message.
    **Raises:** `ValueError` for a layout that is not one of the choices.
    """
    if layout not in choices:
        raise ValueError(f"`{call}` takes one of {', '.join(choices)}, got {layout!r}.")


def output_files(
    networks: Sequence[NetworkToWrite],
    layout: str,
    *,
    dtype: np.dtype | None = None,
    name: str | None = None,
) -> list[OutputFile]:
    """Return the files of a layout; their values are read when they are written.

    **Arguments:** `layout`: one of `LAYOUTS`. `dtype`: of the weights; None keeps theirs. One of 8
    bits is for the matrices of the transformer's and the encoders' linear layers only; the rest
    keeps its dtype. `name`: of the one file to write; None for a folder's usual names.
    **Raises:** `WeightsError` if the layout, or one file of it, can't hold these networks.
    """
    if not networks:
        raise WeightsError("There is nothing to write. Pass one network or more.")
    if name is None:
        files = []
        for network in networks:
            path = _file_name(network, layout, dtype)
            files.append(_output_file([network], layout, dtype, path))
        return files
    if layout == "diffusers":
        raise WeightsError(
            "The diffusers layout is a folder. Give a destination without a .safetensors ending."
        )
    if len(networks) > 1 and layout != "comfy":
        names = ", ".join(network.kind.name for network in networks)
        raise WeightsError(
            f"One file of the {layout} layout holds one network, not {names}. "
            "Write a folder, or one of them only."
        )
    return [_output_file(networks, layout, dtype, name)]


def _output_file(
    networks: Sequence[NetworkToWrite], layout: str, dtype: np.dtype | None, path: str
) -> OutputFile:
    """Return one file with these networks, and with what the metadata says of them."""
    tensors: dict[str, OutputTensor] = {}
    for network in networks:
        # Keys of several networks in a file are told apart by ComfyUI's prefixes.
        prefix = network.kind.prefixes[0] if len(networks) > 1 else ""
        if layout == "own":
            of_network = stacked_tensors(network, dtype)
        else:
            of_network = dialect_tensors(network, _dialect_of(network, layout), dtype)
        for key, tensor in of_network.items():
            tensors[prefix + key] = tensor
    metadata = json.dumps(own_metadata(networks, layout))
    return OutputFile(path, tensors, {OWN_METADATA: metadata})


def own_metadata(networks: Sequence[NetworkToWrite], layout: str) -> JsonObject:
    """Return what fluxjax's entry in the metadata of a file says of its networks."""
    configs, origins = {}, {}
    for network in networks:
        configs[network.kind.name] = own_configs.to_dict(network.config)
        origins[network.kind.name] = network.origin
    return {
        "layout": layout,
        "parts": configs,
        "origin": origins,
        "version": _version(),
    }


def _version() -> str:
    """Return which fluxjax writes the file."""
    try:
        return f"fluxjax {version('fluxjax')}"
    except PackageNotFoundError:  # used from a source tree that is not installed
        return "fluxjax"


def _dialect_of(network: NetworkToWrite, layout: str) -> Dialect:
    """Return the key table that a layout has for a network."""
    kind = network.kind
    if layout == "bfl" and kind.name not in _WITH_BFL_NAMES:
        raise WeightsError(
            f"The BFL layout has no {kind.title}. "
            f"Write one of {', '.join(_WITH_BFL_NAMES)} only, or the comfy layout."
        )
    if kind is CONTROLNET and not network.config.hint_image:  # type: ignore[union-attr]
        if layout == "bfl":
            raise WeightsError(
                "The BFL layout has XLabs' ControlNets only, whose condition is an image. Write "
                "another layout."
            )
        return kind.dialects[1]  # which ComfyUI reads too
    has_diffusers_names = kind.name in _WITH_DIFFUSERS_NAMES and layout == "diffusers"
    return dialect_for(kind.dialects[1 if has_diffusers_names else 0], network.config)


_WITH_BFL_NAMES = ("flux", "chroma", "vae", "controlnet", "redux")
_WITH_DIFFUSERS_NAMES = ("flux", "chroma", "vae", "controlnet")
"""Kinds whose second dialect is diffusers'."""
_BFL_NAMES = {
    "dev": "flux1-dev",
    "schnell": "flux1-schnell",
    "lite-8B": "flux1-lite-8b",
    "Fill": "flux1-fill-dev",
    "Canny/Depth": "flux1-control-dev",
}
_FILE_NAMES = {
    "chroma": "chroma1.safetensors",
    "clip": "clip_l.safetensors",
    "vae": "ae.safetensors",
    "controlnet": "flux1-controlnet.safetensors",
    "siglip": "sigclip_vision_patch14_384.safetensors",
    "clip_vision": "clip_vision_l.safetensors",
    "redux": "flux1-redux-dev.safetensors",
    "ip_adapter": "flux1-ip-adapter.safetensors",
}
_COMFY_DTYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8_e4m3fn",
    "float8_e5m2": "fp8_e5m2",
}


def _file_name(network: NetworkToWrite, layout: str, dtype: np.dtype | None) -> str:
    """Return the path that a network's file usually has in a folder of a layout."""
    kind = network.kind
    if layout == "own":
        return f"{kind.name}.safetensors"
    if layout == "diffusers":
        return f"{network.folder}/{kind.stem}.safetensors"
    if kind.name == "flux":
        variant = (flux_variant(network.config) or "").partition(",")[0]
        return f"{_BFL_NAMES.get(variant, 'flux1')}.safetensors"
    if kind.name == "t5":
        stored = str(dtype or network.weights.dtype("blocks.0.q.weight"))
        return f"t5xxl_{_COMFY_DTYPES.get(stored, stored)}.safetensors"
    return _FILE_NAMES[kind.name]


def dialect_tensors(
    network: NetworkToWrite, dialect: Dialect, dtype: np.dtype | None
) -> dict[str, OutputTensor]:
    """Return a network's tensors as a dialect names and lays them out.

    **Raises:** `WeightsError` for a parameter that the dialect has no name for.
    """
    fused = fused_parts(network.config)
    tensors: dict[str, OutputTensor] = {}
    for name, parameter in parameters_of(network.weights.network).items():
        keys = dialect.keys(name)
        if not keys:
            raise WeightsError(
                f"The {dialect.name} names have none for {name} of a {network.kind.title}. "
                "Write another layout."
            )
        target = _written_dtype(network, name, parameter.shape, dtype)
        for key, row in keys:
            rows = slice(0, parameter.shape[0])
            if row.part is not None:
                rows = fused[row.part]
            count = rows.stop - rows.start
            shape = shape_in_file((count, *parameter.shape[1:]), row.layout)
            chunks = _ParameterRows(network.weights, name, rows, row, target)
            tensors[key] = OutputTensor(target, shape, chunks)
    return tensors


@dataclass(frozen=True)
class _ParameterRows:
    """Reads rows of a parameter when called, as a row of a key table lays them out.

    `name`: of the parameter. `rows`: those that the tensor holds. `dtype`: to write them in.
    """

    weights: Weights
    name: str
    rows: slice
    row: Row
    dtype: np.dtype

    def __call__(self) -> Iterator[np.ndarray]:
        values = self.weights.read(self.name, self.rows, self.dtype)
        yield to_file(values, self.row.layout)


def stacked_tensors(network: NetworkToWrite, dtype: np.dtype | None) -> dict[str, OutputTensor]:
    """Return a network's tensors as its leaves lie in memory, with the blocks stacked."""
    weights = network.weights
    leaves = jax.tree.leaves(weights.network)
    tensors: dict[str, OutputTensor] = {}
    for leaf_name, leaf in zip(leaf_names(weights.network), leaves, strict=True):
        shape = leaf.shape[1:] if is_stacked(leaf_name) else leaf.shape
        names = parameter_names(leaf_name, leaf.shape)
        if not names:  # a stack of no blocks
            continue
        # The blocks of a leaf lie in one tensor, which has one dtype.
        target = widest(_written_dtype(network, name, shape, dtype) for name in names)
        chunks = _ParameterStack(weights, names, shape, target)
        tensors[leaf_name] = OutputTensor(target, leaf.shape, chunks)
    return tensors


@dataclass(frozen=True)
class _ParameterStack:
    """Reads the blocks of a leaf one by one when called.

    `names`: of the blocks' parameters. `shape`: of each. `dtype`: to write them in.
    """

    weights: Weights
    names: Iterable[str]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __call__(self) -> Iterator[np.ndarray]:
        for name in self.names:
            yield self.weights.read(name, slice(0, self.shape[0]), self.dtype)


def _written_dtype(
    network: NetworkToWrite, name: str, shape: tuple[int, ...], dtype: np.dtype | None
) -> np.dtype:
    """Return the dtype that a parameter is written in."""
    stored = network.weights.dtype(name)
    if dtype is None:
        return stored
    is_matrix = len(shape) == 2 and name not in _TABLES
    # 8 bits are too few for norms, biases and tables, and for the few weights of the VAE.
    if dtype.itemsize == 1 and (not is_matrix or network.kind is VAE):
        return stored
    return dtype
