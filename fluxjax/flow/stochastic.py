"""Integrators that draw noise. In the limit of many steps, each has the marginals of the flow."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.clocks import (
    PreviousEstimate,
    estimate_slope,
    half_difference,
    no_previous_estimate,
    safe_inverse,
)
from fluxjax.flow.step import (
    EvaluationTimes,
    OptionalKey,
    Step,
    StepAround,
    StepState,
    StochasticStep,
    X,
    start_time_only,
)
from fluxjax.flow.velocity import Velocity
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Scalar, ScalarLike


@convert_arguments
class ReverseSDE(StochasticStep):
    """Euler-Maruyama's step of the reverse SDE: x + h (v + g^2 noise / (2 t)) + g sqrt|h| z.

    Here h = u - t, `noise` is the estimate x + (1 - t) v, and z is drawn from N(0, 1).

    **Arguments:** `eta`: scales the default diffusion, g^2 = 2 eta t. `squared`: g^2 as another
    function of t; that of the forward diffusion, 2 t / (1 - t), is singular at t = 1.
    **Source:** Song et al. 2021 (score SDE), eq. 6 and 13; Albergo et al. 2023, eq. 2.34.
    """

    order = 1
    evaluations = 1
    eta: ScalarLike = 1.0
    squared: Callable[[Scalar], Scalar] | None = None

    def __check_init__(self):
        check_finite("ReverseSDE", eta=self.eta)

    evaluation_times = start_time_only

    def init(self, x: X) -> None:
        return None

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        """Take one Euler-Maruyama step: the drift at t over the whole step, and fresh noise."""
        v = velocity(x, t)
        if self.squared is None:
            squared = jnp.asarray(2 * self.eta * t)
        else:
            squared = jnp.asarray(self.squared(t))
        noise = x + (1 - t) * v
        drift = v + squared / (2 * t) * noise
        deviation = jnp.sqrt(squared * jnp.abs(u - t))
        return x + (u - t) * drift, deviation, None


@convert_arguments
class DDIM(StochasticStep):
    """DDIM: the x0 estimate, plus the rest of the estimated noise, plus fresh noise.

    **Arguments:** `eta`: 0 adds no fresh noise and equals Euler; 1 is DDPM's posterior, see
    `ancestral`.
    **Source:** Song et al. 2021 (DDIM), eq. 12 and 16.
    """

    order = 1
    evaluations = 1
    eta: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("DDIM", eta=self.eta)

    evaluation_times = start_time_only

    def init(self, x: X) -> None:
        return None

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        """Return the estimates of x0 and of noise mixed for u, and the deviation of fresh noise."""
        v = velocity(x, t)
        x0 = x - t * v
        noise = x + (1 - t) * v
        noise_share, deviation = ddim_noise(t, u, self.eta)
        return (1 - u) * x0 + noise_share * noise, deviation, None


def ddim_noise(t: Scalar, u: Scalar, eta: ScalarLike) -> tuple[Scalar, Scalar]:
    """Return what `DDIM` has of noise at u: the factor of the estimated, the deviation of fresh."""
    # The variance that one step of the forward process, from u to t, would add. Both
    # differences are positive but for rounding, and their roots must not be NaN.
    forward_variance = jnp.square(t) - jnp.square(u * (1 - t) / (1 - u))
    forward_deviation = jnp.sqrt(jnp.maximum(forward_variance, 0))
    deviation = jnp.asarray(eta * u / t * forward_deviation)
    noise_variance = jnp.square(u) - jnp.square(deviation)
    return jnp.sqrt(jnp.maximum(noise_variance, 0)), deviation


def ancestral() -> DDIM:
    """Return DDPM's posterior step, `DDIM(1.0)`.

    **Source:** Ho et al. 2020, eq. 7.
    """
    return DDIM(1.0)


class Renoise(StochasticStep):
    """The x0 estimate with all noise drawn anew.

    It does not converge with more steps (`order` 0), and is meant for models of a few steps.

    **Source:** Song et al. 2023 (consistency models), algorithm 1.
    """

    order = 0
    evaluations = 1
    rising = True

    evaluation_times = start_time_only

    def init(self, x: X) -> None:
        return None

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        """Return the estimate of x0, to which all the noise of u is added afresh."""
        x0 = x - t * velocity(x, t)
        return (1 - u) * x0, u, None


@convert_arguments
class DPMpp2MSDE(StochasticStep):
    """DPM-Solver++ 2M of the reverse SDE; the linear part and the noise are exact.

    **Arguments:** `eta`: 0 is `DPMpp2M`, without noise.
    **Source:** Lu et al. 2022b, eq. 19 (eta 1).
    """

    order = 1
    evaluations = 1
    eta: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("DPMpp2MSDE", eta=self.eta)

    evaluation_times = start_time_only

    def init(self, x: X) -> PreviousEstimate:
        return no_previous_estimate(x)

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: PreviousEstimate
    ) -> tuple[X, Scalar, PreviousEstimate]:
        """Integrate the linear part exactly, with x0 extrapolated from two estimates."""
        estimate = x - t * velocity(x, t)
        # e^-h, where h is the clock difference.
        ratio = u * (1 - t) / (t * (1 - u))
        slope = estimate_slope("log_snr", state, estimate, t)
        extrapolated = estimate + half_difference("log_snr", t, u) * slope
        x_part = u / t * ratio**self.eta * x
        estimate_share = (1 - u) * (1 - ratio ** (1 + self.eta))
        mean = x_part + estimate_share * extrapolated
        # Between close times the ratio may be rounded to more than 1.
        variance = jnp.maximum(1 - ratio ** (2 * self.eta), 0)
        deviation = u * jnp.sqrt(variance)
        return mean, deviation, PreviousEstimate(estimate, t)


_QUADRATURE_POINTS = 64


class ERSDE2(StochasticStep):
    """The extended reverse-time SDE solver of order 2.

    The noise scale is phi(sigma) = sigma (e^(sigma^0.3) + 10) with sigma = t / (1 - t), and the
    x0 estimate is a line in sigma. The integral of 1 / phi is taken by the midpoint rule.

    **Source:** Cui et al. 2023, algorithm 3 and ER SDE 5.
    """

    order = 1
    evaluations = 1

    evaluation_times = start_time_only

    def init(self, x: X) -> PreviousEstimate:
        return no_previous_estimate(x)

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: PreviousEstimate
    ) -> tuple[X, Scalar, PreviousEstimate]:
        """Integrate with the estimate of x0, and its slope between the last two."""
        estimate = x - t * velocity(x, t)
        # Sigma at both ends of the step.
        start = t / (1 - t)
        end = u / (1 - u)
        ratio = _noise_scale(end) / _noise_scale(start)
        # (1 - u) / (1 - t) times the ratio, in a form that is finite at t = 1.
        x_share = (1 - u) * _noise_scale(end) / (t * (jnp.exp(start**0.3) + 10))
        estimate_share = (1 - u) * (1 - ratio)
        mean = x_share * x + estimate_share * estimate
        # The slope is per unit of sigma, which falls. Before there is a previous node it is 0.
        previous_sigma = state.t / (1 - state.t)
        difference = jnp.where(state.t > 0, start - previous_sigma, 0)
        slope = (estimate - state.estimate) * safe_inverse(difference)
        has_slope = jnp.isfinite(start) & (u > 0)
        weight = jnp.where(has_slope, self._slope_weight(start, end), 0)
        old_noise = jnp.square(_noise_scale(end) / (jnp.exp(start**0.3) + 10))
        variance = jnp.square(end) - old_noise
        deviation = (1 - u) * jnp.sqrt(jnp.maximum(variance, 0))
        mean = mean + (1 - u) * weight * slope
        return mean, deviation, PreviousEstimate(estimate, t)

    def _slope_weight(self, start: Scalar, end: Scalar) -> Scalar:
        """Return phi(end) times the integral of 1 / phi from end to start, less start - end."""
        # At t = 1 sigma is infinite. The caller ignores the result, which still has to be finite
        # so that gradients are.
        start = jnp.where(jnp.isfinite(start), start, 1.0)
        width = (start - end) / _QUADRATURE_POINTS
        indices = jnp.arange(_QUADRATURE_POINTS, dtype=start.dtype)
        points = end + (indices + 0.5) * width
        integral = jnp.sum(width / _noise_scale(points))
        return (end - start) + _noise_scale(end) * integral


def _noise_scale(sigma: Float[Array, "*points"]) -> Float[Array, "*points"]:
    return sigma * (jnp.exp(sigma**0.3) + 10)


@convert_arguments
class Churn(StepAround):
    """A deterministic step that first adds noise, and so starts from a time with more noise.

    **Arguments:**

    - `step`: the deterministic integrator.
    - `rate`: by which sigma = t / (1 - t) grows, at most sqrt(2) - 1.
    - `low`, `high`: noise is added only at times from `low` to `high`.
    - `inflation`: scales the noise that is added; 1 keeps the marginal.

    **Source:** Karras et al. 2022, algorithm 2: `rate` is min(S_churn / N, sqrt(2) - 1), and
    `inflation` is S_noise.
    """

    step: Step
    rate: ScalarLike = math.sqrt(2) - 1
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0
    inflation: ScalarLike = 1.0

    def __check_init__(self):
        check_finite(
            "Churn", rate=self.rate, low=self.low, high=self.high, inflation=self.inflation
        )

    def noisier_time(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Return the time with more noise, and how x is brought there.

        **Returns:** the new time, the factor of x, and the standard deviation of the added noise.
        """
        inside = (self.low <= t) & (t <= self.high)
        rate = jnp.where(inside, self.rate, 0).astype(t.dtype)
        # The new x is not (1 - t) x0 + sigma noise but divided by this, to stay on the path.
        whole = 1 + rate * t
        noisier = (1 + rate) * t / whole
        deviation = self.inflation * t * jnp.sqrt(rate * (2 + rate)) / whole
        return noisier, 1 / whole, jnp.asarray(deviation)

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: StepState,
        *,
        key: OptionalKey,
    ) -> tuple[X, StepState, Scalar | None]:
        if key is None:
            raise ValueError("Churn draws noise. Pass key=jax.random.key(…) to `sample`.")
        noise_key, step_key = jax.random.split(key)
        noisier, factor, deviation = self.noisier_time(t)
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        noisier_x = factor * x + deviation * noise
        x = noisier_x.astype(x.dtype)
        return self.step(velocity, x, noisier, u, state, key=step_key)

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes | None:
        noisier, _, _ = self.noisier_time(t)
        return self.step.evaluation_times(noisier, u)


def draws_noise(step: Step) -> bool:
    """Return whether a step of sampling draws noise, and so needs a key."""
    return isinstance(step, StochasticStep | Churn)


def check_draws_no_noise(call: str, step: Step, *, name: str = "step") -> None:
    """Check an integrator that is the argument `name` of a call.

    **Raises:** `ValueError` for one that draws noise.
    """
    if draws_noise(step):
        raise ValueError(
            f"`{call}({name})` needs an integrator that draws no noise, got "
            f"{type(step).__name__}. Choose another, such as Midpoint() or Euler()."
        )
