"""Velocities of the posterior: a prior's velocity, conditioned on a measurement y = A(x0) + noise.

    measurement = Measurement(Mask(mask), mask * image, std=0.05)
    conditioned = Conditioned(velocity, measurement, tmpd())
    x0 = sample(conditioned, noise, times, step=Midpoint()).x

With g the gradient of log p(y | x_t), the exact velocity is v - t / (1 - t) g: the estimate of x0
moves by t^2 / (1 - t) g, and the estimate of the noise by -t g. Methods differ in how they correct
the estimate of x0:

- `tmpd()` is exact for Gaussian data. It costs the most, and is best with `Midpoint`.
- `pigdm()` costs 3 evaluations per step. It is best with steps that draw noise, `DDIM(1.0)`.
- `dps()` costs the same. It has a larger error, and diverges in few steps with little noise.
- `proximal()` and `NullSpace()` need no derivative of the velocity, and 1 evaluation per step.
- `DDNM` is a step for measurements without noise: inpainting and super-resolution.

No correction of the estimate gives modes of the data their posterior shares; see
`fluxjax.flow.particles`.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import cast_value
from fluxjax.flow.operators import (
    Linearized,
    Map,
    Measurement,
    linearize,
    pseudo_inverse,
    solve_normal,
)
from fluxjax.flow.step import StochasticStep, X, start_time_only
from fluxjax.flow.stochastic import ddim_noise
from fluxjax.flow.velocity import Condition, Memory, StatefulVelocity, Velocity, initial_memory
from fluxjax.numeric import (
    check_count,
    check_finite,
    check_positive,
    is_concrete_number,
    wide_dtype,
)
from fluxjax.shapes import Array, Scalar, ScalarLike

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


class _Local(NamedTuple):
    """Everything that a gain knows at one x and t.

    - `velocity`, `estimate`: v, and x - t v.
    - `near`: the operator, linearized at the estimate.
    - `residual`: y - A(estimate).
    - `outer`: w -> O w.
    - `inner`: w -> I w, or a number whose multiple of the identity I is.
    """

    velocity: Array
    estimate: Array
    near: Linearized
    residual: Array
    outer: Map
    inner: Map | Scalar

    def corrected(self, solved: Array) -> Corrected:
        """Return the estimate moved by O A^T times a solution."""
        change = self.outer(self.near.backward(solved))
        return Corrected(self.velocity, self.estimate + change)


@convert_arguments
class Gain(Correction):
    """The estimate plus O A^T (A I A^T + std^2)^-1 r, with r = y - A(estimate).

    O and I, the outer and the inner covariance, approximate that of x0 given x_t:

    - "model": t^2 / (1 - t) d(estimate)/dx, the model's own, by derivatives of the velocity.
    - "white": a multiple of the identity, exact for a white prior.
    - "none": 0; only as the inner one.

    `tmpd`, `pigdm`, `dps` and `proximal` return the usual pairs.

    **Arguments:**

    - `outer`, `inner`: the two covariances.
    - `iterations`: of conjugate gradients; none are needed if `inner` is not "model" and A A^T is
      diagonal, as for a mask or block means. With "model", each costs a Jacobian-vector product of
      the velocity, about 2 evaluations.
    - `prior_std`: the standard deviation of the data, which "white" supposes.

    **Raises:** `ValueError` for fewer than 1 iteration, or a `prior_std` that is not positive.
    """

    outer: Literal["model", "white"] = eqx.field(static=True)
    inner: CovarianceName = eqx.field(static=True)
    iterations: int = eqx.field(default=5, static=True)
    prior_std: ScalarLike = 1.0

    def __check_init__(self):
        check_positive("Gain", prior_std=self.prior_std)
        check_count("Gain", iterations=self.iterations)

    @property
    def differentiates(self) -> bool:  # type: ignore[override]
        return "model" in (self.outer, self.inner)

    def __call__(self, field: Field, x: X, t: Scalar, measurement: Measurement) -> Corrected:
        local = self._linearize(field, x, t, measurement)
        near, residual = local.near, local.residual
        if self.inner == "none":
            std = measurement.noise_std('Gain(inner="none")', residual.dtype)
            return local.corrected(residual / jnp.square(std))
        solved = solve_normal(
            near.forward,
            near.backward,
            local.inner,
            measurement.std,
            residual,
            self.iterations,
            gram=near.gram,
        )
        return local.corrected(solved)

    def with_log_likelihood(
        self, field: Field, x: X, t: Scalar, measurement: Measurement
    ) -> tuple[Corrected, Scalar]:
        """Return the correction and log N(y; A(estimate), A I A^T + std^2).

        If I is "model", or A A^T is not diagonal, A I A^T is made as a matrix: that applies it
        once to each entry of y, and needs memory for the square of their number.
        """
        local = self._linearize(field, x, t, measurement)
        system = _measured_system(local, measurement)
        observed = measurement.operator.observed(local.residual)
        log_density = system.log_density(local.residual, observed)
        return local.corrected(system.solve(local.residual)), log_density

    def _linearize(self, field: Field, x: X, t: Scalar, measurement: Measurement) -> _Local:
        """Return the velocity, the measurement of its estimate, linearized, and covariances."""
        scale = jnp.square(t) / (1 - t)
        if self.outer == "model":
            velocity, pull_back = jax.vjp(field, x)
        else:
            velocity = field(x)

        def model_outer(w: Array) -> Array:
            return scale * (w - t * pull_back(w)[0])

        def model_inner(w: Array) -> Array:
            _, change = jax.jvp(field, (x,), (w,))
            return scale * (w - t * change)

        variance = self._white_variance(t)
        outer = model_outer if self.outer == "model" else lambda w: variance * w
        inner: Map | Scalar
        if self.inner == "model":
            inner = model_inner
        elif self.inner == "white":
            inner = variance
        else:
            inner = jnp.zeros_like(t)
        estimate = x - t * velocity
        near = linearize(measurement.operator, estimate)
        residual = measurement.residual(near.value)
        return _Local(velocity, estimate, near, residual, outer, inner)

    def _white_variance(self, t: Scalar) -> Scalar:
        """Return the variance of x0 given x_t for a white prior."""
        prior = jnp.square(jnp.asarray(self.prior_std, t.dtype))
        return prior * jnp.square(t) / (jnp.square(t) + prior * jnp.square(1 - t))


class _System(NamedTuple):
    """A I A^T + std^2 by its eigenvalues.

    - `vectors`: the eigenvectors, or None where the matrix is diagonal.
    - `values`: the eigenvalues, without std^2, in one row.
    - `variance`: std^2.
    """

    vectors: Array | None
    values: Array
    variance: Scalar

    def solve(self, r: Array) -> Array:
        """Return (A I A^T + std^2)^-1 r."""
        solved = self._rotated(r) / (self.values + self.variance)
        if self.vectors is not None:
            solved = self.vectors @ solved
        return solved.reshape(r.shape)

    def log_density(self, r: Array, observed: Array) -> Scalar:
        """Return log N(r; 0, A I A^T + std^2) of the entries that were measured."""
        variances = self.values + self.variance
        squares = jnp.sum(jnp.square(self._rotated(r)) / variances)
        # Rows that were not measured are 0, so that each has the variance of the noise.
        hidden = jnp.sum(1 - observed) * jnp.log(self.variance)
        count = jnp.sum(observed) * math.log(2 * math.pi)
        return -0.5 * (squares + jnp.sum(jnp.log(variances)) - hidden + count)

    def _rotated(self, r: Array) -> Array:
        if self.vectors is None:
            return r.ravel()
        return self.vectors.T @ r.ravel()


def _measured_system(local: _Local, measurement: Measurement) -> _System:
    """Return the covariance of the measurement given x, diagonalized.

    Where an operator knows its own product with its adjoint, no network is evaluated for that.
    """
    near, residual, inner = local.near, local.residual, local.inner
    variance = jnp.square(measurement.noise_std("twisted_sample", residual.dtype))
    if not callable(inner) and near.gram is not None:
        values = inner.astype(residual.dtype) * near.gram.astype(residual.dtype)
        return _System(None, values.ravel(), variance)

    def column(unit: Array) -> Array:
        # Inside `jax.shard_map` an adjoint takes only what varies over the axes of x.
        w = near.backward(unit.reshape(residual.shape) + jnp.zeros_like(residual))
        spread = inner(w) if callable(inner) else inner * w
        return near.forward(spread).ravel().astype(residual.dtype)

    # One column after another: a batch would hold the network's activations for each.
    columns = jax.lax.map(column, jnp.eye(residual.size, dtype=residual.dtype))
    # The covariance of a network is not quite symmetric, and may not be positive.
    values, vectors = jnp.linalg.eigh((columns + columns.T) / 2)
    return _System(vectors, jnp.maximum(values, 0), variance)


@convert_arguments
def tmpd(iterations: int = 5) -> Gain:
    """Return the gain of Tweedie moment projection: both covariances are the model's.

    It is exact for Gaussian data and linear operators. A step costs about 3 + 2 `iterations`
    evaluations of the velocity, one of them backwards.

    **Arguments:** `iterations`: of conjugate gradients, at most as many as y has entries.
    **Source:** Boys et al. 2023, eq. 10, with the full covariance instead of its diagonal.
    """
    return Gain("model", "model", iterations)


@convert_arguments
def pigdm(iterations: int = 5, *, prior_std: ScalarLike = 1.0) -> Gain:
    """Return the gain of pseudoinverse guidance: the model's covariance outside, white inside.

    It is exact for white data. A step costs about 3 evaluations of the velocity. With steps that
    draw noise, such as `DDIM` with eta 1, its error is smaller.

    **Arguments:** as `Gain`.
    **Source:** Song et al. 2023 (PiGDM), eq. 7; Pokle et al. 2023, for flows.
    """
    return Gain("model", "white", iterations, prior_std)


def dps() -> Gain:
    """Return the gain of diffusion posterior sampling: it supposes that the estimate is x0 itself.

    Its gradient is large where the noise of the measurement is small, and few steps diverge.
    A step costs about 3 evaluations of the velocity. The measurement needs a std above 0.

    **Source:** Chung et al. 2023 (DPS), eq. 11, with the factor 1 / std^2 of its derivation.
    """
    return Gain("model", "none")


@convert_arguments
def proximal(iterations: int = 5, *, prior_std: ScalarLike = 1.0) -> Gain:
    """Return a gain without derivatives of the velocity: both covariances are white.

    The estimate moves to the minimum of |y - A x0|^2 / std^2 + |x0 - estimate|^2 / variance.
    A step costs 1 evaluation of the velocity.

    **Arguments:** as `Gain`.
    **Source:** Zhu et al. 2023 (DiffPIR), eq. 12.
    """
    return Gain("white", "white", iterations, prior_std)


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


class ConditionedEvaluation(NamedTuple):
    """One evaluation of a `Conditioned` velocity.

    - `velocity`: without the measurement.
    - `conditioned`: with it.
    - `log_likelihood`: the approximate log p(y | x_t), and 0 where the velocity is unguided.
    """

    velocity: Array
    conditioned: Array
    log_likelihood: Scalar


@convert_arguments
class Conditioned(StatefulVelocity):
    """The `Velocity` of x0 given a measurement, for any integrator.

    It is (x - estimate) / t with the corrected estimate of x0; at t = 0 it is the prior's.

    **Arguments:**

    - `velocity`: of the prior; it may be `Guided`, which then guides the prior. With a memory, as
      of a cache, it can not be differentiated, so that only corrections such as `proximal()` and
      `NullSpace()` take it.
    - `measurement`: of one x0, in the shape of x. Use `jax.vmap` for several.
    - `correction`: of the estimate of x0.
    - `high`: the velocity is unguided at later times, and at t = 1. There the model's covariance
      is 0 / 0: rounding the velocity to bfloat16 changes it by 20 % at t = 0.99.

    **Raises:** `ValueError` for a `high` outside (0, 1], for a y that has not the shape of what is
    measured of x, and for a velocity with a memory whose derivative is needed.
    """

    velocity: Velocity
    measurement: Measurement
    correction: Correction
    high: ScalarLike = 0.98

    def __check_init__(self):
        check_finite("Conditioned", high=self.high)
        if not is_concrete_number(self.high):
            return
        high = np.asarray(self.high)
        if not np.all((high > 0) & (high <= 1)):
            raise ValueError(
                f"`Conditioned(high)` needs a time in (0, 1], got {self.high}. 1 is noise."
            )

    def init(self, x: X) -> Memory:
        memory = initial_memory(self.velocity, x)
        if memory is not None and self.correction.differentiates:
            raise ValueError(
                f"`Conditioned(velocity)` with {type(self.correction).__name__}"
                f" differentiates the velocity, and a {type(self.velocity).__name__} with a memory "
                "has no derivative. Leave out its cache or momentum, or use `proximal()`."
            )
        return memory

    def __call__(
        self, x: X, t: ScalarLike, *condition: Condition, memory: Memory = None
    ) -> X | tuple[X, Memory]:
        self._check(x)
        wide, t = _widened(x, t)
        inside, inner_t = self._guided_at(t)

        def guided() -> tuple[Array, Memory]:
            after = memory

            def field(x: Array) -> Array:
                # Only corrections that do not differentiate get here with a memory.
                nonlocal after
                value, after = self._evaluate(x, inner_t, condition, memory)
                return value

            corrected = self.correction(field, wide, inner_t, self.measurement)
            return _toward(wide, inner_t, corrected), after

        # The branch is chosen at run time, so that unguided steps cost one evaluation.
        value, after = jax.lax.cond(
            inside, guided, lambda: self._evaluate(wide, t, condition, memory)
        )
        value = value.astype(x.dtype)
        return value if memory is None else (value, after)

    def evaluate(self, x: X, t: ScalarLike) -> ConditionedEvaluation:
        """Return the velocity with and without the measurement, and the measurement's likelihood.

        The likelihood is meant for weights: with a covariance that is "model", its derivative is
        NaN where eigenvalues are equal, as for the hidden pixels of a mask.

        **Raises:** as the call, and `ValueError` for a correction that has no likelihood, or a
        measurement whose std is 0.
        """
        self._check(x)
        wide, t = _widened(x, t)
        inside, inner_t = self._guided_at(t)

        def field(x: Array) -> Array:
            return self._evaluate(x, inner_t, (), None)[0]

        def guided() -> ConditionedEvaluation:
            corrected, log_likelihood = self.correction.with_log_likelihood(
                field, wide, inner_t, self.measurement
            )
            conditioned = _toward(wide, inner_t, corrected)
            weight = log_likelihood.astype(wide.dtype)
            return ConditionedEvaluation(corrected.velocity, conditioned, weight)

        def unguided() -> ConditionedEvaluation:
            value, _ = self._evaluate(wide, t, (), None)
            # Made from x, as `jax.shard_map` wants both branches to vary over the same axes.
            return ConditionedEvaluation(value, value, jnp.sum(jnp.zeros_like(wide)))

        return jax.lax.cond(inside, guided, unguided)

    def _check(self, x: X) -> None:
        self.init(x)
        self.measurement.check(x)

    def _guided_at(self, t: Scalar) -> tuple[Array, Scalar]:
        """Return whether the velocity is guided at t, and a time at which it can be."""
        inside = (t > 0) & (t < 1) & (t <= jnp.asarray(self.high, t.dtype))
        # Under `jax.vmap` both branches are evaluated, and NaN would spoil the gradient of both.
        return inside, jnp.where(inside, t, 0.5)

    def _evaluate(
        self, x: X, t: Scalar, condition: tuple[Condition, ...], memory: Memory
    ) -> tuple[X, Memory]:
        """Return the velocity without the measurement, in the dtype of x, and the new memory."""
        if memory is None:
            return cast_value("Conditioned", self.velocity(x, t, *condition), x), None
        value, after = self.velocity(x, t, *condition, memory=memory)  # type: ignore[call-arg]
        return cast_value("Conditioned", value, x), after


def _widened(x: X, t: ScalarLike) -> tuple[X, Scalar]:
    """Return x and t in at least float32, in which estimates are corrected."""
    dtype = wide_dtype(x.dtype)
    return x.astype(dtype), jnp.asarray(t, dtype)


def _toward(x: X, t: Scalar, corrected: Corrected) -> X:
    """Return the velocity whose estimate of x0 is the corrected one."""
    return (x - corrected.estimate) / t


@convert_arguments
class DDNM(StochasticStep):
    """`DDIM` whose estimate of x0 is corrected by `NullSpace`; the estimate of the noise is kept.

    For a mask without noise it converges to the posterior with more steps. It takes the prior's
    velocity, and needs 1 evaluation per step and no derivative.

    **Arguments:** `measurement`: of x0; its std is ignored. `eta`: the share of fresh noise, in
    [0, 1]. `iterations`: as for `NullSpace`.
    **Raises:** `ValueError` for an eta outside [0, 1], and for a y that has not the shape of what
    is measured of x.
    **Source:** Wang et al. 2022 (DDNM), algorithm 1, with the noise of Song et al. 2021 (DDIM),
    eq. 16. The noise of DDNM's own eq. 15 converges to another covariance.
    """

    order = 1
    evaluations = 1
    measurement: Measurement
    eta: ScalarLike = 0.85
    iterations: int = eqx.field(default=5, static=True)

    evaluation_times = start_time_only

    def __check_init__(self):
        check_finite("DDNM", eta=self.eta)
        eta = np.asarray(self.eta) if is_concrete_number(self.eta) else np.zeros(())
        if not np.all((eta >= 0) & (eta <= 1)):
            raise ValueError(
                f"`DDNM(eta)` needs a share of noise in [0, 1], got {self.eta}. 0.85 is usual."
            )

    def init(self, x: X) -> None:
        self.measurement.check(x)

    def moments(
        self, velocity: Velocity, x: X, t: Scalar, u: Scalar, state: None
    ) -> tuple[X, Scalar, None]:
        correction = NullSpace(self.iterations)
        v, estimate = correction(lambda x: velocity(x, t), x, t, self.measurement)
        noise = x + (1 - t) * v
        noise_share, deviation = ddim_noise(t, u, jnp.asarray(self.eta, u.dtype))
        return (1 - u) * estimate + noise_share * noise, deviation, None
