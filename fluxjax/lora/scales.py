"""The scales of adapters: one number an adapter, or numbers by the beginning of a weight's name."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Number = float | np.number | np.ndarray | jax.Array
"""A Python number, or a NumPy or JAX scalar, which may be traced."""
Scale = Number | Mapping[str, Number]
"""One scale, or scales by the beginning of a weight's name ("double.3", "single", "" for the rest); the longest that fits
counts, and a weight that none fits stays as it is."""
Scales = Sequence[Scale] | np.ndarray | jax.Array
"""One scale per adapter."""


def check_scales(call: str, count: int, scales: Scales | None) -> list[Any]:
    """Return one scale per adapter: Python floats, traced scalars, or mappings to those; 1 where none are given.

    **Raises:** `ValueError` for another count, and for what is not a finite number in float32; `call` names the function.
    """
    if scales is not None and not isinstance(scales, Sequence) and np.ndim(scales) == 0:
        raise ValueError(
            f"`{call}` needs one scale per adapter, got {scales!r} alone. Pass a list of {count}."
        )
    found: list[Any] = [1.0] * count if scales is None else list(scales)
    if len(found) != count:
        raise ValueError(f"`{call}` needs one scale per adapter, got {len(found)} for {count}.")
    return [_checked(call, scale) for scale in found]


def _checked(call: str, scale: Any) -> Any:
    if isinstance(scale, Mapping):
        return {name: _number(call, value) for name, value in scale.items()}
    return _number(call, scale)


def _number(call: str, value: Any) -> Any:
    traced = isinstance(value, jax.core.Tracer)
    number = value if traced else np.asarray(value)
    real = jnp.issubdtype(number.dtype, jnp.floating) or jnp.issubdtype(number.dtype, jnp.integer)
    if number.ndim or not real:
        raise ValueError(
            f"`{call}` needs one number as the scale of an adapter, got {value!r}. Pass one per adapter."
        )
    if traced:
        return value
    with np.errstate(over="ignore"):
        finite = np.isfinite(number.astype(np.float64).astype(np.float32))
    if not finite:
        raise ValueError(
            f"`{call}` needs scales that are finite in float32, got {value}. Choose a number such as 0.8."
        )
    return float(number)


def is_zero(scale: Any) -> bool:
    """Return whether a scale is known to be 0; a traced one is not."""
    return not isinstance(scale, jax.core.Tracer) and scale == 0


def scale_of(scale: Any, name: str) -> Any:
    """Return the scale of one weight."""
    if not isinstance(scale, Mapping):
        return scale
    fitting = [key for key in scale if begins_with(name, key)]
    return scale[max(fitting, key=len)] if fitting else 0.0


def begins_with(name: str, key: str) -> bool:
    """Return whether a weight's name begins with these whole fields."""
    return key == "" or name == key or name.startswith(f"{key}.")


def negative(scale: Any) -> Any:
    return {name: -value for name, value in scale.items()} if isinstance(scale, Mapping) else -scale
