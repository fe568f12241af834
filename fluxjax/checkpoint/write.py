"""A checkpoint onto the disk: one file, or a folder of files, configs and shards."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxjax.checkpoint.atomic import new_file, new_folder
from fluxjax.checkpoint.config_fields import JsonObject
from fluxjax.checkpoint.disk import explain_full_disk
from fluxjax.checkpoint.gguf_layout import WrittenAs, gguf_file
from fluxjax.checkpoint.gguf_writer import write_gguf
from fluxjax.checkpoint.layouts import NetworkToWrite, OutputFile, output_files
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.printable import printable

Progress = Callable[[int, int], object]
"""Is called after each piece that is written, with the bytes written so far and their total."""
_FILE_ENDINGS = (".safetensors", ".gguf")
_OTHER_ENDINGS = (".sft", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".msgpack")


@dataclass(frozen=True)
class Target:
    """Where a checkpoint is written to: a new folder, or one new .safetensors file.

    `path`: of the folder or the file, whose ending tells which it is.
    """

    path: Path

    @property
    def is_file(self) -> bool:
        """Whether the checkpoint is one file."""
        return self.path.suffix.lower() in _FILE_ENDINGS


def check_target(call: str, destination: str | Path, layout: str = "own") -> Target:
    """Return where to write. It may be anywhere on the disk, but must have a name.

    **Arguments:** `call`: the function and its argument, for the message. `layout`: to write.
    **Raises:** `ValueError` for a path without a name, or with the ending of a format that fluxjax
    does not write, or of another than the layout's.
    """
    path = Path(destination)
    # "a/.." and "" have no name of their own, to which a temporary folder could be renamed.
    if path.name in ("", "..") or path.name.lower() in _FILE_ENDINGS:
        shown = printable(repr(str(destination)))
        raise ValueError(
            f"`{call}` needs a name for the new folder or file, got {shown}. "
            "Pass one such as model, ../model or model.safetensors."
        )
    if path.suffix.lower() in _OTHER_ENDINGS:
        raise ValueError(
            f"`{call}` writes .safetensors files and folders, got {printable(path.name)}. "
            "End the name in .safetensors, or leave the ending out for a folder."
        )
    is_gguf = path.suffix.lower() == ".gguf"
    if layout == "gguf" and not is_gguf:
        raise ValueError(
            f"`{call}` writes the layout gguf to one file, got {printable(path.name)}. End the "
            "name in .gguf."
        )
    if is_gguf and layout != "gguf":
        raise ValueError(
            f"`{call}` writes .safetensors files and folders in the layout {layout}, got "
            f"{printable(path.name)}. End the name in .safetensors, or choose the layout gguf."
        )
    return Target(path)


def write_networks(
    target: Target,
    networks: Sequence[NetworkToWrite],
    layout: str,
    *,
    dtype: WrittenAs = None,
    shard_size: int | None = None,
    progress: Progress | None = None,
    write_rest: Callable[[Path], None] | None = None,
) -> None:
    """Write networks in a layout; nothing is at the target until all of it is written.

    **Arguments:** `dtype`: as for `output_files`. `shard_size`: the most bytes of a file of a
    folder. `write_rest`: writes into the folder what belongs beside the networks.
    **Raises:** `WeightsError` for a full disk, or networks that the layout can't hold;
    `FileExistsError` if there is something at the target, also if it has appeared meanwhile.
    """
    path = target.path
    if layout == "gguf":
        tensors, metadata = gguf_file(networks, dtype)
        report = _counter(sum(one.content.nbytes for one in tensors.values()), progress)
        write_gguf(path, tensors, metadata, report=report)
        return
    if isinstance(dtype, str):
        raise ValueError(f"{dtype} is for the layout gguf, and not for {layout}.")
    if target.is_file:
        files = output_files(networks, layout, dtype=dtype, name=path.name)
        _write_all(path.parent, files, None, progress)
        return
    files = output_files(networks, layout, dtype=dtype)
    total = sum(file.nbytes for file in files)
    # The folder has a temporary name until all of it is written, as a single file has.
    with explain_full_disk(path, total), new_folder(path) as temporary:
        _write_all(temporary, files, shard_size, progress)
        if layout == "diffusers":
            for network in networks:
                config = network.kind.to_json(network.config)
                write_json(temporary / network.folder / "config.json", config)
        if write_rest is not None:
            write_rest(temporary)


def _write_all(
    folder: Path, files: Sequence[OutputFile], shard_size: int | None, progress: Progress | None
) -> None:
    """Write files under a folder, and report the sum of the bytes written."""
    report = _counter(sum(file.nbytes for file in files), progress)
    write_files(folder, files, shard_size=shard_size, report=report)


def _counter(total: int, progress: Progress | None) -> "_ByteCounter | None":
    return None if progress is None else _ByteCounter(total, progress)


class _ByteCounter:
    """Adds up the bytes of the pieces that are written, and reports the sum with the total."""

    def __init__(self, total: int, progress: Progress):
        self.written = 0
        self.total = total
        self.progress = progress

    def __call__(self, count: int) -> None:
        self.written += count
        self.progress(self.written, self.total)


def write_files(
    folder: Path,
    files: Iterable[OutputFile],
    *,
    shard_size: int | None = None,
    report: Callable[[int], object] | None = None,
) -> None:
    """Write files under a folder.

    **Arguments:** `shard_size`: the most bytes of a file, which is else split into shards with an
    index; None for no limit. `report`: is called with the bytes of each piece that is written.
    """
    for file in files:
        shards = [file]
        if shard_size is not None:
            shards = split_into_shards(file, shard_size)
        for shard in shards:
            write_safetensors(folder / shard.path, shard.tensors, shard.metadata, report=report)
        if len(shards) > 1:
            write_json(folder / f"{file.path}.index.json", _shard_index(file, shards))


def split_into_shards(file: OutputFile, most: int) -> list[OutputFile]:
    """Split a file so that none holds more than `most` bytes, unless one tensor alone does."""
    group: dict[str, OutputTensor] = {}
    groups = [group]
    size = 0
    for key, tensor in file.tensors.items():
        if group and size + tensor.nbytes > most:
            group = {}
            groups.append(group)
            size = 0
        group[key] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return [file]
    stem = file.path.removesuffix(".safetensors")
    shards = []
    # Named and numbered as diffusers and transformers do.
    for number, group in enumerate(groups, start=1):
        path = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(OutputFile(path, group, file.metadata))
    return shards


def _shard_index(file: OutputFile, shards: Sequence[OutputFile]) -> JsonObject:
    """Return the index of a file's shards, as transformers and diffusers write it."""
    weight_map: dict[str, str] = {}
    for shard in shards:
        for key in shard.tensors:
            weight_map[key] = Path(shard.path).name
    return {"metadata": {"total_size": file.nbytes}, "weight_map": weight_map}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a new JSON file. **Raises:** `FileExistsError` if there is something at `path`."""
    with new_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
