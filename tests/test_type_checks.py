"""The tests' own decorator checks the annotations of functions and dataclasses, one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from type_checks import checks_types

from fluxjax.shapes import Float, checked

lazily = checks_types(typechecker=checked)
ROW, TALL = np.zeros(2, np.float32), np.zeros((3, 2), np.float32)


def makes(result):
    """Return a function that another one defines at each call, as closures are."""

    @lazily
    def product(
        matrix: Float[np.ndarray, "rows size"], x: Float[np.ndarray, " size"], *, n=1
    ) -> Float[np.ndarray, " rows"]:
        return result

    return product


def test_sizes_of_arguments_and_of_the_result_agree_in_each_call():
    for result in (np.zeros(3, np.float32), np.ones(3, np.float32)):
        assert makes(result)(TALL, ROW, n=2) is result
        assert makes(result)(matrix=TALL, x=ROW) is result
    # Another size at another call.
    assert makes(ROW)(TALL[:2], x=ROW) is ROW
    for wrong in (makes(ROW), lambda *args: makes(ROW)(args[0], args[1][:1])):
        with pytest.raises(BeartypeCallHintViolation):
            wrong(TALL, ROW)
    with pytest.raises(TypeError, match="missing 1 required"):
        makes(ROW)(TALL)


def test_fields_methods_and_names_of_classes_are_checked():
    @lazily
    @dataclass
    class Point:
        x: float
        name: str = ""

        @lazily
        def moved(self, other: "Iterator[float] | int") -> "NoSuchName":
            return other

    assert Point(1).moved(2) == 2  # an int is a float
    for wrong in (lambda: Point("a"), lambda: Point(1.0, 2), lambda: Point(1.0).moved("a")):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()


def test_functions_and_dataclasses_of_the_package_are_checked():
    from fluxjax.flow import time_shift
    from fluxjax.nets import FluxConfig

    assert time_shift.__wrapped__.checks_types
    with pytest.raises(BeartypeCallHintViolation):
        FluxConfig(width="a")
