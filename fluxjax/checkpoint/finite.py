"""Whether weights are finite: checked on their bit patterns, on the host, without a copy."""

import numpy as np

# Bytes. Two passes are made over each chunk, and the second finds it in the processor's cache.
_CHUNK_BYTES = 1_000_000


def all_finite(values: np.ndarray) -> bool:
    """Return whether an array of floats, 8-bit ones too, holds neither NaN nor infinity.

    Among the bit patterns of one sign, those of infinity and NaN are the largest as integers. So
    the maximum over signed integers finds the positive ones, and the maximum over unsigned
    integers the negative ones. NumPy vectorizes these maxima, while its `isfinite` converts the
    values of 8-bit and 16-bit types one by one.
    """
    if values.size == 0:
        return True
    values = np.asarray(values)
    if not values.flags.c_contiguous:
        return _below_infinity(values)
    flat = values.reshape(-1)
    step = max(1, _CHUNK_BYTES // values.dtype.itemsize)
    chunks = (flat[start : start + step] for start in range(0, len(flat), step))
    return all(_below_infinity(chunk) for chunk in chunks)


def _below_infinity(values: np.ndarray) -> bool:
    """Return whether all bit patterns lie below that of the infinity of their sign."""
    size = values.dtype.itemsize
    signed, unsigned = f"i{size}", f"u{size}"
    with np.errstate(invalid="ignore"):  # types without infinity have NaN in its place
        infinity = np.array(np.inf, values.dtype)
    positive_pattern = int(infinity.view(signed))
    sign_bit = 2 ** (8 * size - 1)
    if values.view(signed).max() >= positive_pattern:
        return False
    return bool(values.view(unsigned).max() < positive_pattern + sign_bit)
