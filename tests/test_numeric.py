"""Checks of numbers, and how text of a file is printed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.numeric import check_finite
from fluxjax.printable import printable


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        np.float32("-inf"),
        jnp.float32("nan"),
        np.array([1.0, np.nan]),
        10**400,
        [1.0, np.inf],
    ],
)
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match=r"`sample\(times\)` needs finite numbers"):
        check_finite("sample", times=value)


@pytest.mark.parametrize(
    "value", [None, 1, 2.5, np.float32(1), jnp.bfloat16(1), np.zeros(3), np.int64(2**62), True]
)
def test_finite_numbers_pass(value):
    check_finite("sample", times=value)


def test_traced_numbers_pass():
    def double(x):
        check_finite("double", x=x)
        return x * 2

    assert np.isnan(jax.jit(double)(np.nan))


def test_what_does_not_print_is_escaped():
    assert printable("a\x1b[2K\r\nwhole é ⭐\u202e") == r"a\x1b[2K\r\nwhole é ⭐\u202e"
    assert printable("x" * 500) == "x" * 199 + "…"
