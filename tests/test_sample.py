import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import Euler, flow_times, sample

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
    errors = [float(jnp.abs(sample(gaussian_velocity, x, flow_times(n)).x - exact_gaussian(x)).max()) for n in (32, 64, 128)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(orders - Euler.order) < 0.25)


def test_history_holds_every_node_from_start_to_end():
    x, times = jnp.ones(3), flow_times(5)
    result = sample(gaussian_velocity, x, times, history=True)
    assert result.history.shape == (6, 3)
    np.testing.assert_array_equal(result.history[0], x)
    np.testing.assert_array_equal(result.history[-1], result.x)
    for i in range(5):
        step = result.history[i] + (times[i + 1] - times[i]) * gaussian_velocity(result.history[i], times[i])
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
