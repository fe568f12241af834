"""Weights that bitsandbytes stores in 4 or 8 bits, found among the tensors of a file."""

from collections.abc import Mapping

from fluxjax.checkpoint.bitsandbytes_4bit import STATE_INFIX, combine_four_bits
from fluxjax.checkpoint.bitsandbytes_8bit import ROW_SCALES, combine_eight_bits
from fluxjax.checkpoint.errors import WeightsError
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.printable import printable_path, quote_name


def combine_bitsandbytes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with each 4-bit or 8-bit weight and its statistics combined into one.

    **Raises:** `WeightsError` that names the weight, for tensors that do not fit together, and for
    a format that can't be decoded.
    """
    combined = dict(tensors)
    for name in tensors:
        layer, _, last = name.rpartition(".")
        if STATE_INFIX in name:
            combine_four_bits(combined, name)
        elif last == ROW_SCALES:
            combine_eight_bits(combined, layer, combined.pop(name))
    for name, tensor in combined.items():
        if name.endswith(".weight.absmax"):
            raise WeightsError(
                f"{printable_path(tensor.file)}: {quote_name(name)} belongs to a 4-bit weight of "
                "bitsandbytes, whose quant_state is missing. Download the file again."
            )
    return combined
