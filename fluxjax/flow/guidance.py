"""Guidance: several velocities combined into one that follows the condition more strongly.

The velocity of the positive condition is guided away from the velocity of a negative condition
(classifier-free guidance and its variants), from the velocity of a degraded model, or from both.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.step import X
from fluxjax.flow.velocity import Condition, Memory, StatefulVelocity, initial_memory
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Scalar, ScalarLike

Conditional = Callable[[Array, Scalar, Condition], Array]
"""(x, t, condition) -> dx/dt, a pytree."""


class Rule(eqx.Module):
    """How the velocities of the positive and of the negative condition are combined."""

    @abstractmethod
    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        """Return the combined velocity at x and t; with `scale` 1, the positive one."""

    def init(self, x: X) -> Memory:
        """Return the memory of the rule before the first evaluation; by default it has none."""
        return None

    def with_memory(
        self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar, memory: Memory
    ) -> tuple[X, Memory]:
        """Return the combined velocity and the new memory."""
        return self(x, t, positive, negative, scale), memory


class ClassifierFree(Rule):
    """Classifier-free guidance: negative + scale (positive - negative).

    **Source:** Ho & Salimans 2022, eq. 6, with scale = w + 1.
    """

    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        return negative + scale * (positive - negative)


@convert_arguments
class ZeroStar(Rule):
    """CFG-Zero*: classifier-free guidance whose negative velocity is first optimally scaled.

    The factor minimizes the distance from the scaled negative velocity to the positive one.

    **Arguments:** `zero_from`: the velocity is 0 at this time and above, as in the paper's first
    steps. The default is above 1, which means never.
    **Source:** Fan et al. 2025, eq. 7 and section 4.2.
    """

    zero_from: ScalarLike = 2.0

    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        square = jnp.vdot(negative, negative)
        nonzero = square > 0
        factor = jnp.vdot(positive, negative) / jnp.where(nonzero, square, 1)
        scaled = jnp.where(nonzero, factor, 0) * negative
        guided = scaled + scale * (positive - scaled)
        return jnp.where(t >= self.zero_from, 0, guided)


@convert_arguments
class Projected(Rule):
    """Adaptive projected guidance, which avoids the saturated colours of high scales.

    The difference of both x0 estimates is bounded, and its part parallel to the positive estimate,
    which saturates colours, is scaled down.

    **Arguments:**

    - `parallel`: the factor of the parallel part. 1 with no bound and no momentum is
      classifier-free guidance.
    - `bound`: of the norm of the difference, in the units of x; infinity means no bound.
    - `momentum`: the factor with which the previous differences are added to each. The paper uses
      negative ones, -0.5 and -0.75. None means no memory.

    **Source:** Sadat et al. 2024, algorithm 1.
    """

    parallel: ScalarLike = 0.0
    bound: ScalarLike = float("inf")
    momentum: ScalarLike | None = None

    def __check_init__(self):
        check_finite("Projected", parallel=self.parallel, momentum=self.momentum)
        if is_concrete_number(self.bound) and not np.all(np.asarray(self.bound) > 0):
            raise ValueError(
                f"`Projected(bound)` needs a positive number, or infinity for none, got "
                f"{self.bound}."
            )

    def __call__(self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar) -> X:
        return self._guide(x, t, positive, positive - negative, scale)

    def init(self, x: X) -> X | None:
        if self.momentum is None:
            return None
        return jnp.zeros_like(x)

    def with_memory(
        self, x: X, t: Scalar, positive: X, negative: X, scale: Scalar, memory: X | None
    ) -> tuple[X, X | None]:
        if memory is None:
            return self(x, t, positive, negative, scale), None
        # The memory is a difference of x0 estimates, which is t times one of velocities. At t = 0
        # guidance changes no estimate.
        momentum = jnp.asarray(self.momentum, x.dtype) * memory
        inside = t > 0
        velocity_momentum = jnp.where(inside, momentum / jnp.where(inside, t, 1), 0)
        plain = positive - negative
        guided = self._guide(x, t, positive, plain + velocity_momentum, scale)
        return guided, t * plain + momentum

    def _guide(self, x: X, t: Scalar, positive: X, difference: X, scale: Scalar) -> X:
        """Return the guided velocity.

        **Arguments:** `difference`: of the velocities, positive - negative, with momentum.
        """
        estimate = x - t * positive
        # The difference of the estimates is -t times that of the velocities: no division by t.
        length = t * jnp.linalg.norm(difference)
        too_long = length > self.bound
        # An infinite bound stays out of the division, whose gradient would be NaN.
        shrink = jnp.where(too_long, self.bound, 1) / jnp.where(too_long, length, 1)
        difference = difference * shrink
        # An estimate of 0 has no direction; then nothing is along it.
        square = jnp.vdot(estimate, estimate)
        share = jnp.vdot(difference, estimate) / jnp.where(square > 0, square, 1)
        along = share * estimate
        change = difference - along + self.parallel * along
        return positive + (scale - 1) * change


@convert_arguments
class WeakModel(eqx.Module):
    """A degraded model, which the velocity is guided away from.

    **Arguments:**

    - `velocity`: (x, t, condition) -> dx/dt. The same network with blocks skipped (skip-layer
      guidance) or with their attention replaced (perturbed-attention guidance), as
      `fluxjax.nets.DegradedBlocks` says; or another, weaker model (autoguidance).
    - `strength`: the factor of positive - weak. At 0 the degraded model is not evaluated.
    - `low`, `high`: it is used only at times from `low` to `high`.

    **Source:** Karras et al. 2024 (autoguidance).
    """

    velocity: Conditional
    strength: ScalarLike
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0

    def __check_init__(self):
        check_finite("WeakModel", strength=self.strength, low=self.low, high=self.high)


class GuidedMemory(NamedTuple):
    """The memory of a guided velocity: that of its rule, and of the velocity of each condition."""

    rule: Memory
    positive: Memory
    negative: Memory


@convert_arguments
class Guided(StatefulVelocity):
    """A `Velocity` guided to a positive condition, away from a negative one and a degraded model.

    It is the rule's combination of the velocities of both conditions, plus
    strength (positive - weak).

    Both conditions are evaluated as one batch if they have the same shapes, else one after the
    other. If the velocity is a `StatefulVelocity`, they are evaluated one after the other too, each
    with its own memory. Where the scale is 1, or the time is
    outside of `low` to `high`, only the positive condition is evaluated; but under `jax.vmap` over
    the scale or the time, both always are, since a batched `jax.lax.cond` evaluates both branches.

    **Arguments:**

    - `velocity`: (x, t, condition) -> dx/dt, for one condition.
    - `positive`, `negative`: the conditions, pytrees of arrays. Without `negative`, the velocity is
      that of `positive`.
    - `scale`: the guidance scale; 1 is no guidance.
    - `rule`: how both velocities are combined.
    - `low`, `high`: guidance is used only at times from `low` to `high`.
    - `weak`: a degraded model, used in addition.

    **Raises:** `ValueError` for a scale other than 1 without `negative`, and for numbers that are
    not finite.
    **Source:** Ho & Salimans 2022; Kynkäänniemi et al. 2024 (`low`, `high`).
    """

    velocity: Conditional
    positive: Condition
    negative: Condition = None
    scale: ScalarLike = 1.0
    rule: Rule = ClassifierFree()
    low: ScalarLike = 0.0
    high: ScalarLike = 1.0
    weak: WeakModel | None = None

    def __check_init__(self):
        check_finite("Guided", scale=self.scale, low=self.low, high=self.high)
        known = is_concrete_number(self.scale)
        if self.negative is None and known and np.any(np.asarray(self.scale) != 1):
            # A traced scale can not be checked; then the velocity is that of `positive`.
            raise ValueError(
                f"`Guided(scale={self.scale})` needs the condition to guide away from. "
                "Pass negative=."
            )

    def init(self, x: X) -> GuidedMemory | None:
        memory = initial_memory(self.velocity, x)
        rule_memory = self.rule.init(x)
        if memory is None and rule_memory is None:
            return None
        return GuidedMemory(rule_memory, memory, memory)

    def __call__(
        self, x: X, t: ScalarLike, *condition: Condition, memory: GuidedMemory | None = None
    ) -> X | tuple[X, GuidedMemory]:
        scale = jnp.asarray(self.scale, x.dtype)
        t = jnp.asarray(t, x.dtype)
        before = memory
        if before is None:
            before = self.init(x) or GuidedMemory(None, None, None)
        if self.negative is None:
            guided, positive, after = self._positive_only(x, t, before)
        else:
            # The branch is chosen at run time, so that another scale or window does not recompile.
            guided, positive, after = jax.lax.cond(
                (scale != 1) & (self.low <= t) & (t <= self.high),
                lambda: self._both(x, t, scale, before),
                lambda: self._positive_only(x, t, before),
            )
        if self.weak is not None:
            guided = self._away_from_weak(self.weak, x, t, guided, positive)
        if memory is None:
            return guided
        return guided, after

    def _positive_only(self, x: X, t: Scalar, memory: GuidedMemory) -> tuple[X, X, GuidedMemory]:
        """Return what `_both` does, without guidance: the guided velocity is the positive one."""
        positive, after = self._evaluate(x, t, self.positive, memory.positive)
        return positive, positive, memory._replace(positive=after)

    def _both(
        self, x: X, t: Scalar, scale: Scalar, memory: GuidedMemory
    ) -> tuple[X, X, GuidedMemory]:
        """Return the guided velocity, the positive one, and the new memory."""
        if memory.positive is None and _same_shapes(self.positive, self.negative):
            pair = jax.tree.map(lambda *sides: jnp.stack(sides), self.positive, self.negative)
            evaluate_pair = jax.vmap(self.velocity, in_axes=(None, None, 0))
            positive, negative = evaluate_pair(x, t, pair)
            after_positive, after_negative = None, None
        else:
            # A memory may decide which parts are evaluated, so that a batch would evaluate all; and
            # conditions of different shapes, as of prompts of different lengths, make no batch.
            positive, after_positive = self._evaluate(x, t, self.positive, memory.positive)
            negative, after_negative = self._evaluate(x, t, self.negative, memory.negative)
        guided, after_rule = self.rule.with_memory(x, t, positive, negative, scale, memory.rule)
        return guided, positive, GuidedMemory(after_rule, after_positive, after_negative)

    def _evaluate(self, x: X, t: Scalar, condition: Condition, memory: Memory) -> tuple[X, Memory]:
        if memory is None:
            return self.velocity(x, t, condition), None
        return self.velocity(x, t, condition, memory=memory)  # type: ignore[call-arg, return-value]

    def _away_from_weak(self, weak: WeakModel, x: X, t: Scalar, guided: X, positive: X) -> X:
        """Return a velocity guided away from a degraded model, where that is used."""
        strength = jnp.asarray(weak.strength, x.dtype)
        used = (strength != 0) & (weak.low <= t) & (t <= weak.high)

        def away() -> X:
            degraded = weak.velocity(x, t, self.positive)
            return guided + strength * (positive - degraded)

        return jax.lax.cond(used, away, lambda: guided)


def _same_shapes(one: Condition, other: Condition) -> bool:
    """Return whether two conditions can be stacked."""
    if jax.tree.structure(one) != jax.tree.structure(other):  # type: ignore[operator]
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(jnp.shape(left) == jnp.shape(right) for left, right in pairs)
