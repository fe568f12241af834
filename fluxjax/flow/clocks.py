"""The clocks of exponential integrators: functions c(t) in which their formulas are polynomials.

The clock "log_snr" is c = log((1 - t) / t), half of the log signal-to-noise ratio. The clock
"log_time" is c = -log t. Both grow as t falls. Both are infinite at t = 0, and "log_snr" is
-infinite at t = 1; every function here has a finite value for steps that start or end there.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.flow.step import X, scalar_like
from fluxjax.shapes import Array, Scalar

Clock = Literal["log_snr", "log_time"]
"""The name of a clock."""

_SERIES_TERMS = 18


def clock_difference(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return c(u) - c(t) to the relative precision of its dtype, however close t and u are.

    It is infinite where one of the two is infinite, and NaN where both are; there its gradients
    are 0.
    """
    t_rest: Scalar | float = 1.0
    u_rest: Scalar | float = 1.0
    if clock == "log_snr":
        t_rest = 1 - t
        u_rest = 1 - u
    # log1p of the ratio of both odds minus 1. The ratio is taken so that it is above 1: then
    # nothing cancels, however close the times are.
    falls = u < t
    distance = jnp.where(falls, t - u, u - t)
    odds = jnp.where(falls, u * t_rest, t * u_rest)
    finite = odds > 0
    # Divided only where that is finite: gradients would make NaN of 0 times infinity.
    ratio = jnp.where(finite, distance, 0) / jnp.where(finite, odds, 1)
    limit = jax.lax.stop_gradient(distance) * jnp.inf
    size = jnp.where(finite, jnp.log1p(ratio), limit)
    return jnp.where(falls, size, -size)


def half_difference(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return (c(u) - c(t)) / 2, or 0 where that is infinite, so that nothing is extrapolated."""
    half = clock_difference(clock, t, u) / 2
    return jnp.where(jnp.isfinite(half), half, 0)


def middle_time(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return the time at which the clock is halfway between t and u.

    It is 0 for u = 0, and 1 for t = 1 with the clock "log_snr".
    """
    noise = _root(t) * _root(u)
    if clock == "log_time":
        return noise
    # The same from the shares of noise and image, of which none is infinite.
    image = _root(1 - t) * _root(1 - u)
    whole = noise + image
    known = whole > 0
    return jnp.where(known, noise / jnp.where(known, whole, 1), 0)


def _root(share: Scalar) -> Scalar:
    """Return the square root, with a gradient of 0 at 0 instead of an infinite one."""
    positive = share > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, share, 1)), 0)


def slope_weight(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return u times the integral of e^c (c - c(t)) dc from t to u.

    It is the factor by which a slope of the x0 estimate in c changes x at u; 0 where the clock is
    infinite.
    """
    difference = clock_difference(clock, t, u)
    finite = jnp.isfinite(difference)
    # Replaced before it is used, since a gradient would make NaN of 0 times infinity.
    difference = jnp.where(finite, difference, 0)
    # u e^c(u) of each clock.
    end = 1 - u if clock == "log_snr" else jnp.ones_like(u)
    weight = end * difference**2 * phi2(-difference)
    return jnp.where(finite, weight, 0)


def constant_weight(t: Scalar, u: Scalar) -> Scalar:
    """Return 1 - u / t: the factor by which a change of the x0 estimate changes x at u.

    It is 0 at t = 0, where the estimate is x itself.
    """
    started = t > 0
    divisor = jnp.where(started, t, 1)
    return jnp.where(started, (t - u) / divisor, 0)


def safe_inverse(difference: Scalar) -> Scalar:
    """Return 1 / difference, or 0 where that is 0, infinite or NaN: then a slope is unknown."""
    usable = jnp.isfinite(difference) & (difference != 0)
    divisor = jnp.where(usable, difference, 1)
    return jnp.where(usable, 1 / divisor, 0)


def phi2(z: Scalar) -> Scalar:
    """Return (e^z - 1 - z) / z^2, accurate near 0 as well."""
    return _phi(z, 2, lambda z: (jnp.expm1(z) - z) / z**2)


def phi3(z: Scalar) -> Scalar:
    """Return (e^z - 1 - z - z^2 / 2) / z^3, accurate near 0 as well."""
    return _phi(z, 3, lambda z: ((jnp.expm1(z) - z) / z**2 - 0.5) / z)


def _phi(z: Scalar, order: int, formula: Callable[[Scalar], Scalar]) -> Scalar:
    """Return (e^z - its Taylor polynomial of degree order - 1) / z^order.

    **Arguments:** `formula`: computes that directly, accurate where z is not near 0.
    """
    # For |z| < 1 the formula would lose its digits to cancellation, and the Taylor series does not.
    near = jnp.abs(z) < 1
    small = jnp.where(near, z, 0)
    series = jnp.zeros_like(z)
    # Horner's scheme: the sum of z^n / (n + order)!.
    for power in reversed(range(_SERIES_TERMS)):
        coefficient = 1 / math.factorial(power + order)
        series = series * small + coefficient
    far = jnp.where(near, 1, z)
    return jnp.where(near, series, formula(far))


class PreviousEstimate(NamedTuple):
    """The x0 estimate at the previous node, and the time of that node (0 before the first)."""

    estimate: Array
    t: Scalar


def no_previous_estimate(x: X) -> PreviousEstimate:
    """Return the state before the first node.

    Its time is 0, where the clock is infinite, so that every slope is 0.
    """
    return PreviousEstimate(x * 0, scalar_like(x, 0))


def estimate_slope(clock: Clock, previous: PreviousEstimate, estimate: X, t: Scalar) -> X:
    """Return the change of the x0 estimate since the previous node, per unit of the clock.

    It is 0 where the clock is infinite at either node, and before there is a previous node.
    """
    difference = clock_difference(clock, previous.t, t)
    change = estimate - previous.estimate
    return change * safe_inverse(difference)
