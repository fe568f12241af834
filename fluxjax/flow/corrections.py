"""Corrections of an estimate of x0 by a measurement: their interface, and the one without noise."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import equinox as eqx

from fluxjax.arguments import convert_arguments
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.normal_equations import linearize, pseudo_inverse
from fluxjax.flow.step import X
from fluxjax.numeric import check_count
from fluxjax.shapes import Array, Scalar

CovarianceName = Literal["model", "white", "none"]
"""How a `Gain` approximates the covariance of x0 given x_t."""
Field = Callable[[Array], Array]
"""The velocity at one time: x -> dx/dt."""


class Corrected(NamedTuple):
    """One evaluation of a velocity with its correction.

    - `velocity`: v, without the measurement.
    - `estimate`: of x0, given the measurement.
    """

    velocity: Array
    estimate: Array


class Correction(eqx.Module):
    """How the estimate of x0 is corrected by a measurement.

    - `differentiates`: whether it takes derivatives of the velocity.
    """

    differentiates: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, field: Field, x: X, t: Scalar, measurement: Measurement) -> Corrected:
        """Evaluate the velocity at x, and correct its estimate x - t v.

        **Arguments:** `field`: the velocity at t. `x`: at least float32. `t`: in (0, 1).
        """

    def with_log_likelihood(
        self, field: Field, x: X, t: Scalar, measurement: Measurement
    ) -> tuple[Corrected, Scalar]:
        """Return the correction and the approximate log p(y | x_t), for `twisted_sample`."""
        raise ValueError(
            f"{type(self).__name__} approximates no likelihood of the measurement. Use a `Gain`, "
            "such as `tmpd()` or `proximal()`."
        )


@convert_arguments
class NullSpace(Correction):
    """The estimate with what was measured put in its place: estimate + A^+ (y - A(estimate)).

    What A does not see, its null space, is kept. The noise of the measurement is ignored.

    **Arguments:** `iterations`: of conjugate gradients, unless A A^T is diagonal.
    **Raises:** `ValueError` for fewer than 1 iteration.
    **Source:** Wang et al. 2022 (DDNM), eq. 10.
    """

    iterations: int = eqx.field(default=5, static=True)

    def __check_init__(self):
        check_count("NullSpace", iterations=self.iterations)

    def __call__(self, field: Field, x: X, t: Scalar, measurement: Measurement) -> Corrected:
        velocity = field(x)
        estimate = x - t * velocity
        near = linearize(measurement.operator, estimate)
        residual = measurement.residual(near.value)
        change = pseudo_inverse(
            near.forward, near.backward, residual, self.iterations, gram=near.gram
        )
        return Corrected(velocity, estimate + change)
