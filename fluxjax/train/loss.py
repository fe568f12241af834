"""Training: the flow-matching loss, its times, caption dropout, guidance distillation, and an optimizer step with EMA."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.times import time_shift
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
    """Draw times whose logit is normal, then shift them by `mu` as the sampler's are.

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
) -> Scalar:
    """Return the mean squared error of one example's velocity at x_t = (1 - t) x0 + t noise; the target is noise - x0.

    **Source:** Lipman et al. 2022, eq. 23; Esser et al. 2024, eq. 2.
    """
    predicted = velocity((1 - t) * x0 + t * noise, t)
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - (noise - x0)))


@convert_arguments
def drop_captions(key: PRNGKeyArray, captions: Any, empty: Any, rate: float) -> Any:
    """Replace each caption of a batch by the empty one with probability `rate`.

    **Arguments:** `captions`: a pytree of arrays with a leading batch axis (ids, or encoded text). `empty`: the same for
    the empty prompt, without that axis. `rate`: in [0, 1].
    **Source:** Ho & Salimans 2022, algorithm 1.
    """
    count = jax.tree.leaves(captions)[0].shape[0]
    dropped = jax.random.bernoulli(key, rate, (count,))

    def pick(full: Array, none: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *(1,) * none.ndim), none, full)

    return jax.tree.map(pick, captions, empty)


@convert_arguments
def guided_target(conditional: Array, unconditional: Array, scale: ScalarLike) -> Array:
    """Return the velocity a distilled network learns: classifier-free guidance of its teacher at `scale`.

    1 is the conditional velocity. **Source:** Meng et al. 2022, eq. 3, with w = scale - 1.
    """
    return unconditional + scale * (conditional - unconditional)
