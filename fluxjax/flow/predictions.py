"""What models predict (velocity, x0, noise, score or v), converted into each other."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.paths import STRAIGHT, Path, Straight
from fluxjax.shapes import Array, Float, Scalar, ScalarLike

PREDICTIONS = ("velocity", "x0", "noise", "score", "v")
"""The kinds of predictions on a path x = alpha(t) x0 + sigma(t) noise.

velocity: dx/dt. score: the gradient of the log-density of x. v: alpha noise - sigma x0 (Salimans
& Ho 2022, appendix D).
"""


class Estimates(NamedTuple):
    """The `x0` and the `noise` that a prediction implies."""

    x0: Array
    noise: Array


@convert_arguments
def estimates(
    prediction: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    t: ScalarLike,
    kind: str,
    path: Path = STRAIGHT,
) -> Estimates:
    """Return the x0 and the noise that a prediction at x and t implies.

    **Arguments:** `kind`: one of `PREDICTIONS`. `t`: in the time of the path.
    **Raises:** `ValueError` for another kind. At run time, an error where the prediction does not
    determine x0 and noise: for noise and score where alpha = 0, for x0 and score where sigma = 0.
    """
    _check_kind(kind)
    t = jnp.asarray(t, x.dtype)
    alpha, sigma = path.alpha(t), path.sigma(t)
    if kind == "velocity":
        return _from_velocity(prediction, x, t, path)
    if kind == "v":
        # v and x are x0 and noise, rotated and scaled.
        square = alpha**2 + sigma**2
        x0 = (alpha * x - sigma * prediction) / square
        noise = (sigma * x + alpha * prediction) / square
        return Estimates(x0, noise)
    if kind == "x0":
        sigma = _nonzero_sigma(sigma, kind)
        noise = (x - alpha * prediction) / sigma
        return Estimates(prediction, noise)
    if kind == "score":
        # The score of x is -noise / sigma; from here on it is a prediction of the noise.
        prediction = -_nonzero_sigma(sigma, kind) * prediction
    alpha = eqx.error_if(alpha, alpha == 0, _undetermined(kind, "alpha = 0, the start"))
    x0 = (x - sigma * prediction) / alpha
    return Estimates(x0, prediction)


def _nonzero_sigma(sigma: Scalar, kind: str) -> Scalar:
    return eqx.error_if(sigma, sigma == 0, _undetermined(kind, "sigma = 0, the end"))


def _from_velocity(prediction: Array, x: Array, t: Scalar, path: Path) -> Estimates:
    """Return x0 and the noise that a velocity along a path means."""
    alpha, alpha_rate = _with_derivative(path.alpha, t)
    sigma, sigma_rate = _with_derivative(path.sigma, t)
    # x and dx/dt are two linear equations in x0 and noise; this is their determinant.
    wronskian = alpha * sigma_rate - sigma * alpha_rate
    x0 = (sigma_rate * x - sigma * prediction) / wronskian
    noise = (alpha * prediction - alpha_rate * x) / wronskian
    return Estimates(x0, noise)


def _with_derivative(function: Callable[[Scalar], Scalar], t: Scalar) -> tuple[Scalar, Scalar]:
    return jax.jvp(function, (t,), (jnp.ones_like(t),))


@convert_arguments
def convert_prediction(
    prediction: Float[Array, "*shape"],
    x: Float[Array, "*shape"],
    t: ScalarLike,
    *,
    source: str,
    target: str,
    path: Path = STRAIGHT,
) -> Float[Array, "*shape"]:
    """Convert a prediction at x and t from one kind into another.

    **Arguments:** `source`, `target`: each one of `PREDICTIONS`. `t`: in the time of the path.
    **Raises:** as `estimates`.
    """
    _check_kind(target)
    x0, noise = estimates(prediction, x, t, source, path)
    t = jnp.asarray(t, x.dtype)
    alpha, sigma = path.alpha(t), path.sigma(t)
    if target == "x0":
        return x0
    if target == "noise":
        return noise
    if target == "v":
        return alpha * noise - sigma * x0
    if target == "score":
        return -noise / _nonzero_sigma(sigma, target)
    _, alpha_rate = _with_derivative(path.alpha, t)
    _, sigma_rate = _with_derivative(path.sigma, t)
    return alpha_rate * x0 + sigma_rate * noise


class AsVelocity(eqx.Module):
    """A model of any prediction on any path as a velocity on the straight path: `as_velocity`."""

    model: Callable[[Array, Scalar], Array]
    path: Path
    kind: str = eqx.field(static=True)

    @convert_arguments
    def __call__(self, x: Float[Array, "*shape"], t: ScalarLike) -> Float[Array, "*shape"]:
        tau = jnp.asarray(t, x.dtype)
        path_t = self.path.time(tau)
        path_x = x
        # The scale of the straight path is 1 by definition, where 1 - t + t might round.
        if not isinstance(self.path, Straight):
            path_x = x * (self.path.alpha(path_t) + self.path.sigma(path_t))
        prediction = self.model(path_x, path_t)
        x0, noise = estimates(prediction, path_x, path_t, self.kind, self.path)
        return noise - x0


@convert_arguments
def as_velocity(
    model: Callable[[Array, Scalar], Array], kind: str, path: Path = STRAIGHT
) -> AsVelocity:
    """Return a model of any prediction, on any Gaussian path, as a `Velocity`.

    Every Gaussian path is the straight one in other units: x / (alpha + sigma) at
    t = sigma / (alpha + sigma). So every sampler of FLUX can sample the model, from the time
    `path.straight(path.last)` to 0, where x is x0 itself.

    **Arguments:** `model`: (x, t) -> prediction, in the x and t of the path; a pytree. `kind`: one
    of `PREDICTIONS`.
    **Raises:** `ValueError` for another kind. At run time, an error at times where the prediction
    does not determine x0 and noise: sample a noise or score model from below t = 1, and an x0
    model to above t = 0.
    """
    _check_kind(kind)
    return AsVelocity(model, path, kind)


def _check_kind(kind: str) -> None:
    if kind not in PREDICTIONS:
        raise ValueError(
            f"There is no prediction {kind!r}. Choose one of {', '.join(PREDICTIONS)}."
        )


def _undetermined(kind: str, place: str) -> str:
    return (
        f"A prediction of {kind} does not determine x0 and noise at {place} of the path. "
        "Keep the times inside, such as times[1:] or times[:-1]."
    )
