"""The dtypes that weights are loaded and written in: which are allowed, and which a leaf takes."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from fluxjax.checkpoint.weights import (
    LOADED_DTYPES,
    Weights,
    parameter_names,
    parameters_of,
    widest,
)
from fluxjax.printable import printable


def check_dtype(call: str, dtype: DTypeLike | None) -> np.dtype | None:
    """Return the dtype that a loading function was called with.

    **Raises:** `ValueError` for a dtype that no weights are loaded in.
    """
    if dtype is None:
        return None
    try:
        checked = np.dtype(dtype)
    except TypeError as error:
        remedy = _describe_dtypes(str(dtype))
        raise ValueError(f"`{call}(dtype)` got {printable(repr(dtype))}. {remedy}") from error
    # JAX would silently make float32 of it.
    if checked == np.float64:
        if jax.config.read("jax_enable_x64"):
            return checked
        raise ValueError(
            f"`{call}(dtype='float64')` needs JAX's 64-bit mode, without which arrays are float32. "
            "Call jax.config.update('jax_enable_x64', True) before, or pass dtype='float32'."
        )
    if str(checked) not in LOADED_DTYPES:
        raise ValueError(f"`{call}(dtype)` got {checked}. {_describe_dtypes(str(checked))}")
    return checked


def _describe_dtypes(name: str) -> str:
    """Return which dtypes there are, and for one of 8 bits what `quantize` is for."""
    known = f"Weights are loaded as {', '.join(LOADED_DTYPES)}, or float64 in JAX's 64-bit mode."
    if "8" not in name:
        return known
    # Whoever asks for int8 or fp8 here most likely wants less memory.
    format = "fp8" if "f" in name else "int8"
    return (
        f"{known} To round the blocks' matrices to 8 bits, `load_flux` and `load_t5` take "
        f"quantize={format!r}."
    )


def check_written_dtype(call: str, dtype: DTypeLike | None) -> np.dtype | None:
    """Return the dtype that a writing function was called with.

    **Raises:** `ValueError` for a dtype that fluxjax does not write.
    """
    if dtype is None:
        return None
    try:
        checked = np.dtype(dtype)
    except TypeError:
        checked = None
    if checked is None or str(checked) not in LOADED_DTYPES:
        shown = repr(dtype) if checked is None else str(checked)
        raise ValueError(
            f"`{call}(dtype)` writes floats of 32 bits or fewer, got {printable(shown)}. "
            f"Pass {', '.join(LOADED_DTYPES)}."
        )
    return checked


def loaded_dtype(
    weights: Weights, name: str, shape: Sequence[int], dtype: DTypeLike | None
) -> np.dtype:
    """Return the dtype that a leaf is loaded in.

    It is the one that is passed, or for None the widest of the leaf's parameters; float32 in place
    of float64 where JAX's 64-bit mode is off.
    """
    if dtype is None:
        # A stack of no blocks holds no parameter; it gets the dtype of the network's first.
        names = parameter_names(name, shape) or list(parameters_of(weights.network))[:1]
        target = widest(weights.dtype(parameter) for parameter in names)
    else:
        target = np.dtype(dtype)
    if target == np.float64 and not jax.config.read("jax_enable_x64"):
        return np.dtype(np.float32)
    return target
