"""Headers of safetensors files: read within bounds, and checked against the file."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.json_file import first_repeated_name
from fluxjax.checkpoint.tensors import (
    MOST_TENSORS,
    StoredTensor,
    TensorFile,
    check_overlaps,
    check_regular_file,
    check_tensor_end,
)
from fluxjax.printable import printable, printable_path, quote_name

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,  # the scales of mxfp8
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""NumPy's dtype for each dtype of the format."""
METADATA_KEY = "__metadata__"
"""The entry of a header that holds the metadata and not a tensor."""
LENGTH_BYTES = 8
"""A file begins with the header's length: little-endian, in this many bytes."""
_MOST_HEADER_BYTES = 50_000_000  # FLUX.1's files have 200,000 at most
_MOST_AXES = 32  # NumPy's own limit is 64
_MOST_BYTES = 2**63


def read_header(path: Path) -> TensorFile:
    """Return the content of a safetensors file's header, checked against the size of the file.

    **Raises:** `WeightsError` for a pickle, a file of another format, and a truncated or damaged
    file.
    **Source:** the safetensors format, https://github.com/huggingface/safetensors#format.
    """
    size = check_regular_file(path)
    length, text = _read_header_text(path, size)
    header = _parse_header(path, text)
    metadata = header.pop(METADATA_KEY, {})
    if not _is_metadata(metadata):
        raise WeightsError(
            f"{printable_path(path)}: the header's metadata is damaged. Download the file again."
        )
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        tensors[name] = _tensor(path, name, entry, LENGTH_BYTES + length, size)
    check_overlaps(path, {name: (one.offset, one.nbytes) for name, one in tensors.items()})
    return TensorFile(path, tensors, metadata)


def _read_header_text(path: Path, size: int) -> tuple[int, bytes]:
    """Return the length of the header in bytes, and its text."""
    where = printable_path(path)
    with open(path, "rb") as file:
        start = file.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        brace = file.read(1)
        # Pickles and zip files begin with these bytes. The length of a header may as well, but
        # then the brace of its JSON follows.
        if brace != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise _pickle_error(path)
        if len(start) < LENGTH_BYTES or not 2 <= length <= _MOST_HEADER_BYTES:
            raise WeightsError(
                f"{where} is not a safetensors file. Pass a .safetensors or .gguf file, or a "
                "model's folder."
            )
        if length > size - LENGTH_BYTES:
            raise WeightsError(
                f"{where} is truncated within its header ({size:,} bytes). Download it again."
            )
        return length, brace + file.read(length - 1)


def _pickle_error(path: Path) -> WeightsError:
    # Some files hold a dictionary of dictionaries, whose names are joined by a dot.
    code = (
        "import sys, torch, safetensors.torch as s; "
        'f = lambda d, p="": {a: b for k, v in d.items() for a, b in (f(v, p + k + ".") '
        "if isinstance(v, dict) else {p + k: v.clone(memory_format=torch.contiguous_format)})"
        ".items()}; s.save_file(f(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])"
    )
    return WeightsError(
        f"{printable_path(path)} is a pickle (a PyTorch checkpoint). Reading one can run any code, "
        "so fluxjax does not read it. Use the model's .safetensors file, or convert it where "
        f"PyTorch is installed: python -c '{code}' {printable_path(Path(path.name))} "
        "model.safetensors"
    )


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    """Return the header's table of entries by name."""
    where = printable_path(path)
    # Counted in the text first: parsing millions of entries would take minutes.
    if text.count(b'"data_offsets"') > MOST_TENSORS:
        raise _too_many_tensors(path)

    try:
        header = json.loads(text, object_pairs_hook=partial(_make_table, path))
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{where} is not a safetensors file: its header is not JSON ({printable(str(error))})."
        ) from error
    if not isinstance(header, dict):
        raise WeightsError(
            f"{where} is not a safetensors file: its header is not a table of tensors."
        )
    # An entry whose key is written with escaped characters was not counted in the text.
    if len(header) > MOST_TENSORS + 1:
        raise _too_many_tensors(path)
    return header


def _make_table(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of the header's JSON, whose names must differ."""
    table = dict(pairs)
    if len(table) < len(pairs):
        name = quote_name(first_repeated_name(pairs))
        raise WeightsError(
            f"{printable_path(path)}: the header names {name} twice. Download the file again."
        )
    return table


def _too_many_tensors(path: Path) -> WeightsError:
    return WeightsError(
        f"{printable_path(path)}: the header names more than {MOST_TENSORS:,} tensors, so it is "
        "not FLUX.1's."
    )


def _is_metadata(value: object) -> TypeGuard[Mapping[str, str]]:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    """Return the tensor that an entry of the header describes.

    **Arguments:** `start`: where the data begins in the file. `size`: of the file, in bytes.
    """
    try:
        code = entry["dtype"]
        shape = tuple(entry["shape"])
        first, last = entry["data_offsets"]
        is_known = code in DTYPES
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged_entry(path, name) from error
    if not is_known:
        raise WeightsError(
            f"{printable_path(path)}: {quote_name(name)} has dtype {printable(str(code), 30)}, "
            f"which fluxjax does not read. Known: {', '.join(DTYPES)}."
        )
    if len(shape) > _MOST_AXES:
        raise _damaged_entry(path, name)
    for number in (*shape, first, last):
        # `type` and not `isinstance`, for which true and false are integers too.
        if type(number) is not int or not 0 <= number < _MOST_BYTES:
            raise _damaged_entry(path, name)
    tensor = StoredTensor(path, np.dtype(DTYPES[code]), shape, start + first)
    if tensor.nbytes != last - first:
        raise WeightsError(
            f"{printable_path(path)}: {quote_name(name)} of shape {printable(str(list(shape)))} "
            "does not fit its offsets. Download the file again."
        )
    check_tensor_end(path, name, start + last, size)
    return tensor


def _damaged_entry(path: Path, name: str) -> WeightsError:
    return WeightsError(
        f"{printable_path(path)}: the header's entry for {quote_name(name)} is damaged. Download "
        "the file again."
    )
