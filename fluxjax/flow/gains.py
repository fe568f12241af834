"""Gains: corrections by an approximate covariance of x0 given x_t."""

import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.corrections import Corrected, Correction, CovarianceName, Field
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.normal_equations import Linearized, linearize, solve_normal
from fluxjax.flow.operators import Map
from fluxjax.flow.step import X
from fluxjax.numeric import check_count, check_positive
from fluxjax.shapes import Array, Scalar, ScalarLike


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
