"""Exponential integrators: exact where x0's estimate is constant, so that any of them ends on it.

D(t) = x - t v is the estimate of x0. From t to u, x / t changes by the integral of D over e^c, where c is a clock:
log((1 - t) / t), half of the log-SNR, or -log t. Steps take D as a polynomial in c, and where c is infinite at an end of
the step, as a constant. With D constant a step is Euler's, x + (u - t) v; only what D changes by is added to that, which
keeps float32's digits and is finite at t = 0 too, where steps to rising times begin.

All that a step adds to x is summed first: over close times what D changes by is less than half of x's last digit, and added
by itself it would be rounded away at every step.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from fluxjax.flow.step import Step, at_start, scalar_like
from fluxjax.flow.velocity import Velocity
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar

X = Float[Array, "*shape"]
Clock = Literal["log_snr", "log_time"]
_TERMS = 18


def read_clock(clock: Clock, t: Scalar) -> Scalar:
    """Return c at t: infinite at 0, and -infinite at 1 where the clock is the log-SNR's."""
    return jnp.log((1 - t) / t) if clock == "log_snr" else -jnp.log(t)


def clock_way(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return c(u) - c(t), to float32's relative precision however close t and u are; infinite where either clock is, and NaN
    where both are."""
    falling, rising = (1 - t, 1 - u) if clock == "log_snr" else (1.0, 1.0)
    # The ratio of the two odds, less 1, as seen from the end with more of the image.
    return jnp.where(u < t, jnp.log1p((t - u) / (u * falling)), -jnp.log1p((u - t) / (t * rising)))


def phi2(z: Scalar) -> Scalar:
    """Return (e^z - 1 - z) / z^2, by its series near 0, where the difference would lose its digits."""
    return _phi(z, 2, lambda z: (jnp.expm1(z) - z) / z**2)


def phi3(z: Scalar) -> Scalar:
    """Return (e^z - 1 - z - z^2 / 2) / z^3, as `phi2`."""
    return _phi(z, 3, lambda z: ((jnp.expm1(z) - z) / z**2 - 0.5) / z)


def _phi(z: Scalar, order: int, direct: Any) -> Scalar:
    near = jnp.abs(z) < 1
    small = jnp.where(near, z, 0)
    series = jnp.zeros_like(z)
    for power in reversed(range(_TERMS)):
        series = series * small + 1 / math.factorial(power + order)
    return jnp.where(near, series, direct(jnp.where(near, 1, z)))


def halfway(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return the time at which the clock has gone half of its way from t to u; 0 for u = 0, 1 for t = 1 by the log-SNR."""
    noise = jnp.sqrt(t * u)
    if clock == "log_time":
        return noise
    # In shares of image and noise nothing is infinite.
    whole = noise + jnp.sqrt((1 - t) * (1 - u))
    return jnp.where(whole > 0, noise / jnp.where(whole > 0, whole, 1), 0)


def line_weight(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return u times the integral of e^c (c - c_t) dc from t to u: what a slope of D adds. 0 where a clock is infinite."""
    way = clock_way(clock, t, u)
    finite = jnp.isfinite(way)
    way = jnp.where(finite, way, 0)
    end = 1 - u if clock == "log_snr" else jnp.ones_like(u)  # u e^c(u)
    return jnp.where(finite, end * way**2 * phi2(-way), 0)


def estimate_weight(t: Scalar, u: Scalar) -> Scalar:
    """Return 1 - u / t, what a change of the estimate adds to x at u; 0 at t = 0, where the estimate is x itself."""
    return jnp.where(t > 0, (t - u) / jnp.where(t > 0, t, 1), 0)


class Past(NamedTuple):
    """The estimate at the node before, and its time: NaN before the first, so that slopes are 0."""

    estimate: Array
    t: Scalar


def no_past(x: X) -> Past:
    return Past(x * 0, scalar_like(x, float("nan")))


def inverse(way: Scalar) -> Scalar:
    """Return 1 / way, or 0 where a clock is infinite or there is no past."""
    usable = jnp.isfinite(way) & (way != 0)
    return jnp.where(usable, 1 / jnp.where(usable, way, 1), 0)


def slope(clock: Clock, past: Past, estimate: X, t: Scalar) -> X:
    """Return how fast the estimate has moved since the node before, per unit of the clock; 0 where that clock is infinite."""
    return (estimate - past.estimate) * inverse(clock_way(clock, past.t, t))


class _Exponential(Step):
    """A step by a clock, which has a meaning from 0 to 1 alone."""

    span: ClassVar[tuple[float, float]] = (0.0, 1.0)
    clock: Clock = eqx.field(static=True, default="log_snr")


class _OneStep(_Exponential):
    def init(self, x: X) -> None:
        return None

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, halfway(self.clock, t, u)


class _Multistep(_Exponential):
    evaluation_times = at_start

    def init(self, x: X) -> Any:
        return no_past(x)


class DPMpp2S(_OneStep):
    """DPM-Solver++ 2S: the estimate halfway by the clock, for the whole step. Source: Lu et al. 2022b, algorithm 1, r = 1/2."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: PRNGKeyArray | None,
    ):
        v, moved = _moved_halfway(self.clock, velocity, x, t, u)
        return x + ((u - t) * v + estimate_weight(t, u) * moved), None, None


class RES2S(_OneStep):
    """The refined exponential solver: the estimate as a line through its values at t and halfway, integrated exactly.

    **Source:** Zhang et al. 2023, algorithm 1 with c2 = 1/2; Hochbruck & Ostermann 2010, example 2.18.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: PRNGKeyArray | None,
    ):
        v, moved = _moved_halfway(self.clock, velocity, x, t, u)
        share = line_weight(self.clock, t, u) * 2 * inverse(clock_way(self.clock, t, u))
        return x + ((u - t) * v + share * moved), None, None


def _moved_halfway(clock: Clock, velocity: Velocity, x: X, t: Scalar, u: Scalar) -> tuple[X, X]:
    """Return the velocity at t, and by how much the estimate differs halfway."""
    middle, v = halfway(clock, t, u), velocity(x, t)
    there = x + (middle - t) * v
    return v, there - middle * velocity(there, middle) - (x - t * v)


class DPMpp2M(_Multistep):
    """DPM-Solver++ 2M: the estimate extrapolated half a step. Source: Lu et al. 2022b, algorithm 2."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: Past,
        *,
        key: PRNGKeyArray | None,
    ):
        v = velocity(x, t)
        estimate = x - t * v
        moved = half_way(self.clock, t, u) * slope(self.clock, state, estimate, t)
        return x + ((u - t) * v + estimate_weight(t, u) * moved), Past(estimate, t), None


def half_way(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return half of the clock's way from t to u; 0 where it is infinite, so that nothing is extrapolated there."""
    half = clock_way(clock, t, u) / 2
    return jnp.where(jnp.isfinite(half), half, 0)


class RES2M(_Multistep):
    """The estimate as the line through the last two nodes, integrated exactly. Source: Zhang et al. 2023, section 3.3."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: Past,
        *,
        key: PRNGKeyArray | None,
    ):
        v = velocity(x, t)
        estimate = x - t * v
        line = line_weight(self.clock, t, u) * slope(self.clock, state, estimate, t)
        return x + ((u - t) * v + line), Past(estimate, t), None


class DEIS2(Step):
    """The noise's estimate as the line in t through the last two nodes, integrated exactly (tAB-DEIS).

    **Source:** Zhang & Chen 2022, eq. 15, on the straight path.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1
    span: ClassVar[tuple[float, float]] = (0.0, 1.0)

    evaluation_times = at_start

    def init(self, x: X) -> tuple[X, Scalar]:
        return x * 0, scalar_like(x, float("inf"))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: tuple[X, Scalar],
        *,
        key: PRNGKeyArray | None,
    ):
        before, last = state
        v = velocity(x, t)
        noise = x + (1 - t) * v
        return (
            x + ((u - t) * v + _noise_line(t, u) / (t - last) * (noise - before)),
            (noise, t),
            None,
        )


def _noise_line(t: Scalar, u: Scalar) -> Scalar:
    """Return (1 - u) times the integral of (s - t) / (1 - s)^2 ds from t to u; 0 from t = 1 and, to end on the estimate, to
    u = 0."""
    inside = (t < 1) & (u > 0)
    end = jnp.where(inside & (u < 1), 1 - u, 1)
    # The logarithm of (1 - t) / (1 - u).
    way = jnp.log1p(jnp.where(inside & (u < 1), (u - t) / end, 0))
    return jnp.where(inside, jnp.where(u < 1, end * way**2 * phi2(way), 1 - t), 0)


class Corrected(NamedTuple):
    """The start of the last step, the velocity there, the estimates at its start and before it, and the steps so far."""

    x: Array
    velocity: Array
    last: Past
    earlier: Past
    seen: Array


class UniPC2(_Multistep):
    """DPM-Solver++ 2M's predictor, and a corrector that takes each step again with the estimate found at its end, which costs
    no evaluation and raises the order by one. Source: Zhao et al. 2023, algorithms 1 and 2, B(h) = e^h - 1 (bh2), for p = 2."""

    order: ClassVar[int] = 3
    evaluations: ClassVar[int] = 1

    def init(self, x: X) -> Corrected:
        return Corrected(x, x * 0, no_past(x), no_past(x), jnp.int32(0))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: Corrected,
        *,
        key: PRNGKeyArray | None,
    ):
        v = velocity(x, t)
        estimate = x - t * v
        x = jnp.where(state.seen > 0, self._corrected(state, t, estimate), x)
        # The estimate was found where the predictor led, and the velocity is what it stands for at the corrected x.
        v = jnp.where(t > 0, (x - estimate) / jnp.where(t > 0, t, 1), v)
        moved = half_way(self.clock, t, u) * slope(self.clock, state.last, estimate, t)
        end = x + ((u - t) * v + estimate_weight(t, u) * moved)
        return end, Corrected(x, v, Past(estimate, t), state.last, state.seen + 1), None

    def _corrected(self, state: Corrected, t: Scalar, estimate: X) -> X:
        """Return x at t, from the start of the step before and the estimate that was found at t."""
        start = state.last.t
        way = clock_way(self.clock, start, t)
        first, second = _corrector_rows(way)
        back = -clock_way(self.clock, state.earlier.t, start) * inverse(way)
        two = (state.seen > 1) & jnp.isfinite(back) & (back != 0)
        back = jnp.where(two, back, -1)
        older = jnp.where(two, (first - second) / (1 - back), 0)
        newer = jnp.where(state.seen > 1, first - older, 0.5)
        moved = newer * (estimate - state.last.estimate) + older / back * (
            state.earlier.estimate - state.last.estimate
        )
        return state.x + ((t - start) * state.velocity + estimate_weight(start, t) * moved)


def _corrector_rows(way: Scalar) -> tuple[Scalar, Scalar]:
    """Return the right-hand sides of UniPC's conditions: phi_2 and 2 phi_3 over phi_1, of -way, and their limits where it is
    infinite."""
    finite = jnp.isfinite(way) & (way != 0)
    z = jnp.where(finite, -way, 1)
    one = jnp.expm1(z) / z
    limit = jnp.where(way > 0, 1, 0)
    return jnp.where(finite, phi2(z) / one, limit), jnp.where(finite, 2 * phi3(z) / one, limit)
