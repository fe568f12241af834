"""Whether weights are finite, as they are read: by their bits, on the host, without a copy."""

import numpy as np

_CHUNK = 1_000_000  # bytes: both passes over a chunk find it in the processor's cache


def all_finite(values: np.ndarray) -> bool:
    """Return whether an array of floats, of 8 bits too, holds neither NaN nor infinity.

    Of each sign, those are the largest bit patterns. So two maxima of integers decide, which NumPy takes many values at a
    time, while `isfinite` converts the values of 8- and 16-bit types one by one.
    """
    if values.size == 0:
        return True
    values = np.asarray(values)
    size = values.dtype.itemsize
    if not values.flags.c_contiguous:
        return _below_infinity(values)
    flat, step = values.reshape(-1), max(1, _CHUNK // size)
    return all(_below_infinity(flat[start : start + step]) for start in range(0, len(flat), step))


def _below_infinity(values: np.ndarray) -> bool:
    bits = 8 * values.dtype.itemsize
    with np.errstate(invalid="ignore"):  # types without infinity have NaN in its place
        infinity = int(np.array(np.inf, values.dtype).view(f"i{bits // 8}"))
    negative_infinity = infinity + 2 ** (bits - 1)
    return bool(
        values.view(f"i{bits // 8}").max() < infinity
        and values.view(f"u{bits // 8}").max() < negative_infinity
    )
