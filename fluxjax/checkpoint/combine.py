"""Weights that a file stores in several tensors each, combined into one tensor each."""

from collections.abc import Mapping, Sequence

from fluxjax.checkpoint.bitsandbytes import combine_bitsandbytes
from fluxjax.checkpoint.scaled import combine_scaled
from fluxjax.checkpoint.tensors import Tensor, TensorFile


def combine_packed(
    tensors: Mapping[str, Tensor], files: Sequence[TensorFile] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with one for each weight.

    **Arguments:** `tensors`: by name. `files`: where they come from; ComfyUI's files may describe
    the weights in their metadata.
    **Raises:** `WeightsError` that names the weight, for a scale without its weight, tensors that
    do not fit together, and a format that can't be decoded.
    """
    return combine_scaled(combine_bitsandbytes(tensors), files)
