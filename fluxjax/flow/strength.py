"""Sampling that starts from an image with noise, instead of from noise alone (SDEdit)."""

import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import check_times, checked_fraction
from fluxjax.flow.runge_kutta import Euler
from fluxjax.flow.sample import Sample, sample
from fluxjax.flow.step import Step
from fluxjax.flow.velocity import Velocity, initial_memory
from fluxjax.numeric import is_concrete_number, wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray, ScalarLike

STRENGTH_RULES = ("steps", "time")
"""What a strength means: the share of the steps that are taken, or the time of the first node."""

_ENDS = "0 keeps the image, 1 replaces it."


@convert_arguments
def add_noise(
    x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], t: ScalarLike
) -> Float[Array, "*shape"]:
    """Return (1 - t) x0 + t noise, an image on the way to noise.

    **Arguments:** `x0`: the image, as a latent. `noise`: drawn from N(0, 1), in the shape of x0.
    `t`: the time, in [0, 1].
    **Returns:** at 0 exactly x0, at 1 exactly the noise; in the dtype of both, or if those differ
    in at least float32.
    **Raises:** `ValueError` for another shape or a t outside [0, 1] (at run time if it is traced).
    """
    t = checked_fraction("add_noise", "t", t, "0 is the image, 1 is noise.")
    return _add_noise(x0, noise, t)


def _add_noise(x0: Array, noise: Array, t: ScalarLike) -> Array:
    wide = jnp.promote_types(wide_dtype(x0.dtype), wide_dtype(noise.dtype))
    dtype = wide
    if x0.dtype == noise.dtype:
        dtype = x0.dtype
    return noisy_image(x0.astype(wide), noise.astype(wide), t).astype(dtype)


def noisy_image(x0: Array, noise: Array, t: ScalarLike) -> Array:
    """Return (1 - t) x0 + t noise in the dtype of x0, without any check."""
    time = jnp.asarray(t, x0.dtype)
    return (1 - time) * x0 + time * noise


@convert_arguments
def start_time(
    times: Float[Array, " nodes"],
    strength: ScalarLike | Float[Array, "*shape"],
    rule: str = "steps",
) -> Float[Array, "*shape"]:
    """Return the time at which sampling starts for a strength, or for each one of a map.

    A map of strengths becomes a map of times, which is the mask of `Inpaint`.

    **Arguments:**

    - `times`: all nodes, such as those of `flow_times`, from 1 to 0.
    - `strength`: in [0, 1], a number or an array of any shape.
    - `rule`: "steps": the time after int(N - N strength) of the N steps, as in diffusers. FLUX's
      shifted times make it much later than the strength: at 1024x1024 and 28 steps, a strength of
      0.3 starts at t = 0.60, and 0.6 at 0.83. "time": the strength itself.

    **Returns:** times, in the shape of `strength`.
    **Raises:** `ValueError` for strengths outside [0, 1] (at run time if traced), and another rule.
    """
    _check_rule("start_time", rule)
    strength = checked_fraction("start_time", "strength", strength, _ENDS)
    if rule == "time":
        return jnp.asarray(strength, times.dtype)
    return times[_skipped_steps(len(times) - 1, strength)]


@convert_arguments
def partial_times(
    times: Float[Array, " nodes"], strength: ScalarLike, rule: str = "steps"
) -> Float[Array, " left"]:
    """Return the times of sampling that starts from an image with noise, instead of from noise.

    Their first one is the time at which it starts; see `sdedit`. Strengths that leave equally many
    steps give arrays of one shape, so that nothing is compiled again.

    **Arguments:**

    - `times`: all nodes, such as those of `flow_times`, from 1 to 0.
    - `strength`: in [0, 1]: 0 keeps the image, 1 is plain sampling.
    - `rule`: "steps" skips the first int(N - N strength) of the N steps, as diffusers does. "time"
      starts at t = strength and takes all N steps, with the nodes scaled down. There the strength
      may also be traced.

    **Returns:** the nodes. For a strength of 0, only one: there is nothing to integrate.
    **Raises:** `ValueError` for a strength outside [0, 1], another rule, or a traced strength with
    the rule "steps".
    """
    _check_rule("partial_times", rule)
    check_times("partial_times", times, rising=False, step="partial sampling")
    strength = checked_fraction("partial_times", "strength", strength, _ENDS)
    if is_concrete_number(strength) and float(np.asarray(strength)) == 0:
        return times[-1:]
    if rule == "time":
        return times * (jnp.asarray(strength, times.dtype) / times[0])
    if not is_concrete_number(strength):
        raise ValueError(
            "`partial_times(strength)` got a traced strength, and the number of steps depends on "
            'it. Call it outside jit, or with rule="time".'
        )
    skipped = int(_skipped_steps(len(times) - 1, strength))
    return times[skipped:]


def _check_rule(call: str, rule: str) -> None:
    if rule not in STRENGTH_RULES:
        raise ValueError(
            f"`{call}(rule)` takes one of {', '.join(STRENGTH_RULES)}, got {rule!r}. "
            '"steps" is that of diffusers.'
        )


def _skipped_steps(steps: int, strength: ScalarLike | Array) -> int | Array:
    """Return how many of the first steps are skipped: int(N - N strength)."""
    if isinstance(strength, float | int):
        # Python's own arithmetic, as in diffusers.
        return int(max(steps - min(steps * strength, steps), 0))
    # 0.3 is a little more in float32, and of 10 steps 7 are skipped, not int(6.9999999).
    skipped = jnp.floor(steps - steps * jnp.asarray(strength) + 1e-6 * steps)
    return jnp.clip(skipped.astype(jnp.int32), 0, steps)


@convert_arguments
def sdedit(
    velocity: Velocity,
    image: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
    times: Float[Array, " nodes"],
    *,
    step: Step = Euler(),
    key: PRNGKeyArray | None = None,
    history: bool = False,
) -> Sample:
    """Draw an image again: add noise up to the first time, and sample from there.

    The later the start, the more is kept of the image. It costs the steps that are left.

    **Arguments:**

    - `velocity`, `step`, `key`, `history`: as for `sample`.
    - `image`: as a latent. `noise`: drawn from N(0, 1), in the same shape.
    - `times`: from `partial_times`. A single node, of strength 0, returns the image itself.

    **Returns:** as `sample`.
    **Raises:** as `sample`, and `ValueError` for times outside [0, 1].
    **Source:** Meng et al. 2021, algorithm 2.
    """
    # Traced times are not checked: that would put a call to the host into the program, which JAX
    # would then not keep in its compilation cache.
    if is_concrete_number(times):
        checked_fraction("sdedit", "times", times, "1 is noise, 0 the image.")
    x = _add_noise(image, noise, times[0])
    if len(times) == 1:
        nodes = x[None] if history else None
        return Sample(x, nodes, 0, None, initial_memory(velocity, x))
    drawn = sample(velocity, x, times, step=step, key=key, history=history)
    # Times that are all 0 come from a traced strength of 0. Multistep integrators divide by their
    # steps, which then have no length.
    kept = jnp.where(times[0] > 0, drawn.x, x)
    return drawn._replace(x=kept)
