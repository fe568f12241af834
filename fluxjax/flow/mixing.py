"""Velocities made of several: mixed by weights, on windows, or guided by text and by an image."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import check_broadcasts
from fluxjax.flow.step import X
from fluxjax.flow.velocity import (
    Condition,
    Memory,
    StatefulVelocity,
    Velocity,
    evaluate_with_memory,
    initial_memory,
)
from fluxjax.numeric import check_finite, is_concrete_number
from fluxjax.shapes import Array, Float, Scalar, ScalarLike


def _as_arrays(weights: Sequence) -> tuple[Array, ...]:
    """Return weights as arrays, so that other numbers need no new compilation."""
    return tuple(map(jnp.asarray, weights))


@convert_arguments
class Mixed(StatefulVelocity):
    """The weighted mean of several velocities, sum w_i v_i / sum w_i, at each entry of x.

    MultiDiffusion for regions: each prompt's velocity counts where its weight is. It costs one
    evaluation of each.

    **Arguments:**

    - `velocities`: (x, t) -> dx/dt, each for all of x.
    - `weights`: one for each velocity, in a shape that broadcasts to that of x. At each entry of x
      their sum is above 0.

    **Raises:** `ValueError` for another number of weights, and for entries at which their sum is
    not above 0 (of traced ones, only their number and shapes are checked).
    **Source:** Bar-Tal et al. 2023, eq. 5.
    """

    velocities: Sequence[Velocity]
    weights: Sequence[ScalarLike | Array] = eqx.field(converter=_as_arrays)

    def __check_init__(self):
        if len(self.velocities) != len(self.weights) or not self.velocities:
            raise ValueError(
                f"`Mixed(velocities, weights)` needs one weight for each velocity, got "
                f"{len(self.velocities)} velocities and {len(self.weights)} weights."
            )
        _check_positive(
            "`Mixed(weights)` needs a sum above 0 at each entry",
            sum(self.weights),
            "One velocity may have the weight 1 everywhere, as a background.",
        )

    def init(self, x: X) -> Memory:
        """Return the memories of all velocities, or None if none of them has one."""
        memories = [initial_memory(velocity, x) for velocity in self.velocities]
        if not jax.tree.leaves(memories):
            return None
        return memories

    def __call__(
        self,
        x: X,
        t: ScalarLike,
        *condition: Condition,
        memory: Memory = None,
    ) -> X | tuple[X, Memory]:
        before = memory
        if before is None:
            before = [None] * len(self.velocities)
        mixed = total = jnp.zeros_like(x)
        after = []
        for velocity, weight, old in zip(self.velocities, self.weights, before, strict=True):
            array = jnp.asarray(weight, x.dtype)
            check_broadcasts("Mixed", x, weights=array)
            value, new = evaluate_with_memory(velocity, old, x, t, *condition)
            mixed = mixed + array * value.astype(x.dtype)
            total = total + array
            after.append(new)
        if memory is None:
            return mixed / total
        return mixed / total, after


def _check_positive(rule: str, weights: object, remedy: str) -> None:
    """Check weights; traced ones pass.

    **Raises:** `ValueError` unless all are finite and above 0.
    """
    if not is_concrete_number(weights):
        return
    numbers = np.asarray(weights)
    least = numbers.min()
    # Written so that NaN fails.
    if not (least > 0 and numbers.max() < np.inf):
        raise ValueError(f"{rule}, got {least:g}. {remedy}")


@convert_arguments
class SlidingWindows(StatefulVelocity):
    """A velocity for large x, from one that is evaluated on overlapping windows of it.

    MultiDiffusion for panoramas: where windows overlap, their velocities are averaged. Nothing in
    x is coherent over more than a window, and overlaps blur: the mean of several velocities is that
    of no draw. It costs one evaluation for each of the `starts`, one after another.

    **Arguments:**

    - `velocity`: (window, t) -> dx/dt, for windows.
    - `size`: of a window along the first axes of x; the further axes are whole.
    - `stride`: between windows, at most `size`. The last window ends where x ends.
    - `weights`: how much each entry of a window counts where several overlap, above 0, in a shape
      that broadcasts to the window's.

    **Raises:** `ValueError` for strides outside 1 to `size`, weights that are not above 0, and,
    when evaluated, for an x that is smaller than a window.
    **Source:** Bar-Tal et al. 2023, section 4.1.
    """

    velocity: Velocity
    size: tuple[int, ...] = eqx.field(static=True)
    stride: tuple[int, ...] = eqx.field(static=True)
    weights: Float[Array, "..."] = eqx.field(default_factory=lambda: jnp.ones(()))

    def __check_init__(self):
        sizes, strides = np.array(self.size), np.array(self.stride)
        same = sizes.shape == strides.shape != (0,)
        if not (same and np.all((strides >= 1) & (strides <= sizes))):
            raise ValueError(
                "`SlidingWindows(size, stride)` needs a stride from 1 to the size for each axis, "
                f"got {self.size} and {self.stride}."
            )
        _check_positive(
            "`SlidingWindows(weights)` needs finite numbers above 0",
            self.weights,
            "Leave them out to count all entries of a window alike.",
        )

    def starts(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return where the windows of an x of this shape start, [windows, axes].

        **Raises:** `ValueError` for an x that is smaller than a window.
        """
        lengths = shape[: len(self.size)]
        if len(lengths) < len(self.size) or np.any(np.array(lengths) < np.array(self.size)):
            raise ValueError(
                f"`SlidingWindows` of the size {self.size} got an x of the shape {tuple(shape)}, "
                "which is smaller. Choose smaller windows."
            )
        along = []
        for length, size, stride in zip(lengths, self.size, self.stride, strict=True):
            last = length - size
            along.append([*range(0, last, stride), last])
        return np.array(list(itertools.product(*along)))

    def init(self, x: X) -> Memory:
        """Return the memories of the windows, one for each along the first axis."""
        return jax.vmap(partial(initial_memory, self.velocity))(self._cut(x))

    def __call__(
        self,
        x: X,
        t: ScalarLike,
        *condition: Condition,
        memory: Memory = None,
    ) -> X | tuple[X, Memory]:
        def evaluate(item: tuple[Array, Memory]) -> tuple[Array, Memory]:
            window, old = item
            return evaluate_with_memory(self.velocity, old, window, t, *condition)

        windows = self._cut(x)
        values, after = jax.lax.map(evaluate, (windows, memory))
        weights = jnp.broadcast_to(self.weights.astype(x.dtype), windows.shape)
        # The transpose of cutting x into windows adds them up where they lie.
        add_up = jax.linear_transpose(self._cut, x)
        weighted = weights * values.astype(x.dtype)
        (mixed,) = add_up(weighted)
        (total,) = add_up(weights)
        if memory is None:
            return mixed / total
        return mixed / total, after

    def _cut(self, x: X) -> Float[Array, "windows *window"]:
        """Return all windows, which overlap, along a new first axis."""
        axes = len(self.size)
        size = (*self.size, *x.shape[axes:])

        def window(start: Array) -> Array:
            padded = jnp.pad(start, (0, x.ndim - axes))
            return jax.lax.dynamic_slice(x, padded, size)

        return jax.vmap(window)(jnp.asarray(self.starts(x.shape)))


@convert_arguments
class ImageGuided(StatefulVelocity):
    """A velocity guided by an image and by a text, each with its own scale (InstructPix2Pix).

    It is v_0 + image_scale (v_I - v_0) + text_scale (v_IT - v_I), for a model that takes an image,
    such as Kontext. With both scales 1 it is v_IT. It costs three evaluations, as one batch; one
    after another if the velocity has a memory.

    **Arguments:**

    - `velocity`: (x, t, condition) -> dx/dt, for one condition.
    - `neither`, `image`, `both`: the conditions of v_0, v_I and v_IT, pytrees of the same shapes.
    - `image_scale`, `text_scale`: 1.5 and 7.5 in the paper; distilled models need less.

    **Raises:** `ValueError` for scales that are not finite.
    **Source:** Brooks et al. 2022, eq. 3.
    """

    velocity: Callable[[Array, Scalar, Condition], Array]
    neither: Condition
    image: Condition
    both: Condition
    image_scale: ScalarLike = 1.5
    text_scale: ScalarLike = 7.5

    def __check_init__(self):
        check_finite(
            "ImageGuided",
            image_scale=self.image_scale,
            text_scale=self.text_scale,
        )

    def init(self, x: X) -> Memory:
        """Return the memories of the three conditions along a first axis, if there are any."""
        memory = initial_memory(self.velocity, x)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), memory)

    def __call__(
        self,
        x: X,
        t: ScalarLike,
        *condition: Condition,
        memory: Memory = None,
    ) -> X | tuple[X, Memory]:
        time = jnp.asarray(t, x.dtype)
        before = memory
        if before is None:
            before = self.init(x)

        def evaluate(item: tuple[Condition, Memory]) -> tuple[X, Memory]:
            condition, old = item
            return evaluate_with_memory(self.velocity, old, x, time, condition)

        evaluate_all = jax.vmap(evaluate)
        if before is not None:
            # A memory may decide which parts are evaluated, so that a batch would evaluate all.
            evaluate_all = partial(jax.lax.map, evaluate)
        conditions = self.neither, self.image, self.both
        batch = jax.tree.map(lambda *each: jnp.stack(each), *conditions)
        (plain, of_image, of_both), after = evaluate_all((batch, before))
        # Written so that scales of 1 give v_IT exactly.
        image_part = (jnp.asarray(self.image_scale, x.dtype) - 1) * (of_image - plain)
        text_part = (jnp.asarray(self.text_scale, x.dtype) - 1) * (of_both - of_image)
        guided = of_both + image_part + text_part
        if memory is None:
            return guided
        return guided, after
