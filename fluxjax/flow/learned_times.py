"""Sampling times learned for a velocity: planned by dynamic programming, or fitted by gradients.

Both compare with a teacher, which takes many small steps over a batch of noise.
"""

from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.arguments import convert_arguments
from fluxjax.flow.checks import cast_value, check_times, import_optax
from fluxjax.flow.runge_kutta import Euler, Heun
from fluxjax.flow.sample import sample
from fluxjax.flow.step import Step, time_dtype
from fluxjax.flow.stochastic import check_draws_no_noise
from fluxjax.flow.times import uniform_times
from fluxjax.flow.velocity import Velocity
from fluxjax.numeric import check_count, check_positive
from fluxjax.shapes import Array, Float, Scalar, Times


@convert_arguments
def plan_times(
    velocity: Velocity,
    noise: Float[Array, "draws *shape"],
    steps: int,
    *,
    nodes: Times | None = None,
    decay: float = 0.95,
    teacher: Step = Heun(),
) -> Float[Array, " planned"]:
    """Choose times out of the nodes of a teacher, so that Euler's jumps between them err least.

    The error of the jump from one node to another is measured on the teacher's path, and dynamic
    programming finds the `steps` jumps whose sum of errors is least. It costs the teacher's
    evaluations and one for each node, however many times are planned.

    **Arguments:**

    - `velocity`: (x, t) -> dx/dt of one draw, without a memory.
    - `noise`: the state of each draw at the first node. A few draws are enough.
    - `steps`: how many to plan, at most one less than the nodes.
    - `nodes`: of the teacher, falling; by default 64 uniform steps from 1 to 0.
    - `decay`: the weight of an error falls by this factor with each later step. Below 1, the first
      steps become shorter.
    - `teacher`: its integrator.

    **Returns:** [steps + 1], a choice of the nodes with both ends.
    **Raises:** `ValueError` for fewer than 1 step, more steps than the nodes have, or a decay that
    is not positive; as `sample`.
    **Source:** Chen et al. 2024 (GITS, 2405.11326), eq. 13 and algorithm 1.
    """
    check_count("plan_times", steps=steps)
    check_positive("plan_times", decay=decay)
    check_draws_no_noise("plan_times", teacher, name="teacher")
    if nodes is None:
        nodes = uniform_times(64)
    check_times("plan_times", nodes)
    if steps > len(nodes) - 1:
        raise ValueError(
            f"`plan_times(steps={steps})` needs at least as many steps of the teacher, got "
            f"{len(nodes) - 1}. Pass more nodes."
        )
    errors = _jump_errors(velocity, noise, nodes, teacher)
    return jnp.asarray(nodes)[_cheapest_path(np.asarray(errors), steps, decay)]


@convert_arguments
def fit_times(
    velocity: Velocity,
    noise: Float[Array, "draws *shape"],
    target: Float[Array, "draws *shape"],
    times: Times,
    *,
    step: Step = Euler(),
    iterations: int = 100,
    learning_rate: float = 0.02,
) -> Times:
    """Fit times to a teacher's results by Adam, for one integrator and number of steps.

    The gaps between the times are a softmax, so that they stay positive and both ends stay.

    **Arguments:**

    - `velocity`: (x, t) -> dx/dt of one draw, differentiable.
    - `noise`, `target`: the state of each draw at the first time, and at the last time, as `sample`
      gives it with many steps.
    - `times`: where to begin, falling; their number stays. Those of `plan_times` are good.
    - `step`: the integrator.
    - `iterations`, `learning_rate`: of Adam, on the logits of the gaps.

    **Returns:** the times with the least error of all iterations, [nodes].
    **Raises:** `ValueError` for targets of another shape than the noise, a stochastic step, no
    iterations; as `sample`. An error of Equinox's, also under `jax.jit`, if a gradient is not
    finite. `ImportError` without optax (extra `train`).
    **Source:** Xia et al. 2023 (2312.02443), with the mean squared error of x as the objective.
    """
    optax = import_optax("fit_times")
    check_count("fit_times", iterations=iterations)
    check_positive("fit_times", learning_rate=learning_rate)
    check_draws_no_noise("fit_times", step)
    check_times("fit_times", times)
    times = times.astype(time_dtype(noise))
    first, last = times[0], times[-1]

    def times_of(logits: Array) -> Array:
        passed = jnp.cumsum(jax.nn.softmax(logits))[:-1]
        return jnp.concatenate([first[None], first + (last - first) * passed, last[None]])

    def error(logits: Array) -> Scalar:
        ends = jax.vmap(lambda x: sample(velocity, x, times_of(logits), step=step).x)(noise)
        return jnp.mean(jnp.square(ends - target))

    optimizer = optax.adam(learning_rate)

    def improve(state: tuple, _: None) -> tuple[tuple, None]:
        logits, memory, best, least = state
        loss, slope = jax.value_and_grad(error)(logits)
        slope = eqx.error_if(slope, ~jnp.isfinite(slope).all(), _NO_SLOPE)
        best = jnp.where(loss < least, logits, best)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, memory = optimizer.update(slope, memory)
        return (logits + updates, memory, best, jnp.minimum(loss, least)), None

    logits = jnp.log(-jnp.diff(times) / (first - last))
    start = (logits, optimizer.init(logits), logits, jnp.asarray(jnp.inf, logits.dtype))
    (_, _, best, _), _ = jax.lax.scan(improve, start, length=iterations)
    return times_of(best)


_NO_SLOPE = (
    "`fit_times` got a gradient in the times that is not finite. Differentiate the velocity in x "
    "and t on its own, also at the first and the last time, or begin with other times."
)


def _jump_errors(
    velocity: Velocity, noise: Array, nodes: Array, teacher: Step
) -> Float[Array, "nodes nodes"]:
    """Return the mean error of one Euler step from each node to each other one."""

    @jax.jit
    def errors(noise: Array, nodes: Array) -> Array:
        nodes = nodes.astype(time_dtype(noise))

        def of_draw(x: Array) -> Array:
            wide = x.astype(nodes.dtype)
            path = cast(Array, sample(velocity, wide, nodes, step=teacher, history=True).history)

            def from_node(inputs: tuple[Array, Scalar]) -> Array:
                x, t = inputs
                v = cast_value("plan_times", velocity(x, t), x)
                ends = x + jnp.expand_dims(nodes - t, range(1, x.ndim + 1)) * v
                axes = tuple(range(1, ends.ndim))
                return jnp.sqrt(jnp.sum(jnp.square(ends - path), axes))

            return jax.lax.map(from_node, (path, nodes))

        return jnp.mean(jax.vmap(of_draw)(noise), 0)

    return errors(noise, nodes)


def _cheapest_path(errors: np.ndarray, steps: int, decay: float) -> np.ndarray:
    """Return the nodes of the path of `steps` jumps, from first to last, of least discounted error.

    **Arguments:** `errors`: of the jump from one node (row) to a later one (column).
    """
    nodes = len(errors)
    forward = np.triu(np.ones((nodes, nodes), bool), 1)
    jumps = np.where(forward, errors, np.inf)
    # The least error from each node to the last one, with one more jump in each round.
    to_end = np.full(nodes, np.inf)
    to_end[-1] = 0
    following = []
    for _ in range(steps):
        totals = jumps + decay * to_end
        following.append(totals.argmin(1))
        to_end = totals.min(1)
    path = [0]
    for choice in reversed(following):
        path.append(int(choice[path[-1]]))
    return np.array(path)
