"""Numbers: checks of those that users pass, and the dtype in which values are accumulated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype in which values of `dtype` are accumulated: float32, or float64."""
    if dtype == jnp.float64:
        return jnp.dtype(jnp.float64)
    return jnp.dtype(jnp.float32)


def index_axis(x: jax.Array, index: int | jax.Array, axis: int = 0) -> jax.Array:
    """Return a slice of an array, without the axis that it is taken from.

    Unlike `x[index]`, it has no program that asks whether the index is negative.

    **Arguments:** `index`: from 0 on; may be traced.
    """
    return jax.lax.dynamic_index_in_dim(
        x, index, axis, keepdims=False, allow_negative_indices=False
    )


def to_bits(x: jax.Array) -> jax.Array:
    """Return numbers of 16 bits as integers, which XLA:CPU copies as they are.

    To copy bfloat16 it converts each number to float32 and back. Where a loop writes a part of an
    array of bfloat16, it converts the whole array each time. Integers have no derivatives.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(bits: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return the numbers that `to_bits` made integers of.

    **Arguments:** `dtype`: theirs, of 16 bits.
    """
    return jax.lax.bitcast_convert_type(bits, dtype)


def is_concrete_number(value: object) -> bool:
    """Return whether a value is a number or an array whose value is known, that is, not traced."""
    if isinstance(value, jax.core.Tracer):
        return False
    return isinstance(value, int | float | np.generic | np.ndarray | jax.Array)


def check_finite(call: str, **values: object) -> None:
    """Check that numbers are finite.

    None, traced values and values that are not numbers pass.

    **Arguments:** `call`: the function or class that the numbers are passed to, for the message.
    `values`: Python, NumPy or JAX scalars, arrays or lists, by argument name.
    **Raises:** `ValueError` for NaN and infinity, and for Python integers beyond float64.
    """
    for name, value in values.items():
        checkable = is_concrete_number(value) or isinstance(value, list | tuple)
        if checkable and not _is_finite(value):
            is_scalar = np.asarray(value).ndim == 0
            shown = value if is_scalar else "NaN or infinity in it"
            raise ValueError(
                f"`{call}({name})` needs finite numbers, got {shown}. Choose a finite number."
            )


def check_positive(call: str, **values: object) -> None:
    """Check that numbers are finite and above 0; traced ones pass, as in `check_finite`.

    **Raises:** `ValueError` for others.
    """
    check_finite(call, **values)
    for name, value in values.items():
        if is_concrete_number(value) and not np.all(np.asarray(value) > 0):
            raise ValueError(
                f"`{call}({name})` needs a positive number, got {value}. Choose one above 0."
            )


def check_nonnegative(call: str, **values: object) -> None:
    """Check that numbers are finite and at least 0; traced ones pass, as in `check_finite`.

    **Raises:** `ValueError` for others.
    """
    check_finite(call, **values)
    for name, value in values.items():
        if is_concrete_number(value) and not np.all(np.asarray(value) >= 0):
            raise ValueError(
                f"`{call}({name})` needs a number of at least 0, got {value}. Choose 0 or more."
            )


def check_count(call: str, **values: int) -> None:
    """Check that whole numbers are at least 1.

    **Raises:** `ValueError` for others.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(
                f"`{call}({name})` needs a whole number of at least 1, got {value}. "
                "Choose 1 or more."
            )


def _is_finite(value: object) -> bool:
    # Python integers have no bound, and NumPy makes an array of objects of the largest.
    if isinstance(value, int | float):
        try:
            return math.isfinite(value)
        except OverflowError:  # an integer larger than the largest float64
            return False
    return bool(np.isfinite(np.asarray(value, np.float64)).all())
