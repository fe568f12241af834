"""Weights from any layout to any other, and what a file or a folder holds."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from jax.typing import DTypeLike

from fluxjax.checkpoint.atomic import check_free, new_folder
from fluxjax.checkpoint.defaults import DEFAULTS_FILE, load_defaults, write_pipeline
from fluxjax.checkpoint.detect import FoundNetwork, Source, open_source
from fluxjax.checkpoint.inspect import _listed
from fluxjax.checkpoint.kinds import KINDS
from fluxjax.checkpoint.load import check_written_dtype
from fluxjax.checkpoint.locate import WHOLE, find
from fluxjax.checkpoint.plan import Weights
from fluxjax.checkpoint.safetensors import WeightsError, disk_errors
from fluxjax.checkpoint.write import (
    LAYOUTS,
    NetworkToWrite,
    check_target,
    output_files,
    write_files,
    write_json,
)
from fluxjax.zoo import Defaults

TOKENIZERS = ("tokenizer", "tokenizer_2")


class WeightsTransform(Protocol):
    """A change of weights while they are converted, such as merging adapters."""

    @property
    def networks(self) -> frozenset[str]:
        """The names of the networks that it changes."""

    def __call__(self, network: str, weights: Weights) -> Weights:
        """Return the changed weights of one network."""

    def metadata(self, network: str) -> Mapping[str, Any]:
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
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write a checkpoint in another layout, tensor by tensor; nothing is at the destination until all of it is.

    **Arguments:** `source`: a zoo name, a file or a folder of any layout, or a hub id. `destination`: a new folder, or a new
    file that ends in .safetensors; it may lie anywhere. `to`: "own" (leaves stacked as in memory), "diffusers" (a folder),
    "bfl" or "comfy".
    `dtype`: of the weights; None keeps them bit by bit, and decodes scaled fp8 and GGUF's blocks to bfloat16; float8 is for
    the matrices of the transformer's and the encoders' linear layers. `only`: one or some of "flux", "t5", "clip", "vae".
    `shard_size`: the most bytes of a file, for a folder of the own or the diffusers layout. `transform`: changes
    the weights on the way, such as `merge_while_converting(loras)`. `progress`: called with the bytes written so far and their
    total, after each piece.
    **Returns:** the destination.
    **Raises:** `WeightsError` for weights that are not whole or that the layout can't hold, a full disk, or tensors of none of
    the networks; `FileExistsError` if there is something at the destination, also if it has appeared meanwhile; `ValueError`
    for a destination that has no name, and for a dtype that is not written.
    """
    target, single = check_target("convert_weights(destination)", destination)
    only = [only] if isinstance(only, str) else only
    if to not in LAYOUTS:
        raise ValueError(f"There is no layout {to!r}. Choose one of {', '.join(LAYOUTS)}.")
    if shard_size is not None and (single or to not in ("own", "diffusers") or shard_size < 1):
        raise ValueError(
            "Shards need a folder of the own or the diffusers layout as destination, and a size of 1 byte or more."
        )
    check_free(target)
    stored = check_written_dtype("convert_weights", dtype)
    folder = find(
        source, WHOLE if only is None else [KINDS[name].folder for name in KINDS if name in only]
    )
    parts = _chosen(open_source(folder), only)
    _check_transform(transform, parts)
    given = [_given(part, transform) for part in parts]
    files = output_files(given, to, dtype=stored, name=target.name if single else None)
    # Read before hours of writing, since it may be damaged.
    defaults = (
        None
        if single or to not in ("own", "diffusers") or not _holds_flux(given)
        else load_defaults(source)
    )
    total = sum(sheet.nbytes for sheet in files)
    report = None if progress is None else _ByteCounter(total, progress)
    if single:
        write_files(target.parent, files, report=report)
        return target
    with disk_errors(target, total), new_folder(target) as temporary:
        write_files(temporary, files, shard_size=shard_size, report=report)
        _write_rest(folder, temporary, given, to, defaults)
    return target


def _holds_flux(given: Sequence[NetworkToWrite]) -> bool:
    return any(one.kind.name == "flux" for one in given)


def _chosen(source: Source, only: Iterable[str] | None) -> list[FoundNetwork]:
    """Return the parts to convert. **Raises:** `WeightsError` if one is missing, or the source holds more than is converted."""
    if only is not None:
        unknown = sorted(set(only) - KINDS.keys())
        if unknown:
            raise ValueError(
                f"There is no network {unknown[0]!r}. Choose some of {', '.join(KINDS)}."
            )
        return [source.part(KINDS[name]) for name in KINDS if name in set(only)]
    for problem in source.strangers.values():
        raise WeightsError(f"{problem} To convert the rest, choose it with `only`.")
    if source.left:
        raise WeightsError(
            f"{source.path} holds {len(source.left)} tensors of no known network ({_listed(source.left[:3])} …). "
            "To convert the rest, choose it with `only`."
        )
    if not source.parts:
        raise WeightsError(
            f"{source.path} holds no weights. Pass a .safetensors or .gguf file, or a model's folder."
        )
    return list(source.parts.values())


class _ByteCounter:
    """Adds up the bytes of the pieces written, and reports the sum with the total."""

    def __init__(self, total: int, progress: Callable[[int, int], object]):
        self.written, self.total, self.progress = 0, total, progress

    def __call__(self, count: int) -> None:
        self.written += count
        self.progress(self.written, self.total)


def _given(part: FoundNetwork, transform: WeightsTransform | None) -> NetworkToWrite:
    origin: dict[str, Any] = {
        "files": [file.name for file in part.files],
        "names": part.dialect.name,
    }
    name, weights = part.kind.name, part.plan()
    if transform is None or name not in transform.networks:
        return NetworkToWrite(part.kind, part.config, weights, origin)
    changed = transform(name, weights)
    config = changed.network.config  # type: ignore[attr-defined]
    return NetworkToWrite(part.kind, config, changed, origin | dict(transform.metadata(name)))


def _check_transform(transform: WeightsTransform | None, parts: Sequence[FoundNetwork]) -> None:
    """**Raises:** `WeightsError` for a transform of a network that is not converted."""
    if transform is None:
        return
    left = sorted(transform.networks - {part.kind.name for part in parts})
    if left:
        raise WeightsError(
            f"`convert_weights(transform)` changes {', '.join(left)} too, which is not converted. "
            "Convert it as well, or leave out the adapters that change it."
        )


def _write_rest(
    folder: Path,
    target: Path,
    given: Sequence[NetworkToWrite],
    layout: str,
    defaults: Defaults | None,
) -> None:
    """Write what a folder holds beside the weights: configs, tokenizers, and how the model is sampled."""
    kinds = {one.kind.name for one in given}
    if layout == "diffusers":
        for one in given:
            write_json(target / one.kind.folder / "config.json", one.kind.to_json(one.config))
    if layout in ("own", "diffusers"):
        found = [name for name in TOKENIZERS if kinds & {"clip", "t5"} and (folder / name).is_dir()]
        for name in found:
            _copy_files(folder / name, target / name)
        if defaults is not None:
            if layout == "diffusers" and len(kinds) == len(KINDS) and len(found) == len(TOKENIZERS):
                write_pipeline(target, defaults)
            else:
                write_json(target / DEFAULTS_FILE, asdict(defaults))


def _copy_files(folder: Path, target: Path) -> None:
    """Copy the files of a folder, without what lies deeper; a pipe would wait for its writer, a folder may hold itself."""
    target.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)
