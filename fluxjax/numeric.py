"""Checks of the numbers that a user gives: finite, and of a kind that is a number."""

import math
from typing import Any

import jax
import numpy as np


def check_finite(call: str, **values: Any) -> None:
    """Check that numbers are finite, each named by its keyword; None and traced values pass.

    **Arguments:** `call`: what the number is given to, for the message, such as "sample". `values`: Python, NumPy or JAX
    scalars or arrays.
    **Raises:** `ValueError` for NaN and infinity, and for Python integers beyond float64.
    """
    for name, value in values.items():
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        if not _is_finite(value):
            shown = value if np.ndim(value) == 0 else "NaN or infinity in it"
            raise ValueError(f"`{call}({name})` needs finite numbers, got {shown}. Choose a finite number.")


def _is_finite(value: Any) -> bool:
    if isinstance(value, int | float):
        try:
            return math.isfinite(value)
        except OverflowError:  # an integer larger than the largest float64
            return False
    return bool(np.isfinite(np.asarray(value, np.float64)).all())
