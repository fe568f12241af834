"""Sampling in one run, in segments, and one step at a time."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import DDIM, DPMpp2M, Euler, UniPC2, flow_times, stream
from fluxjax.flow import AB2, Guided, Projected, advance_sample, begin_sample, sample

MEAN, DEVIATION = 0.7, 0.4
X = np.linspace(-2, 2, 5, dtype=np.float32)


def gaussian_velocity(x, t):
    """The exact velocity for data N(MEAN, DEVIATION^2): E[noise - x0 | x]."""
    variance = ((1 - t) * DEVIATION) ** 2 + t**2
    x0 = MEAN + (1 - t) * DEVIATION**2 / variance * (x - (1 - t) * MEAN)
    noise = t / variance * (x - (1 - t) * MEAN)
    return noise - x0


def test_euler_is_exact_on_straight_paths():
    target = np.float32([0.3, -2.0])
    straight = lambda x, t: (x - target) / t  # noqa: E731
    for steps in (1, 20):
        end = sample(straight, [1.0, 5.0], flow_times(steps)).x
        np.testing.assert_allclose(end, target, atol=1e-5)  # each step rounds a few times


def test_euler_converges_with_order_one():
    # The flow of a Gaussian carries x at t = 1 to the same quantile at t = 0.
    exact = MEAN + DEVIATION * X
    ends = [sample(gaussian_velocity, X, flow_times(steps)).x for steps in (32, 128)]
    errors = [np.abs(end - exact).max() for end in ends]
    assert np.log2(errors[0] / errors[1]) / 2 == pytest.approx(Euler.order, abs=0.25)


def test_history_has_every_node_from_start_to_end():
    times = np.asarray(flow_times(5))
    result = sample(gaussian_velocity, X, times, history=True)
    assert result.history.shape == (6, 5)
    np.testing.assert_array_equal(result.history[0], X)
    np.testing.assert_array_equal(result.history[-1], result.x)
    history = np.asarray(result.history)
    for i in range(5):
        end = history[i] + (times[i + 1] - times[i]) * gaussian_velocity(history[i], times[i])
        np.testing.assert_allclose(history[i + 1], end, rtol=1e-5, atol=1e-6)


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
    for run in (sample, stream):
        with pytest.raises(ValueError, match=rf"`{run.__name__}\(times\)` needs at least 2 nodes"):
            run(gaussian_velocity, X, np.ones(1))


@pytest.mark.parametrize(
    ("step", "key"),
    [(Euler(), None), (UniPC2(), None), (DDIM(0.5), jax.random.key(1))],
    ids=["one-step", "multistep", "stochastic"],
)
def test_a_stream_has_the_states_of_one_run_and_their_estimates(step, key):
    times = np.asarray(flow_times(6, mu=1.0))
    whole = sample(gaussian_velocity, X, times, step=step, key=key, history=True)
    states = list(stream(gaussian_velocity, X, times, step=step, key=key))
    assert [state.number for state in states] == list(range(6))
    history = np.asarray(whole.history)
    np.testing.assert_allclose([state.x for state in states], history[1:], atol=1e-6)
    np.testing.assert_array_equal([state.t for state in states], times[1:])
    if isinstance(step, Euler):
        # The estimate of an Euler step is the model's own.
        estimate = history[2] - times[2] * gaussian_velocity(history[2], times[2])
        np.testing.assert_allclose(states[2].x0, estimate, atol=1e-5)


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
def test_many_particles_are_as_many_single_runs(step):
    xs = jax.random.normal(jax.random.key(0), (5, 3))
    keys, shifts = jax.random.split(jax.random.key(1), 5), np.linspace(0.5, 2.0, 5)
    particles = (xs, keys, jnp.asarray(shifts, jnp.float32))
    times = flow_times(8)

    def run(x, key, shift):
        velocity = eqx.Partial(lambda shift, x, t: gaussian_velocity(x, t) * shift, shift)
        return sample(velocity, x, times, step=step, key=key).x

    single = jax.jit(run)
    alone = [single(*(values[i] for values in particles)) for i in range(5)]
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(*particles), alone, atol=1e-5)

    @jax.jit
    def in_batches(*particles):
        return jax.lax.map(lambda one: run(*one), particles, batch_size=2)

    np.testing.assert_allclose(in_batches(*particles), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, np.nan, 0.0], "needs finite numbers"),
        ([1.0, 0.5, 0.5, 0.0], "all fall, or all rise, got 0.5 and then 0.5"),
        ([1.0, 0.2, 0.5, 0.0], "got 0.2 and then 0.5"),
        ([1.5, 0.5, 0.0], "from 0 to 1 for UniPC2, got 0 to 1.5"),
    ],
)
def test_impossible_times_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian_velocity, X, times, step=UniPC2())


def test_stochastic_steps_refuse_rising_times():
    with pytest.raises(ValueError, match="DDIM only goes from noise to image"):
        sample(gaussian_velocity, X, [0.0, 1.0], step=DDIM(), key=jax.random.key(0))


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


@pytest.mark.parametrize("step", [Euler(), DPMpp2M(), UniPC2()], ids=lambda s: type(s).__name__)
def test_float16_is_integrated_in_float32_and_the_result_is_float16(step):
    x, times = X.astype(np.float16), flow_times(5)
    result = sample(gaussian_velocity, x, times, step=step, history=True)
    assert result.x.dtype == result.history.dtype == jnp.float16
    wide = sample(gaussian_velocity, x.astype(np.float32), times, step=step)
    np.testing.assert_array_equal(result.x, wide.x.astype(jnp.float16))


GUIDED = Guided(
    lambda x, t, condition: condition - jnp.float32(0.3) * t * x,
    jnp.linspace(-1, 1, 5),
    jnp.linspace(0.5, 0, 5),
    3.0,
    Projected(0.2, momentum=-0.5),
)
RUNS = {
    "one-step": (gaussian_velocity, Euler()),
    "multistep": (gaussian_velocity, AB2()),
    "stochastic": (gaussian_velocity, DDIM(0.5)),
    "stateful velocity": (GUIDED, DPMpp2M()),
}


@pytest.mark.parametrize("kind", RUNS)
def test_segments_give_bitwise_the_result_of_one_run(kind):
    velocity, step = RUNS[kind]
    times, key = flow_times(6, mu=1.0), jax.random.key(1)

    def whole(x):
        return sample(velocity, x, times, step=step, key=key, history=True)

    def advance(state, start, stop):
        return advance_sample(velocity, state, times, start, stop, step=step, key=key)

    # As users compile it: the faster compilation of the tests contracts products and sums otherwise
    # in one program than in another.
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    if jax.__version_info__ < (0, 11):  # later versions have no other emitters
        options["xla_cpu_use_fusion_emitters"] = True
    jit = partial(jax.jit, compiler_options=options)
    while_loop = jit(lambda *arguments: advance(*arguments))
    scan = jit(advance, static_argnums=(1, 2))
    begin = jit(partial(begin_sample, velocity, times=times, step=step))(X)
    result = jit(whole)(X)
    history, times = np.asarray(result.history), np.asarray(times)
    one_segment = scan(begin, 0, 6)
    check_same = np.testing.assert_array_equal
    if jax.__version_info__ >= (0, 12):
        # It contracts products and sums otherwise in a program that returns all states.
        check_same = partial(np.testing.assert_allclose, rtol=2e-7, atol=1e-7)
    for program, ends in ((while_loop, (0, 1, 1, 4, 6)), (scan, (0, 2, 6))):
        state = begin
        for start, stop in itertools.pairwise(ends):
            state = program(state, start, stop)
            check_same(state.x, history[stop])
            assert state.finite_steps == stop
        memories = jax.tree.leaves(state.memory), jax.tree.leaves(result.memory)
        for ours, theirs in zip(*memories, strict=True):
            check_same(ours, theirs)
        found = jax.tree.leaves((state.x, state.memory))
        expected = jax.tree.leaves((one_segment.x, one_segment.memory))
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(state.estimate, state.x)  # at t = 0
    assert while_loop._cache_size() == 1
    middle = while_loop(begin, 0, 3)
    slope = (history[3] - history[2]) / (times[3] - times[2])
    np.testing.assert_allclose(middle.estimate, history[3] - times[3] * slope, atol=1e-5)


def test_a_segment_counts_its_leading_finite_steps():
    def infinite_once(x, t):
        return jnp.where(jnp.abs(t - 0.6) < 0.1, jnp.inf, -x)

    @jax.jit
    def run(x):
        state = begin_sample(infinite_once, x, flow_times(5), step=Euler())
        return advance_sample(infinite_once, state, flow_times(5), 0, 5, step=Euler())

    # The steps from 1 and from 0.8 are finite; no later one counts.
    assert run(jnp.ones(2)).finite_steps == 2


def test_a_segment_of_known_length_has_gradients():
    times = flow_times(4)

    @jax.jit
    @jax.grad
    def gradient(scale):
        velocity = eqx.Partial(lambda scale, x, t: scale * x, scale)
        state = begin_sample(velocity, jnp.ones(2), times, step=Euler())
        return advance_sample(velocity, state, times, 0, 4, step=Euler()).x.sum()

    # The derivative of 2 (1 - s / 4)^4 at s = 1.
    np.testing.assert_allclose(gradient(1.0), -2 * 0.75**3, rtol=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_a_segment_outside_of_the_times_is_refused(start, stop):
    state = begin_sample(gaussian_velocity, X, flow_times(4), step=Euler())
    with pytest.raises(ValueError, match="needs 0 <= start <= stop <= 4"):
        advance_sample(gaussian_velocity, state, flow_times(4), start, stop, step=Euler())
