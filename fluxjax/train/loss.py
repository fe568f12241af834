"""Losses for training a velocity field, the times they are taken at, and caption dropout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.times import time_shift
from fluxjax.flow.velocity import Condition
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar, ScalarLike


@convert_arguments
def logit_normal_times(
    key: PRNGKeyArray,
    count: int,
    *,
    mean: ScalarLike = 0.0,
    deviation: ScalarLike = 1.0,
    mu: ScalarLike = 0.0,
) -> Float[Array, " count"]:
    """Draw times whose logit is normal, then shift them as sampling times are.

    **Arguments:**

    - `key`: PRNG key.
    - `count`: the number of times.
    - `mean`, `deviation`: of the logit log(t / (1 - t)), before the shift.
    - `mu`: the log-shift, see `fluxjax.flow.time_shift`.

    **Returns:** [count], times in [0, 1].
    **Source:** Esser et al. 2024, section 3.1 and eq. 23.
    """
    draws = jax.random.normal(key, (count,))
    logits = jnp.asarray(mean, draws.dtype) + jnp.asarray(deviation, draws.dtype) * draws
    return time_shift(jax.nn.sigmoid(logits), mu)


@convert_arguments
def flow_matching_loss(
    velocity: Callable[[Array, Scalar], Array],
    x0: Float[Array, "*shape"],
    t: Scalar,
    noise: Float[Array, "*shape"],
    mask: Float[Array, " tokens"] | None = None,
) -> Scalar:
    """Return the flow-matching loss of one example.

    It is the mean squared error of the velocity at x_t = (1 - t) x0 + t noise against the target
    noise - x0.

    **Arguments:** `velocity`: (x, t) -> dx/dt. `x0`: the data. `t`: the time, in [0, 1]. `noise`:
    drawn from N(0, 1), in the shape of x0. `mask`: how much each entry of the first axis counts,
    at least 0: the loss is the mean by these weights, 0 if all are 0. None: all alike.
    **Returns:** a scalar, computed in at least float32.
    **Source:** Lipman et al. 2022, eq. 23; Esser et al. 2024, eq. 2.
    """
    predicted = velocity((1 - t) * x0 + t * noise, t)
    squared = jnp.square(predicted.astype(wide_dtype(predicted.dtype)) - (noise - x0))
    return masked_mean(squared, mask)


def masked_mean(values: Float[Array, "*shape"], mask: Float[Array, " tokens"] | None) -> Scalar:
    """Return the mean of values by the weights of the first axis; 0 if all of these are 0."""
    if mask is None:
        return jnp.mean(values)
    by_token = jnp.mean(values, axis=range(1, values.ndim))
    total = jnp.sum(mask)
    return jnp.sum(mask * by_token) / jnp.where(total > 0, total, 1)


@convert_arguments
def min_snr_weight(t: ScalarLike, gamma: ScalarLike = 5.0) -> Scalar:
    """Return the weight of a velocity's squared error at a time: min(SNR, gamma) t².

    It is Min-SNR-gamma for straight paths. The signal-to-noise ratio of x_t = (1 - t) x0 + t noise
    is (1 - t)² / t², and the error of the estimate x0 = x_t - t dx/dt is t times that of dx/dt, so
    that min(SNR, gamma) times the squared error of x0 is this weight times that of dx/dt.

    **Arguments:** `t`: in [0, 1]. `gamma`: the largest weight of the error of x0, positive.
    **Returns:** in float32, at most gamma / (1 + sqrt(gamma))²; 0 at both ends.
    **Source:** Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting, section 3.4.
    """
    t = jnp.asarray(t, jnp.float32)
    return jnp.minimum(jnp.square(1 - t), gamma * jnp.square(t))


@convert_arguments
def drop_captions(
    key: PRNGKeyArray, captions: Condition, empty: Condition, rate: float
) -> Condition:
    """Replace each caption of a batch by the empty one with probability `rate`.

    **Arguments:**

    - `key`: PRNG key.
    - `captions`: a pytree of arrays with a leading batch axis, such as token ids or text states.
    - `empty`: the same for the empty prompt, without the batch axis.
    - `rate`: in [0, 1].

    **Returns:** captions of the same shapes.
    **Source:** Ho & Salimans 2022, algorithm 1.
    """
    count = jax.tree.leaves(captions)[0].shape[0]
    dropped = jax.random.bernoulli(key, rate, (count,))

    def pick(caption: Array, empty_caption: Array) -> Array:
        # One decision per caption, broadcast over all other axes.
        per_caption = dropped.reshape(-1, *(1,) * empty_caption.ndim)
        return jnp.where(per_caption, empty_caption, caption)

    return jax.tree.map(pick, captions, empty)


@convert_arguments
def guided_target(conditional: Array, unconditional: Array, scale: ScalarLike) -> Array:
    """Return the velocity that a guidance-distilled network learns at `scale`.

    It is the classifier-free guidance of its teacher.

    **Arguments:** `conditional`, `unconditional`: velocities of the teacher, of the same shape.
    `scale`: the guidance scale; 1 is the conditional velocity, 0 the unconditional one.
    **Source:** Meng et al. 2022, eq. 3, with w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)
