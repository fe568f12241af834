"""Gaussian paths x = alpha(t) x0 + sigma(t) noise, each with its own times.

FLUX's path is straight: alpha = 1 - t, sigma = t, and dx/dt = noise - x0.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.shapes import Array, Float, Scalar

_BISECTIONS = 60


class Path(eqx.Module):
    """A Gaussian path whose sigma / alpha rises with t from `first` to `last`."""

    first: ClassVar[float] = 0.0

    @property
    def last(self) -> float:
        """The time with the most noise."""
        return 1.0

    # `first` and `last` are in the path's own time, which need not end at 1.

    @abstractmethod
    def alpha(self, t: Scalar) -> Scalar:
        """Return the factor of x0, differentiable in t."""

    @abstractmethod
    def sigma(self, t: Scalar) -> Scalar:
        """Return the factor of the noise, differentiable in t."""

    @convert_arguments
    def time(self, tau: Scalar) -> Scalar:
        """Return the t at which sigma / (alpha + sigma) is `tau`; the inverse of `straight`.

        `tau` is the time of the straight path with the same signal-to-noise ratio. The search is
        by bisection; values of `tau` beyond both ends give the ends.
        """

        def halve(_: Array, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            low, high = ends
            middle = (low + high) / 2
            below = (1 - tau) * self.sigma(middle) < tau * self.alpha(middle)
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        # A fixed number of halvings, enough for float64, so that it compiles to a plain loop.
        ends = (jnp.full_like(tau, self.first), jnp.full_like(tau, self.last))
        low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
        return (low + high) / 2

    @convert_arguments
    def straight(self, t: Scalar) -> Scalar:
        """Return the straight path's time with the same ratio: sigma / (alpha + sigma)."""
        return self.sigma(t) / (self.alpha(t) + self.sigma(t))


class Straight(Path):
    """FLUX's path: alpha = 1 - t, sigma = t.

    **Source:** Liu et al. 2022, eq. 1; Lipman et al. 2022, example II.
    """

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


@convert_arguments
class VariancePreserving(Path):
    """A path with alpha^2 + sigma^2 = 1, whose noise rate rises linearly in t.

    **Arguments:** `beta_min`, `beta_max`: the noise rate at t = 0 and at t = 1.
    **Source:** Song et al. 2021 (score SDE), eq. 32 and 33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Scalar) -> Scalar:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Scalar) -> Scalar:
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: Scalar) -> Scalar:
        # 1 - alpha^2 by expm1, which keeps its digits where alpha is close to 1.
        return jnp.sqrt(-jnp.expm1(2 * self._log_alpha(t)))


@convert_arguments
class VarianceExploding(Path):
    """The path x0 + t noise, for t from 0 to `sigma_max`.

    **Source:** Karras et al. 2022, table 1 (EDM).
    """

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
        # In closed form: bisection from 0 to `sigma_max` would be less precise near 0.
        return tau / (1 - tau)


@convert_arguments
class Discrete(Path):
    """The path of a model trained at whole times 0, 1, …, such as the 1,000 of Stable Diffusion.

    Between whole times, log alpha is interpolated linearly.

    **Arguments:** `alphas_cumprod`: alpha^2 at each whole time; in (0, 1), falling.
    **Source:** Ho et al. 2020, eq. 4.
    """

    alphas_cumprod: Float[Array, " times"] = eqx.field(converter=jnp.asarray)

    @property
    def last(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    def alpha(self, t: Scalar) -> Scalar:
        whole = jnp.arange(len(self.alphas_cumprod), dtype=t.dtype)
        log_alphas = 0.5 * jnp.log(self.alphas_cumprod).astype(t.dtype)
        return jnp.exp(jnp.interp(t, whole, log_alphas))

    def sigma(self, t: Scalar) -> Scalar:
        return jnp.sqrt(1 - self.alpha(t) ** 2)


@convert_arguments
class CustomPath(Path):
    """A custom path.

    **Arguments:** `alpha_of`, `sigma_of`: alpha and sigma as differentiable functions of t in
    [0, 1].
    """

    alpha_of: Callable[[Scalar], Scalar]
    sigma_of: Callable[[Scalar], Scalar]

    def alpha(self, t: Scalar) -> Scalar:
        return self.alpha_of(t)

    def sigma(self, t: Scalar) -> Scalar:
        return self.sigma_of(t)


STRAIGHT = Straight()
"""FLUX's path."""
