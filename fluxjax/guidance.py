"""Guidance: two velocities, with and without what is asked for, combined into one."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.shapes import Array, Float, Scalar, ScalarLike

Conditional = Callable[[Array, Scalar, Any], Array]
"""(x, t, condition) -> dx/dt, a pytree."""
X = Float[Array, "*shape"]


class Rule(eqx.Module):
    """How the two velocities of a guided one are combined."""

    @abstractmethod
    def __call__(self, x: X, t: Scalar, wanted: X, unwanted: X, scale: Scalar) -> X:
        """Return the velocity at x and t. `scale` 1 gives the wanted one."""


class ClassifierFree(Rule):
    """unwanted + scale (wanted - unwanted). Source: Ho & Salimans 2022, eq. 6, with scale = w + 1."""

    def __call__(self, x: X, t: Scalar, wanted: X, unwanted: X, scale: Scalar) -> X:
        return unwanted + scale * (wanted - unwanted)


class ZeroStar(Rule):
    """CFG-Zero*: the unwanted velocity is first scaled to be as near as it gets to the wanted one.

    `zero_from`: at this time and above it the velocity is 0, as the paper has it for the first steps; above 1 for none.
    **Source:** Fan et al. 2025, eq. 7 and section 4.2.
    """

    zero_from: ScalarLike = 2.0

    def __call__(self, x: X, t: Scalar, wanted: X, unwanted: X, scale: Scalar) -> X:
        square = jnp.vdot(unwanted, unwanted)
        near = jnp.where(square > 0, jnp.vdot(wanted, unwanted) / jnp.where(square > 0, square, 1), 0) * unwanted
        return jnp.where(t >= self.zero_from, 0, near + scale * (wanted - near))


class Projected(Rule):
    """Adaptive projected guidance: of the difference of the estimates of x0, the part along the wanted one, which saturates
    colours, is damped, and the rest is bounded. Without the paper's momentum.

    `parallel`: how much of that part is kept; 1, with no bound, is classifier-free guidance. `bound`: of the difference's
    norm, in the units of x.
    **Source:** Sadat et al. 2024, algorithm 1.
    """

    parallel: ScalarLike = 0.0
    bound: ScalarLike = float("inf")

    def __call__(self, x: X, t: Scalar, wanted: X, unwanted: X, scale: Scalar) -> X:
        # The estimates differ by -t times this, so that nothing is divided by t.
        difference, estimate = wanted - unwanted, x - t * wanted
        length = t * jnp.linalg.norm(difference)
        difference = difference * jnp.where(length > self.bound, self.bound / jnp.where(length > 0, length, 1), 1)
        square = jnp.vdot(estimate, estimate)
        along = jnp.vdot(difference, estimate) / jnp.where(square > 0, square, 1) * estimate
        return wanted + (scale - 1) * (difference - along + self.parallel * along)


class Guided(eqx.Module):
    """A `Velocity` guided towards one condition and away from another.

    Both are evaluated as one batch; only the first where the scale is 1 or the time is outside of `low` to `high`, if neither
    is batched by `jax.vmap`, which turns the choice into both.

    `velocity`: (x, t, condition) -> dx/dt, of one condition. `wanted`, `unwanted`: conditions, pytrees of the same shapes.
    `scale`: 1 is no guidance. `rule`: how they are combined. `low`, `high`: times (Kynkäänniemi et al. 2024).
    """

    velocity: Conditional
    wanted: Any
    unwanted: Any
    scale: ScalarLike
    rule: Rule = ClassifierFree()
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __call__(self, x: X, t: Scalar) -> X:
        scale = jnp.asarray(self.scale, x.dtype)

        def one() -> X:
            return self.velocity(x, t, self.wanted)

        def both() -> X:
            pair = jax.tree.map(lambda *sides: jnp.stack(sides), self.wanted, self.unwanted)
            wanted, unwanted = jax.vmap(self.velocity, in_axes=(None, None, 0))(x, t, pair)
            return self.rule(x, t, wanted, unwanted, scale)

        t = jnp.asarray(t, x.dtype)
        return jax.lax.cond((scale != 1) & (self.low <= t) & (t <= self.high), both, one)
