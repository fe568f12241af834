"""Steps that draw noise. Each has the same marginals as the flow, in the limit of many steps."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fluxjax.flow.clocks import (
    PreviousEstimate,
    no_previous_estimate,
    half_difference,
    estimate_slope,
    safe_inverse,
)
from fluxjax.flow.step import Step, StochasticStep, start_time_only
from fluxjax.flow.velocity import Velocity
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar, ScalarLike

X = Float[Array, "*shape"]


class ReverseSDE(StochasticStep):
    """Euler-Maruyama's step of the reverse diffusion with noise rate g: x + h (v + g^2 noise / (2 t)) + g sqrt|h| z.

    `squared`: g^2 as a function of t, by default 2 eta t; the forward diffusion's own, 2 t / (1 - t), is singular at 1.
    **Source:** Song et al. 2021, eq. 6 and 13; Albergo et al. 2023, eq. 2.34.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1
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
        v = velocity(x, t)
        squared = jnp.asarray(2 * self.eta * t if self.squared is None else self.squared(t))
        drift = v + squared / (2 * t) * (x + (1 - t) * v)
        return x + (u - t) * drift, jnp.sqrt(squared * jnp.abs(u - t)), None


class DDIM(StochasticStep):
    """The estimate of x0, the noise that is left, and fresh noise. eta 0 is Euler; eta 1 is DDPM's posterior, `ancestral`.

    **Source:** Song et al. 2021, eq. 12 and 16.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1
    eta: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("DDIM", eta=self.eta)

    evaluation_times = start_time_only

    def init(self, x: X) -> None:
        return None

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        v = velocity(x, t)
        image, noise = x - t * v, x + (1 - t) * v
        # What one step of the forward process would add, by its share of the noise.
        fresh = jnp.square(t) - jnp.square(u * (1 - t) / (1 - u))
        deviation = self.eta * u / t * jnp.sqrt(jnp.maximum(fresh, 0))
        kept = jnp.sqrt(jnp.maximum(jnp.square(u) - jnp.square(deviation), 0))
        return (1 - u) * image + kept * noise, jnp.asarray(deviation), None


def ancestral() -> DDIM:
    """Return DDPM's posterior step. **Source:** Ho et al. 2020, eq. 7."""
    return DDIM(1.0)


class Renoise(StochasticStep):
    """The estimate of x0 with all noise drawn anew. It does not converge with more steps: for models of a few steps alone.

    **Source:** Song et al. 2023, consistency models, algorithm 1.
    """

    order: ClassVar[int] = 0
    evaluations: ClassVar[int] = 1
    rising: ClassVar[bool] = True

    evaluation_times = start_time_only

    def init(self, x: X) -> None:
        return None

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        return (1 - u) * (x - t * velocity(x, t)), u, None


class DPMpp2MSDE(StochasticStep):
    """DPM-Solver++ 2M of the reverse diffusion, whose linear part and noise are exact. Source: Lu et al. 2022b, eq. 19 (eta 1).

    `eta`: 0 is DPM-Solver++ 2M.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1
    eta: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("DPMpp2MSDE", eta=self.eta)

    evaluation_times = start_time_only

    def init(self, x: X) -> PreviousEstimate:
        return no_previous_estimate(x)

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: PreviousEstimate
    ) -> tuple[X, Scalar, PreviousEstimate]:
        estimate = x - t * velocity(x, t)
        ratio = u * (1 - t) / (t * (1 - u))  # e^-h
        extrapolated = estimate + half_difference("log_snr", t, u) * estimate_slope(
            "log_snr", state, estimate, t
        )
        mean = u / t * ratio**self.eta * x + (1 - u) * (1 - ratio ** (1 + self.eta)) * extrapolated
        # The ratio of close times may be rounded to more than 1.
        return (
            mean,
            u * jnp.sqrt(jnp.maximum(1 - ratio ** (2 * self.eta), 0)),
            PreviousEstimate(estimate, t),
        )


_POINTS = 64


class ERSDE2(StochasticStep):
    """The extended reverse SDE, with noise by phi(sigma) = sigma (e^(sigma^0.3) + 10), and the estimate as a line.

    **Source:** Cui et al. 2023, algorithm 3 and ER SDE 5; sigma is t / (1 - t), and the integral of 1 / phi is taken by the
    midpoint rule.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    evaluation_times = start_time_only

    def init(self, x: X) -> PreviousEstimate:
        return no_previous_estimate(x)

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: PreviousEstimate
    ) -> tuple[X, Scalar, PreviousEstimate]:
        estimate = x - t * velocity(x, t)
        start, end = t / (1 - t), u / (1 - u)
        ratio = _noise_scale(end) / _noise_scale(start)
        # (1 - u) / (1 - t) times the ratio, finite at t = 1.
        kept = (1 - u) * _noise_scale(end) / (t * (jnp.exp(start**0.3) + 10))
        mean = kept * x + (1 - u) * (1 - ratio) * estimate
        # The clock of the line is sigma itself, here falling.
        moved = (estimate - state.estimate) * safe_inverse(start - state.t / (1 - state.t))
        line = jnp.where(jnp.isfinite(start) & (u > 0), self._line(start, end), 0)
        left = jnp.square(end) - jnp.square(_noise_scale(end) / (jnp.exp(start**0.3) + 10))
        deviation = (1 - u) * jnp.sqrt(jnp.maximum(left, 0))
        return mean + (1 - u) * line * moved, deviation, PreviousEstimate(estimate, t)

    def _line(self, start: Scalar, end: Scalar) -> Scalar:
        """Return what a slope of the estimate in sigma adds: phi(end) times the integral of 1 / phi, less the way."""
        finite = jnp.where(jnp.isfinite(start), start, 1.0)
        width = (finite - end) / _POINTS
        points = end + (jnp.arange(_POINTS, dtype=finite.dtype) + 0.5) * width
        return (end - finite) + _noise_scale(end) * jnp.sum(width / _noise_scale(points))


def _noise_scale(sigma: Float[Array, "*points"]) -> Float[Array, "*points"]:
    return sigma * (jnp.exp(sigma**0.3) + 10)


class Churn(Step):
    """A deterministic step from a time that is raised first, with the noise that this takes.

    `step`: the integrator. `rate`: by how much sigma = t / (1 - t) grows, at most sqrt(2) - 1. `low`, `high`: the times within
    which it does. `inflation`: of the noise, 1 keeps the marginal.
    **Source:** Karras et al. 2022, algorithm 2: rate is min(S_churn / N, sqrt(2) - 1), inflation S_noise.
    """

    rising: ClassVar[bool] = False
    span: ClassVar[tuple[float, float]] = (0.0, 1.0)
    step: Step
    rate: ScalarLike = math.sqrt(2) - 1
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0
    inflation: ScalarLike = 1.0

    def __check_init__(self):
        check_finite(
            "Churn", rate=self.rate, low=self.low, high=self.high, inflation=self.inflation
        )

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.step.order

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return self.step.evaluations

    def init(self, x: X) -> Any:
        return self.step.init(x)

    def raised(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Return the raised time, the factor of x that leads there, and the deviation of the noise that is added."""
        rate = jnp.where((self.low <= t) & (t <= self.high), self.rate, 0).astype(t.dtype)
        whole = 1 + rate * t
        return (
            (1 + rate) * t / whole,
            1 / whole,
            jnp.asarray(self.inflation * t * jnp.sqrt(rate * (2 + rate)) / whole),
        )

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: Any,
        *,
        key: PRNGKeyArray | None,
    ):
        if key is None:
            raise ValueError("Churn draws noise. Pass key=jax.random.key(…) to `sample`.")
        mine, inner = jax.random.split(key)
        higher, kept, deviation = self.raised(t)
        x = (kept * x + deviation * jax.random.normal(mine, x.shape, x.dtype)).astype(x.dtype)
        return self.step(velocity, x, higher, u, state, key=inner)

    def evaluation_times(self, t: Scalar, u: Scalar) -> tuple[Scalar, ...] | None:
        return self.step.evaluation_times(self.raised(t)[0], u)
