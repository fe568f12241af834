"""Velocities of the posterior against the exact posteriors of G8 and M8 (`problems`).

Numbers of methods are errors that were measured once, by another implementation in NumPy: the RMS
error of the mean in posterior deviations, and the relative error of the covariance.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from problems import (
    OPERATORS,
    PIXELS,
    Normal,
    affine_moments,
    draw_many,
    errors,
    falling_times,
    g8,
    m8,
    mode_distance,
    sliced_w2,
)

from fluxjax import make_mesh
from fluxjax.flow import (
    AB2,
    DDIM,
    DDNM,
    DEIS2,
    ERSDE2,
    RES2M,
    RES2S,
    RK4,
    Churn,
    Conditioned,
    Decoded,
    Downsample,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    Euler,
    Gain,
    Guided,
    Heun,
    LinearMap,
    Mask,
    Measurement,
    Midpoint,
    NullSpace,
    Projected,
    Renoise,
    ReverseSDE,
    StatefulVelocity,
    UniPC2,
    dps,
    pigdm,
    proximal,
    sample,
    sample_ode,
    tmpd,
)

EXACT_CG = 8
"""Iterations after which conjugate gradients have solved G8's systems."""


def early_times(steps, end=1e-7):
    """Return uniform times from just below 1: at 1 itself velocities are unguided."""
    return falling_times(steps).at[0].add(-end)


@eqx.filter_jit
def moments(step, velocity, times):
    return affine_moments(step, velocity, times)


def conditioned(problem, correction, high=1.0):
    return Conditioned(problem.prior, problem.measurement, correction, high)


@eqx.filter_jit
def value_at(velocity, x, t):
    return velocity(x, t)


@eqx.filter_jit
def evaluated(velocity, x, t):
    return velocity.evaluate(x, t)


@eqx.filter_jit
def likelihood_gradient(velocity, x, t):
    return jax.grad(lambda x: velocity.evaluate(x, t).log_likelihood)(x)


def x_at(seed=0):
    return jnp.float64(np.random.default_rng(seed).normal(size=PIXELS))


@pytest.mark.parametrize("name", OPERATORS)
def test_tmpd_is_the_true_velocity_of_a_gaussian_posterior(name):
    with jax.enable_x64(True):
        problem = g8(name)
        velocity = conditioned(problem, tmpd(EXACT_CG))
        for t in (0.02, 0.3, 0.7, 0.98):
            found = value_at(velocity, x_at(), jnp.float64(t))
            exact = problem.posterior(x_at(), jnp.float64(t))
            # Rounding, magnified by 1 / t and 1 / (1 - t).
            np.testing.assert_allclose(found, exact, atol=1e-10)


@pytest.mark.parametrize("name", OPERATORS)
def test_28_midpoint_steps_of_tmpd_are_those_of_the_true_velocity(name):
    with jax.enable_x64(True):
        problem = g8(name)
        times = 0.98 * falling_times(28)
        found = moments(Midpoint(), conditioned(problem, tmpd(EXACT_CG)), times)
        exact = moments(Midpoint(), problem.posterior, times)
        np.testing.assert_allclose(found[0], exact[0], atol=1e-10)
        np.testing.assert_allclose(found[1], exact[1], atol=1e-10)


# (correction or None for the true velocity, step, steps, then mean and covariance errors of each
# operator).
G8_ERRORS = {
    "true": (None, Euler(), 100, (0, 0.026), (0, 0.035), (0, 0.033)),
    "tmpd": (tmpd(EXACT_CG), Midpoint(), 28, (0, 0), (0, 0), (0, 0)),
    "pigdm": (pigdm(EXACT_CG), Euler(), 100, (0.305, 0.091), (0.280, 0.174), (0.348, 0.232)),
    "pigdm, ddim": (
        pigdm(EXACT_CG),
        DDIM(1.0),
        100,
        (0.119, 0.041),
        (0.119, 0.072),
        (0.153, 0.079),
    ),
    "pigdm, sde": (
        pigdm(EXACT_CG),
        ReverseSDE(16.0),
        1600,
        (0.015, 0.013),
        (0.003, 0.003),
        (0.003, 0.003),
    ),
    "dps": (dps(), Euler(), 100, (0.817, 0.321), (0.696, 0.416), (0.990, 0.415)),
    "proximal": (proximal(EXACT_CG), Euler(), 100, (0.304, 0.405), (0.135, 0.145), (0.233, 0.117)),
}
HALF_DIGIT = 6e-4
"""Of numbers that are given with three digits after the point."""


@pytest.mark.parametrize("method", G8_ERRORS)
def test_errors_on_gaussian_problems_are_those_of_the_methods(method):
    with jax.enable_x64(True):
        correction, step, steps, *expected = G8_ERRORS[method]
        for name, error in zip(OPERATORS, expected, strict=True):
            problem = g8(name)
            velocity = problem.posterior
            if correction is not None:
                velocity = conditioned(problem, correction)
            found = errors(moments(step, velocity, early_times(steps)), problem.posterior)
            np.testing.assert_allclose(found, error, atol=HALF_DIGIT, err_msg=name)


def test_errors_of_ddnm_on_gaussian_problems():
    with jax.enable_x64(True):
        expected = ((0.233, 0.052), (0.563, 0.899), (0.404, 0.404))
        for name, error in zip(OPERATORS, expected, strict=True):
            problem = g8(name)
            step = DDNM(problem.measurement, iterations=EXACT_CG)
            found = errors(moments(step, problem.prior, falling_times(100)), problem.posterior)
            np.testing.assert_allclose(found, error, atol=HALF_DIGIT, err_msg=name)


@pytest.mark.parametrize(("high", "bias"), [(0.98, 0.015), (0.95, 0.037), (0.9, 0.079)])
def test_unguided_steps_near_the_noise_bias_the_mean(high, bias):
    with jax.enable_x64(True):
        problem = g8("mask")
        velocity = conditioned(problem, tmpd(EXACT_CG), jnp.float64(high))
        mean_error, _ = errors(moments(Midpoint(), velocity, falling_times(400)), problem.posterior)
        np.testing.assert_allclose(mean_error, bias, atol=HALF_DIGIT)


def test_the_score_form_of_dps_diverges_in_28_steps():
    with jax.enable_x64(True):
        problem = g8("blur")
        velocity = conditioned(problem, dps())
        mean_error, _ = errors(moments(Euler(), velocity, falling_times(28)), problem.posterior)
        assert mean_error > 2


def test_pigdm_is_exact_for_a_white_prior_of_its_deviation():
    with jax.enable_x64(True):
        problem = g8("blur")
        std = 1.7
        prior = Normal(problem.prior.mean, std**2 * jnp.eye(PIXELS))
        exact = prior.posterior(problem.matrix, problem.observed, 0.2)
        for correction in (pigdm(EXACT_CG, prior_std=std), proximal(EXACT_CG, prior_std=std)):
            velocity = Conditioned(prior, problem.measurement, correction)
            for t in jnp.float64([0.1, 0.9]):
                found = value_at(velocity, x_at(), t)
                np.testing.assert_allclose(found, exact(x_at(), t), atol=1e-11)


M8_DISTANCES = {
    "true": (None, Euler(), 100, 0.021, 0.004),
    "tmpd": (tmpd(2), Midpoint(), 28, 0.279, 0.13),
    "pigdm": (pigdm(), Euler(), 100, 0.331, 0.19),
    "pigdm, ddim": (pigdm(), DDIM(1.0), 100, 0.286, 0.16),
    "dps": (dps(), Euler(), 100, 0.414, 0.17),
    "proximal": (proximal(), Euler(), 100, 0.381, 0.19),
}


@pytest.mark.parametrize("method", [*M8_DISTANCES, "ddnm"])
def test_distances_to_a_posterior_of_several_modes_are_those_of_the_methods(method):
    with jax.enable_x64(True):
        problem = m8()
        if method == "ddnm":
            velocity, step, steps = problem.prior, DDNM(problem.measurement), 100
            distance, variation = 0.287, 0.15
        else:
            correction, step, steps, distance, variation = M8_DISTANCES[method]
            velocity = problem.posterior
            if correction is not None:
                velocity = conditioned(problem, correction, 0.98)
        count = 3000
        draws = draw_many(velocity, jax.random.key(1), count, falling_times(steps), step)
        exact = problem.posterior.draw(jax.random.key(6), count)
        # Two sets of 3,000 exact draws are up to 0.05 apart. Shares of modes have a standard
        # error of 0.009 each.
        assert abs(sliced_w2(draws, exact) - distance) < 0.05
        assert abs(mode_distance(draws, problem.posterior) - variation) < 0.03


def hidden_errors(steps):
    """Return the errors of DDNM in the half that a mask hides, with a measurement without noise."""
    problem = g8("mask", std=1e-9)
    measurement = eqx.tree_at(lambda m: m.std, problem.measurement, 0)
    found = moments(DDNM(measurement), problem.prior, falling_times(steps))
    np.testing.assert_allclose(found[0][:4], problem.observed, atol=1e-12)
    hidden = slice(4, PIXELS)
    exact = Normal(problem.posterior.mean[hidden], problem.posterior.covariance[hidden, hidden])
    off = found[0][hidden] - exact.mean
    mean_error = jnp.sqrt(off @ jnp.linalg.solve(exact.covariance, off) / 4)
    difference = found[1][hidden, hidden] - exact.covariance
    return mean_error, jnp.linalg.norm(difference) / jnp.linalg.norm(exact.covariance)


def test_without_noise_ddnm_converges_to_the_posterior_of_what_a_mask_hides():
    with jax.enable_x64(True):
        np.testing.assert_allclose(hidden_errors(100), (0.094, 0.025), atol=HALF_DIGIT)
        np.testing.assert_allclose(hidden_errors(1000), (0.022, 0.005), atol=HALF_DIGIT)


@pytest.mark.parametrize("correction", [tmpd(EXACT_CG), proximal(), NullSpace()])
def test_a_measurement_without_noise_is_met(correction):
    with jax.enable_x64(True):
        problem = g8("down")
        measurement = Measurement(problem.measurement.operator, problem.measurement.y, 0)
        velocity = Conditioned(problem.prior, measurement, correction)
        run = eqx.filter_jit(lambda field, x, times: sample(field, x, times).x)
        found = run(velocity, x_at(), falling_times(20))
        # The last step ends at the corrected estimate.
        np.testing.assert_allclose(measurement.operator(found), measurement.y, atol=1e-9)


DETERMINISTIC = [
    Euler(),
    Heun(),
    Midpoint(),
    RK4(),
    AB2(),
    DPMpp2M(),
    DPMpp2S(),
    DEIS2(),
    RES2M(),
    RES2S(),
    UniPC2(),
]


def white_problem():
    """Return a conditioned velocity of a white prior, which is exact, and the posterior."""
    problem = g8("mask")
    std = 1.3
    prior = Normal(problem.prior.mean, std**2 * jnp.eye(PIXELS))
    field = Conditioned(prior, problem.measurement, proximal(prior_std=std))
    return field, prior.posterior(problem.matrix, problem.observed, 0.2)


def step_name(step):
    return type(step).__name__


@pytest.mark.parametrize("step", DETERMINISTIC, ids=step_name)
def test_every_integrator_moves_the_mean_to_that_of_the_posterior(step):
    with jax.enable_x64(True):
        velocity, posterior = white_problem()
        # x stays the mean of an affine flow that starts at the mean of the noise.
        run = eqx.filter_jit(lambda field, x, times: sample(field, x, times, step=step).x)
        found = run(velocity, jnp.zeros(PIXELS), falling_times(60))
        off = found - posterior.mean
        distance = jnp.sqrt(off @ jnp.linalg.solve(posterior.covariance, off) / PIXELS)
        # 0.015 is the bias of the unguided start, the rest Euler's error at the last steps.
        assert distance < 0.03


STOCHASTIC = [DDIM(1.0), ReverseSDE(1.0), DPMpp2MSDE(), ERSDE2(), Renoise(), Churn(Heun(), 0.1)]


@pytest.mark.parametrize("step", STOCHASTIC, ids=step_name)
def test_every_stochastic_integrator_draws_around_the_mean_of_the_posterior(step):
    with jax.enable_x64(True):
        velocity, posterior = white_problem()
        draws = draw_many(velocity, jax.random.key(2), 400, falling_times(60), step)
        off = jnp.mean(draws, 0) - posterior.mean
        distance = jnp.sqrt(off @ jnp.linalg.solve(posterior.covariance, off) / PIXELS)
        # 1 / sqrt(400) is 0.05. Without the measurement it is above 1.
        assert distance < 0.15
        assert jnp.all(jnp.std(draws, 0) > 0.05)


def test_an_adaptive_solver_takes_a_conditioned_velocity():
    with jax.enable_x64(True):
        velocity, posterior = white_problem()
        times = jnp.float64([0.97, 0.0])
        found, exact = (
            sample_ode(field, x_at(), times, solver=diffrax.Bosh3(), rtol=1e-6, atol=1e-6).x
            for field in (velocity, posterior)
        )
        np.testing.assert_allclose(found, exact, atol=1e-5)


def test_guidance_inside_tilts_the_prior_before_it_is_conditioned():
    with jax.enable_x64(True):
        problem = g8("down")
        covariance = problem.prior.covariance
        means = problem.prior.mean, jnp.cos(2 * jnp.arange(PIXELS, dtype=jnp.float64))
        scale = 2.5

        def velocity(x, t, mean):
            return Normal(mean, covariance)(x, t)

        guided = Guided(velocity, *means, scale)
        # Guidance of normal distributions of one covariance moves only the mean.
        tilted = Normal(means[1] + scale * (means[0] - means[1]), covariance)
        exact = tilted.posterior(problem.matrix, problem.observed, 0.2)
        found = Conditioned(guided, problem.measurement, tmpd(EXACT_CG))
        for t in jnp.float64([0.1, 0.9]):
            value = value_at(found, x_at(), t)
            np.testing.assert_allclose(value, exact(x_at(), t), atol=1e-10)


def test_at_time_0_and_above_high_the_velocity_is_the_priors():
    with jax.enable_x64(True):
        problem = g8("blur")
        for correction in (tmpd(), pigdm(), dps(), proximal(), NullSpace()):
            velocity = eqx.filter_jit(conditioned(problem, correction, 0.9))
            for t in (0.0, 0.91, 1.0):
                t = jnp.float64(t)
                found = velocity(x_at(), t)
                np.testing.assert_allclose(found, problem.prior(x_at(), t), rtol=1e-13)
            at_high = velocity(x_at(), jnp.float64(0.9))
            assert jnp.max(jnp.abs(at_high - problem.prior(x_at(), 0.9))) > 1e-3


def test_gradients_are_finite_at_every_time_and_those_of_the_posterior():
    with jax.enable_x64(True):
        problem = g8("mask")

        def value(y, t, correction):
            measurement = eqx.tree_at(lambda m: m.y, problem.measurement, y)
            field = Conditioned(problem.prior, measurement, correction)
            # Also with all times in one batch, in which both branches are evaluated.
            return jnp.sum(jax.vmap(lambda t: field(x_at(), t) ** 2)(t))

        gradient = jax.jit(jax.grad(value, (0, 1)), static_argnums=2)
        y, correction = problem.measurement.y, tmpd(EXACT_CG)
        for found in gradient(y, jnp.float64([0.0, 0.5, 0.99, 1.0]), correction):
            assert jnp.all(jnp.isfinite(found))

        def exact(y):
            velocity = problem.prior.posterior(problem.matrix, y, 0.2)
            return 4 * jnp.sum(velocity(x_at(), 0.5) ** 2)

        by_y, _ = gradient(y, jnp.full(4, 0.5), correction)
        np.testing.assert_allclose(by_y[:4], jax.grad(exact)(problem.observed), rtol=1e-8)
        np.testing.assert_array_equal(by_y[4:], 0)


def test_a_batch_of_measurements_is_one_vmap_and_may_be_sharded():
    with jax.enable_x64(True):
        problem = g8("mask")
        count = 8
        x = jnp.float64(np.random.default_rng(3).normal(size=(count, PIXELS)))
        y = problem.measurement.y + 0.1 * x
        times = falling_times(10)

        def run(x, y):
            measurement = Measurement(problem.measurement.operator, y, 0.2)
            return sample(Conditioned(problem.prior, measurement, tmpd(3)), x, times).x

        one_by_one = jnp.stack([jax.jit(run)(*row) for row in zip(x, y, strict=True)])
        rows = NamedSharding(make_mesh(data=8), PartitionSpec("data"))
        sharded = jax.jit(jax.vmap(run))(jax.device_put(x, rows), jax.device_put(y, rows))
        assert sharded.sharding.is_equivalent_to(rows, 2)
        np.testing.assert_allclose(sharded, one_by_one, atol=1e-10)


def test_other_measurements_masks_and_numbers_compile_nothing():
    traces = []

    @eqx.filter_jit
    def run(field, x):
        traces.append(None)
        return sample(field, x, jnp.float32([0.9, 0.5, 0.0])).x

    def field(mask, y, std, high):
        measurement = Measurement(Mask(jnp.float32(mask)), jnp.float32(y), jnp.float32(std))
        correction = Gain("white", "white", prior_std=jnp.float32(1 + std))
        return Conditioned(lambda x, t: -x, measurement, correction, jnp.float32(high))

    x = jnp.ones(2)
    velocity = field([1, 0], [1, 2], 0.1, 0.98)
    other = eqx.tree_at(lambda f: f.velocity, field([0, 0.5], [3, 1], 0, 0.4), velocity.velocity)
    first, second = run(velocity, x), run(other, x)
    assert len(traces) == 1
    assert jnp.max(jnp.abs(first - second)) > 1e-3


def test_a_bfloat16_x_is_corrected_in_float32():
    dtypes = []

    def velocity(x, t):
        dtypes.append((x.dtype, t.dtype))
        return (-x).astype(jnp.bfloat16)

    measurement = Measurement(Mask(jnp.ones(2)), jnp.ones(2, jnp.bfloat16), 0.1)
    field = Conditioned(velocity, measurement, tmpd(1))
    assert field(jnp.ones(2, jnp.bfloat16), 0.5).dtype == jnp.bfloat16
    assert set(dtypes) == {(jnp.dtype("float32"), jnp.dtype("float32"))}


def seen_rows(problem):
    """Return the measurement without its hidden entries: A C A^T has no equal eigenvalues."""
    operator = LinearMap(eqx.Partial(jnp.matmul, problem.matrix))
    return Measurement(operator, problem.observed, problem.measurement.std)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_likelihood_of_tmpd_is_that_of_a_gaussian_prior(name):
    with jax.enable_x64(True):
        problem = g8(name)
        t = jnp.float64(0.6)
        found = evaluated(conditioned(problem, tmpd(EXACT_CG)), x_at(), t)
        # x_t is a measurement of x0, too.
        eye = jnp.eye(PIXELS)
        given_x = problem.prior.posterior((1 - t) * eye, x_at(), t)
        exact = given_x.log_evidence(problem.matrix, problem.observed, 0.2)
        np.testing.assert_allclose(found.log_likelihood, exact, rtol=1e-9)
        np.testing.assert_allclose(found.velocity, problem.prior(x_at(), t), rtol=1e-12)
        np.testing.assert_allclose(found.conditioned, problem.posterior(x_at(), t), atol=1e-10)


def test_the_gradient_of_the_likelihood_guides_the_velocity():
    with jax.enable_x64(True):
        problem = g8("mask")
        t = jnp.float64(0.6)
        for correction in (tmpd(EXACT_CG), pigdm()):
            field = Conditioned(problem.prior, seen_rows(problem), correction)
            gradient = likelihood_gradient(field, x_at(), t)
            expected = problem.prior(x_at(), t) - t / (1 - t) * gradient
            np.testing.assert_allclose(value_at(field, x_at(), t), expected, atol=1e-9)


def test_the_likelihood_of_a_white_covariance_is_a_normal_density():
    with jax.enable_x64(True):
        for name in OPERATORS:
            problem = g8(name)
            x, t = x_at(), jnp.float64(0.3)
            variance = t**2 / (t**2 + (1 - t) ** 2)
            white = Normal(x - t * problem.prior(x, t), variance * jnp.eye(PIXELS))
            exact = white.log_evidence(problem.matrix, problem.observed, 0.2)
            field = conditioned(problem, proximal(EXACT_CG))
            found = evaluated(field, x, t)
            np.testing.assert_allclose(found.log_likelihood, exact, rtol=1e-10)
            by_call = value_at(field, x, t)
            np.testing.assert_allclose(found.conditioned, by_call, atol=1e-9)
            field = conditioned(problem, proximal(EXACT_CG), 0.2)
            unguided = evaluated(field, x, t)
            assert unguided.log_likelihood == 0
            np.testing.assert_array_equal(unguided.conditioned, unguided.velocity)


def test_a_linear_decoder_is_measured_as_the_operator_it_makes():
    with jax.enable_x64(True):
        problem = g8("mask")
        matrix = jnp.float64(np.random.default_rng(4).normal(size=(4, PIXELS)))
        y = jnp.float64([0.3, -0.2])
        decoded = Decoded(lambda z: matrix @ z, Downsample(2, axes=(0,)))
        pairs = Downsample(2, axes=(0,))(matrix)
        exact = problem.prior.posterior(pairs, y, 0.2)
        field = Conditioned(problem.prior, Measurement(decoded, y, 0.2), tmpd(2))
        np.testing.assert_allclose(field(x_at(), 0.6), exact(x_at(), 0.6), atol=1e-10)


def test_a_nonlinear_decoder_is_linearized_at_the_estimate():
    with jax.enable_x64(True):
        problem = g8("mask")
        operator = Decoded(jnp.tanh, Downsample(2, axes=(0,)))
        y = jnp.float64([0.1, 0.5, -0.3, 0.2])
        field = Conditioned(problem.prior, Measurement(operator, y, 0.2), proximal(8))
        x, t = x_at(), 0.4
        estimate = x - t * problem.prior(x, t)
        jacobian = jax.jacobian(operator)(estimate)
        variance = t**2 / (t**2 + (1 - t) ** 2)
        system = variance * jacobian @ jacobian.T + 0.04 * jnp.eye(4)
        change = variance * jacobian.T @ jnp.linalg.solve(system, y - operator(estimate))
        np.testing.assert_allclose(field(x, t), (x - estimate - change) / t, atol=1e-10)


def test_a_bfloat16_decoder_is_solved_in_float32():
    std = jnp.float32(1.0)
    prior = Normal(jnp.zeros(PIXELS), jnp.eye(PIXELS))
    decoded = Decoded(lambda z: z.astype(jnp.bfloat16), Downsample(2, axes=(0,)))
    x = jnp.float32(x_at())
    found, exact = (
        Conditioned(prior, Measurement(operator, jnp.ones(4), std), tmpd(4)).evaluate(x, 0.6)
        for operator in (decoded, Downsample(2, axes=(0,)))
    )
    # bfloat16 rounds what is decoded by 2^-9 of it.
    np.testing.assert_allclose(found.conditioned, exact.conditioned, atol=0.03)
    np.testing.assert_allclose(found.log_likelihood, exact.log_likelihood, rtol=0.01)
    assert found.log_likelihood.dtype == jnp.float32


class Counted(StatefulVelocity):
    """A velocity whose memory counts its evaluations and pushes x a little more each time."""

    def init(self, x):
        return jnp.zeros(())

    def __call__(self, x, t, *, memory=None):
        if memory is None:
            return -x
        return -x * (1 + 0.1 * memory), memory + 1


def test_a_velocity_with_a_memory_is_conditioned_without_derivatives():
    measurement = Measurement(Mask(jnp.ones(2)), jnp.ones(2), 0.1)
    times = jnp.float32([1.0, 0.7, 0.3, 0.0])
    for correction in (proximal(), NullSpace()):
        result = sample(Conditioned(Counted(), measurement, correction), jnp.ones(2), times)
        np.testing.assert_array_equal(result.memory, 3)
        np.testing.assert_allclose(result.x, 1, atol=0.1)
    result = sample(Counted(), jnp.ones(2), times, step=DDNM(measurement), key=jax.random.key(0))
    np.testing.assert_array_equal(result.memory, 3)
    np.testing.assert_allclose(result.x, 1, atol=1e-5)


def test_a_velocity_with_a_memory_has_no_derivative():
    measurement = Measurement(Mask(jnp.ones(2)), jnp.ones(2), 0.1)
    field = Conditioned(Counted(), measurement, tmpd())
    with pytest.raises(ValueError, match="a Counted with a memory has no derivative"):
        sample(field, jnp.ones(2), jnp.float32([1.0, 0.0]))
    with pytest.raises(ValueError, match="a Counted with a memory has no derivative"):
        field(jnp.ones(2), 0.5)
    momentum = Guided(
        lambda x, t, c: c - x, jnp.ones(2), jnp.zeros(2), 2.0, Projected(momentum=-0.5)
    )
    with pytest.raises(ValueError, match="a Guided with a memory"):
        Conditioned(momentum, measurement, pigdm())(jnp.ones(2), 0.5)


def field_of(**changes):
    parts = {
        "velocity": lambda x, t: -x,
        "measurement": Measurement(Downsample(2, axes=(0,)), jnp.ones(1), 0.1),
        "correction": proximal(),
        "high": 0.98,
    }
    return Conditioned(**{**parts, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: field_of(high=0), r"time in \(0, 1\], got 0"),
        (lambda: field_of(high=1.5), r"time in \(0, 1\], got 1.5"),
        (lambda: field_of(high=float("nan")), "finite"),
        (
            lambda: field_of(
                velocity=lambda x, t: x[:1],
                measurement=Measurement(Downsample(2, axes=(0,)), jnp.ones(1), 0.1),
            )(jnp.ones(2), 0.5),
            "returns the shape of x",
        ),
        (lambda: field_of()(jnp.ones(4), 0.5), r"returns for x \[4\], \[2\], got \[1\]"),
        (
            lambda: field_of(
                measurement=Measurement(Mask(jnp.ones(2)), jnp.ones(2), 0), correction=dps()
            )(jnp.ones(2), 0.5),
            "divides by the noise",
        ),
        (lambda: Gain("none", "white"), "'model' or 'white', got 'none'"),
        (lambda: Gain("model", "full"), "'none', got 'full'"),
        (lambda: Gain("model", "model", 0), "at least 1, got 0"),
        (lambda: proximal(prior_std=0), "positive number, got 0"),
        (lambda: NullSpace(0), "at least 1, got 0"),
        (lambda: DDNM(Measurement(Mask(1.0), jnp.ones(2), 0), 1.5), r"in \[0, 1\], got 1.5"),
        (
            lambda: sample(
                lambda x, t: -x,
                jnp.ones(4),
                jnp.float32([1, 0]),
                step=DDNM(Measurement(Mask(1.0), jnp.ones(2), 0)),
                key=jax.random.key(0),
            ),
            r"\[4\], got \[2\]",
        ),
    ],
)
def test_bad_input_is_a_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
