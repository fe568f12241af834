"""How a tensor lies in a file and in memory: convolutions' axes, 1x1 convolutions, swapped halves.

PyTorch has a convolution's kernel as [out, in, rows, columns], fluxjax as [rows, columns, in, out].
"""

import numpy as np

from fluxjax.checkpoint.dialect import Layout


def shape_in_file(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    """Return the shape that a file has for a tensor of this shape in memory.

    **Arguments:** `layout`: of the tensor's row in the key table.
    """
    if layout == "own":
        return shape
    if len(shape) == 4:
        rows, columns, inputs, outputs = shape
        return (outputs, inputs, rows, columns)
    if layout == "1x1" and len(shape) == 2:
        return (*shape, 1, 1)
    return shape


def from_file(values: np.ndarray, layout: Layout | None) -> np.ndarray:
    """Return a file's tensor as it is in memory; the halves of a "swap" stay where they are.

    Those are exchanged by reading each into the other's rows.
    """
    if values.ndim != 4 or layout == "own":
        return values
    # Both views share the file's memory; nothing is copied here.
    if layout == "1x1":
        return values[:, :, 0, 0]
    return values.transpose(2, 3, 1, 0)


def to_file(values: np.ndarray, layout: Layout | None) -> np.ndarray:
    """Return a tensor in memory as a file has it, with the halves of a "swap" exchanged.

    **Arguments:** `layout`: of the tensor's row in the key table.
    """
    if layout == "own":
        return values
    if values.ndim == 4:
        return values.transpose(3, 2, 0, 1)
    if layout == "1x1" and values.ndim == 2:
        return values[:, :, None, None]
    if layout == "swap":
        return np.roll(values, len(values) // 2, axis=0)
    return values
