"""Weights from any layout to any other, and what a file or a folder holds."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from fluxjax.atomic import check_free, new_folder
from fluxjax.convert.files import WeightsError, disk_errors
from fluxjax.convert.layouts import LAYOUTS, Given, parameters, sheets, write_json, write_sheets
from fluxjax.convert.load import Problems, Weights, written_dtype
from fluxjax.convert.source import FLUX, KINDS, Part, Source, open_source, variant
from fluxjax.lora.merge import Merged, changes_of, notes_of
from fluxjax.lora.read import Lora
from fluxjax.lora.scales import Scale, check_scales
from fluxjax.printable import printable
from fluxjax.zoo import DEFAULTS_FILE, WHOLE, Defaults, find, load_defaults, write_pipeline

TOKENIZERS = ("tokenizer", "tokenizer_2")


def convert_weights(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "own",
    dtype: DTypeLike | None = None,
    only: str | Sequence[str] | None = None,
    shard_size: int | None = None,
    loras: Sequence[tuple[Lora, Scale]] = (),
    start: Callable[[int], Any] | None = None,
    report: Callable[[int], Any] | None = None,
) -> Path:
    """Write a checkpoint in another layout, tensor by tensor; nothing is at the destination until all of it is.

    **Arguments:** `source`: a zoo name, a file or a folder of any layout, or a hub id. `destination`: a new folder, or a new
    file that ends in .safetensors; it may lie anywhere. `to`: "own" (leaves stacked as in memory), "diffusers" (a folder),
    "bfl" or "comfy".
    `dtype`: of the weights; None keeps them bit by bit, and decodes scaled fp8 and GGUF's blocks to bfloat16; float8 is for
    the matrices of the transformer's and the encoders' linear layers. `only`: one or some of "flux", "t5", "clip", "vae".
    `shard_size`: the most bytes of a file, for a folder of the own or the diffusers layout. `loras`: adapters to
    merge on the way, and their scales. `start`, `report`: hear of the bytes to be written, and of each piece's.
    **Returns:** the destination.
    **Raises:** `WeightsError` for weights that are not whole or that the layout can't hold, a full disk, or tensors of none of
    the networks; `FileExistsError` if there is something at the destination, also if it has appeared meanwhile; `ValueError`
    for a destination that has no name, or a dtype that no weights are written in.
    """
    target, single = destination_of("convert_weights(destination)", destination)
    only = [only] if isinstance(only, str) else only
    if to not in LAYOUTS:
        raise ValueError(f"There is no layout {to!r}. Choose one of {', '.join(LAYOUTS)}.")
    if shard_size is not None and (single or to not in ("own", "diffusers") or shard_size < 1):
        raise ValueError(
            "Shards need a folder of the own or the diffusers layout as destination, and a size of 1 byte or more."
        )
    dtype = written_dtype("convert_weights", dtype, float64=True)
    check_free(target)
    folder = find(source, WHOLE if only is None else [KINDS[name].folder for name in KINDS if name in only])
    parts = _chosen(open_source(folder), only)
    given = [_given(part, loras) for part in parts]
    _check_used(loras, parts)
    files = sheets(given, to, dtype=dtype, name=target.name if single else None)
    # Read before hours of writing, since it may be damaged.
    defaults = None if single or to not in ("own", "diffusers") or not _holds_flux(given) else load_defaults(source)
    total = sum(sheet.nbytes for sheet in files)
    if start is not None:
        start(total)
    if single:
        write_sheets(target.parent, files, report=report)
        return target
    with disk_errors(target, total), new_folder(target) as temporary:
        write_sheets(temporary, files, shard_size=shard_size, report=report)
        _write_rest(folder, temporary, given, to, defaults)
    return target


_OTHER_FILES = (".sft", ".gguf", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".msgpack")


def destination_of(call: str, destination: str | Path) -> tuple[Path, bool]:
    """Return where to write, and whether that is one file. It may lie anywhere, but has to have a name.

    **Arguments:** `call`: the function and its argument, for the message.
    **Raises:** `ValueError` for a path without a name, or an ending of files that fluxjax does not write.
    """
    target = Path(destination)
    if target.name in ("", "..") or target.name.lower() == ".safetensors":
        raise ValueError(
            f"`{call}` needs a name for the new folder or file, got {printable(repr(str(destination)))}. "
            "Pass one such as model, ../model or model.safetensors."
        )
    if target.suffix.lower() in _OTHER_FILES:
        raise ValueError(
            f"`{call}` writes .safetensors files and folders, got {printable(target.name)}. "
            "End the name in .safetensors, or leave the ending out for a folder."
        )
    return target, target.suffix.lower() == ".safetensors"


def _holds_flux(given: Sequence[Given]) -> bool:
    return any(one.kind.name == "flux" for one in given)


def _chosen(source: Source, only: Iterable[str] | None) -> list[Part]:
    """Return the parts to convert. **Raises:** `WeightsError` if one is missing, or the source holds more than is converted."""
    if only is not None:
        unknown = sorted(set(only) - KINDS.keys())
        if unknown:
            raise ValueError(f"There is no network {unknown[0]!r}. Choose some of {', '.join(KINDS)}.")
        return [source.part(KINDS[name]) for name in KINDS if name in set(only)]
    for problem in source.strangers.values():
        raise WeightsError(f"{problem} To convert the rest, choose it with `only`.")
    if source.left:
        raise WeightsError(
            f"{source.path} holds {len(source.left)} tensors of no known network ({_listed(source.left[:3])} …). "
            "To convert the rest, choose it with `only`."
        )
    if not source.parts:
        raise WeightsError(f"{source.path} holds no weights. Pass a .safetensors or .gguf file, or a model's folder.")
    return list(source.parts.values())


def adapter_notes(source: str | Path, loras: Sequence[Lora]) -> list[str]:
    """Return one line for each thing in adapters that has no effect on a checkpoint's transformer, from its headers."""
    part = open_source(find(source, [FLUX.folder])).parts.get(FLUX.name)
    if part is None:
        return []
    network = part.plan().network
    return [note for lora in loras if FLUX.name in lora.changes for note in notes_of(network, lora)]


def _given(part: Part, loras: Sequence[tuple[Lora, Scale]]) -> Given:
    origin: dict[str, Any] = {"files": [file.name for file in part.files], "names": part.dialect.name}
    weights: Weights = part.plan()
    mine = [(lora, scale) for lora, scale in loras if part.kind.name in lora.changes]
    if not mine:
        return Given(part.kind, part.config, weights, origin)
    scales = check_scales("convert_weights(loras)", len(mine), [scale for _, scale in mine])
    merged = Merged(weights, changes_of(weights.network, [lora for lora, _ in mine], scales))
    config = merged.network.config  # type: ignore[attr-defined]
    return Given(part.kind, config, merged, origin | {"adapters": len(mine)})


def _check_used(loras: Sequence[tuple[Lora, Scale]], parts: Sequence[Part]) -> None:
    """**Raises:** `WeightsError` for an adapter of a network that is not converted."""
    left = {network for lora, _ in loras for network in lora.changes} - {part.kind.name for part in parts}
    if left:
        raise WeightsError(f"An adapter changes {', '.join(sorted(left))} too, which is not converted. Convert it as well.")


def _write_rest(folder: Path, target: Path, given: Sequence[Given], layout: str, defaults: Defaults | None) -> None:
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


@dataclass(frozen=True)
class Summary:
    """What a file or folder holds of one network.

    `names`: whose key names it has. `variant`: which of FLUX.1's transformers. `parameters`: None if its config is not known.
    `nbytes`: in the files. `storage`: bytes by how they are stored. `loads_as`: the dtype of most weights when loaded.
    `problems`: keys that are missing, unexpected, misshapen or repeated. `error`: why its config is not known.
    """

    kind: str
    title: str
    names: str
    variant: str | None
    files: tuple[str, ...]
    parameters: int | None
    nbytes: int
    storage: dict[str, int]
    loads_as: str
    problems: Problems
    error: str | None

    @property
    def whole(self) -> bool:
        return self.error is None and not any(self.problems.values())

    def __str__(self) -> str:
        size = "unknown size" if self.parameters is None else f"{self.parameters:,} parameters"
        stored = ", ".join(
            f"{name} {nbytes / 1e6:,.1f} MB" for name, nbytes in sorted(self.storage.items(), key=lambda i: -i[1])
        )
        what = self.title + ("" if self.variant is None else f" ({self.variant})")
        lines = [
            f"{self.kind}: {what}, {size}, {self.nbytes / 1e6:,.1f} MB",
            f"  in {_listed(self.files)}; {self.names} names; stored as {stored}",
        ]
        for problem, keys in self.problems.items():
            if keys:
                lines.append(f"  {len(keys)} {problem}: {_listed(keys)}")
        verdict = f"  whole: loads with load_{self.kind} as {self.loads_as}" if self.whole else "  does not load"
        return "\n".join([*lines, verdict if self.error is None else f"  does not load: {self.error}"])


@dataclass(frozen=True)
class Report:
    """What a file or folder holds. `strangers`: files that hold no network of FLUX, and why; `left`: tensors of none."""

    networks: tuple[Summary, ...]
    strangers: dict[str, str]
    left: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether there is a network, and all that there is loads."""
        return bool(self.networks) and all(network.whole for network in self.networks)

    def __str__(self) -> str:
        lines = [str(network) for network in self.networks] + list(self.strangers.values())
        if self.left:
            lines.append(f"{len(self.left)} tensors of no known network: {_listed(self.left)}")
        return "\n".join(lines or ["no weights"])


def _listed(names: Sequence[str]) -> str:
    """Return the first names of a list on one line, with what could fake another line escaped."""
    return ", ".join(printable(name) for name in names[:8]) + (" …" if len(names) > 8 else "")


def inspect_weights(source: str | Path) -> Report:
    """Tell what a file or folder holds, from its headers alone: kind, variant, size, dtypes, what is missing or extra.

    **Arguments:** `source`: as for `convert_weights`, but a name's files have to be in the hub's cache.
    **Raises:** `WeightsError` for a file that can't be read, `FileNotFoundError` for no such source.
    """
    found = open_source(find(source, WHOLE, cached=True))
    networks = tuple(_summary(part) for part in found.parts.values())
    return Report(networks, {path.name: problem for path, problem in found.strangers.items()}, tuple(found.left))


def _summary(part: Part) -> Summary:
    problems: Problems = {}
    count = kind = error = None
    try:
        plan, problems = part.check()
        count, kind = parameters(plan.network), variant(part.config)
    except WeightsError as problem:
        error = str(problem)
    storage: dict[str, int] = {}
    loaded: dict[str, int] = {}
    for tensor in part.tensors.values():
        storage[tensor.storage] = storage.get(tensor.storage, 0) + tensor.nbytes
        loaded[str(tensor.dtype)] = loaded.get(str(tensor.dtype), 0) + tensor.size
    return Summary(
        kind=part.kind.name,
        title=part.kind.title,
        names=part.dialect.name,
        variant=kind,
        files=tuple(file.name for file in part.files),
        parameters=count,
        nbytes=sum(tensor.nbytes for tensor in part.tensors.values()),
        storage=storage,
        loads_as=max(loaded, key=loaded.__getitem__, default="nothing"),
        problems=problems,
        error=error,
    )
