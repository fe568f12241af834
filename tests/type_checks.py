"""jaxtyping's checks of annotations, built when a function is first called.

The import hook puts `jaxtyping.jaxtyped` above each function of the package. That one builds its
checks when a function is defined: half of the time of an import, and some milliseconds for each
function that another one defines whenever it is called.
"""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable

import jaxtyping
from jaxtyping import jaxtyped

Function = Callable[..., typing.Any]

BOUND = "__beartype_func"
"""The keyword by which a function made by beartype holds the function that it calls."""

CALL = jaxtyped("context")
"""Sizes of named dimensions are the same in one call, and in others they are others."""

_checks: dict[typing.Any, types.FunctionType | None] = {}
"""For each code and annotations: beartype's function, or None if it has nothing to check."""


def use_lazy_checks() -> None:
    """Replace the decorator of jaxtyping's import hook by the one of this module."""
    jaxtyping.jaxtyped = checks_types


def checks_types(target=None, *, typechecker=None):
    """Decorate a function, or the `__init__` of a dataclass, as `jaxtyping.jaxtyped` does."""
    if target == "context":
        return CALL
    if target is None:
        return functools.partial(checks_types, typechecker=typechecker)
    if not inspect.isclass(target):
        return _check_calls(target, typechecker)
    if dataclasses.is_dataclass(target) and not hasattr(target.__init__, "checks_types"):
        target.__init__ = _check_calls(target.__init__, typechecker)
    return target


def _check_calls(function: Function, typechecker) -> Function:
    # The sizes in the annotations of a generator are bound while its body runs, not at the call.
    if inspect.isgeneratorfunction(function):
        return jaxtyped(function, typechecker=typechecker)
    if getattr(function, "__no_type_check__", False) or not function.__annotations__:
        return function
    checked = None

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        nonlocal checked
        if checked is None:
            checked = _with_checks(function, typechecker)
        with CALL:
            return checked(*args, **kwargs)

    wrapped.checks_types = True
    return wrapped


def _with_checks(function: types.FunctionType, typechecker) -> Function:
    """Return a function with checks of its arguments and its result."""
    key = _key(function)
    if key not in _checks:
        made = typechecker(_with_classes(function))
        _checks[key] = made if BOUND in (made.__kwdefaults__ or {}) else None
    if _checks[key] is None:
        return function
    return _copy(_checks[key], {**_checks[key].__kwdefaults__, BOUND: function})


def _key(function: types.FunctionType) -> typing.Hashable:
    """Return the code of a function and its annotations, by which its checks are kept."""
    annotations = []
    for name, annotation in function.__annotations__.items():
        # Of older Pythons, the arguments of a ParamSpec have no hash.
        has_hash = getattr(type(annotation), "__hash__", None) is not None
        annotations.append((name, annotation if has_hash else repr(annotation)))
    return function.__code__, tuple(annotations)


def _with_classes(function: types.FunctionType) -> types.FunctionType:
    """Return a copy whose annotations are classes where they were their names."""
    copy = _copy(function, function.__kwdefaults__)
    copy.__annotations__ = {
        name: _resolve(annotation, function.__globals__)
        for name, annotation in function.__annotations__.items()
    }
    return copy


def _resolve(annotation, namespace):
    """Return an annotation, or `Any` where only type checkers import the name."""

    def holder(value):
        del value

    holder.__annotations__ = {"value": annotation}
    try:
        return typing.get_type_hints(holder, namespace, include_extras=True)["value"]
    except NameError:
        return typing.Any


def _copy(function: types.FunctionType, keywords) -> types.FunctionType:
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = keywords
    copy.__annotations__, copy.__module__ = function.__annotations__, function.__module__
    copy.__qualname__ = function.__qualname__
    return copy
