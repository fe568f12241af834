"""Velocities made of several: mixed by weights, on windows, or guided by text and by an image."""

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import check_broadcasts
from fluxjax.flow.step import X
from fluxjax.flow.velocity import Condition, Memory, StatefulVelocity, Velocity, initial_memory
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, Scalar, ScalarLike


def _evaluate(velocity: Callable, memory: Memory, x: X, *inputs: object) -> tuple[X, Memory]:
    """Return the value of a velocity and its new memory, both with and without one."""
    if memory is None:
        return velocity(x, *inputs), None
    return velocity(x, *inputs, memory=memory)


def _as_arrays(weights: Sequence[ScalarLike | Array]) -> tuple[Array, ...]:
    """Return weights as arrays, so that other numbers need no new compilation."""
    return tuple(jnp.asarray(weight) for weight in weights)


@convert_arguments
class Mixed(StatefulVelocity):
    """The weighted mean of several velocities, sum w_i v_i / sum w_i, at each entry of x.

    MultiDiffusion for regions: each prompt's velocity counts where its weight is. It costs one
    evaluation of each.

    **Arguments:**

    - `velocities`: (x, t) -> dx/dt, each for all of x.
    - `weights`: one for each velocity, at least 0, in a shape that broadcasts to that of x. At each
      entry of x at least one is above 0.

    **Raises:** `ValueError` for another number of weights, negative ones, and entries that no
    weight covers (of traced ones, only their number and shapes are checked).
    **Source:** Bar-Tal et al. 2023, eq. 5.
    """

    velocities: Sequence[Velocity]
    weights: Sequence[ScalarLike | Float[Array, "..."]] = eqx.field(converter=_as_arrays)

    def __check_init__(self):
        if len(self.velocities) != len(self.weights) or not self.velocities:
            raise ValueError(
                f"`Mixed(velocities, weights)` needs one weight for each velocity, got "
                f"{len(self.velocities)} velocities and {len(self.weights)} weights."
            )
        if any(isinstance(weight, jax.core.Tracer) for weight in self.weights):
            return
        for weight in self.weights:
            _check_weights("Mixed", weight)
        if np.any(sum(np.asarray(weight) for weight in self.weights) == 0):
            raise ValueError(
                "`Mixed(weights)` are all 0 at some entries. Give each entry a weight above 0; one "
                "velocity may have the weight 1 everywhere, as a background."
            )

    def init(self, x: X) -> tuple[Memory, ...] | None:
        memories = tuple(initial_memory(velocity, x) for velocity in self.velocities)
        if all(memory is None for memory in memories):
            return None
        return memories

    def __call__(
        self, x: X, t: ScalarLike, *condition: Condition, memory: tuple[Memory, ...] | None = None
    ) -> X | tuple[X, tuple[Memory, ...]]:
        before = memory
        if before is None:
            before = (None,) * len(self.velocities)
        mixed, whole, after = jnp.zeros_like(x), jnp.zeros_like(x), []
        for velocity, weight, one in zip(self.velocities, self.weights, before, strict=True):
            check_broadcasts("Mixed", x, weights=weight)
            value, new = _evaluate(velocity, one, x, t, *condition)
            mixed = mixed + weight.astype(x.dtype) * value.astype(x.dtype)
            whole = whole + weight.astype(x.dtype)
            after.append(new)
        if memory is None:
            return mixed / whole
        return mixed / whole, tuple(after)


def _check_weights(call: str, weight: Array) -> None:
    check_finite(call, weights=weight)
    if np.any(np.asarray(weight) < 0):
        raise ValueError(
            f"`{call}(weights)` needs numbers of at least 0, got {np.min(np.asarray(weight)):g}."
        )


@convert_arguments
class SlidingWindows(StatefulVelocity):
    """A velocity for large x, from one that is evaluated on overlapping windows of it.

    MultiDiffusion for panoramas: where windows overlap, their velocities are averaged. Nothing in
    x is coherent over more than a window, and overlaps blur: the mean of several velocities is that
    of no draw. It costs one evaluation of a window for each of `count(shape)` windows, one after
    another.

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
        fits = len(self.size) == len(self.stride) and len(self.size) > 0
        if fits:
            strides, sizes = np.array(self.stride), np.array(self.size)
            fits = bool(np.all((strides >= 1) & (strides <= sizes)))
        if not fits:
            raise ValueError(
                "`SlidingWindows(size, stride)` needs a stride from 1 to the size for each axis, "
                f"got {self.size} and {self.stride}."
            )
        if isinstance(self.weights, jax.core.Tracer):
            return
        _check_weights("SlidingWindows", self.weights)
        if np.any(np.asarray(self.weights) == 0):
            raise ValueError("`SlidingWindows(weights)` needs numbers above 0, got 0.")

    def starts(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return where the windows of an x of this shape start, [windows, axes].

        **Raises:** `ValueError` for an x that is smaller than a window.
        """
        axes = len(self.size)
        if len(shape) < axes or np.any(np.array(shape[:axes]) < np.array(self.size)):
            raise ValueError(
                f"`SlidingWindows` of the size {self.size} got an x of the shape {tuple(shape)}, "
                "which is smaller. Choose smaller windows."
            )
        along = []
        for length, size, stride in zip(shape[:axes], self.size, self.stride, strict=True):
            last = length - size
            along.append([*range(0, last, stride), last])
        return np.array(list(itertools.product(*along)), np.int32)

    def count(self, shape: tuple[int, ...]) -> int:
        """Return the number of windows of an x of this shape."""
        return len(self.starts(shape))

    def init(self, x: X) -> Memory:
        starts = jnp.asarray(self.starts(x.shape))
        if initial_memory(self.velocity, self._window(x, starts[0])) is None:
            return None
        # One memory for each window.
        return jax.vmap(lambda start: initial_memory(self.velocity, self._window(x, start)))(starts)

    def __call__(
        self, x: X, t: ScalarLike, *condition: Condition, memory: Memory = None
    ) -> X | tuple[X, Memory]:
        starts = self.starts(x.shape)
        window_shape = self._window_shape(x)
        weights = jnp.broadcast_to(self.weights.astype(x.dtype), window_shape)

        def add(before: tuple[X, X], item: tuple[Array, Memory]) -> tuple[tuple[X, X], Memory]:
            mixed, whole = before
            start, one = item
            value, new = _evaluate(self.velocity, one, self._window(x, start), t, *condition)
            mixed = _add_window(mixed, weights * value.astype(x.dtype), start)
            return (mixed, _add_window(whole, weights, start)), new

        zeros = jnp.zeros_like(x)
        (mixed, whole), after = jax.lax.scan(add, (zeros, zeros), (jnp.asarray(starts), memory))
        if memory is None:
            return mixed / whole
        return mixed / whole, after

    def _window_shape(self, x: X) -> tuple[int, ...]:
        return (*self.size, *x.shape[len(self.size) :])

    def _window(self, x: X, start: Array) -> Array:
        return jax.lax.dynamic_slice(x, _all_starts(x, start), self._window_shape(x))


def _all_starts(x: X, start: Array) -> tuple[Scalar | int, ...]:
    return (*start, *(0,) * (x.ndim - len(start)))


def _add_window(x: X, window: Array, start: Array) -> X:
    place = _all_starts(x, start)
    old = jax.lax.dynamic_slice(x, place, window.shape)
    return jax.lax.dynamic_update_slice(x, old + window, place)


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
        check_finite("ImageGuided", image_scale=self.image_scale, text_scale=self.text_scale)

    def init(self, x: X) -> tuple[Memory, Memory, Memory] | None:
        memory = initial_memory(self.velocity, x)
        if memory is None:
            return None
        return memory, memory, memory

    def __call__(
        self, x: X, t: ScalarLike, *condition: Condition, memory: Memory = None
    ) -> X | tuple[X, Memory]:
        time = jnp.asarray(t, x.dtype)
        conditions = self.neither, self.image, self.both
        before = memory
        if before is None:
            before = self.init(x)
        if before is None:
            batch = jax.tree.map(lambda *each: jnp.stack(each), *conditions)
            values = jax.vmap(self.velocity, in_axes=(None, None, 0))(x, time, batch)
            plain, of_image, of_both = values
            after = None
        else:
            pairs = [
                _evaluate(self.velocity, one, x, time, each)
                for one, each in zip(before, conditions, strict=True)
            ]
            (plain, of_image, of_both), after = zip(*pairs, strict=True)
        image_scale = jnp.asarray(self.image_scale, x.dtype)
        text_scale = jnp.asarray(self.text_scale, x.dtype)
        # Written so that both scales of 1 give v_IT but for rounding of zeros.
        guided = (
            of_both
            + (image_scale - 1) * (of_image - plain)
            + (text_scale - 1) * (of_both - of_image)
        )
        if memory is None:
            return guided
        return guided, after
