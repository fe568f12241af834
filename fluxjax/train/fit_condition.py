"""A condition fitted to one image: the text embedding that draws it (Imagic)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fluxjax.arguments import convert_arguments
from fluxjax.flow.guidance import Conditional
from fluxjax.flow.velocity import Condition
from fluxjax.numeric import check_finite, wide_dtype
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar, ScalarLike
from fluxjax.train.loss import flow_matching_loss, logit_normal_times
from fluxjax.train.step import Leaf, Trainable


class FittedCondition(eqx.Module):
    """The result of `fit_condition`: the condition, and the loss at each of its steps."""

    condition: Condition
    losses: Float[Array, " steps"]


@convert_arguments
def fit_condition(
    velocity: Conditional,
    condition: Condition,
    image: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray,
    steps: int = 500,
    optimizer: optax.GradientTransformation | None = None,
    mu: ScalarLike = 0.0,
    trainable: Trainable = eqx.is_inexact_array,
) -> FittedCondition:
    """Fit a condition to an image: the flow-matching loss at this one image is minimized.

    The first stage of Imagic. Between the fitted condition and that of the wanted text, as
    `interpolate_conditions` returns them, sampling from the image's own noise edits it. Imagic also
    fits the network, here best an adapter by `make_step`, in between.

    Each step draws one time, and a noise together with its negative, which cancels the part of the
    gradient's error that is linear in the noise. It costs two evaluations and their gradients with
    respect to the condition.

    **Arguments:**

    - `velocity`: (x, t, condition) -> dx/dt.
    - `condition`: where the fit starts: that of the wanted text.
    - `image`: as a latent.
    - `steps`: at least 1; the paper takes 100 to 500.
    - `optimizer`: of optax; by default Adam with a learning rate of 1e-3.
    - `mu`: the log-shift of the drawn times, as `time_shift`.
    - `trainable`: which leaves of the condition are fitted, as a function of one leaf or a pytree
      of booleans; by default all floating-point arrays. Of a `Conditioning` fit the text alone, and
      not the positions of the image's tokens.

    **Raises:** `ValueError` for fewer than 1 step, or if nothing is trainable.
    **Source:** Kawar et al. 2022, section 3.2, stage A.
    """
    check_finite("fit_condition", mu=mu)
    if steps < 1:
        raise ValueError(f"`fit_condition(steps)` needs at least 1 step, got {steps}.")
    if optimizer is None:
        optimizer = optax.adam(1e-3)
    fitted, fixed = eqx.partition(jax.tree.map(_as_jax, condition), trainable)
    if not jax.tree.leaves(fitted):
        raise ValueError(
            "`fit_condition(condition)` has no trainable leaf. Pass the text states as arrays of "
            "floating-point numbers."
        )
    dtype = wide_dtype(image.dtype)
    x0 = image.astype(dtype)

    def loss(fitted: Condition, step_key: Array) -> Scalar:
        time_key, noise_key = jax.random.split(step_key)
        t = logit_normal_times(time_key, 1, mu=mu)[0].astype(dtype)
        noise = jax.random.normal(noise_key, x0.shape, dtype)
        whole = eqx.combine(fitted, fixed)

        def one(noise: Array) -> Scalar:
            return flow_matching_loss(lambda x, t: velocity(x, t, whole), x0, t, noise)

        return jnp.mean(jax.lax.map(one, jnp.stack([noise, -noise])))

    def step(state: tuple, step_key: Array) -> tuple[tuple, Scalar]:
        fitted, optimizer_state = state
        value, gradient = jax.value_and_grad(loss)(fitted, step_key)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, fitted)
        return (eqx.apply_updates(fitted, updates), optimizer_state), value

    start = fitted, optimizer.init(fitted)
    (fitted, _), losses = jax.lax.scan(step, start, jax.random.split(key, steps))
    return FittedCondition(eqx.combine(fitted, fixed), losses)


@convert_arguments
def interpolate_conditions(fitted: Condition, target: Condition, share: ScalarLike) -> Condition:
    """Return share * target + (1 - share) * fitted, of each array of two conditions.

    **Arguments:** `fitted`: from `fit_condition`. `target`: that of the wanted text, of the same
    shapes. `share`: 0 draws the image as it is, 1 only what the text says; Imagic takes 0.6 to 0.8.
    Arrays that are not floating-point are those of `target`.
    **Raises:** `ValueError` for a share that is not finite.
    **Source:** Kawar et al. 2022, eq. 3.
    """
    check_finite("interpolate_conditions", share=share)

    def mix(start: Leaf, end: Leaf) -> Leaf:
        if not eqx.is_inexact_array(end):
            return end
        return start + jnp.asarray(share, end.dtype) * (end - start)

    return jax.tree.map(mix, jax.tree.map(_as_jax, fitted), jax.tree.map(_as_jax, target))


def _as_jax(leaf: Leaf) -> Leaf:
    """Return a NumPy array as a JAX array, which is fitted and mixed alike."""
    if isinstance(leaf, np.ndarray):
        return jnp.asarray(leaf)
    return leaf
