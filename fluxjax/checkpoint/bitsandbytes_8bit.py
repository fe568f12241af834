"""Weights that bitsandbytes stores in 8 bits.

The largest magnitude of each row is a tensor beside the weight, under the layer's name and `SCB`.
"""

import numpy as np

from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.packed import (
    INT8,
    SCALE_DTYPES,
    USE_ANOTHER_FILE,
    Arrays,
    PackedTensor,
    packed_tensor,
)
from fluxjax.checkpoint.scaled_formats import times_scale
from fluxjax.checkpoint.tensors import StoredTensor, Tensor
from fluxjax.printable import printable_path, quote_name

ROW_SCALES = "SCB"
"""The last part of the name of the magnitudes of a layer's rows."""
_ROW_FORMAT = "weight_format"


def combine_eight_bits(tensors: dict[str, Tensor], layer: str, scale: Tensor) -> None:
    """Replace the 8-bit weight of a layer by one combined with its scales.

    **Arguments:** `tensors`: changed in place. `layer`: whose weight it is. `scale`: the largest
    magnitudes of its rows.
    **Raises:** `WeightsError` for tensors that do not fit together, or the tiles of old releases.
    """
    name = f"{layer}.weight"
    tensors[name] = _eight_bits(layer, tensors.get(name), scale)
    row_format = tensors.pop(f"{layer}.{_ROW_FORMAT}", None)
    if row_format is not None:
        _check_row_format(row_format, layer)


def _eight_bits(layer: str, weight: Tensor | None, scale: Tensor) -> PackedTensor:
    """Return the weight of a layer combined with its scales, if these fit each other."""
    error = WeightsError(
        f"{printable_path(scale.file)}: {quote_name(f'{layer}.{ROW_SCALES}')} needs an int8 "
        f"matrix with as many rows, {quote_name(f'{layer}.weight')}. Download the file again."
    )
    if not isinstance(weight, StoredTensor) or not isinstance(scale, StoredTensor):
        raise error
    if len(weight.shape) != 2 or scale.shape != weight.shape[:1]:
        raise error
    if weight.dtype != INT8 or scale.dtype not in SCALE_DTYPES:
        raise error
    parts = {"weight": weight, "scale": scale}
    return packed_tensor("int8 (bitsandbytes)", weight.shape, parts, decode_eight_bits)


def decode_eight_bits(arrays: Arrays) -> np.ndarray:
    """Return the float32 values of a weight in bitsandbytes' int8: code * row scale / 127.

    bitsandbytes stores one scale for each row: the largest absolute value in the row before it was
    rounded to int8.
    """
    # bitsandbytes multiplies by this rounded reciprocal of 127.
    return times_scale(arrays) * np.float32(7.874015718698502e-3)


def _check_row_format(tensor: Tensor, layer: str) -> None:
    """Check that an int8 weight is stored in row-major order.

    **Raises:** `WeightsError` if it is stored in the tiles of old releases.
    """
    if isinstance(tensor, StoredTensor) and tensor.size == 1:
        code = tensor.view().astype(np.float32).reshape(())
        if code == 0:
            return
    raise WeightsError(
        f"{printable_path(tensor.file)}: {quote_name(f'{layer}.weight')} is in a tiled int8 format "
        f"of old bitsandbytes releases, which fluxjax can't decode. {USE_ANOTHER_FILE}"
    )
