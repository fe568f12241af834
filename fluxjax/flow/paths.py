"""What a model predicts: velocity, x0, noise, score or v, on any Gaussian path, turned into each other.

A path is x = alpha(t) x0 + sigma(t) noise. FLUX's is straight: alpha = 1 - t, sigma = t, and dx/dt = noise - x0.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.shapes import Array, Float, Scalar, ScalarLike

PREDICTIONS = ("velocity", "x0", "noise", "score", "v")
"""velocity: dx/dt. score: the gradient of the log-density. v: alpha noise - sigma x0 (Salimans & Ho 2022, appendix D)."""
_BISECTIONS = 60


class Path(eqx.Module):
    """A Gaussian path x = alpha(t) x0 + sigma(t) noise, whose sigma / alpha rises with t from `first` to `last`."""

    first: ClassVar[float] = 0.0

    @property
    def last(self) -> float:
        """The time of the most noise."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Scalar) -> Scalar:
        """Return the share of x0, differentiable in t."""

    @abstractmethod
    def sigma(self, t: Scalar) -> Scalar:
        """Return the share of the noise, differentiable in t."""

    @convert_arguments
    def time(self, tau: Scalar) -> Scalar:
        """Return the t at which sigma / (alpha + sigma) is `tau`: the straight path's time of the same noise. By bisection;
        beyond the ends, the ends."""

        def halve(_, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            low, high = ends
            middle = (low + high) / 2
            below = (1 - tau) * self.sigma(middle) < tau * self.alpha(middle)
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        ends = (jnp.full_like(tau, self.first), jnp.full_like(tau, self.last))
        low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
        return (low + high) / 2

    @convert_arguments
    def straight(self, t: Scalar) -> Scalar:
        """Return the straight path's time of the same noise: sigma / (alpha + sigma)."""
        return self.sigma(t) / (self.alpha(t) + self.sigma(t))


class Straight(Path):
    """FLUX's path, alpha = 1 - t and sigma = t. Source: Liu et al. 2022, eq. 1; Lipman et al. 2022, example II."""

    def alpha(self, t: Scalar) -> Scalar:
        return 1 - t

    def sigma(self, t: Scalar) -> Scalar:
        return t

    @convert_arguments
    def time(self, tau: Scalar) -> Scalar:
        return tau

    @convert_arguments
    def straight(self, t: Scalar) -> Scalar:
        return t


class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1, with a noise rate that rises linearly. Source: Song et al. 2021, eq. 32 and 33."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Scalar) -> Scalar:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: Scalar) -> Scalar:
        return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(t)))


class VarianceExploding(Path):
    """x0 + t noise, to t = `sigma_max`. Source: Karras et al. 2022, table 1 (EDM)."""

    sigma_max: float = 80.0

    @property
    def last(self) -> float:
        return self.sigma_max

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.ones_like(t)

    def sigma(self, t: Scalar) -> Scalar:
        return t

    @convert_arguments
    def time(self, tau: Scalar) -> Scalar:
        return tau / (1 - tau)


class Discrete(Path):
    """The path of a model trained at whole times 0, 1, …, as Stable Diffusion's 1,000; log alpha is linear in between.

    `alphas_cumprod`: alpha^2 at each of them, falling, in (0, 1). **Source:** Ho et al. 2020, eq. 4.
    """

    alphas_cumprod: Float[Array, " times"] = eqx.field(converter=jnp.asarray)

    @property
    def last(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def alpha(self, t: Scalar) -> Scalar:
        whole = jnp.arange(len(self.alphas_cumprod), dtype=t.dtype)
        return jnp.exp(jnp.interp(t, whole, 0.5 * jnp.log(self.alphas_cumprod).astype(t.dtype)))

    def sigma(self, t: Scalar) -> Scalar:
        return jnp.sqrt(1 - self.alpha(t) ** 2)


class CustomPath(Path):
    """A path of your own: `alpha` and `sigma` as functions of t in [0, 1]."""

    alpha_of: Callable[[Scalar], Scalar]
    sigma_of: Callable[[Scalar], Scalar]

    def alpha(self, t: Scalar) -> Scalar:
        return self.alpha_of(t)

    def sigma(self, t: Scalar) -> Scalar:
        return self.sigma_of(t)


STRAIGHT = Straight()


class Estimates(NamedTuple):
    """What a prediction says of the image and of the noise."""

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
    """Return x0 and the noise that a prediction at x and t stands for.

    **Arguments:** `kind`: one of `PREDICTIONS`. `t`: the path's own time.
    **Raises:** `ValueError` for another kind. Where a prediction says nothing (noise and score at alpha = 0, x0 and score at
    sigma = 0), an error as it runs.
    """
    _check_kind(kind)
    t = jnp.asarray(t, x.dtype)
    alpha, sigma = path.alpha(t), path.sigma(t)
    if kind == "velocity":
        (alpha, alpha_rate), (sigma, sigma_rate) = (
            jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in (path.alpha, path.sigma)
        )
        wronskian = alpha * sigma_rate - sigma * alpha_rate
        x0 = (sigma_rate * x - sigma * prediction) / wronskian
        return Estimates(x0, (alpha * prediction - alpha_rate * x) / wronskian)
    if kind == "v":
        square = alpha**2 + sigma**2
        return Estimates(
            (alpha * x - sigma * prediction) / square, (sigma * x + alpha * prediction) / square
        )
    if kind == "x0":
        sigma = eqx.error_if(sigma, sigma == 0, _nothing("x0", "sigma = 0, the end"))
        return Estimates(prediction, (x - alpha * prediction) / sigma)
    if kind == "score":
        prediction = (
            -eqx.error_if(sigma, sigma == 0, _nothing("score", "sigma = 0, the end")) * prediction
        )
    alpha = eqx.error_if(alpha, alpha == 0, _nothing(kind, "alpha = 0, the start"))
    return Estimates((x - sigma * prediction) / alpha, prediction)


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
    """Turn a prediction at x and t of one kind into another: one of `PREDICTIONS` each. Errors as for `estimates`."""
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
        return -noise / eqx.error_if(sigma, sigma == 0, _nothing("score", "sigma = 0, the end"))
    rates = [jax.jvp(f, (t,), (jnp.ones_like(t),))[1] for f in (path.alpha, path.sigma)]
    return rates[0] * x0 + rates[1] * noise


class AsVelocity(eqx.Module):
    """A model of any prediction on any path, as a velocity on the straight path; see `as_velocity`."""

    model: Callable[[Array, Scalar], Array]
    path: Path
    kind: str = eqx.field(static=True)

    @convert_arguments
    def __call__(self, x: Float[Array, "*shape"], t: ScalarLike) -> Float[Array, "*shape"]:
        tau = jnp.asarray(t, x.dtype)
        own = self.path.time(tau)
        native = (
            x
            if isinstance(self.path, Straight)
            else x * (self.path.alpha(own) + self.path.sigma(own))
        )
        x0, noise = estimates(self.model(native, own), native, own, self.kind, self.path)
        return noise - x0


@convert_arguments
def as_velocity(
    model: Callable[[Array, Scalar], Array], kind: str, path: Path = STRAIGHT
) -> AsVelocity:
    """Return a model of any prediction, on any Gaussian path, as a `Velocity` on the straight path.

    Every such path is the straight one in other units: x / (alpha + sigma) at t = sigma / (alpha + sigma). So whatever samples
    FLUX samples the model, from `path.straight(path.last)` to x0 itself at t = 0.

    **Arguments:** `model`: (x, t) -> prediction in the path's own x and t; a pytree. `kind`: one of `PREDICTIONS`.
    **Raises:** `ValueError` for another kind; as it runs, an error at times where the prediction says nothing: sample a noise
    or score model below t = 1, an x0 model above t = 0.
    """
    _check_kind(kind)
    return AsVelocity(model, path, kind)


def _check_kind(kind: Any) -> None:
    if kind not in PREDICTIONS:
        raise ValueError(
            f"There is no prediction {kind!r}. Choose one of {', '.join(PREDICTIONS)}."
        )


def _nothing(kind: str, place: str) -> str:
    return f"A prediction of {kind} says nothing at {place} of the path. Keep the times inside, as times[1:] or times[:-1]."
