"""Guidance: velocities with and without what is asked for, or of a spoilt network, combined into one."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.flow.velocity import StatefulVelocity, initial_memory
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Float, Scalar, ScalarLike

Conditional = Callable[[Array, Scalar, Any], Array]
"""(x, t, condition) -> dx/dt, a pytree."""
X = Float[Array, "*shape"]


class Rule(eqx.Module):
    """How the two velocities of a guided one are combined."""

    @abstractmethod
    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        """Return the velocity at x and t. `scale` 1 gives the positive one."""

    def init(self, x: X) -> Any:
        """Return what the rule remembers before the first evaluation, by default nothing."""
        return None

    def with_memory(
        self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar, memory: Any
    ) -> tuple[X, Any]:
        """Return the velocity and the new memory."""
        return self(x, t, positive, negative, scale), memory


class ClassifierFree(Rule):
    """negative + scale (positive - negative). Source: Ho & Salimans 2022, eq. 6, with scale = w + 1."""

    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        return negative + scale * (positive - negative)


class ZeroStar(Rule):
    """CFG-Zero*: the negative velocity is first scaled to be as near as it gets to the positive one.

    `zero_from`: at this time and above it the velocity is 0, as the paper has it for the first steps; above 1 for none.
    **Source:** Fan et al. 2025, eq. 7 and section 4.2.
    """

    zero_from: ScalarLike = 2.0

    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        square = jnp.vdot(negative, negative)
        near = (
            jnp.where(
                square > 0, jnp.vdot(positive, negative) / jnp.where(square > 0, square, 1), 0
            )
            * negative
        )
        return jnp.where(t >= self.zero_from, 0, near + scale * (positive - near))


class Projected(Rule):
    """Adaptive projected guidance: of the difference of the estimates of x0, the part along the positive one, which saturates
    colours, is damped, and the rest is bounded.

    `parallel`: how much of that part is kept; 1, with no bound and no momentum, is classifier-free guidance. `bound`: of the
    difference's norm, in the units of x. `momentum`: this times the difference before is added to each; the paper's are
    negative, -0.5 and -0.75.
    **Source:** Sadat et al. 2024, algorithm 1.
    """

    parallel: ScalarLike = 0.0
    bound: ScalarLike = float("inf")
    momentum: ScalarLike | None = None

    def __check_init__(self):
        check_finite("Projected", parallel=self.parallel, momentum=self.momentum)
        if is_concrete_number(self.bound) and not np.all(np.asarray(self.bound) > 0):
            raise ValueError(
                f"`Projected(bound)` needs a positive number, or infinity for none, got {self.bound}."
            )

    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        return self._guide(x, t, positive, positive - negative, scale)

    def init(self, x: X) -> X | None:
        return None if self.momentum is None else jnp.zeros_like(x)

    def with_memory(
        self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar, memory: X | None
    ) -> tuple[X, X | None]:
        if memory is None:
            return self(x, t, positive, negative, scale), None
        # In the units of x0, of which the velocity's are 1 / t; at t = 0 guidance changes no estimate.
        carried = jnp.asarray(self.momentum, x.dtype) * memory
        difference = positive - negative + jnp.where(t > 0, carried / jnp.where(t > 0, t, 1), 0)
        return self._guide(x, t, positive, difference, scale), t * (positive - negative) + carried

    def _guide(self, x: X, t: Scalar, positive: X, difference: X, scale: Scalar) -> X:
        # The estimates differ by -t times the difference, so that nothing is divided by t.
        estimate = x - t * positive
        length = t * jnp.linalg.norm(difference)
        difference = difference * jnp.where(
            length > self.bound, self.bound / jnp.where(length > 0, length, 1), 1
        )
        square = jnp.vdot(estimate, estimate)
        along = jnp.vdot(difference, estimate) / jnp.where(square > 0, square, 1) * estimate
        return positive + (scale - 1) * (difference - along + self.parallel * along)


class WeakModel(eqx.Module):
    """A weaker model, to be led away from.

    `velocity`: (x, t, condition) -> dx/dt: the same network with blocks skipped (skip-layer guidance) or their attention
    spoilt (PAG), as `fluxjax.Weaken` makes it, or another one (Karras et al. 2024, autoguidance). `strength`: 0 is none, and
    costs nothing. `low`, `high`: times within which it is used.
    """

    velocity: Conditional
    strength: ScalarLike
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("WeakModel", strength=self.strength, low=self.low, high=self.high)


class Memories(NamedTuple):
    """What a guided velocity remembers: the rule's memory, and the velocity's of either condition."""

    rule: Any
    positive: Any
    negative: Any


class Guided(StatefulVelocity):
    """A `Velocity` guided towards one condition, away from another, and away from a weaker model: the rule's velocity of both
    conditions, plus strength (positive - weak).

    Both conditions are evaluated as one batch (one after the other if the velocity is `Remembering`, each with a memory of its
    own); only the first where the scale is 1 or the time is outside of `low` to `high`, if neither is batched by
    `jax.vmap`, which turns the choice into both.

    `velocity`: (x, t, condition) -> dx/dt, of one condition. `positive`, `negative`: conditions, pytrees of the same shapes;
    without the second, the first is bound and nothing is led away from it. `scale`: 1 is no guidance. `rule`: how they are
    combined. `low`, `high`: times (Kynkäänniemi et al. 2024). `weak`: a weaker model.
    **Raises:** `ValueError` for a scale without `negative`, or numbers that are not finite.
    """

    velocity: Conditional
    positive: Any
    negative: Any = None
    scale: ScalarLike = 1.0
    rule: Rule = ClassifierFree()
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0
    weak: WeakModel | None = None

    def __check_init__(self):
        check_finite("Guided", scale=self.scale, low=self.low, high=self.high)
        if (
            self.negative is None
            and is_concrete_number(self.scale)
            and np.any(np.asarray(self.scale) != 1)
        ):
            raise ValueError(
                f"`Guided(scale={self.scale})` needs the condition to lead away from. Pass negative=."
            )

    def init(self, x: X) -> Any:
        one, state = initial_memory(self.velocity, x), self.rule.init(x)
        return None if one is None and state is None else Memories(state, one, one)

    def __call__(self, x: X, t: Scalar, *condition: Any, memory: Any = None) -> Any:
        scale, t = jnp.asarray(self.scale, x.dtype), jnp.asarray(t, x.dtype)
        before = self.init(x) if memory is None else memory
        before = Memories(None, None, None) if before is None else before
        state, first, second = before

        def one() -> tuple[X, X, Memories]:
            positive, now = self._ask(x, t, self.positive, first)
            return positive, positive, Memories(state, now, second)

        def both() -> tuple[X, X, Memories]:
            if first is None:
                pair = jax.tree.map(lambda *sides: jnp.stack(sides), self.positive, self.negative)
                positive, negative = jax.vmap(self.velocity, in_axes=(None, None, 0))(x, t, pair)
                now, then = None, None
            else:
                (positive, now), (negative, then) = (
                    self._ask(x, t, self.positive, first),
                    self._ask(x, t, self.negative, second),
                )
            guided, after = self.rule.with_memory(x, t, positive, negative, scale, state)
            return guided, positive, Memories(after, now, then)

        if self.negative is None:
            guided, positive, after = one()
        else:
            guided, positive, after = jax.lax.cond(
                (scale != 1) & (self.low <= t) & (t <= self.high), both, one
            )
        guided = guided if self.weak is None else self._from_weak(self.weak, x, t, guided, positive)
        return guided if memory is None else (guided, after)

    def _ask(self, x: X, t: Scalar, condition: Any, memory: Any) -> tuple[X, Any]:
        if memory is None:
            return self.velocity(x, t, condition), None
        return self.velocity(x, t, condition, memory=memory)  # type: ignore[call-arg, return-value]

    def _from_weak(self, weak: WeakModel, x: X, t: Scalar, guided: X, positive: X) -> X:
        strength = jnp.asarray(weak.strength, x.dtype)
        used = (strength != 0) & (weak.low <= t) & (t <= weak.high)
        return jax.lax.cond(
            used,
            lambda: guided + strength * (positive - weak.velocity(x, t, self.positive)),
            lambda: guided,
        )
