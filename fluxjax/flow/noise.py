"""Restorations that optimize the initial noise, with gradients along the whole path to the image.

They need optax, which is in the optional dependencies `fluxjax[train]`.
"""

from abc import abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import checked_times, import_optax
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.optimize import check_no_memory
from fluxjax.flow.runge_kutta import Midpoint
from fluxjax.flow.sample import sample
from fluxjax.flow.step import Step
from fluxjax.flow.stochastic import check_draws_no_noise
from fluxjax.flow.velocity import Velocity
from fluxjax.numeric import check_count, check_finite, check_nonnegative
from fluxjax.shapes import Array, Bool, Float, Int, PRNGKeyArray, Scalar, ScalarLike


class NoisePrior(eqx.Module):
    """A term of the loss of `optimize_noise` that keeps the noise probable."""

    @abstractmethod
    def __call__(self, noise: Float[Array, "*shape"]) -> Scalar:
        """Return minus the log-density of the noise, up to a constant."""


@convert_arguments
class NormalNoise(NoisePrior):
    """weight |noise - center|^2 / 2; with a weight of 1 and the center 0, the noise's own density.

    **Arguments:** `weight`: at least 0. `center`: broadcast to the noise.
    """

    weight: ScalarLike = 1.0
    center: ScalarLike | Float[Array, "*shape"] = 0.0

    def __check_init__(self):
        check_nonnegative("NormalNoise", weight=self.weight)
        check_finite("NormalNoise", center=self.center)

    def __call__(self, noise: Float[Array, "*shape"]) -> Scalar:
        weight = jnp.asarray(self.weight, noise.dtype)
        distance = noise - jnp.asarray(self.center, noise.dtype)
        return weight / 2 * jnp.sum(jnp.square(distance))


@convert_arguments
class RadialNoise(NoisePrior):
    """Minus the log-density of the noise's norm: weight (|noise|^2 / 2 - (size - 1) log |noise|).

    It only keeps the norm probable, near the square root of the noise's size. Where noise of that
    norm fits the measurement in many directions, the result depends on the start.

    **Arguments:** `weight`: at least 0. The authors' lambda 0.01, for |A x - y|^2, is a weight of
    0.01 / (2 std^2).
    **Source:** Ben-Hamu et al. 2024 (D-Flow), section 3.3.
    """

    weight: ScalarLike = 1.0

    def __check_init__(self):
        check_nonnegative("RadialNoise", weight=self.weight)

    def __call__(self, noise: Float[Array, "*shape"]) -> Scalar:
        square = jnp.sum(jnp.square(noise))
        log_norm = jnp.log(square) / 2
        return jnp.asarray(self.weight, noise.dtype) * (square / 2 - (noise.size - 1) * log_norm)


class NoiseFit(NamedTuple):
    """The result of `optimize_noise`.

    - `noise`: the optimized initial noise.
    - `x`: the image that it leads to.
    - `loss`: the misfit plus the prior's term.
    - `gradient_norm`: of the loss at `noise`.
    - `iterations`: of L-BFGS.
    """

    noise: Array
    x: Array
    loss: Scalar
    gradient_norm: Scalar
    iterations: Int[Array, ""]


@convert_arguments
def optimize_noise(
    velocity: Velocity,
    measurement: Measurement,
    noise: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step = Midpoint(),
    prior: NoisePrior = NormalNoise(),
    iterations: int = 50,
    tolerance: ScalarLike = 1e-4,
) -> NoiseFit:
    """D-Flow: find the initial noise whose image fits the measurement.

    Minimizes |A x(noise) - y|^2 / (2 std^2) plus the prior's term by L-BFGS, where x(noise) is the
    end of the path that `step` integrates. With the default prior it is the most probable noise;
    for a Gaussian prior of images, its image is the posterior's mean. Each iteration takes a
    gradient along the path, seldom two. A gradient costs about four times the evaluations of the
    path: one forward, one recomputed instead of stored, and two backward. Five midpoint steps are
    usual.

    The result can not be differentiated in reverse mode.

    **Arguments:**

    - `velocity`: (x, t) -> dx/dt, a pytree without a memory.
    - `measurement`: what was measured of x0; its std is positive.
    - `noise`: where to start; an inversion of a near image is a good start too.
    - `times`: as for `sample`.
    - `step`: an integrator that draws no noise.
    - `prior`: of the noise, `NormalNoise` or `RadialNoise`.
    - `iterations`: at most.
    - `tolerance`: iterations end when the norm of the gradient has fallen by this factor. They
      also end when neither it nor the loss falls.

    **Raises:** `ValueError` for a std of 0, for a step that draws noise, a velocity with a memory,
    fewer than 1 iteration, and as `sample`. `ImportError` without optax.
    **Source:** Ben-Hamu et al. 2024 (D-Flow), algorithm 1.
    """
    optax = import_optax("optimize_noise")
    check_count("optimize_noise", iterations=iterations)
    check_nonnegative("optimize_noise", tolerance=tolerance)
    times = checked_times("optimize_noise", step, times, noise)
    start = noise.astype(times.dtype)
    _check_path("optimize_noise", velocity, measurement, start, step)
    std = measurement.noise_std("optimize_noise", start.dtype)
    # Only the inputs of the evaluations are stored along the path.
    field = eqx.filter_checkpoint(velocity)

    def image_of(noise: Array) -> Array:
        return sample(field, noise, times, step=step).x

    def loss_of(noise: Array) -> Scalar:
        residual = measurement.residual(measurement.operator(image_of(noise))).astype(start.dtype)
        return jnp.sum(jnp.square(residual / std)) / 2 + prior(noise)

    end = _minimize(optax, loss_of, start, iterations, jnp.asarray(tolerance, start.dtype))
    x = image_of(end.noise)
    return NoiseFit(
        end.noise.astype(noise.dtype),
        x.astype(noise.dtype),
        end.loss,
        _norm(end.gradient),
        end.iterations,
    )


@convert_arguments
def randomize_then_optimize(
    velocity: Velocity,
    measurement: Measurement,
    noise: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    key: PRNGKeyArray,
    step: Step = Midpoint(),
    iterations: int = 50,
    tolerance: ScalarLike = 1e-4,
) -> NoiseFit:
    """Draw an image from about the posterior by optimizing noise for a perturbed measurement.

    `optimize_noise` with noise added to the measurement and with the prior centered at the drawn
    `noise` instead of at 0. It is an exact draw for a Gaussian prior of images.

    **Arguments:** `noise`: standard normal, such as `initial_noise`; the start and the center.
    `key`: for the noise that is added to the measurement. Others: as for `optimize_noise`.
    **Raises:** as `optimize_noise`.
    **Source:** Bardsley et al. 2014 (randomize-then-optimize), without its correction.
    """
    y = measurement.y
    added = jnp.asarray(measurement.std, y.dtype) * jax.random.normal(key, y.shape, y.dtype)
    perturbed = Measurement(measurement.operator, y + added, measurement.std)
    return optimize_noise(
        velocity,
        perturbed,
        noise,
        times,
        step=step,
        prior=NormalNoise(center=noise),
        iterations=iterations,
        tolerance=tolerance,
    )


class _Descent(NamedTuple):
    """L-BFGS between two iterations."""

    noise: Array
    state: object
    loss: Scalar
    gradient: Array
    falls: Bool[Array, ""]
    iterations: Int[Array, ""]


def _minimize(
    optax: ModuleType,
    loss_of: Callable[[Array], Scalar],
    start: Array,
    iterations: int,
    tolerance: Scalar,
) -> _Descent:
    """Minimize a loss by L-BFGS."""
    optimizer = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss_of)

    def improve(run: _Descent) -> _Descent:
        # optax adds integers of two sizes where float64 is enabled.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(
                run.gradient,
                run.state,
                run.noise,
                value=run.loss,
                grad=run.gradient,
                value_fn=loss_of,
            )
        noise = optax.apply_updates(run.noise, updates)
        # The line search has evaluated both at its end, and left them in its state.
        loss, gradient = value_and_gradient(noise, state=state)
        # Where rounding is all that is left, neither falls, and line searches become long.
        falls = (loss < run.loss) | (_norm(gradient) < _norm(run.gradient))
        return _Descent(noise, state, loss, gradient, falls, run.iterations + 1)

    loss, gradient = jax.value_and_grad(loss_of)(start)
    enough = tolerance * _norm(gradient)

    def unfinished(run: _Descent) -> Scalar:
        return run.falls & (run.iterations < iterations) & (_norm(run.gradient) > enough)

    state = optimizer.init(start)
    first = _Descent(start, state, loss, gradient, jnp.asarray(True), jnp.int32(0))
    return jax.lax.while_loop(unfinished, improve, first)


def _norm(x: Array) -> Scalar:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _check_path(
    call: str, velocity: Velocity, measurement: Measurement, x: Array, step: Step
) -> None:
    measurement.check(x)
    check_no_memory(call, velocity, x)
    check_draws_no_noise(call, step)
