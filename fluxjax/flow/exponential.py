"""Exponential integrators: exact where the x0 estimate is constant, so that each ends on it.

The estimate of x0 is D(t) = x - t v. From t to u, x / t changes by the integral of D over e^c,
where c is a clock (see `clocks`). A step takes D as a polynomial in c, or as a constant if c is
infinite at one of its ends.

With a constant D every step is Euler's, x + (u - t) v. The steps here therefore add to Euler's
only what a change of D contributes. That keeps the digits of float32, and it is finite at t = 0,
where steps to rising times begin. All that a step adds to x is summed first: between close times
the contribution of D is less than half of the last digit of x, and would be rounded away at every
step if it were added alone.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.clocks import (
    Clock,
    PreviousEstimate,
    clock_difference,
    constant_weight,
    estimate_slope,
    half_difference,
    middle_time,
    no_previous_estimate,
    phi2,
    phi3,
    safe_inverse,
    slope_weight,
)
from fluxjax.flow.step import (
    EvaluationTimes,
    OptionalKey,
    Step,
    StepState,
    X,
    scalar_like,
    start_time_only,
)
from fluxjax.flow.velocity import Velocity
from fluxjax.shapes import Array, Scalar


class _ExponentialStep(Step):
    """A step whose clock is defined only from t = 0 to 1."""

    span = (0.0, 1.0)
    clock: Clock = eqx.field(static=True, default="log_snr")


class _OneStep(_ExponentialStep):
    def init(self, x: X) -> None:
        return None

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes:
        return t, middle_time(self.clock, t, u)


class _Multistep(_ExponentialStep):
    evaluation_times = start_time_only

    def init(self, x: X) -> StepState:
        return no_previous_estimate(x)


@convert_arguments
class DPMpp2S(_OneStep):
    """DPM-Solver++ 2S: the estimate at the middle of the clock, for the whole step.

    **Source:** Lu et al. 2022b, algorithm 1, r = 1/2.
    """

    order = 2
    evaluations = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: OptionalKey,
    ) -> tuple[X, None, None]:
        v, change = _change_at_middle(self.clock, velocity, x, t, u)
        correction = constant_weight(t, u) * change
        return x + ((u - t) * v + correction), None, None


@convert_arguments
class RES2S(_OneStep):
    """Refined exponential solver, one-step: the estimate as a line, integrated exactly.

    The line goes through the estimates at t and at the middle of the clock.

    **Source:** Zhang et al. 2023, algorithm 1 with c2 = 1/2; Hochbruck & Ostermann 2010, example
    2.18.
    """

    order = 2
    evaluations = 2

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: None,
        *,
        key: OptionalKey,
    ) -> tuple[X, None, None]:
        v, change = _change_at_middle(self.clock, velocity, x, t, u)
        difference = clock_difference(self.clock, t, u)
        # The slope is the change over half of the clock difference.
        weight = slope_weight(self.clock, t, u) * 2 * safe_inverse(difference)
        correction = weight * change
        return x + ((u - t) * v + correction), None, None


def _change_at_middle(clock: Clock, velocity: Velocity, x: X, t: Scalar, u: Scalar) -> tuple[X, X]:
    """Return the velocity at t, and the change of the x0 estimate from t to the middle time."""
    middle = middle_time(clock, t, u)
    v = velocity(x, t)
    estimate = x - t * v
    x_middle = x + (middle - t) * v
    v_middle = velocity(x_middle, middle)
    return v, x_middle - middle * v_middle - estimate


@convert_arguments
class DPMpp2M(_Multistep):
    """DPM-Solver++ 2M: the estimate, extrapolated by half a step, for the whole step.

    **Source:** Lu et al. 2022b, algorithm 2.
    """

    order = 2
    evaluations = 1

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: PreviousEstimate,
        *,
        key: OptionalKey,
    ) -> tuple[X, PreviousEstimate, None]:
        v = velocity(x, t)
        estimate = x - t * v
        slope = estimate_slope(self.clock, state, estimate, t)
        change = half_difference(self.clock, t, u) * slope
        correction = constant_weight(t, u) * change
        end = x + ((u - t) * v + correction)
        return end, PreviousEstimate(estimate, t), None


@convert_arguments
class RES2M(_Multistep):
    """Refined exponential solver, multistep: the estimate as a line, integrated exactly.

    The line goes through the estimates at the last two nodes.

    **Source:** Zhang et al. 2023, section 3.3.
    """

    order = 2
    evaluations = 1

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: PreviousEstimate,
        *,
        key: OptionalKey,
    ) -> tuple[X, PreviousEstimate, None]:
        v = velocity(x, t)
        estimate = x - t * v
        slope = estimate_slope(self.clock, state, estimate, t)
        correction = slope_weight(self.clock, t, u) * slope
        end = x + ((u - t) * v + correction)
        return end, PreviousEstimate(estimate, t), None


class DEIS2(Step):
    """tAB-DEIS of order 2: the noise estimate as a line in t, integrated exactly.

    The line goes through the estimates at the last two nodes.

    **Source:** Zhang & Chen 2022, eq. 15, on the straight path.
    """

    order = 2
    evaluations = 1
    span = (0.0, 1.0)

    evaluation_times = start_time_only

    def init(self, x: X) -> tuple[X, Scalar]:
        # A previous node at infinity makes the first slope 0.
        return x * 0, scalar_like(x, float("inf"))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: tuple[X, Scalar],
        *,
        key: OptionalKey,
    ) -> tuple[X, tuple[X, Scalar], None]:
        previous_noise, previous_t = state
        v = velocity(x, t)
        noise = x + (1 - t) * v
        weight = _noise_slope_weight(t, u) / (t - previous_t)
        correction = weight * (noise - previous_noise)
        end = x + ((u - t) * v + correction)
        return end, (noise, t), None


def _noise_slope_weight(t: Scalar, u: Scalar) -> Scalar:
    """Return (1 - u) times the integral of (s - t) / (1 - s)^2 ds from t to u.

    It is set to 0 from t = 1, and to u = 0 so that the step ends on the x0 estimate.
    """
    inside = (t < 1) & (u > 0)
    regular = inside & (u < 1)
    end = jnp.where(regular, 1 - u, 1)
    # log((1 - t) / (1 - u)), by log1p for close times.
    log_ratio = jnp.log1p(jnp.where(regular, (u - t) / end, 0))
    weight = end * log_ratio**2 * phi2(log_ratio)
    # The limit of the weight for u = 1 is 1 - t.
    weight = jnp.where(u < 1, weight, 1 - t)
    return jnp.where(inside, weight, 0)


class UniPCState(NamedTuple):
    """The state of `UniPC2`.

    `x`, `velocity`: at the start of the last step. `last`, `earlier`: the x0 estimates at the
    start of the last step and of the one before it. `steps`: the number of steps taken.
    """

    x: Array
    velocity: Array
    last: PreviousEstimate
    earlier: PreviousEstimate
    steps: Array


@convert_arguments
class UniPC2(_Multistep):
    """UniPC of order 2: the predictor of DPM-Solver++ 2M, and a corrector.

    The corrector repeats each step with the estimate that was found at its end. It costs no
    evaluation and raises the order by one.

    **Source:** Zhao et al. 2023, algorithms 1 and 2, B(h) = e^h - 1 (bh2), for p = 2.
    """

    order = 3
    evaluations = 1

    def init(self, x: X) -> UniPCState:
        nothing = no_previous_estimate(x)
        return UniPCState(x, x * 0, nothing, nothing, jnp.int32(0))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: UniPCState,
        *,
        key: OptionalKey,
    ) -> tuple[X, UniPCState, None]:
        v = velocity(x, t)
        estimate = x - t * v
        x = jnp.where(state.steps > 0, self._corrected(state, t, estimate), x)
        # The estimate was evaluated at the predicted x. Keep it, and use the velocity that
        # belongs to it at the corrected x.
        started = t > 0
        v = jnp.where(started, (x - estimate) / jnp.where(started, t, 1), v)
        slope = estimate_slope(self.clock, state.last, estimate, t)
        change = half_difference(self.clock, t, u) * slope
        correction = constant_weight(t, u) * change
        end = x + ((u - t) * v + correction)
        last = PreviousEstimate(estimate, t)
        return end, UniPCState(x, v, last, state.last, state.steps + 1), None

    def _corrected(self, state: UniPCState, t: Scalar, estimate: X) -> X:
        """Return the last step taken again, to t, with the estimate that was found at t."""
        # A correction starts at the time of the step before. The first step has none before it: the
        # result is then unused, but it is computed, and its gradient must not be NaN. Starting at
        # t makes the step empty and the gradient finite.
        start = jnp.where(state.steps > 0, state.last.t, t)
        difference = clock_difference(self.clock, start, t)
        first, second = _corrector_right_sides(difference)
        # The clock of the earlier node, in units of the last step; negative. It is 0 where it is
        # unknown: gradients would make NaN of 0 times NaN.
        earlier_clock = clock_difference(self.clock, state.earlier.t, start)
        known = jnp.where(jnp.isfinite(earlier_clock), earlier_clock, 0)
        ratio = -known * safe_inverse(difference)
        usable = (state.steps > 1) & (ratio != 0)
        ratio = jnp.where(usable, ratio, -1)
        # The solution of the two order conditions.
        older = jnp.where(usable, (first - second) / (1 - ratio), 0)
        # With only one earlier node the corrector is of order 1, with the weight 1/2.
        newer = jnp.where(state.steps > 1, first - older, 0.5)
        last_change = estimate - state.last.estimate
        earlier_change = state.earlier.estimate - state.last.estimate
        change = newer * last_change + older / ratio * earlier_change
        correction = constant_weight(start, t) * change
        return state.x + ((t - start) * state.velocity + correction)


def _corrector_right_sides(difference: Scalar) -> tuple[Scalar, Scalar]:
    """Return the right-hand sides of UniPC's order conditions for a step of this clock difference.

    They are phi_2(z) / phi_1(z) and 2 phi_3(z) / phi_1(z) for z = -difference, or the limits of
    these where the difference is infinite.
    """
    finite = jnp.isfinite(difference) & (difference != 0)
    # Where the limit is returned, z only has to be finite.
    z = jnp.where(finite, -difference, 1)
    phi1 = jnp.expm1(z) / z
    limit = jnp.where(difference > 0, 1, 0)
    first = jnp.where(finite, phi2(z) / phi1, limit)
    second = jnp.where(finite, 2 * phi3(z) / phi1, limit)
    return first, second
