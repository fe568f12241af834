"""The scales of adapters: one number each, or numbers by the prefix of a weight's name.

A scale multiplies the whole difference of an adapter, on top of its own alpha / rank. Scales may
be traced, so that a jitted function takes them as arguments.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Number = float | np.number | np.ndarray | jax.Array
"""A Python number, or a NumPy or JAX scalar, which may be traced."""
Scale = Number | Mapping[str, Number]
"""One scale, or scales by the prefix of a weight's name ("double.3", "single", "" for the rest).

The longest prefix that fits counts; a weight that no prefix fits stays as it is."""
Scales = Sequence[Scale] | np.ndarray | jax.Array
"""One scale for each adapter."""
CheckedNumber = float | jax.Array
"""A finite Python number, or a traced scalar."""
CheckedScale = CheckedNumber | Mapping[str, CheckedNumber]
"""A scale as `check_scales` returns it."""


def check_scales(
    call: str,
    count: int,
    scales: Scales | None,
) -> list[CheckedScale]:
    """Return one checked scale for each adapter.

    **Arguments:**

    - `call`: the name of the public function, for the error messages.
    - `count`: the number of adapters.
    - `scales`: None for 1 everywhere.

    **Returns:** Python floats, traced scalars, or mappings of prefixes to those.

    **Raises:** `ValueError` for another number of scales, and for a scale that is not a finite
    number in float32.
    """
    if scales is None:
        return [1.0] * count
    if not isinstance(scales, Sequence) and np.ndim(scales) == 0:
        raise ValueError(
            f"`{call}` needs one scale per adapter, got the single number {scales!r}. "
            f"Pass a list of {count}."
        )
    listed = list(scales)
    if len(listed) != count:
        raise ValueError(
            f"`{call}` needs one scale per adapter, got {len(listed)} for {count}. "
            f"Pass a list of {count}."
        )
    return [_check_scale(call, scale) for scale in listed]


def _check_scale(call: str, scale: Scale) -> CheckedScale:
    """Return one checked scale, or a mapping of checked numbers."""
    if isinstance(scale, Mapping):
        return {prefix: _check_number(call, value) for prefix, value in scale.items()}
    return _check_number(call, scale)


def _check_number(call: str, value: Number) -> CheckedNumber:
    """Return a checked number.

    **Arguments:**

    - `call`: the name of the public function, for the error messages.
    - `value`: a Python, NumPy or JAX number, which may be traced.

    **Raises:** `ValueError` for one that is not real, or not finite in float32.
    """
    if isinstance(value, jax.core.Tracer):
        # The value of a traced scale is not known, so only its kind is checked.
        _check_real_scalar(call, value, value)
        return value
    number = np.asarray(value)
    _check_real_scalar(call, value, number)
    # float32's range decides: a number beyond it becomes infinity here, without a warning.
    with np.errstate(over="ignore"):
        finite = np.isfinite(number.astype(np.float64).astype(np.float32))
    if not finite:
        raise ValueError(
            f"`{call}` needs scales that are finite in float32, got {value}. "
            "Choose a number such as 0.8."
        )
    return float(number)


def _check_real_scalar(
    call: str,
    value: Number,
    number: np.ndarray | jax.Array,
) -> None:
    """**Raises:** `ValueError` unless `number`, the value as an array, is one real number."""
    floating = jnp.issubdtype(number.dtype, jnp.floating)
    real = floating or jnp.issubdtype(number.dtype, jnp.integer)
    if number.ndim or not real:
        raise ValueError(
            f"`{call}` needs one number as the scale of an adapter, got {value!r}. "
            "Pass one per adapter."
        )


def is_known_zero(scale: CheckedNumber) -> bool:
    """Return whether a scale is 0; False for a traced one, whose value is not known yet."""
    return not isinstance(scale, jax.core.Tracer) and bool(scale == 0)


def weight_scale(scale: CheckedScale, name: str) -> CheckedNumber:
    """Return the scale of one weight.

    **Arguments:**

    - `scale`: of the whole adapter.
    - `name`: of the weight.

    **Returns:** 0 where a mapping has no prefix that fits.
    """
    if not isinstance(scale, Mapping):
        return scale
    fitting = [prefix for prefix in scale if has_name_prefix(name, prefix)]
    if not fitting:
        # A mapping without "" is for the weights that it names; the others stay as they are.
        return 0.0
    return scale[max(fitting, key=len)]


def has_name_prefix(name: str, prefix: str) -> bool:
    """Return whether a weight's name begins with these whole fields; "" is a prefix of all."""
    return prefix == "" or name == prefix or name.startswith(f"{prefix}.")


def negate_scale(scale: CheckedScale) -> CheckedScale:
    """Return the scale that subtracts what this one adds."""
    if isinstance(scale, Mapping):
        return {prefix: -value for prefix, value in scale.items()}
    return -scale
