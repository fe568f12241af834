"""Safetensors files: headers checked, tensors read one at a time into their place, files written whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000


class WeightsError(ValueError):
    """Weights that can't be read, or do not fit the network. The message says what to do."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its file, dtype, shape, and first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Read it into memory of its own."""
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out

    def read_into(self, out: np.ndarray) -> None:
        """Read it into a contiguous array of its shape and dtype."""
        view = out.reshape(-1).view(np.uint8).data
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise WeightsError(f"{self.file} ends inside a tensor: it shrank while it was read. Download it anew.")
                done += count


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, having checked that the file holds all of them.

    **Raises:** `WeightsError` for a pickle, another kind of file, a truncated or a damaged one.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise WeightsError(
                f"{path} is a pickle (a torch checkpoint), which can run any code when it is read. "
                "Use the model's .safetensors file, or convert it with safetensors.torch.save_file where you trust it."
            )
        if len(start) < 8 or not 2 <= length <= _MOST_HEADER:
            raise WeightsError(f"{path} is not a safetensors file. Pass a .safetensors file or a diffusers folder.")
        if length > size - 8:
            raise WeightsError(f"{path} is truncated within its header ({size:,} bytes). Download it anew.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise WeightsError(f"{path} is not a safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} is not a safetensors file: its header is not a table of tensors.")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _entry(path: Path, name: str, entry: Mapping, start: int, size: int) -> Tensor:
    try:
        code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: the header's entry for {name} is damaged. Download the file anew.") from error
    if code not in DTYPES:
        raise WeightsError(f"{path}: {name} has dtype {code}, which fluxjax does not read. Known: {', '.join(DTYPES)}.")
    tensor = Tensor(path, np.dtype(DTYPES[code]), shape, start + first)
    if not whole or tensor.nbytes != last - first:
        raise WeightsError(f"{path}: {name} of shape {shape} does not fit its offsets. Download the file anew.")
    if start + last > size:
        raise WeightsError(f"{path} is truncated: {name} ends at byte {start + last:,} of {size:,}. Download it anew.")
    return tensor


def read_headers(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors of several files as one; **Raises:** `WeightsError` if a name comes twice."""
    merged: dict[str, Tensor] = {}
    for path in paths:
        tensors = read_header(path)
        twice = sorted(merged.keys() & tensors.keys())
        if twice:
            raise WeightsError(f"{path} holds {twice[0]}, which {merged[twice[0]].file} holds too. Remove one of the files.")
        merged |= tensors
    return merged


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a component's folder: those its index names, or its only one.

    **Raises:** `WeightsError` if there is none, several without an index, or one of the index is missing.
    """
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        names = sorted(set(json.loads(index[0].read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        missing = [name for name in names if not (folder / name).is_file()]
        if outside or missing:
            problem = f"a path outside the folder, {outside[0]}" if outside else f"{missing[0]}, which is missing"
            raise WeightsError(f"{index[0]} names {problem}. Download the folder anew.")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = "none" if not files else ", ".join(file.name for file in files)
        raise WeightsError(f"{folder} should hold one .safetensors file, or several and their index; it holds {found}.")
    return files


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file beside its place and move it there, so that it is whole or not there."""
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, offset := offset + tensor.nbytes),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
