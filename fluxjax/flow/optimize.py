"""Restorations that optimize the image itself: points, not draws from the posterior."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import cast_value, check_times
from fluxjax.flow.measurement import Measurement
from fluxjax.flow.normal_equations import linearize, solve_normal
from fluxjax.flow.restore import estimate_move
from fluxjax.flow.step import time_dtype
from fluxjax.flow.velocity import Velocity, initial_memory
from fluxjax.numeric import check_count, check_nonnegative, check_positive
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar, ScalarLike


@convert_arguments
def pnp_flow(
    velocity: Velocity,
    measurement: Measurement,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    key: PRNGKeyArray,
    rate: ScalarLike = 1.0,
    power: ScalarLike = 1.0,
    draws: int = 5,
) -> Float[Array, "*shape"]:
    """PnP-Flow: gradient steps on the residual, each followed by noising and denoising.

    The result is one restored image, smoother than draws from the posterior. `draws` evaluations
    of the velocity per step, and no gradient of it. The std of the measurement is not used.

    **Arguments:**

    - `velocity`: (x, t) -> dx/dt, a pytree without a memory.
    - `measurement`: what was measured of x0.
    - `x`: the first image. At t = 1 all of it is replaced by noise, so that zeros will do.
    - `times`: falling, in [0, 1], such as `flow_times(steps)`. A step uses the time at its start.
    - `key`: for the noise.
    - `rate`, `power`: the gradient step has the size rate t^power.
    - `draws`: the number of noised copies whose estimates are averaged.

    **Returns:** the restored x0.
    **Raises:** `ValueError` for bad times, rates that are negative, fewer than 1 draw, and a
    velocity with a memory.
    **Source:** Martin et al. 2024 (PnP-Flow), algorithm 3, with t falling.
    """
    check_nonnegative("pnp_flow", rate=rate, power=power)
    check_count("pnp_flow", draws=draws)
    times = _checked("pnp_flow", velocity, measurement, x, times)
    wide = x.astype(times.dtype)

    def update(x: Array, t: Scalar, key: PRNGKeyArray) -> Array:
        noise = jax.random.normal(key, (draws, *x.shape), x.dtype)
        size = jnp.asarray(rate, x.dtype) * t ** jnp.asarray(power, x.dtype)
        return pnp_flow_update(velocity, measurement, x, t, noise, size)

    return _update_at_each_time(update, wide, times, key).astype(x.dtype)


def pnp_flow_update(
    velocity: Velocity,
    measurement: Measurement,
    x: Float[Array, "*shape"],
    t: Scalar,
    noise: Float[Array, "draws *shape"],
    size: Scalar,
) -> Float[Array, "*shape"]:
    """Return x after one step of `pnp_flow`, whose gradient step has this size."""
    near = x + size * estimate_move(measurement, x, "gradient", 1)

    def denoise(noise: Array) -> Array:
        return _estimate("pnp_flow", velocity, (1 - t) * near + t * noise, t)

    return jnp.mean(jax.vmap(denoise)(noise), 0)


@convert_arguments
def red_diff(
    velocity: Velocity,
    measurement: Measurement,
    x: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    key: PRNGKeyArray,
    strength: ScalarLike = 0.25,
    rate: ScalarLike = 1.0,
    iterations: int = 5,
) -> Float[Array, "*shape"]:
    """RED-diff: the image that fits the measurement, and that noising and denoising leaves.

    Stochastic proximal gradient descent on |A x - y|^2 / (2 std^2) plus a regularization, whose
    gradient strength t / (1 - t) (noise estimate - noise) is strength (x - x0 estimate). The first
    term is solved exactly at each step, so that no rate is too large for it, even for a std of 0.
    One evaluation of the velocity per step, and no gradient of it. Operators that are not linear
    are linearized at each step.

    **Arguments:**

    - `velocity`: (x, t) -> dx/dt, a pytree without a memory.
    - `measurement`: what was measured of x0.
    - `x`: the first image.
    - `times`: falling, in [0, 1], such as `flow_times(steps)`. A step uses the time at its start.
    - `key`: for the noise.
    - `strength`: the weight of the regularization.
    - `rate`: of the descent; each step moves x to the estimate by the share rate * strength, which
      should not exceed 1. A small one averages over more noise, and needs more steps.
    - `iterations`: of conjugate gradients, in each step; masks and block means need none.

    **Returns:** the restored x0.
    **Raises:** `ValueError` for bad times, a strength that is negative, a rate that is not
    positive, fewer than 1 iteration, and a velocity with a memory.
    **Source:** Mardani et al. 2023 (RED-diff), algorithm 1 with the weight t / (1 - t), and
    proximal steps instead of Adam.
    """
    check_nonnegative("red_diff", strength=strength)
    check_positive("red_diff", rate=rate)
    check_count("red_diff", iterations=iterations)
    times = _checked("red_diff", velocity, measurement, x, times)
    wide = x.astype(times.dtype)
    step_rate = jnp.asarray(rate, wide.dtype)
    share = step_rate * jnp.asarray(strength, wide.dtype)

    def update(x: Array, t: Scalar, key: PRNGKeyArray) -> Array:
        noise = jax.random.normal(key, x.shape, x.dtype)
        return red_diff_update(velocity, measurement, x, t, noise, share, step_rate, iterations)

    return _update_at_each_time(update, wide, times, key).astype(x.dtype)


def red_diff_update(
    velocity: Velocity,
    measurement: Measurement,
    x: Float[Array, "*shape"],
    t: Scalar,
    noise: Float[Array, "*shape"],
    share: Scalar,
    rate: Scalar,
    iterations: int,
) -> Float[Array, "*shape"]:
    """Return x after one step of `red_diff`; `share` is rate * strength."""
    estimate = _estimate("red_diff", velocity, (1 - t) * x + t * noise, t)
    # The weight t / (1 - t) cancels the factor (1 - t) / t between the difference of both noises
    # and that of both images, so that nothing is singular at t = 0 or 1.
    moved = x - share * (x - estimate)
    linear = linearize(measurement.operator, moved)
    residual = measurement.residual(linear.value).astype(x.dtype)
    solved = solve_normal(
        linear.forward,
        linear.backward,
        rate,
        measurement.std,
        residual,
        iterations,
        gram=linear.gram,
    )
    return moved + rate * linear.backward(solved).astype(x.dtype)


def _update_at_each_time(
    update: Callable[[Array, Scalar, PRNGKeyArray], Array],
    x: Array,
    times: Array,
    key: PRNGKeyArray,
) -> Array:
    """Return x after update(x, t, key) at each time but the last, each with a key of its own."""

    def body(x: Array, number_and_time: tuple[Scalar, Scalar]) -> tuple[Array, None]:
        number, t = number_and_time
        return update(x, t, jax.random.fold_in(key, number)), None

    return jax.lax.scan(body, x, (jnp.arange(len(times) - 1), times[:-1]))[0]


def _estimate(call: str, velocity: Velocity, x: Array, t: Scalar) -> Array:
    return x - t * cast_value(call, velocity(x, t), x)


def _checked(
    call: str, velocity: Velocity, measurement: Measurement, x: Array, times: Array
) -> Array:
    """Return times in the dtype that they have when used with x, after all checks."""
    times = times.astype(time_dtype(x))
    check_times(call, times, step=f"`{call}`", rising=False, span=(0.0, 1.0))
    measurement.check(x)
    check_no_memory(call, velocity, x)
    return times


def check_no_memory(call: str, velocity: Velocity, x: Array) -> None:
    """Check that a velocity carries nothing from one evaluation to the next.

    **Raises:** `ValueError` if it does.
    """
    if initial_memory(velocity, x) is not None:
        raise ValueError(
            f"`{call}(velocity)` got a velocity with a memory, and its evaluations do not follow "
            "one path from noise to image. Use a velocity without memory."
        )
