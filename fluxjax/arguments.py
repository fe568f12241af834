"""Arguments of public functions and classes: checked, and converted to their annotated types."""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

from fluxjax.annotations import Annotation, describe_annotation, describe_value, union_members
from fluxjax.shapes import Array, PRNGKeyArray, beartype_conf

Function = Callable[..., Any]
"""A function of any signature."""

Target = TypeVar("Target", bound=Function)
"""A function or a class."""

Value = Any
"""An argument, before or after its conversion."""

Arguments = tuple[tuple[Value, ...], dict[str, Value]]
"""The positional and the keyword arguments of a call."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class _ArgumentError(Exception):
    """An argument that does not fit; the decorated function raises it as a `ValueError`."""


def convert_arguments(target: Target) -> Target:
    """Decorate a public function or class so that it checks and converts its arguments.

    - Where an array is annotated, NumPy arrays, lists and Python numbers become JAX arrays.
      float64 becomes JAX's default float dtype. Integers in a list, and single integers, become
      floats where floats are annotated.
    - Where a Python number is annotated, NumPy and JAX scalars become one.
    - A legacy PRNG key, as of `jax.random.PRNGKey`, becomes a new-style key.
    - Everything else has to be of its annotated type. Traced arrays pass through.

    A class is decorated by its `__init__`; each subclass needs a decorator of its own.

    **Raises:** `ValueError` when called, which names the call, the argument, what it takes, and
    what it got.
    """
    if isinstance(target, type):
        initialize = _converting(target.__init__, target.__qualname__)  # type: ignore[misc]
        # jaxtyping's import hook would check the fields once more, before this, and with other
        # errors.
        initialize.__no_type_check__ = True  # type: ignore[attr-defined]
        target.__init__ = initialize  # type: ignore[misc]
        return cast(Target, target)
    return cast(Target, _converting(target, target.__qualname__.removesuffix(".__call__")))


def _converting(function: Function, call: str) -> Function:
    """Return a function that converts its arguments before it calls another one.

    **Arguments:** `call`: what errors name. They are `ValueError`.
    """

    @functools.wraps(function)
    def converted(*args: Value, **kwargs: Value) -> Value:
        try:
            args, kwargs = _convert_all(function, call, args, kwargs)
        except _ArgumentError as error:
            # Raised here and without its cause, so that the traceback ends at the user's own line.
            raise ValueError(str(error)) from None
        return function(*args, **kwargs)

    converted.converts_arguments = True  # type: ignore[attr-defined]  # for the tests
    return converted


@functools.cache
def _annotations(function: Function) -> tuple[inspect.Signature, dict[str, Annotation]]:
    """Return the signature of a function and the annotations of its single parameters.

    They are read at the first call: `inspect.signature` at each decoration would slow down the
    import of the package.
    """
    signature = inspect.signature(function)
    annotations = {}
    for name, parameter in signature.parameters.items():
        annotation = parameter.annotation
        # An annotation that is a string names a class that was not defined yet.
        unknown = annotation is inspect.Parameter.empty or isinstance(annotation, str)
        if not unknown and parameter.kind not in _VARIADIC:
            annotations[name] = annotation
    return signature, annotations


def _convert_all(
    function: Function, call: str, args: tuple[Value, ...], kwargs: dict[str, Value]
) -> Arguments:
    """Return the arguments of a call, converted to what the function is annotated with.

    **Raises:** `_ArgumentError` for one that can't be.
    """
    signature, annotations = _annotations(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # an argument is missing or unknown: the call itself raises Python's error
        return args, kwargs
    # The sizes of named dimensions are those of this call, not of a caller that is checked too.
    with jaxtyping.jaxtyped("context"):
        for name, value in bound.arguments.items():
            if name in annotations:
                bound.arguments[name] = _convert(call, name, value, annotations[name])
    return bound.args, bound.kwargs


def _convert(call: str, name: str, value: Value, annotation: Annotation) -> Value:
    """Return an argument as it is, or converted to the first type of its annotation that it fits.

    **Arguments:** `call`, `name`: of the function and the argument, for errors.
    **Raises:** `_ArgumentError` that says what is expected.
    """
    members = union_members(annotation)
    if any(map(_is_key, members)):
        if value is None and type(None) in members:
            return None
        return _convert_key(call, name, value)
    if _fits(value, annotation):
        return value
    for member in members:
        result = _convert_to(value, member)
        if result is not None and _fits(result, member):
            return result
    expected = describe_annotation(annotation)
    remedy = _remedy(value, annotation)
    raise _ArgumentError(
        f"`{call}({name})` takes {expected}, got {describe_value(value)}. {remedy}"
    )


def _fits(value: object, annotation: Annotation) -> bool:
    # Imported at the first call: beartype takes a tenth of a second.
    from beartype.door import is_bearable

    return is_bearable(value, annotation, conf=beartype_conf())


def _convert_key(call: str, name: str, key: Value) -> Array:
    """Return one PRNG key of the new style."""
    if _is_legacy_key(key):
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if isinstance(key, jax.Array):
        is_key = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        # One key: a batch of keys has dimensions.
        if is_key and key.ndim == 0:
            return key
    raise _ArgumentError(
        f"`{call}({name})` needs one PRNG key, got {describe_value(key)}. "
        "Pass jax.random.key(0), or another seed."
    )


def _is_legacy_key(key: object) -> bool:
    """Return whether an array is a key of `jax.random.PRNGKey`, whose type is not that of keys."""
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    if key.dtype != np.uint32:
        return False
    # The length of its data depends on the default implementation of random numbers.
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return key.shape == data.shape


def _is_key(annotation: Annotation) -> bool:
    return annotation in get_args(PRNGKeyArray)


def _is_array(annotation: Annotation) -> bool:
    """Return whether an annotation is a JAX array, with or without a shape."""
    return annotation is jax.Array or getattr(annotation, "array_type", None) is jax.Array


def _is_float_array(annotation: Annotation) -> bool:
    return getattr(annotation, "dtype", None) is jaxtyping.Float


def _convert_to(value: Value, member: Annotation) -> Value:
    """Return a value converted to one annotated type, or None if that is not possible."""
    if _is_array(member):
        return _to_array(value, floats=_is_float_array(member))
    if member in (float, int, bool):
        return _to_number(value, member)
    if get_origin(member) is Sequence and _has_items(value):
        return _to_list(list(value), get_args(member)[0])
    return None


def _has_items(value: object) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _to_array(value: Value, *, floats: bool) -> Array | None:
    """Return a value as a JAX array, or None if it does not stand for one.

    `floats`: whether integers that are numbers or lists become floats.
    """
    if hasattr(value, "__array__"):
        array = value
    elif isinstance(value, int | float | list | tuple):
        array = _list_to_array(value)
    else:
        return None
    if array is None:
        return None
    if np.dtype(array.dtype).kind in "OSUMm":  # objects, text and dates
        return None
    # 1 is written for 1.0 as a number or in a list; an array of integers holds the bytes of an
    # image or token ids, and is refused where floats are annotated.
    written = array is not value or array.ndim == 0
    integers = np.issubdtype(array.dtype, np.integer)
    if floats and written and integers:
        default_float = jnp.result_type(float)
        return jnp.asarray(array, default_float)
    return jnp.asarray(array)


def _list_to_array(value: Value) -> np.ndarray | Array | None:
    """Return a number, or a list of numbers or arrays, as an array; None for a ragged list."""
    try:
        leaves = jax.tree.leaves(value)
        # NumPy would copy JAX arrays to the host, and fail on traced ones.
        if any(isinstance(leaf, jax.Array) for leaf in leaves):
            return jnp.asarray(value)
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _to_number(value: Value, kind: type) -> float | int | bool | None:
    """Return a NumPy or JAX scalar as a Python number; None if it is traced or of another kind."""
    if isinstance(value, jax.core.Tracer):
        return None
    if not hasattr(value, "dtype") or np.ndim(value) != 0:
        return None
    dtype = value.dtype
    number = jnp.issubdtype(dtype, np.number)
    if kind is float and number and not jnp.issubdtype(dtype, np.complexfloating):
        return float(value)
    if kind is int and jnp.issubdtype(dtype, np.integer):
        return operator.index(value)
    if kind is bool and dtype == np.bool_:
        return bool(value)
    return None


def _to_list(values: list[Value], item: Annotation) -> list[Value] | None:
    """Return a list of items converted to their annotated type; None if one can not be."""
    converted = []
    for value in values:
        if not _fits(value, item):
            value = _convert_to_any(value, union_members(item))
        if value is None:
            return None
        converted.append(value)
    return converted


def _convert_to_any(value: Value, members: tuple[Annotation, ...]) -> Value:
    for member in members:
        result = _convert_to(value, member)
        if result is not None:
            return result
    return None


def _remedy(value: Value, annotation: Annotation) -> str:
    """Return the sentence of the error message that says what to do."""
    members = union_members(annotation)
    arrays = [member for member in members if _is_array(member)]
    takes_floats = any(map(_is_float_array, members))
    if isinstance(value, type):
        return f"Pass an instance, such as {value.__name__}()."
    if isinstance(value, jax.core.Tracer) and not arrays:
        return "Under jit, pass it as a static argument."
    integers = hasattr(value, "dtype") and np.issubdtype(value.dtype, np.integer)
    if takes_floats and integers:
        return "Convert it to float32; bytes of an image are pixels / 127.5 - 1."
    # A scalar of jaxtyping is an array type without dimensions.
    if any(getattr(array, "dim_str", "all") for array in arrays):
        return (
            "Pass an array of this kind and shape. Dimensions of one name have the same size in "
            "all arguments."
        )
    return "Pass a value of this type."
