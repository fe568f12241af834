"""The layouts that users hold: the files of a checkpoint and the tensors of each, written as they are read."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fluxjax.checkpoint import configs
from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.detect import dialect_for, fused_parts, variant
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.kinds import OWN_METADATA, VAE, Kind
from fluxjax.checkpoint.names import Dialect
from fluxjax.checkpoint.plan import Weights, slots_of, slots_of_leaf, their_shape, to_theirs, widest
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.nets.stack import is_stacked, leaf_names
from fluxjax.printable import printable

LAYOUTS = ("own", "diffusers", "bfl", "comfy")
_TABLES = {"tokens.weight", "positions.weight", "position_bias.weight"}


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written, and the networks that it will hold."""

    path: str
    tensors: Mapping[str, OutputTensor]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class NetworkToWrite:
    """A network to be written. `origin`: what the metadata says of where it came from."""

    kind: Kind
    config: Any
    weights: Weights
    origin: Mapping[str, Any]


def output_files(
    networks: Iterable[NetworkToWrite],
    layout: str,
    *,
    dtype: np.dtype | None = None,
    name: str | None = None,
) -> list[OutputFile]:
    """Return the files of a layout.

    **Arguments:** `layout`: one of `LAYOUTS`. `dtype`: of the weights; None keeps theirs; 8 bits are for the matrices
    of the transformer's and the encoders' linear layers, the rest keeps its dtype. `name`: of the one file to write; None
    for a folder's usual names.
    **Raises:** `WeightsError` if the layout, or one file, can't hold these networks.
    """
    networks = list(networks)
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}. Choose one of {', '.join(LAYOUTS)}.")
    if not networks:
        raise WeightsError("There is nothing to write.")
    if name is None:
        return [_sheet([one], layout, dtype, _file_name(one, layout, dtype)) for one in networks]
    if layout == "diffusers":
        raise WeightsError(
            "The diffusers layout is a folder. Give a destination without a .safetensors ending."
        )
    if len(networks) > 1 and layout != "comfy":
        held = ", ".join(one.kind.name for one in networks)
        raise WeightsError(
            f"One file of the {layout} layout holds one network, not {held}. Write a folder, or one of them only."
        )
    return [_sheet(networks, layout, dtype, name)]


def _sheet(
    networks: list[NetworkToWrite], layout: str, dtype: np.dtype | None, path: str
) -> OutputFile:
    tensors: dict[str, OutputTensor] = {}
    for one in networks:
        prefix = one.kind.prefixes[0] if len(networks) > 1 else ""
        found = (
            stacked_outs(one, dtype) if layout == "own" else outs(one, _dialect(one, layout), dtype)
        )
        tensors |= {prefix + key: out for key, out in found.items()}
    about = {
        "layout": layout,
        "parts": {one.kind.name: configs.to_dict(one.config) for one in networks},
        "origin": {one.kind.name: one.origin for one in networks},
        "version": _version(),
    }
    return OutputFile(path, tensors, {OWN_METADATA: json.dumps(about)})


def _dialect(given: NetworkToWrite, layout: str) -> Dialect:
    """Return the names that a layout has for a network."""
    kind, bfl = given.kind.name, layout in ("bfl", "comfy")
    if kind in ("clip", "t5"):
        if layout == "bfl":
            raise WeightsError(
                f"The BFL layout has no {given.kind.title}. Write the flux or the vae only, or the comfy layout."
            )
        return given.kind.dialects[0]
    return dialect_for(given.kind.dialects[0 if bfl else 1], given.config)


_BFL_NAMES = {
    "dev": "flux1-dev",
    "schnell": "flux1-schnell",
    "Fill": "flux1-fill-dev",
    "Canny/Depth": "flux1-control-dev",
}
_DTYPE_NAMES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8_e4m3fn",
    "float8_e5m2": "fp8_e5m2",
}


def _file_name(given: NetworkToWrite, layout: str, dtype: np.dtype | None) -> str:
    kind = given.kind
    if layout == "own":
        return f"{kind.name}.safetensors"
    if layout == "diffusers":
        return f"{kind.folder}/{kind.stem}.safetensors"
    if kind.name == "flux":
        return (
            _BFL_NAMES.get((variant(given.config) or "").partition(",")[0], "flux1")
            + ".safetensors"
        )
    if kind.name == "t5":
        stored = str(dtype or given.weights.dtype("blocks.0.q.weight"))
        return f"t5xxl_{_DTYPE_NAMES.get(stored, stored)}.safetensors"
    return {"clip": "clip_l", "vae": "ae"}[kind.name] + ".safetensors"


def outs(
    given: NetworkToWrite, dialect: Dialect, dtype: np.dtype | None
) -> dict[str, OutputTensor]:
    """Return a network's tensors as a dialect names and lays them out.

    **Raises:** `WeightsError` for a leaf that the dialect has no name for.
    """
    found: dict[str, OutputTensor] = {}
    parts = fused_parts(given.config)
    for name, slot in slots_of(given.weights.network).items():
        keys = dialect.keys(name)
        if not keys:
            raise WeightsError(
                f"The {dialect.name} names have none for {name} of a {given.kind.title}."
            )
        target = _target(given, name, slot.shape, dtype)
        for key, row in keys:
            rows = slice(0, slot.shape[0]) if row.part is None else parts[row.part]
            shape = their_shape((rows.stop - rows.start, *slot.shape[1:]), row)

            def chunks(name=name, rows=rows, target=target, row=row) -> Iterator[np.ndarray]:
                yield to_theirs(given.weights.read(name, rows, target), row)

            found.setdefault(key, OutputTensor(target, shape, chunks))
    return found


def stacked_outs(given: NetworkToWrite, dtype: np.dtype | None) -> dict[str, OutputTensor]:
    """Return a network's tensors as they lie in memory, blocks stacked."""
    found: dict[str, OutputTensor] = {}
    weights = given.weights
    for name, leaf in zip(
        leaf_names(weights.network), jax.tree.leaves(weights.network), strict=True
    ):
        slots = slots_of_leaf(name, leaf.shape)
        shape = leaf.shape[1:] if is_stacked(name) else leaf.shape
        target = widest(_target(given, slot, shape, dtype) for slot in slots)

        def chunks(slots=slots, shape=shape, target=target) -> Iterator[np.ndarray]:
            for slot in slots:
                yield weights.read(slot, slice(0, shape[0]), target)

        found[name] = OutputTensor(target, leaf.shape, chunks)
    return found


def _target(
    given: NetworkToWrite, slot: str, shape: tuple[int, ...], dtype: np.dtype | None
) -> np.dtype:
    """Return the dtype that a slot is written in."""
    stored = given.weights.dtype(slot)
    if dtype is None or (
        dtype.itemsize == 1 and (len(shape) != 2 or slot in _TABLES or given.kind is VAE)
    ):
        return stored
    return dtype


def shards(sheet: OutputFile, most: int) -> tuple[list[OutputFile], dict[str, Any] | None]:
    """Split a file so that none holds more than `most` bytes of tensors, as far as single ones allow.

    **Returns:** the files, and their index, None for a single one.
    """
    groups: list[dict[str, OutputTensor]] = [{}]
    for name, tensor in sheet.tensors.items():
        if groups[-1] and sum(other.nbytes for other in groups[-1].values()) + tensor.nbytes > most:
            groups.append({})
        groups[-1][name] = tensor
    if len(groups) == 1:
        return [sheet], None
    stem = sheet.path.removesuffix(".safetensors")
    paths = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    weight_map = {
        name: Path(path).name for path, group in zip(paths, groups, strict=True) for name in group
    }
    index = {"metadata": {"total_size": sheet.nbytes}, "weight_map": weight_map}
    return [
        OutputFile(path, group, sheet.metadata) for path, group in zip(paths, groups, strict=True)
    ], index


def write_files(
    folder: Path, files: Iterable[OutputFile], *, shard_size: int | None = None, report: Any = None
) -> None:
    """Write the files under a folder, in shards of `shard_size` bytes if that is given, with their index."""
    for sheet in files:
        parts, index = ([sheet], None) if shard_size is None else shards(sheet, shard_size)
        for part in parts:
            write_safetensors(folder / part.path, part.tensors, part.metadata, report=report)
        if index is not None:
            write_json(folder / f"{sheet.path}.index.json", index)


def write_json(path: Path, content: Any) -> None:
    """Write a new JSON file. **Raises:** `FileExistsError` if there is something at `path`."""
    with new_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def _version() -> str:
    try:
        return f"fluxjax {version('fluxjax')}"
    except PackageNotFoundError:  # used from a source tree that is not installed
        return "fluxjax"


_OTHER_FILES = (".sft", ".gguf", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".msgpack")


def check_target(call: str, destination: str | Path) -> tuple[Path, bool]:
    """Return where to write, and whether that is one file. It may lie anywhere, but has to have a name.

    **Arguments:** `call`: the function and its argument, for the message.

    **Raises:** `ValueError` for a path without a name, or an ending of files that fluxjax does not write.
    """
    target = Path(destination)
    if target.name in ("", "..") or target.name.lower() == ".safetensors":
        shown = printable(repr(str(destination)))
        raise ValueError(
            f"`{call}` needs a name for the new folder or file, got {shown}. "
            "Pass one such as model, ../model or model.safetensors."
        )
    if target.suffix.lower() in _OTHER_FILES:
        raise ValueError(
            f"`{call}` writes .safetensors files and folders, got {printable(target.name)}. "
            "End the name in .safetensors, or leave the ending out for a folder."
        )
    return target, target.suffix.lower() == ".safetensors"


def parameters(network: Any) -> int:
    """Return how many numbers a network holds."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(network))
