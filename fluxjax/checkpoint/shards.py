"""The index of a checkpoint that is split over several safetensors files."""

from pathlib import Path

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.json_file import read_json
from fluxjax.printable import printable_path, quote_name

_MOST_INDEX_BYTES = 20_000_000


def read_index(index: Path) -> list[Path]:
    """Return the files that an index names, each once, in the order of their names.

    **Arguments:** `index`: a file `*.safetensors.index.json`.
    **Raises:** `WeightsError` if the index is damaged or names no file, and if a file is missing or
    lies outside the index's folder.
    """
    where = printable_path(index)
    names = _shard_names(index)
    for name in names:
        if Path(name).name != name or name == "..":
            raise WeightsError(
                f"{where} names a path outside its folder, {quote_name(name)}. Download the folder "
                "again."
            )
    files = [index.parent / name for name in names]
    for file in files:
        if not file.is_file():
            raise WeightsError(
                f"{where} names {printable_path(file)}, which is missing. Download the folder "
                "again."
            )
    return files


def _shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index distributes tensors over, sorted.

    **Raises:** `WeightsError` for a file that is no such index.
    """
    content = read_json(index, most_bytes=_MOST_INDEX_BYTES)
    names: set[str] = set()
    if isinstance(content, dict):
        table = content.get("weight_map")
        if isinstance(table, dict) and all(isinstance(name, str) for name in table.values()):
            names = set(table.values())
    if not names:
        raise WeightsError(
            f"{printable_path(index)} is not an index of shards: it has no weight_map from tensors "
            "to files. Download it again."
        )
    return sorted(names)
