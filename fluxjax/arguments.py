"""Arguments of public functions: NumPy arrays, lists and scalars become what the annotations ask for, or one clear error."""

import functools
import inspect
import operator
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from beartype.door import is_bearable

from fluxjax.shapes import CHECKS, PRNGKeyArray

Function = TypeVar("Function", bound=Callable[..., Any])
_EMPTY = inspect.Parameter.empty
_NAMES = {
    int: "an integer",
    float: "a number",
    complex: "a number",
    np.number: "a number",
    bool: "a bool",
    np.bool_: "a bool",
    type(None): "None",
}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def convert_arguments(function: Function) -> Function:
    """Decorate a public function so that each argument may be what stands for its annotated type.

    Where an array is annotated, NumPy arrays, lists and Python numbers are made JAX arrays: float64 becomes the default float
    dtype, and integers in a list become floats where floats are annotated. Where a Python number is annotated, NumPy and JAX
    scalars are made one. A legacy PRNG key is wrapped. Traced arrays pass through.

    **Raises:** `ValueError`, as the function is called, that names the call, the argument, what it takes and what came.
    """
    signature = inspect.signature(function)
    annotations = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.kind not in _VARIADIC and parameter.annotation is not _EMPTY
    }
    call = function.__qualname__.removesuffix(".__call__").removesuffix(".__init__")

    @functools.wraps(function)
    def converted(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # an argument is missing or unknown: Python's own message names it
            return function(*args, **kwargs)
        # A context of its own: the names of dimensions must not meet those of the function that calls this one.
        with jaxtyping.jaxtyped("context"):
            for name in bound.arguments.keys() & annotations.keys():
                bound.arguments[name] = _converted(
                    call, name, bound.arguments[name], annotations[name]
                )
        return function(*bound.args, **bound.kwargs)

    converted.converts_arguments = True  # type: ignore[attr-defined]  # the tests look for it
    return cast(Function, converted)


def check_key(call: str, key: Any) -> jax.Array:
    """Return one PRNG key; a legacy one, as of `jax.random.PRNGKey`, is wrapped.

    **Raises:** `ValueError` for a batch of keys, or what is not a key.
    """
    made = jax.random.wrap_key_data(jnp.asarray(key)) if _is_legacy_key(key) else key
    if (
        isinstance(made, jax.Array)
        and jax.dtypes.issubdtype(made.dtype, jax.dtypes.prng_key)
        and made.ndim == 0
    ):
        return made
    raise ValueError(
        f"`{call}(key)` needs one PRNG key, got {_shown(key)}. Pass jax.random.key(0), or another seed."
    )


def _is_legacy_key(key: Any) -> bool:
    if not isinstance(key, jax.Array | np.ndarray) or key.dtype != np.uint32:
        return False
    return key.shape == jax.eval_shape(jax.random.key_data, jax.eval_shape(jax.random.key, 0)).shape


def _converted(call: str, name: str, value: Any, annotation: Any) -> Any:
    choices = _choices(annotation)
    if any(_is_key(choice) for choice in choices):
        return None if value is None and type(None) in choices else check_key(call, value)
    if isinstance(annotation, str) or _fits(value, annotation):
        return value
    for choice in choices:
        made = _made(value, choice)
        if made is not None and _fits(made, choice):
            return made
    raise ValueError(
        f"`{call}({name})` takes {_described(annotation)}, got {_shown(value)}. {_remedy(value, choices)}"
    )


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself if it is not one."""
    return (
        get_args(annotation)
        if get_origin(annotation) in (Union, types.UnionType)
        else (annotation,)
    )


def _fits(value: Any, annotation: Any) -> bool:
    return is_bearable(value, annotation, conf=CHECKS)


def _is_key(annotation: Any) -> bool:
    return annotation in get_args(PRNGKeyArray)


def _is_array(annotation: Any) -> bool:
    """Whether an annotation is of a JAX array, with or without a shape."""
    return annotation is jax.Array or getattr(annotation, "array_type", None) is jax.Array


def _made(value: Any, choice: Any) -> Any:
    """Convert a value to the annotated type `choice`; None if it can not be."""
    if _is_array(choice):
        return _array(value, getattr(choice, "dtype", jaxtyping.Shaped))
    if choice in (float, int, bool):
        return _number(value, choice)
    if get_origin(choice) is Sequence:
        return _items(list(value), *get_args(choice)) if _has_items(value) else None
    return None


def _has_items(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _array(value: Any, dtype: Any) -> jax.Array | None:
    """Return a value as a JAX array, or None if it does not stand for one of these."""
    if isinstance(value, str | bytes) or not (
        hasattr(value, "__array__") or isinstance(value, int | float | list | tuple)
    ):
        return None
    given = value if hasattr(value, "__array__") else _from_list(value)
    if given is None or np.dtype(given.dtype).kind in "OSUMm":  # objects, text and times
        return None
    integer = np.issubdtype(given.dtype, np.integer)
    # Numbers and lists are written with or without a point; an array of integers would be an image's bytes, or token ids.
    if dtype is jaxtyping.Float and integer and (given is not value or given.ndim == 0):
        return jnp.asarray(given, jnp.result_type(float))
    return jnp.asarray(given)


def _from_list(value: Any) -> Any:
    """Return a number or a list, of numbers or of arrays, as an array; None for a ragged or other list."""
    try:
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
            return jnp.asarray(value)
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _number(value: Any, kind: type) -> float | int | bool | None:
    """Return a NumPy or JAX scalar as a Python number, or None if it is of another kind, or traced."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 0 or not hasattr(value, "dtype"):
        return None
    if (
        kind is float
        and jnp.issubdtype(value.dtype, np.number)
        and not jnp.issubdtype(value.dtype, np.complexfloating)
    ):
        return float(value)
    if kind is int and jnp.issubdtype(value.dtype, np.integer):
        return operator.index(value)
    return bool(value) if kind is bool and value.dtype == np.bool_ else None


def _items(items: list, item: Any) -> list | None:
    """Convert each item of a list to its annotated type; None if one can not be."""
    choices = _choices(item)
    made = [value if _fits(value, item) else _first(value, choices) for value in items]
    return None if any(value is None for value in made) else made


def _first(value: Any, choices: tuple[Any, ...]) -> Any:
    return next((made for choice in choices if (made := _made(value, choice)) is not None), None)


def _described(annotation: Any) -> str:
    """Return an annotation as a person would write it."""
    names = dict.fromkeys(_name(choice) for choice in _choices(annotation))
    if "a number" in names:  # a union of scalars names each kind of them
        names = {name: None for name in names if name not in ("a bool", "an integer")}
    return " or ".join(names)


def _name(choice: Any) -> str:
    if getattr(choice, "array_type", None) is not None:
        dims = ", ".join(choice.dim_str.split())
        kind = {"Float": "a float array", "Int": "an integer array"}.get(
            choice.dtype.__name__, "an array"
        )
        return f"{kind} [{dims}]" if dims else "a number"
    if choice in _NAMES:
        return _NAMES[choice]
    if isinstance(choice, TypeVar):
        return _described(choice.__bound__)
    if get_origin(choice) is Sequence:
        return f"a sequence of {_described(get_args(choice)[0])}"
    if get_origin(choice) is Mapping:
        return "a mapping of names to " + _described(get_args(choice)[1])
    return (
        choice.__name__
        if isinstance(choice, type) and not get_args(choice)
        else str(choice).replace("typing.", "")
    )


def _shown(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        traced = "a traced " if isinstance(value, jax.core.Tracer) else ""
        return f"{traced}{value.dtype}{list(value.shape)}"
    plain = isinstance(value, str | int | float | complex | bytes | list | tuple | None)
    return reprlib.repr(value) if plain else f"a {type(value).__name__}"


def _remedy(value: Any, choices: tuple[Any, ...]) -> str:
    if isinstance(value, jax.core.Tracer):
        return "Inside of jit, pass it as a static argument."
    floats = any(getattr(choice, "dtype", None) is jaxtyping.Float for choice in choices)
    if (
        floats
        and isinstance(value, jax.Array | np.ndarray)
        and np.issubdtype(value.dtype, np.integer)
    ):
        return "Convert it to float32; bytes of an image are pixels / 127.5 - 1."
    if any(map(_is_array, choices)):
        return "Pass an array of this kind and shape."
    return "Pass one of these."
