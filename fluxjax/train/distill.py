"""Consistency distillation: a student takes one step where its teacher takes many."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.arguments import convert_arguments
from fluxjax.flow.times import time_shift
from fluxjax.numeric import wide_dtype
from fluxjax.shapes import Array, Float, Scalar, ScalarLike
from fluxjax.train.loss import masked_mean


class TeacherInterval(NamedTuple):
    """Where a student's velocity is trained, and what it is compared with.

    - `start`: a time of the teacher's schedule.
    - `middle`: the teacher's next time.
    - `end`: of the student's step that `start` is in; at most `middle`.
    """

    start: Scalar
    middle: Scalar
    end: Scalar


@convert_arguments
def teacher_interval(
    t: ScalarLike, *, steps: int, teacher_steps: int, mu: ScalarLike = 0.0
) -> TeacherInterval:
    """Return the interval of the teacher's schedule that begins nearest to a time.

    **Arguments:** `t`: in [0, 1]. `steps`: of the student, from 1 to 0. `teacher_steps`: of the
    teacher in each of them. `mu`: the log-shift of both schedules, as of `fluxjax.flow_times`.
    **Returns:** times of `flow_times(steps * teacher_steps, mu=mu)`, the end of
    `flow_times(steps, mu=mu)`.
    """
    count = steps * teacher_steps
    unshifted = time_shift(jnp.asarray(t, jnp.float32), -jnp.asarray(mu, jnp.float32))
    # Times are numbered from 0, the image, to `count`, noise.
    number = jnp.clip(jnp.round(count * unshifted), 1, count)
    end = teacher_steps * jnp.floor((number - 1) / teacher_steps)
    numbers = jnp.stack([number, number - 1, end])
    return TeacherInterval(*time_shift(numbers / count, mu))


@convert_arguments
def consistency_loss(
    student: Callable[[Array, Scalar], Array],
    teacher: Callable[[Array, Scalar], Array],
    x: Float[Array, "*shape"],
    interval: TeacherInterval,
    mask: Float[Array, " tokens"] | None = None,
) -> Scalar:
    """Return the loss of multistep consistency distillation, of one example.

    The student's step from t to the end e of its interval, x + (e - t) v(x, t), has to end where a
    step of the teacher from t to the time s between them, and one of the student from there to e,
    end. As velocities: with x_s = x + (s - t) u(x, t), v(x, t) is compared with

        ((t - s) u(x, t) + (s - e) v(x_s, s)) / (t - e),

    which gets no gradient. The only v for which the loss is 0 everywhere takes the step to e in
    which the teacher's Euler steps end: for many of them, the mean velocity of the teacher's path.
    Sampled by Euler's method at the ends of the intervals, such a student draws what the teacher
    draws in all of its steps.

    **Arguments:** `student`, `teacher`: v and u, (x, t) -> dx/dt. `x`: noisy data at the interval's
    start. `mask`: as for `flow_matching_loss`.
    **Returns:** a scalar, computed in at least float32.
    **Source:** Song et al. 2023, Consistency Models, algorithm 2; Heek et al. 2024, Multistep
    Consistency Models, algorithm 1, with intervals of constant ends and straight paths.
    """
    start, middle, end = interval
    wide = wide_dtype(x.dtype)
    by_teacher = teacher(x, start).astype(wide)
    reached = x + (middle - start) * by_teacher
    by_student = student(reached, middle).astype(wide)
    whole = start - end
    target = ((start - middle) * by_teacher + (middle - end) * by_student) / whole
    squared = jnp.square(student(x, start).astype(wide) - jax.lax.stop_gradient(target))
    return masked_mean(squared, mask)
