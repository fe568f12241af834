"""Sampling times: schedules from 1 (noise) to 0 (image)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.numeric import check_finite, check_positive
from fluxjax.shapes import Array, Float, Scalar, ScalarLike, Times

_MAX_STEPS = 2**24
"""With more equal steps, neighbouring nodes are equal in float32."""


@convert_arguments
def time_shift(t: Float[Array, "*shape"], mu: ScalarLike) -> Float[Array, "*shape"]:
    """Shift sampling times toward noise: multiply the odds t / (1 - t) by e^mu.

    Larger images need larger shifts.

    **Arguments:** `t`: times in [0, 1]. `mu`: the log-shift, unitless.
    **Returns:** times in [0, 1] in the same order; 0 and 1 stay exactly 0 and 1.
    **Source:** Esser et al. 2024, eq. 23, e^mu / (e^mu + 1/t - 1), rearranged so that 0 and 1 are
    exact.
    """
    check_finite("time_shift", t=t, mu=mu)
    return _multiply_odds(t, jnp.asarray(mu, t.dtype))


@jax.jit
def _multiply_odds(t: Float[Array, "*shape"], log_factor: Scalar) -> Float[Array, "*shape"]:
    factor = jnp.exp(log_factor)
    # In this form 0 stays 0 and 1 stays 1 without rounding.
    return factor * t / (factor * t + (1 - t))


@convert_arguments
def resolution_mu(tokens: int, *, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Return FLUX.1-dev's log-shift for a number of image tokens.

    It is linear in the tokens: `base_shift` at 256, `max_shift` at 4096, extrapolated beyond.

    **Source:** BFL's `get_schedule`.
    """
    return base_shift + (tokens - 256) * (max_shift - base_shift) / (4096 - 256)


@convert_arguments
def flow_times(
    steps: int,
    *,
    tokens: int | None = None,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    mu: float | None = None,
) -> Times:
    """Return the times of FLUX's schedule: uniform from 1 to 0, then shifted.

    **Arguments:**

    - `steps`: of the integrator, at least 1.
    - `tokens`: image tokens, for the shift by resolution of FLUX.1-dev.
    - `base_shift`, `max_shift`: the log-shift at 256 and at 4096 tokens.
    - `mu`: a log-shift in place of the one by resolution. With neither `tokens` nor `mu` there is
      no shift, as for FLUX.1-schnell.

    **Returns:** [steps + 1], float32, from 1 to 0, strictly falling.
    **Raises:** `ValueError` for fewer than 1 step or more than 2^24, for both `tokens` and `mu`,
    and for a shift that makes two times equal in float32.
    **Source:** BFL's `get_schedule`.
    """
    _check_steps("flow_times", steps)
    if tokens is not None and mu is not None:
        raise ValueError(
            "`flow_times` takes `tokens` (the shift by resolution) or `mu` (a custom shift), "
            "not both."
        )
    check_finite("flow_times", base_shift=base_shift, max_shift=max_shift, mu=mu)
    if tokens is not None:
        mu = resolution_mu(tokens, base_shift=base_shift, max_shift=max_shift)
    # Computed in float64: the last times of linspace in float32 are off by a relative 2e-6.
    times = jnp.asarray(np.linspace(1, 0, steps + 1), jnp.float32)
    if mu is None:
        return times
    return _falling("flow_times", time_shift(times, mu), f"a shift of {mu:g}")


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"`{name}(steps)` needs at least 1 step, got {steps}. 20 to 50 are usual.")
    if steps > _MAX_STEPS:
        raise ValueError(
            f"`{name}(steps)` makes at most {_MAX_STEPS} steps, got {steps}. 20 to 50 are usual."
        )


def _falling(call: str, times: Array, settings: str) -> Times:
    """Return times after a check that they fall strictly within [0, 1].

    **Raises:** `ValueError` unless they do. Traced times are not checked.
    """
    if isinstance(times, jax.core.Tracer):
        return times
    nodes = np.asarray(times)
    if not (np.all(np.diff(nodes) < 0) and nodes[0] <= 1 and nodes[-1] >= 0):
        raise ValueError(
            f"`{call}` with {settings} and {len(nodes) - 1} steps gives times that do not fall at "
            "every node. Choose milder settings, or fewer steps."
        )
    return times


@convert_arguments
def uniform_times(steps: int, *, first: float = 1.0, last: float = 0.0) -> Times:
    """Return equal steps from `first` to `last`.

    **Arguments:** `first`, `last`: in [0, 1]. Choose `first` below 1, or `last` above 0, for a
    model whose prediction determines nothing there.
    **Returns:** [steps + 1], float32, strictly falling.
    **Raises:** `ValueError` for fewer than 1 step, or unless 1 >= first > last >= 0.
    """
    _check_steps("uniform_times", steps)
    if not 1 >= first > last >= 0:
        raise ValueError(
            f"`uniform_times` needs 1 >= first > last >= 0, got {first} and {last}. "
            "Times fall from noise (1) to the image (0)."
        )
    times = jnp.asarray(np.linspace(first, last, steps + 1), jnp.float32)
    return _falling("uniform_times", times, f"first={first:g}, last={last:g}")


@convert_arguments
def static_times(steps: int, *, shift: float = 3.0) -> Times:
    """Return uniform times whose odds t / (1 - t) are multiplied by `shift`.

    They equal `flow_times(steps, mu=log(shift))`.

    **Raises:** `ValueError` for fewer than 1 step, or a shift that is not positive.
    **Source:** Esser et al. 2024, eq. 23.
    """
    check_finite("static_times", shift=shift)
    if not shift > 0:
        raise ValueError(
            f"`static_times(shift)` needs a positive factor, got {shift}. 1 is no shift."
        )
    return flow_times(steps, mu=math.log(shift))


@convert_arguments
def karras_times(times: Times, *, rho: float = 7.0) -> Times:
    """Respace all nodes but the last 0: their powers of 1 / rho become evenly spaced.

    **Arguments:** `times`: nodes that fall to 0, such as those of `flow_times`. `rho`: above 0;
    with 1 the nodes are evenly spaced.
    **Raises:** `ValueError` for other nodes, or a rho that is not positive.
    **Source:** Karras et al. 2022, eq. 5, applied to t.
    """
    check_positive("karras_times", rho=rho)

    def place(ramp: np.ndarray, first: float, last: float) -> np.ndarray:
        first_root, last_root = first ** (1 / rho), last ** (1 / rho)
        return (first_root + ramp * (last_root - first_root)) ** rho

    return _respaced("karras_times", times, place)


@convert_arguments
def exponential_times(times: Times) -> Times:
    """Respace all nodes but the last 0: the ratio of neighbouring nodes becomes constant.

    **Arguments:** `times`: nodes that fall to 0, such as those of `flow_times`.
    **Raises:** `ValueError` for other nodes.
    **Source:** Zhang & Chen 2022, section 4 (uniform in log t).
    """

    def place(ramp: np.ndarray, first: float, last: float) -> np.ndarray:
        return first * (last / first) ** ramp

    return _respaced("exponential_times", times, place)


@convert_arguments
def beta_times(times: Times, *, alpha: float = 0.6, beta: float = 0.6) -> Times:
    """Respace all nodes but the last 0 at the quantiles of a beta distribution.

    With parameters below 1, both ends get more nodes.

    **Arguments:** `times`: nodes that fall to 0, such as those of `flow_times`. `alpha`, `beta`:
    parameters of the distribution, above 0.
    **Raises:** `ValueError` for other nodes, or parameters that are not positive.
    **Source:** Lee et al. 2024, "Beta Sampling is All You Need".
    """
    check_positive("beta_times", alpha=alpha, beta=beta)
    from scipy.special import betaincinv  # takes a tenth of a second to import

    def place(ramp: np.ndarray, first: float, last: float) -> np.ndarray:
        return last + betaincinv(alpha, beta, 1 - ramp) * (first - last)

    return _respaced("beta_times", times, place)


def _respaced(
    call: str, times: Times, place: Callable[[np.ndarray, float, float], np.ndarray]
) -> Times:
    """Return nodes placed anew between the first and the one before the last, which stays 0.

    **Arguments:** `place`: (ramp, first, last) -> nodes, the ramp being even from 0 to 1.
    """
    if isinstance(times, jax.core.Tracer):
        raise ValueError(
            f"`{call}(times)` is computed on the host, and got traced times. Call it outside jit."
        )
    check_finite(call, times=times)
    nodes = np.asarray(times, np.float64)
    if len(nodes) < 2 or nodes[-1] != 0:
        raise ValueError(
            f"`{call}(times)` respaces the nodes before a last 0, and got none, or another last "
            "node. Pass those of `flow_times(steps)`."
        )
    _falling(f"{call}(times)", times, "these times")
    first, last = nodes[0], nodes[-2]
    with np.errstate(all="ignore"):  # an overflow is reported by the check below
        respaced = place(np.linspace(0, 1, len(nodes) - 1), first, last)
    # The ends stay exact; powers and logarithms would round them.
    respaced[0], respaced[-1] = first, last
    return _falling(call, jnp.asarray([*respaced, 0.0], jnp.float32), "these settings")


@convert_arguments
def linear_quadratic_times(steps: int, *, threshold: float = 0.025) -> Times:
    """Return times that first fall linearly by `threshold`, and then quadratically to 0.

    **Arguments:** `threshold`: in (0, 1), by how much the first `steps // 2` steps fall in all.
    **Raises:** `ValueError` for fewer than 1 step, or a threshold that is outside (0, 1) or so
    large that the second half would rise.
    **Source:** Polyak et al. 2024 (Movie Gen), section 3.4.2; the slope is continuous where both
    parts meet, as in Mochi's code.
    """
    _check_steps("linear_quadratic_times", steps)
    if not 0 < threshold < 1:
        raise ValueError(
            f"`linear_quadratic_times(threshold)` needs a number in (0, 1), got {threshold}. "
            "0.025 is usual."
        )
    linear_steps = steps // 2
    quadratic_steps = steps - linear_steps
    if linear_steps == 0:
        return jnp.asarray([1.0, 0.0], jnp.float32)
    slope = threshold / linear_steps
    # threshold + slope i + curvature i^2 reaches 1 at i = quadratic_steps.
    curvature = (1 - threshold - slope * quadratic_steps) / quadratic_steps**2
    i = np.arange(quadratic_steps + 1)
    linear = slope * np.arange(linear_steps)
    fallen = np.concatenate([linear, threshold + slope * i + curvature * i**2])
    fallen[-1] = 1  # exactly, so that the last time is 0
    times = jnp.asarray(1 - fallen, jnp.float32)
    return _falling("linear_quadratic_times", times, f"threshold={threshold:g}")


@convert_arguments
def custom_times(nodes: Sequence[float] | Float[Array, " nodes"]) -> Times:
    """Return custom times, checked.

    **Arguments:** `nodes`: in [0, 1], strictly falling. The first may be below 1, to start from an
    image that is partly noise; the last may be above 0, to leave noise for another sampler.
    **Returns:** the same, in float32.
    **Raises:** `ValueError` unless there are at least 2 that fall strictly within [0, 1] in
    float32.
    """
    if isinstance(nodes, jax.core.Tracer):
        raise ValueError(
            "`custom_times(nodes)` checks its nodes, and got traced ones. Pass those to `sample` "
            "directly."
        )
    # Checked in float32, in which two close nodes may become equal.
    times = np.asarray(nodes, np.float32)
    several = times.ndim == 1 and len(times) >= 2
    if not (several and np.all(np.diff(times) < 0) and times[0] <= 1 and times[-1] >= 0):
        raise ValueError(
            "`custom_times(nodes)` needs at least 2 numbers that fall strictly within [0, 1], got "
            f"{np.asarray(nodes).tolist()}. `flow_times(steps)` makes FLUX's."
        )
    return jnp.asarray(times)
