"""Integrators that restore: each step also moves the x0 estimate toward a measurement.

`Decoupled` draws x0 from an approximate posterior of the estimate. `FlowDPS` and `Nudged` only move
along the gradient of the residual. None of them needs a gradient of the velocity, except `Nudged`
with `through="network"`.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.normal_equations import Linearized, linearize, pseudo_inverse, solve_normal
from fluxjax.flow.operators import Map
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
from fluxjax.numeric import check_count, check_nonnegative, check_positive
from fluxjax.shapes import Array, PRNGKeyArray, Scalar, ScalarLike

Direction = Literal["gradient", "norm", "pseudo_inverse"]
"""How an estimate is moved by its residual r = y - A(x0); J is the Jacobian of A.

"gradient" is J^T r, the descent of |r|^2 / 2. "norm" is J^T r / |r|, the descent of |r|.
"pseudo_inverse" is J^+ r, which removes the residual in one move.
"""


@convert_arguments
class Decoupled(Step):
    """Decoupled annealing: x0 drawn from its posterior near the estimate, then noised afresh.

    At each step the prior of x0 is normal around the estimate x - t v, with the variance
    rho^2 = t^2 c^2 / (t^2 + (1 - t)^2 c^2) in all directions, where c is `prior_std`. Its
    posterior is drawn exactly, by one linear solve: a draw p of this prior is corrected by
    rho^2 A^T (rho^2 A A^T + std^2)^-1 (y + std b - A p), with b standard normal. Operators that
    are not linear are linearized at the estimate. No gradient of the velocity is needed.

    It is the default for restoration. The error falls with the number of steps, about as
    steps^-0.7 (so `order` is 0). Spend the steps near 0: 28 steps of `flow_times(28, mu=-1.1)` do
    about as well as 40 of uniform times. With a std of 0, masks and block means keep exactly what
    is seen.

    **Arguments:**

    - `measurement`: what was measured of x0.
    - `prior_std`: the standard deviation of x0 before the measurement, in the units of x; FLUX's
      latents have about 1.
    - `iterations`: of conjugate gradients; operators whose A A^T is diagonal, such as masks and
      block means, need none. A wide blur with little noise is fitted closer with more.

    **Raises:** `ValueError` for a `prior_std` that is not positive, fewer than 1 iteration, and a
    run without a key.
    **Source:** Zhang et al. 2024 (DAPS), algorithm 1, with the draw exact instead of by Langevin
    dynamics.
    """

    order = 0
    evaluations = 1
    rising = False
    span = (0.0, 1.0)
    measurement: Measurement
    prior_std: ScalarLike = 1.0
    iterations: int = eqx.field(default=5, static=True)

    def __check_init__(self):
        check_positive("Decoupled", prior_std=self.prior_std)
        check_count("Decoupled", iterations=self.iterations)

    evaluation_times = start_time_only

    def init(self, x: X) -> None:
        self.measurement.check(x)

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
        if key is None:
            raise ValueError("Decoupled draws noise. Pass key=jax.random.key(…) to `sample`.")
        prior_key, measurement_key, noise_key = jax.random.split(key, 3)
        estimate = x - t * velocity(x, t)
        prior_std = jnp.asarray(self.prior_std, x.dtype)
        rho = t * prior_std / jnp.hypot(t, (1 - t) * prior_std)
        offset = rho * jax.random.normal(prior_key, x.shape, x.dtype)
        x0 = correct_draw(
            self.measurement,
            estimate,
            offset,
            jnp.square(rho),
            self.iterations,
            key=measurement_key,
        )
        noise = jax.random.normal(noise_key, x.shape, x.dtype)
        new = (1 - u) * x0 + u * noise
        return new.astype(x.dtype), None, None


def correct_draw(
    measurement: Measurement,
    estimate: X,
    offset: X,
    covariance: Map | Scalar,
    iterations: int,
    *,
    key: PRNGKeyArray,
) -> X:
    """Turn a draw estimate + offset of a normal prior into one of its posterior.

    The draw p is corrected by the gain of the measurement for the residual y + std b - A p. That
    is exact for a linear operator; others are linearized at the estimate.

    **Arguments:**

    - `measurement`: what was measured of x0.
    - `estimate`: the mean of the prior.
    - `offset`: drawn from a normal distribution of mean 0 and the covariance K of the prior.
    - `covariance`: K, a number or a symmetric linear function from x to x.
    - `iterations`: of conjugate gradients.
    - `key`: for b.

    **Source:** Papandreou & Yuille 2010 (perturb and optimize).
    """
    linear = linearize(measurement.operator, estimate)
    # A decoder may compute in bfloat16; the rest is in the dtype of x, at least float32.
    dtype = estimate.dtype
    value = linear.value.astype(dtype) + linear.forward(offset).astype(dtype)
    residual = measurement.residual(value)
    std = jnp.asarray(measurement.std, dtype)
    noise = std * jax.random.normal(key, residual.shape, residual.dtype)
    # Noise where nothing is measured would take conjugate gradients for nothing.
    seen = measurement.operator.observed(residual) > 0
    solved = solve_normal(
        linear.forward,
        linear.backward,
        covariance,
        measurement.std,
        residual + jnp.where(seen, noise, 0),
        iterations,
        gram=linear.gram,
    )
    correction = linear.backward(solved).astype(dtype)
    if callable(covariance):
        correction = covariance(correction)
    else:
        correction = jnp.asarray(covariance, dtype) * correction
    return estimate + offset + correction


def descend(linear: Linearized, residual: Array, direction: Direction, iterations: int) -> Array:
    """Return the move of x0 for the residual y - A(x0), as `Direction`, in the shape of x."""
    if direction == "pseudo_inverse":
        return pseudo_inverse(
            linear.forward, linear.backward, residual, iterations, gram=linear.gram
        )
    gradient = linear.backward(residual)
    if direction == "norm":
        square = jnp.vdot(residual, residual)
        # A residual of 0 moves nothing; the inner `where` keeps 0 / 0 out of the gradient.
        scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
        return gradient * scale.astype(gradient.dtype)
    return gradient


def estimate_move(
    measurement: Measurement, estimate: X, direction: Direction, iterations: int
) -> X:
    """Return the move of an estimate of x0 for its own residual, as `Direction`."""
    linear = linearize(measurement.operator, estimate)
    residual = measurement.residual(linear.value).astype(estimate.dtype)
    return descend(linear, residual, direction, iterations).astype(estimate.dtype)


@convert_arguments
class FlowDPS(StochasticStep):
    """FlowDPS: a few gradient steps on the estimate, then a part of the estimated noise kept.

    The moved estimate is mixed with the model's own by the share t, and the noise of the new
    state is sqrt(u) of the estimated noise and sqrt(1 - u) of fresh noise. No gradient of the
    velocity is needed. It does not converge to the posterior with more steps (`order` 0): `size`
    has to be tuned, and the std of the measurement is not used.

    **Arguments:**

    - `measurement`: what was measured of x0.
    - `size`: of the gradient steps. The authors use 15 with the direction "norm" for the decoder
      of Stable Diffusion 3.
    - `descents`: the number of gradient steps; the operator is linearized anew at each.
    - `direction`: "gradient", "norm" or "pseudo_inverse", see `Direction`.
    - `iterations`: of conjugate gradients, which only "pseudo_inverse" may need.

    **Raises:** `ValueError` for a negative size, fewer than 1 descent, and a run without a key.
    **Source:** Kim et al. 2025 (FlowDPS), algorithm 1.
    """

    order = 0
    evaluations = 1
    measurement: Measurement
    size: ScalarLike = 0.3
    descents: int = eqx.field(default=3, static=True)
    direction: Direction = eqx.field(default="gradient", static=True)
    iterations: int = eqx.field(default=5, static=True)

    def __check_init__(self):
        check_nonnegative("FlowDPS", size=self.size)
        check_count("FlowDPS", descents=self.descents, iterations=self.iterations)

    evaluation_times = start_time_only

    def init(self, x: X) -> None:
        self.measurement.check(x)

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        v = velocity(x, t)
        estimate = x - t * v
        noise = x + (1 - t) * v
        size = jnp.asarray(self.size, x.dtype)

        def descend_once(x0: Array, _: None) -> tuple[Array, None]:
            move = estimate_move(self.measurement, x0, self.direction, self.iterations)
            return x0 + size * move, None

        moved, _ = jax.lax.scan(descend_once, estimate, length=self.descents)
        mixed = (1 - t) * estimate + t * moved
        mean = (1 - u) * mixed + u * jnp.sqrt(u) * noise
        # Between close times u may be rounded to more than 1.
        deviation = u * jnp.sqrt(jnp.maximum(1 - u, 0))
        return mean, deviation, None


@convert_arguments
class Nudged(StepAround):
    """Another step whose result is then moved toward a measurement: FlowChef, or DPS.

    The residual is that of the estimate x - t v of the step's own first evaluation. With
    `through="estimate"` the result moves as the estimate should (FlowChef: no gradient of the
    velocity). With `through="network"` it moves along the gradient with respect to x, through the
    velocity (DPS: one more gradient, and the memory of it).

    It does not converge with more steps (`order` 0): the moves add up, so `size` has to be tuned
    for each number of steps, and the std of the measurement is not used. For a measurement
    without noise, FlowChef with "pseudo_inverse" and size 1 keeps what is seen exactly.

    - FlowChef is `Nudged(Euler(), measurement, 0.3)`.
    - DPS as published is `Nudged(DDIM(1.0), measurement, 1.0, "norm", "network")`, at 1,000
      steps.

    **Arguments:**

    - `step`: the step that is nudged.
    - `measurement`: what was measured of x0.
    - `size`: the factor of the direction. x - zeta grad |r|^2 is the direction "gradient" with a
      size of 2 zeta.
    - `direction`: "gradient", "norm" or "pseudo_inverse", see `Direction`.
    - `through`: "estimate" or "network". A velocity with a memory needs "estimate", since no memory
      passes out of a derivative.
    - `iterations`: of conjugate gradients, which only "pseudo_inverse" may need.

    **Raises:** `ValueError` for a negative size.
    **Source:** Patel et al. 2024 (FlowChef), algorithm 1; Chung et al. 2023 (DPS), algorithm 1.
    """

    order = 0
    step: Step
    measurement: Measurement
    size: ScalarLike = 0.3
    direction: Direction = eqx.field(default="gradient", static=True)
    through: Literal["estimate", "network"] = eqx.field(default="estimate", static=True)
    iterations: int = eqx.field(default=5, static=True)

    def __check_init__(self):
        check_nonnegative("Nudged", size=self.size)
        check_count("Nudged", iterations=self.iterations)

    def init(self, x: X) -> StepState:
        self.measurement.check(x)
        return super().init(x)

    def start(self, velocity: Velocity, x: X, t: Scalar) -> StepState:
        self.measurement.check(x)
        return super().start(velocity, x, t)

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
        def advance(x: Array) -> tuple[Array, tuple[Array, StepState, Scalar | None]]:
            return _step_and_estimate(self.step, velocity, x, t, u, state, key)

        if self.through == "network":
            estimate, backward, stepped = jax.vjp(advance, x, has_aux=True)
            move = self._move(estimate)
            (move,) = backward(move)
        else:
            estimate, stepped = advance(x)
            move = self._move(estimate)
        new, state, log_prob = stepped
        return new + jnp.asarray(self.size, x.dtype) * move, state, log_prob

    def _move(self, estimate: X) -> X:
        return estimate_move(self.measurement, estimate, self.direction, self.iterations)

    def evaluation_times(self, t: Scalar, u: Scalar) -> EvaluationTimes | None:
        return self.step.evaluation_times(t, u)


def _step_and_estimate(
    step: Step,
    velocity: Velocity,
    x: X,
    t: Scalar,
    u: Scalar,
    state: StepState,
    key: OptionalKey,
) -> tuple[X, tuple[X, StepState, Scalar | None]]:
    """Return the estimate of x0 of a step's first evaluation, and what the step returns."""
    estimates: list[Array] = []

    # The step's own evaluation is used, so that the estimate costs none.
    def recording(x: Array, t: Scalar) -> Array:
        v = velocity(x, t)
        if not estimates:
            estimates.append(x - t * v)
        return v

    stepped = step(recording, x, t, u, state, key=key)
    return estimates[0], stepped
