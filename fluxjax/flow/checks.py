"""Checks of what a sampling run is given: its times, and the values of its velocity."""

from types import ModuleType
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.flow.step import Step, time_dtype
from fluxjax.flow.velocity import AnyVelocity, Memory, Velocity
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Scalar

Number = TypeVar("Number")
"""A Python number or an array of numbers."""


def check_times(
    call: str,
    times: Array,
    *,
    step: str = "",
    rising: bool = True,
    span: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Check the times of an integration; of traced times, only their number.

    **Arguments:** `call`, `step`: the names of the function and of the integrator, for the
    messages. `rising`: whether the integrator takes rising times. `span`: the least and the
    greatest time that it takes.
    **Raises:** `ValueError` for fewer than two times, NaN or infinity, times that neither all fall
    nor all rise, rising times where `rising` is False, and times outside of `span`.
    """
    if len(times) < 2:
        raise ValueError(
            f"`{call}(times)` needs at least 2 nodes, got {len(times)}. "
            "Make them with `flow_times(steps)`."
        )
    if isinstance(times, jax.core.Tracer):
        return
    check_finite(call, times=times)
    nodes = np.asarray(times, np.float64)
    changes = np.diff(nodes)
    falls = np.all(changes < 0)
    rises = np.all(changes > 0)
    if not (falls or rises):
        # The first change against the direction from the first node to the last.
        wrong = int(np.argmax(changes * np.sign(nodes[-1] - nodes[0]) <= 0))
        raise ValueError(
            f"`{call}(times)` needs times that all fall, or all rise, got {nodes[wrong]:g} and "
            f"then {nodes[wrong + 1]:g}. Make them with `flow_times(steps)`."
        )
    least, greatest = span
    if nodes.min() < least or nodes.max() > greatest:
        raise ValueError(
            f"`{call}(times)` needs times from {least:g} to {greatest:g} for {step}, got "
            f"{nodes.min():g} to {nodes.max():g}. 1 is noise, 0 the image."
        )
    if rises and not rising:
        raise ValueError(
            f"`{call}(times)` got rising times, and {step} only goes from noise to image. Pass "
            "falling times, or invert with a step that draws no noise, such as `Euler()`, which is "
            "DDIM with eta 0."
        )


def checked_times(call: str, step: Step, times: Array, x: Array) -> Array:
    """Return times in the dtype that they have when they are used with x.

    **Raises:** as `check_times`.
    """
    times = times.astype(time_dtype(x))
    check_times(call, times, step=type(step).__name__, rising=step.rising, span=step.span)
    return times


def checked_velocity(call: str, velocity: AnyVelocity) -> Velocity:
    """Return a velocity whose values are cast to the dtype of x; see `cast_value`."""

    # A velocity without a memory takes no argument of that name, so none is passed to it.
    def field(x: Array, t: Scalar, **memory: Memory) -> Array | tuple[Array, Memory]:
        result: Any = velocity(x, t, **memory)
        if not memory:
            return cast_value(call, result, x)
        value, new_memory = result
        return cast_value(call, value, x), new_memory

    return field  # type: ignore[return-value]  # with `memory=` it returns a pair


def cast_value(call: str, value: Any, x: Array) -> Array:
    """Return a value of the velocity in the dtype of x.

    **Raises:** `ValueError` for another shape than that of x, and for a dtype that is wider or not
    floating-point.
    """
    shape = jnp.shape(value)
    dtype = jnp.result_type(value)
    fits = shape == x.shape and jnp.issubdtype(dtype, jnp.floating)
    # A wider dtype would be rounded at every step, which the user would not notice.
    if not fits or jnp.finfo(dtype).bits > jnp.finfo(x.dtype).bits:
        raise ValueError(
            f"`{call}(velocity)` needs a velocity that returns the shape of x and at most its "
            f"precision, {x.dtype}{list(x.shape)}, got {dtype}{list(shape)}. Reshape or cast what "
            "it returns."
        )
    return jnp.asarray(value, x.dtype)


def checked_fraction(call: str, name: str, value: Number, meaning: str) -> Number:
    """Return a number, or an array of numbers, after a check that all are in [0, 1].

    **Arguments:** `call`, `name`: the call and the argument. `meaning`: of both ends, a sentence
    for the message.
    **Raises:** `ValueError` unless all are in [0, 1]; at run time for traced ones.
    """
    rule = f"`{call}({name})` needs numbers in [0, 1]"
    if is_concrete_number(value):
        numbers = np.asarray(value, np.float64)
        # Written so that NaN fails.
        inside = (numbers >= 0) & (numbers <= 1)
        if not np.all(inside):
            wrong = numbers[~inside].flat[0]
            raise ValueError(f"{rule}, got {wrong:g}. {meaning}")
        return value
    array: Any = value
    outside = ~jnp.all((array >= 0) & (array <= 1))
    return eqx.error_if(value, outside, f"{rule}, and got others. {meaning}")


def check_same_shape(call: str, x: Array, **arrays: Array | None) -> None:
    """Check that arrays have the shape of x. None passes.

    **Raises:** `ValueError` for another shape.
    """
    for name, array in arrays.items():
        if array is not None and array.shape != x.shape:
            raise ValueError(
                f"`{call}({name})` needs the shape of x, {list(x.shape)}, got "
                f"{list(array.shape)}. Pack and batch both in the same way."
            )


def check_broadcasts(call: str, x: Array, **arrays: Array) -> None:
    """Check that arrays broadcast to the shape of x.

    **Raises:** `ValueError` for a shape that does not, or that is larger.
    """
    for name, array in arrays.items():
        try:
            fits = np.broadcast_shapes(array.shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"`{call}({name})` needs the shape of x, {list(x.shape)}, or one that broadcasts "
                f"to it, got {list(array.shape)}. Pack and batch both in the same way."
            )


def import_optax(call: str) -> ModuleType:
    """Return optax, which is in the optional dependencies `fluxjax[train]`.

    **Raises:** `ImportError` without it.
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError(
            f"`{call}` needs optax. Install it with: pip install 'fluxjax[train]'"
        ) from error
    return optax
