"""Distillation against closed forms: of a normal distribution, whose flow is affine."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import mesh_of, relative
from training import EMPTY, KEY, Training, batch_of, random_flux

from fluxjax import flow_times
from fluxjax.flow import Euler, sample
from fluxjax.lora import without_adapters
from fluxjax.train.config import MethodSettings, train_config
from fluxjax.train.distill import consistency_loss, teacher_interval
from fluxjax.train.mesh_step import row_example
from fluxjax.train.objective import Draws, Evaluation, LossSettings, example_loss, velocity_of
from fluxjax.train.place import place_batch

MEAN, VARIANCE = np.float32([0.7, -1.2]), np.float32([0.3, 1.6])
STEPS, MU = 2, 0.8


def deviation(t):
    """The deviation of x_t, of data with MEAN and VARIANCE."""
    return jnp.sqrt((1 - t) ** 2 * VARIANCE + t**2)


def teacher(x, t):
    """The exact velocity E[noise - x0 | x_t = x]."""
    gain = (t - (1 - t) * VARIANCE) / ((1 - t) ** 2 * VARIANCE + t**2)
    return gain * (x - (1 - t) * MEAN) - MEAN


def mean_velocity(x, start, end):
    """The exact mean velocity of the flow's path from `start` to `end`."""
    reached = (1 - end) * MEAN + deviation(end) / deviation(start) * (x - (1 - start) * MEAN)
    return (reached - x) / (end - start)


@functools.partial(jax.jit, static_argnums=0)
def fitted(count):
    """Return the affine student that minimizes the loss, as slopes and offsets at each time.

    One step of Newton's method minimizes a square of what is affine in the parameters. Targets are
    the student's at lower times, so these are fitted first.
    """
    times = flow_times(STEPS * count, mu=MU)
    size = len(times)
    x = jax.random.normal(KEY, (8, 2))

    def at(parameters, t):
        place = jnp.argmin(jnp.abs(times - t))
        return lambda x: parameters[0, place] * x + parameters[1, place]

    def loss(parameters, t):
        interval = teacher_interval(t, steps=STEPS, teacher_steps=count, mu=MU)
        student = lambda x, t: at(parameters, t)(x)  # noqa: E731
        return jnp.mean(jax.vmap(lambda x: consistency_loss(student, teacher, x, interval))(x))

    def fit(parameters, place):
        def at_place(pair):
            return loss(parameters.at[:, place].set(pair), times[place])

        pair = parameters[:, place]
        gradient = jax.grad(at_place)(pair).ravel()
        hessian = jax.hessian(at_place)(pair).reshape(4, 4)
        better = pair - jnp.linalg.solve(hessian, gradient).reshape(2, 2)
        parameters = parameters.at[:, place].set(better)
        return parameters, loss(parameters, times[place])

    zeros = jnp.zeros((2, size, 2))
    return times, *jax.lax.scan(fit, zeros, jnp.arange(size - 2, -1, -1))


def test_the_minimizer_is_the_flow_of_a_normal_distribution():
    """With many steps of the teacher; the error falls with their number, as Euler's does."""
    errors = []
    for count in (32, 64):
        times, (slope, offset), losses = fitted(count)
        # An affine student can follow an affine teacher exactly.
        assert float(losses.max()) < 1e-9
        x = np.float32([1.3, -0.4])
        error = 0.0
        for place, start in enumerate(times[:-1]):
            end = times[(place // count + 1) * count]
            found = slope[place] * x + offset[place]
            error = max(error, relative(found, mean_velocity(x, start, end)))
        errors.append(error)
    assert errors[1] < 0.04
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)


def test_a_fitted_student_draws_in_few_steps_what_its_teacher_draws_in_all():
    times, (slope, offset), _ = fitted(8)

    def student(x, t):
        place = jnp.argmin(jnp.abs(times - t))
        return slope[place] * x + offset[place]

    noise = jnp.float32([0.4, -1.1])
    few = sample(student, noise, flow_times(STEPS, mu=MU), step=Euler()).x
    many = sample(teacher, noise, times, step=Euler()).x
    np.testing.assert_allclose(few, many, rtol=1e-4)


def test_intervals_are_of_the_schedules_and_any_time_is_rounded_to_one():
    fine, coarse = (np.asarray(flow_times(count, mu=MU)) for count in (6, 2))
    for number, start in enumerate(fine[:-1]):
        found = teacher_interval(float(start) - 1e-3, steps=2, teacher_steps=3, mu=MU)
        expected = (start, fine[number + 1], coarse[number // 3 + 1])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    lowest = teacher_interval(0.0, steps=2, teacher_steps=3, mu=MU)
    np.testing.assert_allclose(lowest, (fine[-2], 0, 0), atol=1e-6)


LORA = MethodSettings(rank=2, targets=("single.*",))
DISTILLED = LossSettings(
    times="uniform", shift=0.3, guidance=(2.0, 2.0), distill_steps=2, teacher_steps=2
)


def test_an_adapter_follows_the_network_without_it():
    training = Training(method=LORA, loss=DISTILLED)
    weights = {name: leaf + 0.1 for name, leaf in training.weights.items()}
    adapted = training.step.part.join(weights, training.frozen)
    plain = random_flux()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, without_adapters(adapted), plain))
    rows, shared = place_batch(batch_of(1), EMPTY, mesh_of())
    example = row_example(jax.tree.map(lambda leaf: leaf[0], rows), shared)
    noise = jax.random.normal(KEY, example.latents.shape)
    evaluation = Evaluation(dtype=jnp.float32)

    @jax.jit
    def found(t):
        draws = Draws(t, noise, jnp.float32(2), jnp.bool_(False))
        return example_loss(adapted, example, draws, DISTILLED, evaluation)

    @jax.jit
    def velocities(x, t):
        rest = (x, t, example, example.text, jnp.float32(2), evaluation)
        return velocity_of(plain, *rest), velocity_of(adapted, *rest)

    first, middle, end = np.asarray(flow_times(4, mu=0.3))[:3]
    x = (1 - first) * example.latents + first * noise
    by_teacher, by_student = velocities(x, first)
    reached = x + (middle - first) * by_teacher
    target = (first - middle) * by_teacher + (middle - end) * velocities(reached, middle)[1]
    expected = np.mean(np.square(by_student - target / (first - end)))
    assert float(found(jnp.float32(0.99))) == pytest.approx(float(expected), rel=1e-4)


def test_the_loss_of_a_batch_falls_in_training():
    training = Training(method=LORA, loss=DISTILLED, optimizer=optax.adam(1e-2))
    batch, losses = batch_of(2), []
    for _ in range(12):
        # The same times and noise are drawn again.
        training.state = replace(training.state, step=jnp.zeros((), jnp.int32))
        losses.append(float(training.take(batch).loss))
    assert losses[-1] < 0.8 * losses[0]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="needs times='uniform'"):
        LossSettings(distill_steps=4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        replace(DISTILLED, teacher_steps=0)
    values = {"loss": {"distill_steps": 4, "times": "uniform"}}
    assert train_config(values).loss.is_distillation
    with pytest.raises(ValueError, match="follows the network without it"):
        train_config({**values, "train": {"method": "full"}})
