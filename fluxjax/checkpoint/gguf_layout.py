"""The tensors and metadata of a GGUF file of a transformer, as ComfyUI-GGUF reads them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jax.typing import DTypeLike

from fluxjax.checkpoint.dialect import Dialect
from fluxjax.checkpoint.dtypes import check_written_dtype
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.gguf_rounding import round_to_gguf
from fluxjax.checkpoint.gguf_writer import GgufOutput
from fluxjax.checkpoint.kinds import OWN_METADATA, dialect_for
from fluxjax.checkpoint.layouts import NetworkToWrite, dialect_tensors, own_metadata
from fluxjax.checkpoint.safetensors_writer import OutputTensor
from fluxjax.checkpoint.tensors import BFLOAT16, BYTES
from fluxjax.nets.packed_formats import PACKED_FORMATS
from fluxjax.nets.stack import is_rounded

GGUF_FORMATS = ("Q8_0", "Q4_K", "Q4_0")
"""The block formats that matrices can be written in."""
_KINDS = ("flux", "chroma")
_FALLBACK = {"Q4_K": "Q5_0"}
"""What a matrix is written in whose columns do not divide into blocks, as llama.cpp does."""
_FILE_TYPES = {"float32": 0, "float16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "bfloat16": 32}
"""llama.cpp's numbers of what most of a file is written in."""
_QUANTIZATION_VERSION = 2
_PLAIN = ("float32", "float16", "bfloat16")

WrittenAs = np.dtype | str | None
"""A dtype, one of `GGUF_FORMATS`, or None for the dtype of the weights."""


def check_written_as(call: str, dtype: DTypeLike | None, layout: str) -> WrittenAs:
    """Return what weights are written as: a dtype, or one of GGUF's block formats.

    **Arguments:** `call`: the name of the public function, for error messages. `dtype`: a dtype;
    or the name of one of GGUF's block formats, as "Q4_K"; or None, which keeps the dtype of each
    weight. `layout`: the name of the file's layout, as "gguf".
    **Raises:** `ValueError` for a dtype or block format that files of this layout can't hold.
    """
    if isinstance(dtype, str) and dtype in GGUF_FORMATS:
        if layout == "gguf":
            return dtype
        raise ValueError(f"`{call}(dtype={dtype!r})` is for the layout gguf. Pass to='gguf'.")
    stored = check_written_dtype(call, dtype)
    if layout == "gguf" and stored is not None and str(stored) not in _PLAIN:
        names = ", ".join((*_PLAIN, *GGUF_FORMATS))
        raise ValueError(f"`{call}(to='gguf')` can't write {stored}. Pass one of {names}.")
    return stored


def gguf_file(
    networks: Sequence[NetworkToWrite], written_as: WrittenAs
) -> tuple[dict[str, GgufOutput], dict[str, str | int]]:
    """Return the tensors of a GGUF file, and its metadata.

    Matrices of blocks are written in a block format; everything else is plain, vectors in float32.

    **Arguments:** `networks`: with their weights. `written_as`: from `check_written_as`.
    **Raises:** `WeightsError` for anything but one transformer.
    """
    names = [network.kind.name for network in networks]
    if len(names) != 1 or names[0] not in _KINDS:
        raise WeightsError(
            f"A GGUF file holds one transformer ({' or '.join(_KINDS)}), not {', '.join(names)}. "
            "Choose it with `only`."
        )
    (network,) = networks
    dialect = dialect_for(network.kind.dialects[0], network.config)
    plain_dtype = None if isinstance(written_as, str) else written_as
    plain = dialect_tensors(network, dialect, plain_dtype)
    tensors: dict[str, GgufOutput] = {}
    for key, tensor in plain.items():
        if isinstance(written_as, str) and _is_block_matrix(key, tensor, dialect):
            tensors[key] = _block_output(tensor, written_as)
        else:
            tensors[key] = _plain_output(tensor)
    largest = max(plain.values(), key=lambda tensor: tensor.nbytes)
    most = written_as or largest.dtype
    metadata: dict[str, str | int] = {
        "general.architecture": "flux",  # Chroma's files have the same
        "general.file_type": _FILE_TYPES.get(str(most), _FILE_TYPES["bfloat16"]),
        "general.quantization_version": _QUANTIZATION_VERSION,
        OWN_METADATA: json.dumps(own_metadata([network], "gguf")),
    }
    return tensors, metadata


def _is_block_matrix(key: str, tensor: OutputTensor, dialect: Dialect) -> bool:
    """Return whether a tensor is a matrix of the transformer's blocks."""
    found = dialect.find(key)
    return found is not None and len(tensor.shape) == 2 and is_rounded(found[0])


def _block_output(tensor: OutputTensor, format: str) -> GgufOutput:
    """Return a matrix in a block format, or as it is if its rows do not divide into blocks."""
    rows, columns = tensor.shape
    if columns % PACKED_FORMATS[format].values:
        format = _FALLBACK.get(format, format)
    packed = PACKED_FORMATS[format]
    if columns % packed.values:
        return _plain_output(tensor)
    row_bytes = columns // packed.values * packed.nbytes
    content = OutputTensor(BYTES, (rows, row_bytes), _RoundedRows(tensor, format))
    return GgufOutput(format, tensor.shape, content)


def _plain_output(tensor: OutputTensor) -> GgufOutput:
    """Return a tensor of floats: vectors in float32, others in the dtype that they have."""
    dtype = np.dtype(np.float32)
    if len(tensor.shape) > 1 and tensor.dtype.itemsize < dtype.itemsize:
        dtype = BFLOAT16 if tensor.dtype.itemsize == 1 else tensor.dtype
    content = OutputTensor(dtype, tensor.shape, tensor.chunks)
    return GgufOutput(str(dtype), tensor.shape, content)


@dataclass(frozen=True)
class _RoundedRows:
    """Rounds a tensor to a block format when it is written."""

    tensor: OutputTensor
    format: str

    def __call__(self) -> Iterator[np.ndarray]:
        for values in self.tensor.chunks():
            rows = round_to_gguf(values.astype(np.float32), self.format)
            _check_scales(rows, self.format)
            yield rows


def _check_scales(rows: np.ndarray, format: str) -> None:
    """**Raises:** `WeightsError` for a scale that float16 can't hold."""
    packed = PACKED_FORMATS[format]
    blocks = rows.reshape(-1, packed.nbytes)
    for offset in packed.scales:
        scale_bytes = np.ascontiguousarray(blocks[:, offset : offset + 2])
        scales = scale_bytes.view(np.float16)
        if not np.isfinite(scales).all():
            raise WeightsError(
                f"A matrix has values that are too large for {format}, whose scales are float16. "
                "Write bfloat16."
            )
