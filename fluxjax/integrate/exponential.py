"""Exponential integrators: exact where x0's estimate is constant, so that any of them ends on it.

D(t) = x - t v is the estimate of x0. From t to u, x / t changes by the integral of D over e^c, where c is a clock:
log((1 - t) / t), half of the log-SNR, or -log t. Steps take D as a polynomial in c, and in the last one, to u = 0
where c is infinite, as a constant.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from fluxjax.integrate.base import Step, Velocity, at_start, scalar_like
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar

X = Float[Array, "*shape"]
Clock = Literal["log_snr", "log_time"]


def read_clock(clock: Clock, t: Scalar) -> Scalar:
    """Return c at t: infinite at 0, and -infinite at 1 where the clock is the log-SNR's."""
    return jnp.log((1 - t) / t) if clock == "log_snr" else -jnp.log(t)


def halfway(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return the time at which the clock has gone half of its way from t to u; 0 for u = 0, 1 for t = 1 by the log-SNR."""
    noise = jnp.sqrt(t * u)
    if clock == "log_time":
        return noise
    # In shares of image and noise nothing is infinite.
    whole = noise + jnp.sqrt((1 - t) * (1 - u))
    return jnp.where(whole > 0, noise / jnp.where(whole > 0, whole, 1), 0)


def line_weight(clock: Clock, t: Scalar, u: Scalar) -> Scalar:
    """Return u times the integral of e^c (c - c_t) dc from t to u: what a slope of D adds. 0 for u = 0 and for t = 1."""
    way = read_clock(clock, u) - read_clock(clock, t)
    weight = way - 1 + u / t if clock == "log_time" else (1 - u) * (way - 1) + u * (1 - t) / t
    return jnp.where((u > 0) & jnp.isfinite(way), weight, 0)


def _constant(x: X, t: Scalar, u: Scalar, estimate: X) -> X:
    """Return x at u for an estimate that stays."""
    return u / t * x + (1 - u / t) * estimate


class Past(NamedTuple):
    """The estimate at the node before, and its clock: infinite before the first, so that slopes are 0."""

    estimate: Array
    clock: Scalar


def no_past(x: X) -> Past:
    return Past(x * 0, scalar_like(x, -float("inf")))


def slope(past: Past, estimate: X, clock: Scalar) -> X:
    """Return how fast the estimate has moved since the node before, a unit of the clock; 0 if that was at -infinity."""
    return (estimate - past.estimate) * jnp.where(jnp.isfinite(past.clock), 1 / (clock - past.clock), 0)


class _OneStep(Step):
    clock: Clock = eqx.field(static=True, default="log_snr")

    def init(self, x: X) -> None:
        return None

    def asked(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...]:
        return t, halfway(self.clock, t, u)


class _Multistep(Step):
    clock: Clock = eqx.field(static=True, default="log_snr")

    asked = at_start

    def init(self, x: X) -> Any:
        return no_past(x)


class DPMpp2S(_OneStep):
    """DPM-Solver++ 2S: the estimate halfway by the clock, for the whole step. Source: Lu et al. 2022b, algorithm 1, r = 1/2."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __call__(self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None, *, key: PRNGKeyArray | None):
        middle = halfway(self.clock, t, u)
        there = _constant(x, t, middle, x - t * velocity(x, t))
        return _constant(x, t, u, there - middle * velocity(there, middle)), None, None


class RES2S(_OneStep):
    """The refined exponential solver: the estimate as a line through its values at t and halfway, integrated exactly.

    **Source:** Zhang et al. 2023, algorithm 1 with c2 = 1/2; Hochbruck & Ostermann 2010, example 2.18.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __call__(self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None, *, key: PRNGKeyArray | None):
        middle = halfway(self.clock, t, u)
        estimate = x - t * velocity(x, t)
        there = _constant(x, t, middle, estimate)
        moved = there - middle * velocity(there, middle) - estimate
        way = read_clock(self.clock, u) - read_clock(self.clock, t)
        share = line_weight(self.clock, t, u) * jnp.where(jnp.isfinite(way), 2 / way, 0)
        return _constant(x, t, u, estimate) + share * moved, None, None


class DPMpp2M(_Multistep):
    """DPM-Solver++ 2M: the estimate extrapolated half a step. Source: Lu et al. 2022b, algorithm 2."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def __call__(self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: Past, *, key: PRNGKeyArray | None):
        estimate, now = x - t * velocity(x, t), read_clock(self.clock, t)
        return _half_extrapolated(self.clock, x, t, u, state, estimate), Past(estimate, now), None


def _half_extrapolated(clock: Clock, x: X, t: Scalar, u: Scalar, past: Past, estimate: X) -> X:
    now = read_clock(clock, t)
    half = jnp.where(u > 0, (read_clock(clock, u) - now) / 2, 0)
    # From t = 1 by the log-SNR the way is infinite too, but there nothing is past.
    half = jnp.where(jnp.isfinite(half), half, 0)
    return _constant(x, t, u, estimate + half * slope(past, estimate, now))


class RES2M(_Multistep):
    """The estimate as the line through the last two nodes, integrated exactly. Source: Zhang et al. 2023, section 3.3."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def __call__(self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: Past, *, key: PRNGKeyArray | None):
        estimate, now = x - t * velocity(x, t), read_clock(self.clock, t)
        line = line_weight(self.clock, t, u) * slope(state, estimate, now)
        return _constant(x, t, u, estimate) + line, Past(estimate, now), None


class DEIS2(Step):
    """The noise's estimate as the line in t through the last two nodes, integrated exactly (tAB-DEIS).

    **Source:** Zhang & Chen 2022, eq. 15, on the straight path.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    asked = at_start

    def init(self, x: X) -> tuple[X, Scalar]:
        return x * 0, scalar_like(x, float("inf"))

    def __call__(self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: tuple[X, Scalar], *, key: PRNGKeyArray | None):
        before, last = state
        v = velocity(x, t)
        noise = x + (1 - t) * v
        # (1 - u) times the integral of (s - t) / (1 - s)^2 ds.
        ratio = jnp.where((t < 1) & (u > 0), (1 - t) / (1 - u), 1)
        line = (1 - u) * (ratio - 1 - jnp.log(ratio))
        return x + (u - t) * v + line / (t - last) * (noise - before), (noise, t), None


class Corrected(NamedTuple):
    """The start of the last step, and the estimates at its start and before it."""

    x: Array
    t: Scalar
    last: Past
    earlier: Past
    seen: Array


class UniPC2(_Multistep):
    """DPM-Solver++ 2M's predictor, and a corrector that takes each step again with the estimate found at its end, which costs
    no evaluation and raises the order by one. Source: Zhao et al. 2023, algorithms 1 and 2, B(h) = e^h - 1 (bh2), for p = 2."""

    order: ClassVar[int] = 3
    evaluations: ClassVar[int] = 1

    def init(self, x: X) -> Corrected:
        return Corrected(x, scalar_like(x, 1.0), no_past(x), no_past(x), jnp.int32(0))

    def __call__(self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: Corrected, *, key: PRNGKeyArray | None):
        estimate, now = x - t * velocity(x, t), read_clock(self.clock, t)
        x = jnp.where(state.seen > 0, self._corrected(state, t, now, estimate), x)
        end = _half_extrapolated(self.clock, x, t, u, state.last, estimate)
        return end, Corrected(x, t, Past(estimate, now), state.last, state.seen + 1), None

    def _corrected(self, state: Corrected, t: Scalar, now: Scalar, estimate: X) -> X:
        """Return x at t, from the start of the step before and the estimate that was found at t."""
        way = now - state.last.clock
        # phi-functions of -way; an infinite way has their limits.
        first, second = _corrector_rows(jnp.where(jnp.isfinite(way), way, 1))
        first, second = (jnp.where(jnp.isfinite(way), row, 1) for row in (first, second))
        back = (state.earlier.clock - state.last.clock) / way
        two = (state.seen > 1) & jnp.isfinite(back)
        back = jnp.where(two, back, -1)
        older = jnp.where(two, (first - second) / (1 - back), 0)
        newer = jnp.where(state.seen > 1, first - older, 0.5)
        moved = newer * (estimate - state.last.estimate) + older / back * (state.earlier.estimate - state.last.estimate)
        return _constant(state.x, state.t, t, state.last.estimate + moved)


def _corrector_rows(way: Scalar) -> tuple[Scalar, Scalar]:
    """Return the right-hand sides of UniPC's conditions: phi_2 and 2 phi_3 over phi_1, of -way."""
    base = jnp.expm1(-way)
    first = base / -way - 1
    return first / base, 2 * (first / -way - 0.5) / base
