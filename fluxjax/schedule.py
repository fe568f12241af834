"""Sampling times: from 1 (noise) to 0 (image)."""

import jax.numpy as jnp
import numpy as np

from fluxjax.shapes import Array, Float, ScalarLike, Times


def time_shift(t: Float[Array, "*shape"], mu: ScalarLike) -> Float[Array, "*shape"]:
    """Move sampling times toward noise, more so for larger images: multiply the odds t / (1 - t) by e^mu.

    **Arguments:** `t`: times in [0, 1]. `mu`: log-shift, unitless.
    **Returns:** times in [0, 1], same order; 0 and 1 are fixed points.
    **Source:** Esser et al. 2024, eq. 23, e^mu / (e^mu + 1/t - 1), rearranged so that 0 and 1 stay exact.
    """
    shift = jnp.exp(jnp.asarray(mu, t.dtype))
    return shift * t / (shift * t + (1 - t))


def resolution_mu(tokens: int, *, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Return FLUX-dev's log-shift for a number of image tokens: linear, `base_shift` at 256 and `max_shift` at 4096
    tokens, extrapolated beyond them. **Source:** BFL's `get_schedule`."""
    return base_shift + (tokens - 256) * (max_shift - base_shift) / (4096 - 256)


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
    **Raises:** `ValueError` for fewer than 1 step, or both `tokens` and `mu`.
    **Source:** BFL's `get_schedule`.
    """
    if steps < 1:
        raise ValueError(f"`flow_times(steps)` needs at least 1 step, got {steps}.")
    if tokens is not None and mu is not None:
        raise ValueError("`flow_times` takes `tokens` (the shift by resolution) or `mu` (a shift of your own), not both.")
    if tokens is not None:
        mu = resolution_mu(tokens, base_shift=base_shift, max_shift=max_shift)
    # In float64 first: float32's linspace is off by 2e-6 of the last times.
    times = jnp.asarray(np.linspace(1, 0, steps + 1), jnp.float32)
    return times if mu is None else time_shift(times, mu)
