"""Numbers: checks of those that a user gives, and the dtype in which they are accumulated."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def wide_dtype(dtype: Any) -> jnp.dtype:
    """Return the dtype in which values of `dtype` are accumulated: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def is_concrete_number(value: Any) -> bool:
    """Whether a value is a Python, NumPy or JAX number or array whose value is known, which a traced one's is not."""
    return isinstance(value, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(
        value, jax.core.Tracer
    )


def check_finite(call: str, **values: Any) -> None:
    """Check that numbers are finite, each named by its keyword; None, traced values and what is not a number pass.

    **Arguments:** `call`: what the number is given to, for the message, such as "sample". `values`: Python, NumPy or JAX
    scalars or arrays.
    **Raises:** `ValueError` for NaN and infinity, and for Python integers beyond float64.
    """
    for name, value in values.items():
        if (is_concrete_number(value) or isinstance(value, list | tuple)) and not _is_finite(value):
            shown = value if np.ndim(value) == 0 else "NaN or infinity in it"
            raise ValueError(
                f"`{call}({name})` needs finite numbers, got {shown}. Choose a finite number."
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, int | float):
        try:
            return math.isfinite(value)
        except OverflowError:  # an integer larger than the largest float64
            return False
    return bool(np.isfinite(np.asarray(value, np.float64)).all())
