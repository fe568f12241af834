"""Sampling times: from 1 (noise) to 0 (image)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, ScalarLike, Times


@convert_arguments
def time_shift(t: Float[Array, "*shape"], mu: ScalarLike) -> Float[Array, "*shape"]:
    """Move sampling times toward noise, more so for larger images: multiply the odds t / (1 - t) by e^mu.

    **Arguments:** `t`: times in [0, 1]. `mu`: log-shift, unitless.
    **Returns:** times in [0, 1], same order; 0 and 1 are fixed points.
    **Source:** Esser et al. 2024, eq. 23, e^mu / (e^mu + 1/t - 1), rearranged so that 0 and 1 stay exact.
    """
    check_finite("time_shift", t=t, mu=mu)
    shift = jnp.exp(jnp.asarray(mu, t.dtype))
    return shift * t / (shift * t + (1 - t))


@convert_arguments
def resolution_mu(tokens: int, *, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Return FLUX-dev's log-shift for a number of image tokens: linear, `base_shift` at 256 and `max_shift` at 4096
    tokens, extrapolated beyond them. **Source:** BFL's `get_schedule`."""
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
    """Return the nodes of FLUX's schedule: uniform in [1, 0], then shifted.

    **Arguments:** `steps`: of the integrator, at least 1. `tokens`: image tokens, for dev's shift by resolution.
    `base_shift`, `max_shift`: the log-shift at 256 and 4096 tokens. `mu`: a log-shift that replaces theirs. Neither
    `tokens` nor `mu`: no shift, as schnell.
    **Returns:** [steps + 1], float32, first 1, last 0, strictly falling.
    **Raises:** `ValueError` for fewer than 1 step or more than 2^24, both `tokens` and `mu`, or a shift that puts two nodes at
    one time of float32.
    **Source:** BFL's `get_schedule`.
    """
    _check_steps("flow_times", steps)
    if tokens is not None and mu is not None:
        raise ValueError(
            "`flow_times` takes `tokens` (the shift by resolution) or `mu` (a shift of your own), not both."
        )
    check_finite("flow_times", base_shift=base_shift, max_shift=max_shift, mu=mu)
    if tokens is not None:
        mu = resolution_mu(tokens, base_shift=base_shift, max_shift=max_shift)
    # In float64 first: float32's linspace is off by 2e-6 of the last times.
    times = jnp.asarray(np.linspace(1, 0, steps + 1), jnp.float32)
    return (
        times if mu is None else _falling("flow_times", time_shift(times, mu), f"a shift of {mu:g}")
    )


_MOST_STEPS = 2**24
"""More equal steps have nodes that float32 does not tell apart."""


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"`{name}(steps)` needs at least 1 step, got {steps}.")
    if steps > _MOST_STEPS:
        raise ValueError(
            f"`{name}(steps)` makes at most {_MOST_STEPS} steps, got {steps}. 20 to 50 are usual."
        )


def _falling(call: str, times: Array, settings: str) -> Times:
    """Return times. **Raises:** `ValueError` unless they fall strictly within [0, 1]; traced ones are not checked."""
    if isinstance(times, jax.core.Tracer):
        return times
    nodes = np.asarray(times)
    if not (np.all(np.diff(nodes) < 0) and nodes[0] <= 1 and nodes[-1] >= 0):
        raise ValueError(
            f"`{call}` with {settings} and {len(nodes) - 1} steps gives times that do not fall at every node. Choose milder "
            "settings, or fewer steps."
        )
    return times


@convert_arguments
def uniform_times(steps: int, *, first: float = 1.0, last: float = 0.0) -> Times:
    """Return equal steps from `first` to `last`.

    **Arguments:** `first`, `last`: in [0, 1]; inside for a model that says nothing at 1 or at 0.
    **Returns:** [steps + 1], float32, strictly falling.
    **Raises:** `ValueError` for fewer than 1 step, or ends that do not fall within [0, 1].
    """
    _check_steps("uniform_times", steps)
    if not 1 >= first > last >= 0:
        raise ValueError(f"`uniform_times` needs 1 >= first > last >= 0, got {first} and {last}.")
    times = jnp.asarray(np.linspace(first, last, steps + 1), jnp.float32)
    return _falling("uniform_times", times, f"first={first:g}, last={last:g}")


@convert_arguments
def static_times(steps: int, *, shift: float = 3.0) -> Times:
    """Return uniform times shifted by a factor of the odds t / (1 - t): `flow_times(steps, mu=log(shift))`.

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
    """Respace the nodes before the last: their 1 / rho-th powers are evenly spaced from the first to the last of them.

    **Arguments:** `times`: nodes that fall to 0, as `flow_times` gives. `rho`: above 0; 1 is even.
    **Raises:** `ValueError` for other nodes or another rho. **Source:** Karras et al. 2022, eq. 5, on t.
    """
    _check_positive("karras_times", rho=rho)

    def place(ramp: np.ndarray, first: float, last: float) -> np.ndarray:
        roots = first ** (1 / rho), last ** (1 / rho)
        return (roots[0] + ramp * (roots[1] - roots[0])) ** rho

    return _respaced("karras_times", times, place)


@convert_arguments
def exponential_times(times: Times) -> Times:
    """Respace the nodes before the last: each is the same share of the one before it. Arguments as for `karras_times`.

    **Source:** Zhang & Chen 2022, section 4 (uniform in log t).
    """
    return _respaced(
        "exponential_times", times, lambda ramp, first, last: first * (last / first) ** ramp
    )


@convert_arguments
def beta_times(times: Times, *, alpha: float = 0.6, beta: float = 0.6) -> Times:
    """Respace the nodes before the last at quantiles of a beta distribution, so that both ends get more of them.

    Arguments as for `karras_times`; `alpha`, `beta`: above 0. **Source:** Lee et al. 2024, "Beta Sampling is All You Need".
    """
    _check_positive("beta_times", alpha=alpha, beta=beta)
    from scipy.special import betaincinv  # takes a tenth of a second to import

    return _respaced(
        "beta_times",
        times,
        lambda ramp, first, last: last + betaincinv(alpha, beta, 1 - ramp) * (first - last),
    )


def _check_positive(call: str, **values: float) -> None:
    check_finite(call, **values)
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{call}({name})` needs a positive number, got {value}.")


def _respaced(call: str, times: Times, place: Callable[..., np.ndarray]) -> Times:
    """Return nodes between the first and the one before the last 0, which stays, as a function of a ramp from 0 to 1."""
    if isinstance(times, jax.core.Tracer):
        raise ValueError(
            f"`{call}(times)` is computed on the host, and got traced times. Call it outside of jit."
        )
    check_finite(call, times=times)
    given = np.asarray(times, np.float64)
    if len(given) < 2 or given[-1] != 0:
        raise ValueError(
            "Nodes are respaced between the first and the one before a last 0. Pass those of `flow_times(steps)`."
        )
    _falling(f"{call}(times)", times, "these times")
    with np.errstate(all="ignore"):  # what overflows does not fall either
        nodes = place(np.linspace(0, 1, len(given) - 1), given[0], given[-2])
    # The ends are those given, not what powers and logarithms make of them.
    nodes[0], nodes[-1] = given[0], given[-2]
    return _falling(call, jnp.asarray([*nodes, 0.0], jnp.float32), "these settings")


@convert_arguments
def linear_quadratic_times(steps: int, *, threshold: float = 0.025) -> Times:
    """Return times whose first half falls linearly by `threshold` in all, and whose second half quadratically to 0.

    **Arguments:** `threshold`: in (0, 1), what the first `steps // 2` steps cover.
    **Raises:** `ValueError` for fewer than 1 step, or a threshold outside, or so large that the second half would rise.
    **Source:** Polyak et al. 2024, Movie Gen, section 3.4.2; the slope is continuous where they meet, as in Mochi's code.
    """
    _check_steps("linear_quadratic_times", steps)
    if not 0 < threshold < 1:
        raise ValueError(f"`linear_quadratic_times(threshold)` is in (0, 1), got {threshold}.")
    half, rest = steps // 2, steps - steps // 2
    if half == 0:
        return jnp.asarray([1.0, 0.0], jnp.float32)
    slope = threshold / half
    # threshold + slope i + curve i^2 reaches 1 at i = rest.
    curve = (1 - threshold - slope * rest) / rest**2
    i = np.arange(rest + 1)
    fallen = np.concatenate([slope * np.arange(half), threshold + slope * i + curve * i**2])
    fallen[-1] = 1
    return _falling(
        "linear_quadratic_times", jnp.asarray(1 - fallen, jnp.float32), f"threshold={threshold:g}"
    )


@convert_arguments
def custom_times(nodes: Sequence[float] | Float[Array, " nodes"]) -> Times:
    """Return nodes that you choose, checked. The first may be below 1, to begin with an image that is partly noise, and the
    last above 0, to leave noise for another sampler.

    **Raises:** `ValueError` unless there are at least 2, within [0, 1], strictly falling in float32.
    """
    if isinstance(nodes, jax.core.Tracer):
        raise ValueError(
            "`custom_times(nodes)` checks its nodes, and got traced ones. Pass those to `sample` as they are."
        )
    times = np.asarray(nodes, np.float32)
    if (
        times.ndim != 1
        or len(times) < 2
        or not np.all(np.diff(times) < 0)
        or times[0] > 1
        or times[-1] < 0
    ):
        raise ValueError(
            f"Times are at least 2 numbers that fall strictly within [0, 1], got {np.asarray(nodes).tolist()}."
        )
    return jnp.asarray(times)
