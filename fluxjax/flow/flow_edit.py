"""Edits by the difference between the velocities of two prompts."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import check_same_shape, checked_fraction, checked_velocity
from fluxjax.flow.step import OptionalKey, Step, X, start_time_only, time_dtype
from fluxjax.flow.strength import noisy_image
from fluxjax.flow.velocity import (
    Memory,
    MemoryCarrier,
    Velocity,
    initial_memory,
    scan_evaluations,
)
from fluxjax.numeric import check_finite
from fluxjax.shapes import Array, Float, PRNGKeyArray, Scalar, ScalarLike


class _Difference(NamedTuple):
    """The state of `FlowEdit`: the edit so far, x - image, and the memory of the source."""

    change: X
    memory: Memory


@convert_arguments
class FlowEdit(Step):
    """FlowEdit: moves an image by the difference of a target's and a source's velocity.

    No inversion, and nothing is kept in memory but the image. `sample` integrates the target's
    velocity, from the image itself:

    ```python
    step = FlowEdit(source, image)
    edited = sample(target, image, times[4:], step=step, key=key).x       # the last 24 of 28 steps
    ```

    The smaller the first time, the more of the image is kept. Usually both velocities are guided,
    in the paper by a scale of 1.5 for the source and 5.5 for the target. If both are the same
    function, the result equals the image bit by bit. Each step evaluates the source's velocity and
    the target's `averages` times each.

    **Arguments:**

    - `source`: the velocity of the prompt that describes the image, (x, t) -> dx/dt.
    - `image`: as a latent, in the shape of x.
    - `averages`: over how many draws of noise the difference is averaged at each step.

    **Raises:** `ValueError` for less than 1 average, without a key, and, when a step is taken, for
    an image that does not have the shape of x.
    **Source:** Kulikov et al. 2024, algorithm 1.
    """

    order = 1
    rising = False
    span = (0.0, 1.0)
    source: Velocity
    image: Float[Array, "*shape"]
    averages: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if self.averages < 1:
            raise ValueError(
                f"`FlowEdit(averages)` needs at least 1 draw of noise, got {self.averages}."
            )

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        return 2 * self.averages

    evaluation_times = start_time_only

    def init(self, x: X) -> _Difference:
        check_same_shape("FlowEdit", x, image=self.image)
        return _Difference(x - self.image.astype(x.dtype), initial_memory(self.source, x))

    def __call__(
        self,
        velocity: Velocity,
        x: X,
        t: Scalar,
        u: Scalar,
        state: _Difference,
        *,
        key: OptionalKey,
    ) -> tuple[X, _Difference, None]:
        if key is None:
            raise ValueError("FlowEdit draws noise. Pass key=jax.random.key(…) to `sample`.")
        image = self.image.astype(x.dtype)
        source = MemoryCarrier(checked_velocity("FlowEdit", self.source), state.memory)

        def add(before: tuple[X, Memory], draw_key: Array) -> tuple[X, Memory]:
            total, memory = before
            noise = jax.random.normal(draw_key, x.shape, x.dtype)
            there = noisy_image(image, noise, t)
            target_there = there + state.change
            if memory is None:
                v_source = source.velocity(there, t)
            else:
                source.memory = memory
                v_source, memory = source(there, t), source.memory
            difference = _exact_difference(velocity(target_there, t), v_source)
            return total + difference, memory

        before = jnp.zeros_like(x), state.memory
        if self.averages == 1:
            total, memory = add(before, key)
        else:
            keys = jax.random.split(key, self.averages)
            total, memory = scan_evaluations(velocity, add, before, keys)
        # The change is carried, and not image + change, whose rounding would add up.
        change = state.change + (u - t) / self.averages * total
        return image + change, _Difference(change, memory), None


def _exact_difference(first: X, second: X) -> X:
    """Return first - second, which is 0 if both are computed alike."""
    # Without the barrier XLA may compute a b - c d with one rounding less on one side.
    first, second = jax.lax.optimization_barrier((first, second))
    return first - second


@convert_arguments
def edit_mask(
    source: Velocity,
    target: Velocity,
    image: Float[Array, "*shape"],
    *,
    key: PRNGKeyArray,
    t: ScalarLike = 0.5,
    draws: int = 10,
    ratio: ScalarLike = 1.5,
    axis: int | None = None,
) -> Float[Array, "*mask_shape"]:
    """Return where two prompts differ, as DiffEdit's mask: 1 where the image is to be edited.

    It is where |v_target - v_source|, averaged over draws of noise, exceeds `ratio` times its mean
    over the image. It costs `2 * draws` evaluations.

    **Arguments:**

    - `source`, `target`: the velocities of both prompts, (x, t) -> dx/dt.
    - `image`: as a latent.
    - `t`: the time at which they are compared, in [0, 1].
    - `draws`: of noise, at least 1.
    - `ratio`: above 0. Larger ones give smaller masks.
    - `axis`: the axis of channels, which get one mask together, such as -1 for packed latents; of
      size 1 in the mask. None: each entry gets its own.

    **Returns:** 0 and 1, in the dtype of the image, in a shape that broadcasts to it. All 0 if both
    prompts differ nowhere, or everywhere alike.
    **Raises:** `ValueError` for a t outside [0, 1], a ratio that is not finite, or no draws.
    **Source:** Couairon et al. 2022, section 3.2, step 1.
    """
    t = checked_fraction("edit_mask", "t", t, "0 is the image, 1 is noise.")
    check_finite("edit_mask", ratio=ratio)
    if draws < 1:
        raise ValueError(f"`edit_mask(draws)` needs at least 1 draw of noise, got {draws}.")
    dtype = time_dtype(image)
    x0, time = image.astype(dtype), jnp.asarray(t, dtype)
    v_source = checked_velocity("edit_mask", source)
    v_target = checked_velocity("edit_mask", target)

    def add(total: Array, draw_key: Array) -> tuple[Array, None]:
        there = noisy_image(x0, jax.random.normal(draw_key, x0.shape, dtype), time)
        return total + jnp.abs(
            _exact_difference(v_target(there, time), v_source(there, time))
        ), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(x0), jax.random.split(key, draws))
    if axis is not None:
        total = jnp.mean(total, axis, keepdims=True)
    mask = total > jnp.asarray(ratio, dtype) * jnp.mean(total)
    return mask.astype(image.dtype)
