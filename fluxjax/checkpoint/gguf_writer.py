"""Writing GGUF files, one tensor at a time."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxjax.checkpoint.atomic import new_file
from fluxjax.checkpoint.disk import explain_full_disk, reserve_space
from fluxjax.checkpoint.gguf_header import GGUF_MAGIC
from fluxjax.checkpoint.safetensors_writer import OutputTensor, ReportBytes, write_chunks

_VERSION = 3
_ALIGNMENT = 32
_UINT32, _STRING = 4, 8
TYPE_CODES: Mapping[str, int] = {
    "float32": 0,
    "float16": 1,
    "Q4_0": 2,
    "Q5_0": 6,
    "Q8_0": 8,
    "Q4_K": 12,
    "bfloat16": 30,
}
"""GGUF's numbers of the types of tensors that are written."""


@dataclass(frozen=True)
class GgufOutput:
    """A tensor to write to a GGUF file.

    `type`: a key of `TYPE_CODES`. `shape`: of its values. `content`: what is written, which is
    bytes for a block format.
    """

    type: str
    shape: tuple[int, ...]
    content: OutputTensor


def write_gguf(
    path: Path,
    tensors: Mapping[str, GgufOutput],
    metadata: Mapping[str, str | int],
    *,
    report: ReportBytes | None = None,
) -> None:
    """Write a GGUF file that appears at `path` complete or not at all.

    **Arguments:** `metadata`: strings, and integers of 32 bits. `report`: called with the number of
    bytes of each chunk.
    **Raises:** `WeightsError` if the disk is full; `FileExistsError` if `path` exists, also if it
    was created while the file was written.
    **Source:** the GGUF specification, version 3.
    """
    header = _header(tensors, metadata)
    total = len(header) + sum(_padded(tensor.content.nbytes) for tensor in tensors.values())
    with explain_full_disk(path, total), new_file(path) as file:
        reserve_space(file.fileno(), total)
        file.write(header)
        for name, tensor in tensors.items():
            write_chunks(file, name, tensor.content, report)
            file.write(bytes(_padded(tensor.content.nbytes) - tensor.content.nbytes))


def _header(tensors: Mapping[str, GgufOutput], metadata: Mapping[str, str | int]) -> bytes:
    """Return all that comes before the tensors' values, padded to the alignment."""
    parts = [GGUF_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts.append(_string(key))
        if isinstance(value, str):
            parts += [struct.pack("<I", _STRING), _string(value)]
        else:
            parts.append(struct.pack("<II", _UINT32, value))
    offset = 0
    for name, tensor in tensors.items():
        axes = len(tensor.shape)
        parts.append(_string(name))
        # GGUF lists the fastest-varying axis first.
        parts.append(struct.pack(f"<I{axes}Q", axes, *reversed(tensor.shape)))
        parts.append(struct.pack("<IQ", TYPE_CODES[tensor.type], offset))
        offset += _padded(tensor.content.nbytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
