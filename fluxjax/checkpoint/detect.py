"""What networks a file or a folder holds; only the headers of its files are read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxjax.checkpoint.config_fields import JsonObject
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.gguf import read_gguf
from fluxjax.checkpoint.gguf_header import GGUF_MAGIC
from fluxjax.checkpoint.identify import AnyFoundNetwork, FoundNetwork, identify_networks
from fluxjax.checkpoint.json_file import read_json
from fluxjax.checkpoint.kinds import KINDS, Kind
from fluxjax.checkpoint.own_configs import Config
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.shards import read_index
from fluxjax.checkpoint.tensors import TensorFile, check_regular_file
from fluxjax.checkpoint.unknown import describe_unknown_file
from fluxjax.printable import printable, printable_path
from fluxjax.zoo import FAMILIES


@dataclass(frozen=True)
class Source:
    """What a file or a folder holds.

    `networks`: by the names of their kinds. `unknown_files`: files without any network of FLUX.1,
    and what they are. `unknown_tensors`: keys in the networks' files that belong to no network.
    """

    path: Path
    networks: Mapping[str, AnyFoundNetwork]
    unknown_files: Mapping[Path, str]
    unknown_tensors: Sequence[str] = ()

    def network(self, kind: Kind[Config]) -> FoundNetwork[Config]:
        """Return the weights of one network.

        **Raises:** `WeightsError` that says what there is instead.
        """
        if kind.name in self.networks:
            return self.networks[kind.name]
        if self.unknown_files and not self.networks:
            raise WeightsError(next(iter(self.unknown_files.values())))
        titles = [f"a {network.kind.title}" for network in self.networks.values()]
        others = ", ".join(titles)
        raise WeightsError(
            f"{printable_path(self.path)} holds no {kind.title}, but {others or 'no weights'}. "
            f"Pass the {kind.title}'s own file or folder."
        )


@dataclass(frozen=True)
class FileGroup:
    """Files that hold one set of tensors, such as shards, and the config.json beside them.

    `settings`: what the config.json holds; None if there is none.
    """

    paths: Sequence[Path]
    settings: JsonObject | None = None


def open_source(path: Path) -> Source:
    """Find the networks in a file or a folder of any known layout; weights are not read.

    In a folder, the networks' own folders (`transformer`, …) come first, then the files in it.

    **Raises:** `WeightsError` for a damaged file, or two of one network; `FileNotFoundError` if
    there is nothing at the path.
    """
    if path.is_file():
        paths = read_index(path) if path.name.endswith(".index.json") else [path]
        return _collect(path, [FileGroup(paths)])
    if not path.is_dir():
        if path.exists():  # a pipe or a device, of which the error says so
            check_regular_file(path)
        raise FileNotFoundError(
            f"There is no {path}. Pass a .safetensors or .gguf file, or a model's folder."
        )
    groups: list[FileGroup] = []
    # Both vision encoders have the same folder.
    for folder in dict.fromkeys(kind.folder for kind in KINDS.values()):
        if (path / folder).is_dir():
            groups += _file_groups(path / folder)
    source = _collect(path, groups)
    if any(family.networks.keys() <= source.networks.keys() for family in FAMILIES):
        return source
    # Files in the folder itself, such as BFL's or ComfyUI's, add what is missing.
    beside = _collect(path, _file_groups(path))
    return Source(
        path,
        # A network in its own folder is preferred to the same one beside.
        {**beside.networks, **source.networks},
        {**source.unknown_files, **beside.unknown_files},
        [*source.unknown_tensors, *beside.unknown_tensors],
    )


def _file_groups(folder: Path) -> list[FileGroup]:
    """Return the weight files of a folder: those of each index together, the others one by one."""
    settings = _read_settings(folder / "config.json")
    groups: list[FileGroup] = []
    sharded: set[Path] = set()
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_index(index)
        sharded.update(shards)
        groups.append(FileGroup(shards, settings))
    for file in _files_ending_in(folder, ("*.safetensors", "*.gguf", "*.sft")):
        if file not in sharded:
            groups.append(FileGroup([file], settings))
    # A config.json is of one network, so with several it would not be known whose it is.
    if settings is not None and len(groups) > 1:
        names = printable(", ".join(group.paths[0].name for group in groups))
        raise WeightsError(
            f"{printable_path(folder)} should hold one network, or its shards and their index; it "
            f"holds {names}. Remove one."
        )
    if not groups:
        pickles = _files_ending_in(folder, ("*.bin", "*.ckpt", "*.pt"))
        if pickles:
            read_header(pickles[0])  # raises an error that says how to convert a pickle
    return groups


def _files_ending_in(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of a folder that fit one of the patterns, sorted by name."""
    files: list[Path] = []
    for pattern in patterns:
        files += folder.glob(pattern)
    return sorted(files)


def _read_settings(path: Path) -> JsonObject | None:
    """Return a config.json; None if there is none."""
    if not path.exists():
        return None
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise WeightsError(f"{printable_path(path)} is not a config. Download it again.")
    return settings


def _collect(path: Path, groups: Iterable[FileGroup]) -> Source:
    """Return what groups of files hold together.

    **Arguments:** `path`: the folder or the file that was passed, for messages.
    **Raises:** `WeightsError` for two of one network.
    """
    networks: dict[str, AnyFoundNetwork] = {}
    unknown_files: dict[Path, str] = {}
    unknown_tensors: list[str] = []
    for group in groups:
        files = [read_file(file) for file in group.paths]
        found, unknown = identify_networks(files, group.settings)
        for network in found:
            other = networks.setdefault(network.kind.name, network)
            if other is not network:
                one, two = printable(other.files[0].name), printable(network.files[0].name)
                raise WeightsError(
                    f"{printable_path(path)} holds two {network.kind.title}s, in {one} and {two}. "
                    "Pass one of the files."
                )
        # What is beside networks in a file is reported tensor by tensor, any other file as one.
        if found:
            unknown_tensors += unknown
        else:
            unknown_files[group.paths[0]] = describe_unknown_file(group.paths[0], files)
    return Source(path, networks, unknown_files, unknown_tensors)


def read_file(path: Path) -> TensorFile:
    """Return the header of a safetensors or GGUF file.

    **Raises:** `WeightsError` for any other file, or a damaged one.
    """
    check_regular_file(path)
    # By the content, since downloads are often renamed.
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == GGUF_MAGIC:
        return read_gguf(path)
    return read_header(path)
