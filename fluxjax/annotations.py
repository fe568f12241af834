"""Annotations and values in words, for error messages about arguments."""

import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import jax
import numpy as np

Annotation = Any
"""The annotation of a parameter: a class, a union, a generic, or an array type of jaxtyping."""

_NAMES = {
    int: "an integer",
    float: "a number",
    complex: "a number",
    np.number: "a number",
    bool: "a bool",
    np.bool_: "a bool",
    str: "a string",
    type(None): "None",
}
_ARRAY_KINDS = {"Float": "a float array", "Int": "an integer array"}
_PLAIN = (str, int, float, complex, bytes, list, tuple, type(None))


def union_members(annotation: Annotation) -> tuple[Annotation, ...]:
    """Return the members of a union, or the annotation itself if it is not a union."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def describe_annotation(annotation: Annotation) -> str:
    """Return what an annotation accepts, such as "a number or a float array [images]"."""
    # A dict instead of a set: it removes repetitions and keeps the order.
    names = dict.fromkeys(map(_describe_member, union_members(annotation)))
    if "a number" in names:  # jaxtyping's ScalarLike lists bool and int as well
        names.pop("a bool", None)
        names.pop("an integer", None)
    return " or ".join(names)


def describe_value(value: object) -> str:
    """Return what came, such as "float32[2, 3]", "'a'" or "a dict"."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced {value.dtype}{list(value.shape)}"
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, _PLAIN):
        return reprlib.repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    article = "an" if name[0] in "AEIOUaeiou" else "a"
    return f"{article} {name}"


def _describe_member(member: Annotation) -> str:
    """Return one type of an annotation in words: an array by its shape, others by their names."""
    if hasattr(member, "array_type"):
        return _describe_array(member)
    if isinstance(member, TypeVar):
        return describe_annotation(member.__bound__)
    origin = get_origin(member)
    parameters = get_args(member)
    if origin is Sequence:
        items = describe_annotation(parameters[0])
        return f"a sequence of {items}"
    if origin is Mapping:
        items = describe_annotation(parameters[1])
        return f"a mapping of names to {items}"
    if origin is Literal:
        return " or ".join(map(repr, parameters))
    # A function is annotated with or without its parameters.
    if Callable in (member, origin):
        return "a function"
    if member in _NAMES:
        return _NAMES[member]
    if isinstance(member, type) and not parameters:
        return member.__name__
    return str(member).replace("typing.", "")


def _describe_array(annotation: Annotation) -> str:
    """Return the kind and the dimensions of an array type of jaxtyping."""
    dims = ", ".join(annotation.dim_str.split())
    if not dims:
        return "a number"
    name = annotation.dtype.__name__
    kind = _ARRAY_KINDS.get(name, "an array")
    return f"{kind} [{dims}]"
