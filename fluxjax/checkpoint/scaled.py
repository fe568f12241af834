"""Weights that ComfyUI and NVIDIA's ModelOpt store with scales: which tensors belong together.

Beside the `weight` of a layer, a file may have its `weight_scale` (in ComfyUI's older files,
`scale_weight`), and for 4-bit formats `weight_scale_2`, the scale of the scales. ComfyUI describes
the format of a layer in JSON, either in a tensor of bytes `comfy_quant` or in the file's metadata.
ModelOpt describes nothing, so its format is recognized from the dtypes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.packed import USE_ANOTHER_FILE, StoredParts, read_description
from fluxjax.checkpoint.scaled_formats import E4M3, E5M2, FORMATS, MODELOPT_NVFP4, PartsError
from fluxjax.checkpoint.tensors import BYTES, StoredTensor, Tensor, TensorFile
from fluxjax.printable import printable, printable_path, quote_name

# The last parts of the names of tensors that belong to the weight of a layer.
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's older and newer names
_GLOBAL_SCALE = "weight_scale_2"
_SMOOTHING_SCALE = "pre_quant_scale"
_WEIGHT_PARTS = (*_SCALES, _GLOBAL_SCALE, _SMOOTHING_SCALE)
_DESCRIPTION = "comfy_quant"
_ACTIVATION_SCALES = ("scale_input", "input_scale")  # nothing here uses them
_MARKER = "scaled_fp8"  # marks a file of ComfyUI's as a whole
_DROPPED = {*_WEIGHT_PARTS, *_ACTIVATION_SCALES, _MARKER}
_METADATA_KEY = "_quantization_metadata"
_PLAIN_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")  # formats whose scale may be missing

Descriptions = Mapping[str, Mapping[str, Any]]
"""What a file says of the format of its quantized weights, by the name of the layer."""


def combine_scaled(tensors: Mapping[str, Tensor], files: Sequence[TensorFile]) -> dict[str, Tensor]:
    """Return the tensors with each weight and its scales combined into one.

    Scales of activations and markers are dropped.

    **Arguments:** `files`: where the tensors come from; their metadata may describe the weights.
    **Raises:** `WeightsError` that names the weight, for tensors that do not fit together, and for
    a format that can't be decoded.
    """
    combined: dict[str, Tensor] = {}
    descriptions = dict(_descriptions_in_metadata(files))
    for name, tensor in tensors.items():
        if _last_part(name) == _DESCRIPTION:
            layer = name.rpartition(".")[0]
            descriptions[layer] = read_description(tensor, name, "format")
        elif name != _MARKER and _last_part(name) not in _DROPPED:
            combined[name] = tensor
    for layer in _quantized_layers(tensors) | dict.fromkeys(descriptions):
        parts = _parts_of(layer, tensors)
        weight = combined.get(f"{layer}.weight")
        if weight is None and not parts:
            continue  # its description lies in this file, and the layer itself in another one
        combined[f"{layer}.weight"] = _combine(layer, weight, parts, descriptions.get(layer))
    return combined


def _descriptions_in_metadata(files: Sequence[TensorFile]) -> Descriptions:
    """Return the descriptions of layers in the metadata of ComfyUI's files."""
    descriptions: dict[str, Mapping[str, Any]] = {}
    for file in files:
        if _METADATA_KEY not in file.metadata:
            continue
        try:
            layers = json.loads(file.metadata[_METADATA_KEY])["layers"]
            for layer, description in layers.items():
                if isinstance(description["format"], str):
                    descriptions[layer] = description
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"{printable_path(file.path)}: the metadata's {_METADATA_KEY} is damaged. Download "
                "the file again."
            ) from error
    return descriptions


def _last_part(name: str) -> str:
    """Return what follows the name of the layer, or nothing if there is no layer."""
    if "." not in name:
        return ""
    return name.rpartition(".")[2]


def _quantized_layers(tensors: Mapping[str, Tensor]) -> dict[str, None]:
    """Return the names of layers with scales, each once, in the order of the file."""
    layers: dict[str, None] = {}
    for name in tensors:
        if _last_part(name) in _WEIGHT_PARTS:
            layers[name.rpartition(".")[0]] = None
    return layers


def _parts_of(layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors beside the weight of a layer, by the last part of their name."""
    parts: dict[str, Tensor] = {}
    for last in _WEIGHT_PARTS:
        if f"{layer}.{last}" in tensors:
            parts[last] = tensors[f"{layer}.{last}"]
    return parts


def _combine(
    layer: str,
    weight: Tensor | None,
    parts: Mapping[str, Tensor],
    description: Mapping[str, Any] | None,
) -> Tensor:
    """Return the weight of a layer combined with its scales.

    **Arguments:** `parts`: at least one, if there is no weight. `description`: what the file says
    of the format, if anything.
    """
    file = (weight or next(iter(parts.values()))).file
    where = f"{printable_path(file)}: {quote_name(f'{layer}.weight')}"
    if _SMOOTHING_SCALE in parts:
        raise WeightsError(
            f"{where} has a {_SMOOTHING_SCALE} beside it, which fluxjax does not read. "
            f"{USE_ANOTHER_FILE}"
        )
    scales = [parts[name] for name in _SCALES if name in parts]
    scale = scales[0] if scales else None
    if not isinstance(weight, StoredTensor) or len(scales) > 1:
        raise WeightsError(
            f"{where} has scales, and is missing or scaled twice. Download the file again."
        )
    if description is None:
        format = _guess_format(weight, parts)
    else:
        format = description["format"]
        if format in _PLAIN_FLOAT8 and scale is None:
            return weight
    _check_format(where, format, description)
    stored: dict[str, StoredTensor] = {"weight": weight}
    if isinstance(scale, StoredTensor):
        stored["scale"] = scale
    global_scale = parts.get(_GLOBAL_SCALE)
    if isinstance(global_scale, StoredTensor):
        stored["global_scale"] = global_scale
    try:
        return FORMATS[format](stored)
    except PartsError as error:
        raise WeightsError(f"{where}: {error}, got {_listed(stored)}. {USE_ANOTHER_FILE}") from None


def _guess_format(weight: StoredTensor, parts: Mapping[str, Tensor]) -> str:
    """Return the format of a weight that the file does not describe, from its dtype and scales."""
    if weight.dtype in (E4M3, E5M2):
        return str(weight.dtype)
    if weight.dtype == BYTES and _GLOBAL_SCALE in parts:
        return MODELOPT_NVFP4
    return f"{weight.dtype} with a scale and no description of its format"


def _check_format(where: str, format: str, description: Mapping[str, Any] | None) -> None:
    """**Raises:** `WeightsError` for a format that can't be decoded."""
    is_rotated = False
    if description is not None:
        # The network would have to rotate its activations in the same way.
        params = str(description.get("params"))
        is_rotated = bool(description.get("convrot")) or "convrot" in params
    if format in FORMATS and not is_rotated:
        return
    name = printable(format, 100)
    if format in FORMATS:
        name += " with rotated inputs"
    raise WeightsError(
        f"{where} is stored as {name}, which fluxjax can't decode. {USE_ANOTHER_FILE}"
    )


def _listed(parts: StoredParts) -> str:
    """Return the dtypes and shapes of tensors for an error message."""
    texts = [f"{role} {part.dtype} {list(part.shape)}" for role, part in parts.items()]
    return printable(", ".join(texts))
