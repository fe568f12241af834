"""Planned and fitted times, beside closed forms and exhaustive search."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PIXELS, m8

from fluxjax.flow import (
    AB2,
    DDIM,
    RK4,
    DPMpp2M,
    Euler,
    fit_times,
    plan_times,
    sample,
    uniform_times,
)
from fluxjax.flow.learned_times import _cheapest_path


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@eqx.filter_jit
def ends(velocity, noise, times, step):
    return jax.vmap(lambda x: sample(velocity, x, times, step=step).x)(noise)


def exact_ends(velocity, noise):
    return ends(velocity, noise, jnp.linspace(1, 0, 201), RK4())


def end_error(velocity, noise, exact, times, step):
    """Return the RMS error at the end. `exact`: from `exact_ends`."""
    off = ends(velocity, noise, jnp.asarray(times, jnp.float64), step) - exact
    return float(np.sqrt(np.mean(np.square(off))))


def normal_velocity(deviation):
    """The exact velocity for data from N(0, deviation^2)."""

    def velocity(x, t):
        variance = ((1 - t) * deviation) ** 2 + t**2
        return (t - (1 - t) * deviation**2) / variance * x

    return velocity


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.9), (3, 0.95), (4, 1.0), (7, 0.5)])
def test_the_plan_is_the_best_of_all_paths(steps, decay):
    errors = np.random.default_rng(steps).uniform(size=(9, 9))

    def total(path):
        return sum(
            decay**number * errors[jump] for number, jump in enumerate(itertools.pairwise(path))
        )

    paths = [(0, *middle, 8) for middle in itertools.combinations(range(1, 8), steps - 1)]
    assert tuple(_cheapest_path(errors, steps, decay)) == min(paths, key=total)


def test_a_path_through_all_nodes_is_the_nodes():
    nodes = uniform_times(6)
    noise = jax.random.normal(jax.random.key(0), (3, PIXELS))
    np.testing.assert_array_equal(plan_times(m8().prior, noise, 6, nodes=nodes), nodes)


def test_plans_for_a_mixture_reduce_the_error():
    """By some 8 % for Euler, and by 17 to 40 % for 2M: most of the error is that of few draws,
    which lie between two modes."""
    velocity, noise = m8().prior, jax.random.normal(jax.random.key(1), (4096, PIXELS))
    exact = exact_ends(velocity, noise)
    few = jax.random.normal(jax.random.key(0), (256, PIXELS))
    even, planned = uniform_times(20), plan_times(velocity, few, 20)
    euler = [end_error(velocity, noise, exact, times, Euler()) for times in (even, planned)]
    multistep = [end_error(velocity, noise, exact, times, DPMpp2M()) for times in (even, planned)]
    assert euler[1] < 0.96 * euler[0]
    assert multistep[1] < 0.9 * multistep[0]
    # With errors of later steps weighing more, as the authors' default of 1.15 has it.
    late = plan_times(velocity, few, 8, decay=1.15)
    even_error = end_error(velocity, noise, exact, uniform_times(8), Euler())
    assert end_error(velocity, noise, exact, late, Euler()) > 1.1 * even_error


@pytest.mark.parametrize("deviation", [1.0, 0.5])
def test_fitted_euler_times_on_a_normal_distribution_are_even_angles(deviation):
    """Euler's steps multiply x by cos of the steps of arctan(t / ((1 - t) c)): even ones are
    best."""
    steps = 10
    angles = np.linspace(np.pi / 2, 0, steps + 1)
    best = np.sin(angles) * deviation / (np.cos(angles) + np.sin(angles) * deviation)
    velocity, noise = normal_velocity(deviation), jnp.linspace(-2.0, 2.0, 16)[:, None]
    fit = jax.jit(
        lambda times: fit_times(velocity, noise, deviation * noise, times, iterations=600)
    )
    fitted = fit(uniform_times(steps))
    np.testing.assert_allclose(fitted, best, atol=2e-3)
    shrinkage = [
        float(ends(velocity, jnp.ones((1, 1)), jnp.asarray(times), Euler())[0, 0]) / deviation
        for times in (fitted, best, np.linspace(1, 0, steps + 1))
    ]
    np.testing.assert_allclose(shrinkage[0], shrinkage[1], atol=1e-6)
    if deviation == 1:
        np.testing.assert_allclose(shrinkage[1:], [0.88348, 0.87898], atol=6e-6)


@pytest.mark.parametrize("step", [AB2(), DPMpp2M()], ids=["ab2", "dpmpp_2m"])
def test_fitted_times_of_a_multistep_integrator_reduce_its_error(step):
    velocity = m8().prior
    train, noise = (jax.random.normal(jax.random.key(i), (512, PIXELS)) for i in (0, 1))
    target = ends(velocity, train, jnp.linspace(1, 0, 101), RK4())
    even = uniform_times(5)
    fit = jax.jit(lambda times: fit_times(velocity, train, target, times, step=step))
    exact = exact_ends(velocity, noise)
    errors = [end_error(velocity, noise, exact, times, step) for times in (even, fit(even))]
    assert errors[1] < 0.95 * errors[0]


def test_a_gradient_that_is_not_finite_is_an_error():
    noise = jnp.ones((2, PIXELS))
    times = uniform_times(2)

    def velocity(x, t):  # its gradient in t is infinite at t = 1/2
        return jnp.sqrt(jnp.abs(t - 0.5)) * x

    target = noise / 2
    message = "gradient in the times that is not finite"
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(fit_times(velocity, noise, target, times, step=AB2()))


def test_bad_arguments_are_refused():
    noise, times = jnp.ones((2, PIXELS)), uniform_times(4)
    velocity = m8().prior
    with pytest.raises(ValueError, match="at least as many steps of the teacher, got 4"):
        plan_times(velocity, noise, 5, nodes=times)
    with pytest.raises(ValueError, match="a whole number of at least 1, got 0"):
        plan_times(velocity, noise, 0)
    with pytest.raises(ValueError, match="positive number"):
        plan_times(velocity, noise, 4, decay=0.0)
    with pytest.raises(ValueError, match="draws no noise, got DDIM"):
        fit_times(velocity, noise, noise, times, step=DDIM())
    with pytest.raises(ValueError, match=r"takes a float array"):
        fit_times(velocity, noise, noise[:1], times)
