"""The files of a folder of encoded examples: its description, its shards, and their entries."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.json_file import read_json
from fluxjax.checkpoint.safetensors import read_header
from fluxjax.checkpoint.safetensors_writer import OutputTensor, write_safetensors
from fluxjax.checkpoint.tensors import StoredTensor
from fluxjax.generate.text import TextStates
from fluxjax.printable import printable_path
from fluxjax.train.buckets import Size

FORMAT = "fluxjax encoded examples, 1"
DESCRIPTION_FILE = "cache.json"
EMPTY_FILE = "empty.safetensors"
_MOST_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """What the examples of a folder were encoded with.

    `model`: its name. `encoders`: from `fingerprint`. `data`: from `data_digest`. `examples`,
    `shards`: how many there are. `settings`: those that the content depends on.
    """

    model: str
    encoders: str
    data: str
    examples: int
    shards: int
    settings: Mapping[str, Any]
    format: str = FORMAT

    def differences(self, other: "CacheDescription") -> list[str]:
        """Return what differs in another description, as text."""
        found = []
        for name in {**self.settings, **other.settings}:
            mine, theirs = self.settings.get(name), other.settings.get(name)
            if mine != theirs:
                found.append(f"{name} {mine}, not {theirs}")
        if self.encoders != other.encoders:
            found.append(f"other encoders (of {self.model}, not {other.model})")
        if found:  # what follows depends on the settings as well
            return found
        for name in ("format", "data", "examples", "shards"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {mine}, not {theirs}")
        return found


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """The part of the index that lies beside a shard: written when the shard is complete.

    `size`: of its images. `numbers`, `names`, `weights`, `text_rows`: of its examples: their
    numbers in the catalog, and the rows of the shard's captions. `broken`: name and reason of each
    example that could not be read. `bytes`, `sha256`: of the shard; 0 and "" if no example is left.
    """

    size: Size
    numbers: list[int]
    names: list[str]
    weights: list[float]
    text_rows: list[int]
    broken: list[list[str]]
    bytes: int = 0
    sha256: str = ""


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"{number:06d}.safetensors"


def entry_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's entry."""
    return folder / f"{number:06d}.json"


def _write_json(path: Path, record: CacheDescription | ShardEntry) -> None:
    with new_file(path, overwrite=True) as file:
        file.write(json.dumps(asdict(record), indent=1).encode() + b"\n")


def _read_record(path: Path, kind: type) -> dict[str, Any]:
    """Read the fields of a record. **Raises:** `ValueError` for a file of other ones."""
    values = read_json(path, most_bytes=_MOST_BYTES)
    names = {one.name for one in fields(kind)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(
            f"{printable_path(path)} is not a file of encoded examples. Remove it, and run "
            "`fluxjax encode` again."
        )
    return values


def write_cache_description(folder: Path, description: CacheDescription) -> None:
    """Write what a folder's examples are encoded with."""
    _write_json(folder / DESCRIPTION_FILE, description)


def read_cache_description(folder: Path) -> CacheDescription:
    """Read what a folder's examples were encoded with.

    **Raises:** `FileNotFoundError` if the folder has no encoded examples; `ValueError` for a
    damaged file.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no encoded examples in {printable_path(folder)}. Write them with `fluxjax "
            "encode`."
        )
    return CacheDescription(**_read_record(path, CacheDescription))


def read_entry(folder: Path, number: int) -> ShardEntry | None:
    """Return the entry of a shard whose file is there with its size; None if it is unfinished.

    **Raises:** `ValueError` for a damaged entry.
    """
    path = entry_path(folder, number)
    if not path.is_file():
        return None
    values = _read_record(path, ShardEntry)
    values["size"] = tuple(values["size"])
    entry = ShardEntry(**values)
    shard = shard_path(folder, number)
    if entry.bytes and not (shard.is_file() and shard.stat().st_size == entry.bytes):
        return None
    return entry


def is_undamaged_shard(folder: Path, number: int, entry: ShardEntry) -> bool:
    """Return whether a shard has the content that its entry says; all of it is read."""
    return not entry.bytes or _sha256(shard_path(folder, number)) == entry.sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(
    folder: Path, number: int, tensors: Mapping[str, np.ndarray], entry: ShardEntry
) -> ShardEntry:
    """Write a shard, and then its entry. Both appear complete or not at all.

    **Arguments:** `tensors`: by name; empty if no example is left. `entry`: without the checksum.
    **Returns:** the entry with it.
    """
    if tensors:
        path = shard_path(folder, number)
        outputs = {name: OutputTensor.from_array(array) for name, array in tensors.items()}
        write_safetensors(path, outputs, overwrite=True)
        values = {**vars(entry), "bytes": path.stat().st_size, "sha256": _sha256(path)}
        entry = ShardEntry(**values)
    _write_json(entry_path(folder, number), entry)
    return entry


def write_empty_text(folder: Path, text: TextStates) -> None:
    """Write the states of the empty caption."""
    outputs = {}
    for name, array in text_tensors(text).items():
        outputs[name] = OutputTensor.from_array(array)
    write_safetensors(folder / EMPTY_FILE, outputs, overwrite=True)


def read_empty_text(folder: Path) -> TextStates:
    """Read the states of the empty caption.

    **Raises:** `WeightsError` or `FileNotFoundError` for a damaged or missing file.
    """
    tensors = read_header(folder / EMPTY_FILE).tensors
    return text_states({name: tensor.view() for name, tensor in tensors.items()})


def text_tensors(text: TextStates) -> dict[str, np.ndarray]:
    """Return text states as tensors by name."""
    arrays = {"txt": text.txt, "vec": text.vec, "txt_length": text.txt_length}
    return {name: np.asarray(array) for name, array in arrays.items() if array is not None}


def text_states(tensors: Mapping[str, np.ndarray]) -> TextStates:
    """Invert `text_tensors`."""
    arrays = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    return TextStates(arrays["txt"], arrays.get("vec"), arrays.get("txt_length"))


class ShardReader:
    """Reads rows of a shard's tensors. Threads may read at once.

    **Raises:** `WeightsError` for a damaged file.
    """

    def __init__(self, path: Path):
        self._tensors: dict[str, StoredTensor] = {}
        for name, tensor in read_header(path).tensors.items():
            if not isinstance(tensor, StoredTensor):
                raise WeightsError(f"{printable_path(path)} is quantized. Encode the data again.")
            self._tensors[name] = tensor

    def row(self, names: Sequence[str], numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """Return a row of some tensors, or of their rows, of those that the shard has.

        **Arguments:** `numbers`: along the first axes.
        """
        rows = {}
        for name in names:
            if name in self._tensors:
                rows[name] = _read_row(self._tensors[name], numbers)
        return rows


def _read_row(tensor: StoredTensor, numbers: Sequence[int]) -> np.ndarray:
    """Read one element. **Arguments:** `numbers`: its index along each of the first axes."""
    for number in numbers:
        tensor = tensor.rows(number, number + 1).split()[0]
    out = np.empty(tensor.shape, tensor.dtype)
    # Not mapped into memory: a process may have only so many maps, and there are many shards.
    tensor.read_into(out.reshape(-1))
    return out
