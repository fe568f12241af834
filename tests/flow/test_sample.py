from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import DDIM, DPMpp2M, Euler, UniPC2, flow_times, stream
from fluxjax.flow import AB2, Guided, Projected, advance_sample, begin_sample, sample

MEAN, DEVIATION = 0.7, 0.4


def gaussian_velocity(x, t):
    """The exact velocity for data N(MEAN, DEVIATION^2): E[noise - x0 | x]."""
    variance = ((1 - t) * DEVIATION) ** 2 + t**2
    x0 = MEAN + (1 - t) * DEVIATION**2 / variance * (x - (1 - t) * MEAN)
    noise = t / variance * (x - (1 - t) * MEAN)
    return noise - x0


def test_euler_is_exact_on_straight_paths():
    target = jnp.float32([0.3, -2.0])
    x = jnp.float32([1.0, 5.0])
    straight = lambda x, t: (x - target) / t  # noqa: E731
    for steps in (1, 3, 20):
        # Each step rounds a few times.
        np.testing.assert_allclose(sample(straight, x, flow_times(steps)).x, target, atol=1e-5)


def exact_gaussian(x):
    """The flow of a Gaussian carries x at t = 1 to the same quantile at t = 0."""
    return MEAN + DEVIATION * x


def test_euler_converges_with_order_one():
    x = jnp.linspace(-2, 2, 5)
    errors = [
        float(jnp.abs(sample(gaussian_velocity, x, flow_times(n)).x - exact_gaussian(x)).max())
        for n in (32, 64, 128)
    ]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(orders - Euler.order) < 0.25)


def test_history_holds_every_node_from_start_to_end():
    x, times = jnp.ones(3), flow_times(5)
    result = sample(gaussian_velocity, x, times, history=True)
    assert result.history.shape == (6, 3)
    np.testing.assert_array_equal(result.history[0], x)
    np.testing.assert_array_equal(result.history[-1], result.x)
    for i in range(5):
        step = result.history[i] + (times[i + 1] - times[i]) * gaussian_velocity(
            result.history[i], times[i]
        )
        np.testing.assert_allclose(result.history[i + 1], step, rtol=1e-6)


def test_evaluations_are_counted():
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -x

    assert sample(counted, jnp.ones(2), flow_times(7)).evaluations == 7
    jax.effects_barrier()
    assert len(calls) == 7


def test_new_times_and_velocity_weights_compile_nothing():
    @jax.jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(scale, x, times):
        return sample(eqx.Partial(lambda scale, x, t: scale * x, scale), x, times).x

    for n in range(3):
        run(jnp.float32(n), jnp.ones(2), flow_times(4, mu=float(n)))


def test_one_time_is_refused():
    with pytest.raises(ValueError, match="at least 2 nodes, got 1"):
        sample(gaussian_velocity, jnp.ones(2), jnp.ones(1))


def test_a_stream_reaches_the_same_end_and_its_previews_are_the_estimates():
    x, times = jnp.linspace(-2, 2, 5), flow_times(6, mu=1.0)
    for step, key in (
        (Euler(), None),
        (AB2(), None),
        (UniPC2(), None),
        (DDIM(0.5), jax.random.key(1)),
    ):
        whole = sample(gaussian_velocity, x, times, step=step, key=key, history=True)
        taken = list(stream(gaussian_velocity, x, times, step=step, key=key))
        assert [one.number for one in taken] == list(range(6))
        np.testing.assert_allclose(
            jnp.stack([one.x for one in taken]), whole.history[1:], atol=1e-6
        )
        np.testing.assert_array_equal(jnp.stack([one.t for one in taken]), times[1:])
    previous = jnp.concatenate([x[None], whole.history[1:-1]])
    euler = stream(gaussian_velocity, previous[2], times[2:])
    wanted = previous[2] - times[2] * gaussian_velocity(previous[2], times[2])
    np.testing.assert_allclose(next(euler).x0, wanted, atol=1e-5)
    with pytest.raises(ValueError, match=r"`stream\(times\)` needs at least 2 nodes"):
        stream(gaussian_velocity, x, times[:1])


def test_a_stream_is_compiled_once_for_all_steps_and_times():
    traces = []

    def velocity(x, t):
        traces.append(1)
        return -x

    for mu in (0.0, 1.0):
        list(stream(velocity, jnp.ones(2), flow_times(5, mu=mu)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "step", [Euler(), DPMpp2M(), DDIM(0.7)], ids=lambda step: type(step).__name__
)
def test_each_of_many_particles_is_its_own_single_run(step):
    xs, keys = (
        jax.random.normal(jax.random.key(0), (10, 3)),
        jax.random.split(jax.random.key(1), 10),
    )
    shifts = jnp.linspace(0.5, 2.0, 10)

    def run(x, key, shift):
        return sample(
            eqx.Partial(lambda shift, x, t: gaussian_velocity(x, t) * shift, shift),
            x,
            flow_times(8),
            step=step,
            key=key,
        ).x

    at_once = jax.vmap(run)(xs, keys, shifts)
    in_parts = jax.lax.map(lambda one: run(*one), (xs, keys, shifts), batch_size=4)
    alone = jnp.stack([run(*one) for one in zip(xs, keys, shifts, strict=True)])
    np.testing.assert_allclose(at_once, alone, atol=1e-5)
    np.testing.assert_allclose(in_parts, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([1.0, np.nan, 0.0], "needs finite numbers"),
        ([1.0, 0.5, 0.5, 0.0], "all fall, or all rise, got 0.5 and then 0.5"),
        ([1.0, 0.2, 0.5, 0.0], "got 0.2 and then 0.5"),
        ([1.5, 0.5, 0.0], "from 0 to 1 for UniPC2, got 0 to 1.5"),
    ],
)
def test_impossible_times_are_refused(times, told):
    with pytest.raises(ValueError, match=told):
        sample(gaussian_velocity, np.ones(2), times, step=UniPC2())


def test_what_draws_noise_refuses_rising_times():
    with pytest.raises(ValueError, match="DDIM only goes from noise to image"):
        sample(gaussian_velocity, np.ones(2), [0.0, 1.0], step=DDIM(), key=jax.random.key(0))


@pytest.mark.parametrize(
    "wrong", [lambda x, t: x[None], lambda x, t: jnp.int32(x)], ids=["shape", "dtype"]
)
def test_a_velocity_that_does_not_fit_x_is_refused(wrong):
    for run in (
        lambda: sample(wrong, np.ones(2), [1.0, 0.0]),
        lambda: next(stream(wrong, np.ones(2), [1.0, 0.0])),
    ):
        with pytest.raises(ValueError, match="returns the shape of x and at most its precision"):
            run()


@pytest.mark.parametrize(
    "step", [Euler(), AB2(), DPMpp2M(), UniPC2()], ids=lambda step: type(step).__name__
)
def test_float16_is_integrated_in_float32_and_comes_back_in_its_dtype(step):
    x = np.linspace(-2, 2, 5).astype(np.float16)
    found = sample(gaussian_velocity, x, flow_times(5), step=step, history=True)
    assert found.x.dtype == found.history.dtype == jnp.float16
    np.testing.assert_array_equal(
        found.x,
        sample(gaussian_velocity, jnp.float32(x), flow_times(5), step=step).x.astype(jnp.float16),
    )


GUIDED = Guided(
    lambda x, t, condition: condition - jnp.float32(0.3) * t * x,
    jnp.float32([1.0, 0.5, -0.3]),
    jnp.float32([-0.2, 0.1, 0.6]),
    3.0,
    Projected(0.2, momentum=-0.5),
)
RUNS = {
    "one-step": (gaussian_velocity, Euler()),
    "multistep": (gaussian_velocity, AB2()),
    "corrected": (gaussian_velocity, UniPC2()),
    "stochastic": (gaussian_velocity, DDIM(0.5)),
    "stateful velocity": (GUIDED, Euler()),
}


@pytest.mark.parametrize("kind", RUNS)
def test_segments_give_bitwise_what_one_run_does(kind):
    velocity, step = RUNS[kind]
    x, times, key = jnp.linspace(-2, 2, 3), flow_times(6, mu=1.0), jax.random.key(1)
    whole = jax.jit(lambda x, times: sample(velocity, x, times, step=step, key=key, history=True))
    result = whole(x, times)
    begin = jax.jit(lambda x, times: begin_sample(velocity, x, times, step=step))

    @jax.jit
    def while_loop(state, times, start, stop):
        return advance_sample(velocity, state, times, start, stop, step=step, key=key)

    @partial(jax.jit, static_argnums=(2, 3))
    def scan(state, times, start, stop):
        return advance_sample(velocity, state, times, start, stop, step=step, key=key)

    for advance in (while_loop, scan):
        state = begin(x, times)
        for start, stop in ((0, 1), (1, 1), (1, 4), (4, 6)):
            state = advance(state, times, start, stop)
            np.testing.assert_array_equal(state.x, result.history[stop])
            assert state.finite_steps == stop
        for one, other in zip(
            jax.tree.leaves(state.memory), jax.tree.leaves(result.memory), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        *_, last = stream(velocity, x, times, step=step, key=key)
        np.testing.assert_allclose(state.estimate, last.x0, atol=1e-6)
    assert while_loop._cache_size() == 1


def test_a_segment_counts_its_leading_finite_steps():
    times = flow_times(5)
    # Infinite from t = 0.6 on, so that two steps are finite; at 0.2 x is NaN, not finite again.
    broken = lambda x, t: jnp.where(t < 0.7, jnp.where(t < 0.3, -x, jnp.inf), x)  # noqa: E731
    state = begin_sample(broken, jnp.ones(2), times, step=Euler())
    state = advance_sample(broken, state, times, 0, 5, step=Euler())
    assert state.finite_steps == 2


def test_a_segment_of_known_length_has_gradients():
    times = flow_times(4)

    def end(scale):
        velocity = eqx.Partial(lambda scale, x, t: scale * x, scale)
        state = begin_sample(velocity, jnp.ones(2), times, step=Euler())
        return advance_sample(velocity, state, times, 0, 4, step=Euler()).x.sum()

    # d/ds of 2 (1 - s / 4)^4 at s = 1.
    np.testing.assert_allclose(jax.grad(end)(1.0), -2 * 0.75**3, rtol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_a_segment_outside_of_the_times_is_refused(start, stop):
    state = begin_sample(gaussian_velocity, jnp.ones(2), flow_times(4), step=Euler())
    with pytest.raises(ValueError, match="needs 0 <= start <= stop <= 4"):
        advance_sample(gaussian_velocity, state, flow_times(4), start, stop, step=Euler())
