"""Restorations by optimization, on problems whose solutions are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fluxjax.flow import (
    DDIM,
    Decoded,
    Euler,
    Guided,
    Mask,
    Measurement,
    Midpoint,
    NormalNoise,
    Projected,
    RadialNoise,
    flow_times,
    optimize_noise,
    pnp_flow,
    randomize_then_optimize,
    red_diff,
    sample,
)
from fluxjax.flow.optimize import pnp_flow_update, red_diff_update

PIXELS = problems.PIXELS
KEY = jax.random.key(0)
# The expected numbers have three digits.
ROUNDING = 6e-4


def cell_of(expected, operator):
    return expected[problems.OPERATORS.index(operator)]


@pytest.mark.parametrize("operator", problems.OPERATORS)
def test_the_moments_of_pnp_flow_are_those_of_the_method(operator):
    expected = cell_of([(0.455, 0.889), (0.637, 0.863), (0.714, 0.871)], operator)
    with jax.enable_x64(True):
        problem = problems.g8(operator)

        @jax.jit
        def run(prior, times):
            def advance(moments, t):
                def move(inputs):
                    x, noise = inputs[:PIXELS], inputs[PIXELS:].reshape(5, PIXELS)
                    return pnp_flow_update(prior, problem.measurement, x, t, noise, t)

                zero = jnp.zeros(6 * PIXELS)
                columns = jax.jacfwd(move)(zero)
                of_x, of_noise = columns[:, :PIXELS], columns[:, PIXELS:]
                mean, covariance = moments
                mean = move(zero) + of_x @ mean
                return (mean, of_x @ covariance @ of_x.T + of_noise @ of_noise.T), None

            start = (jnp.zeros(PIXELS), jnp.eye(PIXELS))
            return jax.lax.scan(advance, start, times[:-1])[0]

        found = problems.errors(run(problem.prior, problems.falling_times(100)), problem.posterior)
        assert found == pytest.approx(expected, abs=ROUNDING)
        # It is a point, much narrower than the posterior.
        assert found[1] > 0.85


def test_pnp_flow_on_a_mixture_is_worse_than_the_prior_itself():
    with jax.enable_x64(True):
        problem, count = problems.m8(), 1000
        x_key, exact_key, prior_key = jax.random.split(jax.random.key(1), 3)
        times = problems.falling_times(100)

        @eqx.filter_jit
        def run(prior, keys):
            def restore(key):
                return pnp_flow(prior, problem.measurement, jnp.zeros(PIXELS), times, key=key)

            return jax.vmap(restore)(keys)

        points = run(problem.prior, jax.random.split(x_key, count))
        exact = problem.posterior.draw(exact_key, count)
        # As a share of the prior's own distance, 0.53: another set of directions changes both.
        prior = problems.sliced_w2(problem.prior.draw(prior_key, count), exact)
        assert problems.sliced_w2(points, exact) / prior == pytest.approx(0.755 / 0.53, rel=0.08)
        assert problems.mode_distance(points, problem.posterior) == pytest.approx(0.39, abs=0.035)


@pytest.mark.parametrize("operator", problems.OPERATORS)
def test_red_diff_rests_at_its_fixed_point_whose_errors_are_those_of_the_method(operator):
    expected = cell_of([0.437, 0.491, 0.528], operator)
    with jax.enable_x64(True):
        problem, strength, s = problems.g8(operator), 0.25, 0.2
        prior, matrix = problem.prior, problem.matrix
        # Gauss-Legendre nodes: the mean over times is a smooth integral.
        nodes, weights = np.polynomial.legendre.leggauss(40)
        times, weights = jnp.asarray((nodes + 1) / 2), jnp.asarray(weights / 2)
        scatters = (1 - times) ** 2 * prior.covariance[..., None]
        scatters = jnp.moveaxis(scatters, -1, 0) + times[:, None, None] ** 2 * jnp.eye(PIXELS)
        pull = strength * jnp.einsum("t,tij->ij", weights * times**2, jnp.linalg.inv(scatters))
        precision = matrix.T @ matrix / s**2 + pull
        right = matrix.T @ problem.observed / s**2 + pull @ prior.mean
        fixed = jnp.linalg.solve(precision, right)

        @jax.jit
        def mean_update(x):
            def at(t):
                # An update is affine in its noise: without noise it is the mean one.
                rate = jnp.asarray(0.5)
                noise = jnp.zeros(PIXELS)
                share = rate * strength
                return red_diff_update(prior, problem.measurement, x, t, noise, share, rate, 5)

            return weights @ jax.vmap(at)(times)

        # 5 conjugate gradients are exact for each of these operators.
        np.testing.assert_allclose(mean_update(fixed), fixed, atol=1e-10)
        assert not np.allclose(mean_update(fixed + 0.1), fixed + 0.1, atol=1e-3)
        point = (fixed, jnp.zeros((PIXELS, PIXELS)))
        assert problems.errors(point, problem.posterior)[0] == pytest.approx(expected, abs=ROUNDING)


def test_red_diff_comes_near_its_fixed_point():
    with jax.enable_x64(True):
        # A white prior has the pull of one number at each time; late times pull less.
        prior = problems.Normal(jnp.ones(PIXELS), jnp.eye(PIXELS))
        measurement = problems.g8("mask").measurement
        times = problems.falling_times(400)

        @jax.jit
        def run(keys):
            def restore(key):
                return red_diff(prior, measurement, jnp.zeros(PIXELS), times, key=key, strength=0.1)

            return jax.vmap(restore)(keys)

        mean = run(jax.random.split(KEY, 500)).mean(0)
        # Unseen pixels are pulled to the prior's mean, seen ones stay at the measurement. The
        # deviation of the mean is below 0.005.
        np.testing.assert_allclose(mean[4:], 1, atol=0.02)
        np.testing.assert_allclose(mean[:4], measurement.y[:4], atol=0.02)


def path_of(prior, times):
    """Return the affine map from noise to image of the midpoint method."""
    image = jax.jit(lambda noise: sample(prior, noise, times, step=Midpoint()).x)
    zero = jnp.zeros(PIXELS)
    return jax.jacfwd(image)(zero), image(zero)


@eqx.filter_jit
def fit(velocity, measurement, start, times, **options):
    options = {"iterations": 400, "tolerance": 1e-10, **options}
    return optimize_noise(velocity, measurement, start, times, **options)


@pytest.mark.parametrize("operator", problems.OPERATORS)
def test_optimized_noise_leads_to_the_mean_of_the_posterior_or_to_draws_of_it(operator):
    with jax.enable_x64(True):
        problem, s = problems.g8(operator), 0.2
        times, measurement = problems.falling_times(5), problem.measurement

        # The optimum is affine in the center of the prior and in the noise of the measurement.
        def restore(inputs):
            center, noise = inputs[:PIXELS], inputs[PIXELS:]
            perturbed = Measurement(measurement.operator, measurement.y + s * noise, s)
            start = center + jnp.cos(3 * jnp.arange(PIXELS, dtype=jnp.float64))
            prior = NormalNoise(center=center)
            return fit(problem.prior, perturbed, start, times, prior=prior)

        size = PIXELS + measurement.y.size
        found = jax.vmap(restore)(jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size)]))
        assert found.iterations.max() < 100
        assert found.gradient_norm.max() < 1e-6

        # The prior that five midpoint steps draw from.
        matrix, offset = path_of(problem.prior, times)
        drawn = problems.Normal(offset, matrix @ matrix.T)
        np.testing.assert_allclose(found.x, found.noise @ matrix.T + offset, atol=1e-12)
        posterior = drawn.posterior(problem.matrix, problem.observed, s)
        # The most probable noise leads to the mean, and randomized noise to draws.
        columns = found.x[1:] - found.x[0]
        moments = (found.x[0], columns.T @ columns)
        assert max(problems.errors(moments, posterior)) < 1e-6
        # Five steps differ from the exact path by this much.
        mean, covariance = problems.errors(moments, problem.posterior)
        assert mean < 1.2e-3
        assert covariance < 5e-3


@pytest.mark.parametrize("operator", problems.OPERATORS)
def test_the_prior_of_the_norm_only_has_its_known_errors(operator):
    # With the mask, a sphere of points fits and has the probable norm, each this far from the mean
    # of the posterior; the mean over many starts is nearer, 0.226.
    expected = cell_of([0.516, 0.500, 0.397], operator)
    with jax.enable_x64(True):
        problem = problems.g8(operator)
        weight = jnp.asarray(0.01 / (2 * 0.2**2))

        def restore(start):
            prior = RadialNoise(weight)
            return fit(
                problem.prior,
                problem.measurement,
                start,
                problems.falling_times(5),
                prior=prior,
            ).x

        images = jax.vmap(restore)(jax.random.normal(KEY, (3, PIXELS)))
        for image in images:
            point = (image, jnp.zeros((PIXELS, PIXELS)))
            error, _ = problems.errors(point, problem.posterior)
            assert error == pytest.approx(expected, abs=2e-3)
        spread = jnp.max(jnp.std(images, 0))
        assert (spread > 0.1) == (operator == "mask")


def test_randomize_then_optimize_centers_at_its_noise_and_perturbs_the_measurement():
    with jax.enable_x64(True):
        problem, count, s = problems.g8("mask"), 400, 0.2
        times = problems.falling_times(3)
        matrix, offset = path_of(problem.prior, times)
        noises = jax.random.normal(KEY, (count, PIXELS))

        @jax.jit
        def run(noises, keys):
            def restore(noise, key):
                return randomize_then_optimize(
                    problem.prior, problem.measurement, noise, times, key=key, tolerance=1e-6
                ).x

            return jax.vmap(restore)(noises, keys)

        images = run(noises, jax.random.split(KEY, count))
        # What is left of x, given its noise, is the gain times the noise of the measurement.
        drawn = problems.Normal(offset, matrix @ matrix.T)
        a, y = problem.matrix, problem.observed
        scatter = a @ drawn.covariance @ a.T + s**2 * jnp.eye(4)
        gain = jnp.linalg.solve(scatter, a @ drawn.covariance).T
        start = noises @ matrix.T + offset
        left = images - start - (y - start @ a.T) @ gain.T
        added = jnp.linalg.lstsq(gain, left.T)[0].T
        np.testing.assert_allclose(added @ gain.T, left, atol=1e-5)
        # The covariance of 400 draws has a deviation of 0.07 of its own size.
        np.testing.assert_allclose(jnp.cov(added.T), s**2 * jnp.eye(4), atol=0.25 * s**2)


def velocity(x, t):
    return jnp.sin(x) - 0.3 * t * jnp.flip(x)


def squared(x):
    return jnp.stack([x[0] * x[1], jnp.tanh(x[2])])


X = jnp.float32([0.4, -1.0, 2.0])
MEASUREMENT = Measurement(Decoded(squared, Mask(1.0)), jnp.float32([0.1, 0.5]), jnp.float32(0.2))
TIMES = flow_times(4)


def run_pnp_flow(velocity, measurement, x, times=TIMES, key=KEY, **options):
    return pnp_flow(velocity, measurement, x, times, key=key, **options)


def run_red_diff(velocity, measurement, x, times=TIMES, key=KEY, **options):
    return red_diff(velocity, measurement, x, times, key=key, **options)


def run_optimize_noise(velocity, measurement, x, times=TIMES, key=KEY, **options):
    return optimize_noise(velocity, measurement, x, times, iterations=5, **options).x


RUNS = [run_pnp_flow, run_red_diff, run_optimize_noise]


@pytest.mark.parametrize("run", RUNS)
def test_optimizing_works_under_jit_and_vmap_and_with_a_decoder(run):
    traced = []

    @eqx.filter_jit
    def compiled(measurement, x):
        traced.append(x)
        return run(velocity, measurement, x)

    one = compiled(MEASUREMENT, X)
    assert np.all(np.isfinite(one))
    other = Measurement(MEASUREMENT.operator, MEASUREMENT.y + 0.3, jnp.float32(0.1))
    two = compiled(other, X)
    assert len(traced) == 1
    assert not np.allclose(one, two)

    def at(y, std):
        return run(velocity, Measurement(MEASUREMENT.operator, y, std), X)

    ys = MEASUREMENT.y + 0.3 * jnp.arange(8.0)[:, None] % 0.6
    stds = jnp.float32([0.2, 0.1] * 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    together = jax.jit(jax.vmap(at))(*jax.device_put((ys, stds), rows))
    assert len(together.sharding.device_set) == 8
    # One row of a batch differs by rounding, which the line search enlarges.
    np.testing.assert_allclose(together[:2], jnp.stack([one, two]), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(together[:2], together[6:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("run", RUNS[:2])
def test_gradients_pass_through_the_whole_restoration(run):
    @jax.jit
    @jax.value_and_grad
    def loss(y):
        measurement = Measurement(MEASUREMENT.operator, y, 0.2)
        return jnp.sum(jnp.square(run(velocity, measurement, X)))

    direction = jnp.float32([1.0, -0.5])
    _, gradient = loss(MEASUREMENT.y)
    (above, _), (below, _) = (loss(MEASUREMENT.y + h * direction) for h in (0.01, -0.01))
    # A central difference in float32.
    difference = float(above - below) / 0.02
    assert float(jnp.vdot(gradient, direction)) == pytest.approx(difference, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("run", RUNS)
def test_the_residual_of_a_restoration_is_smaller_than_that_of_the_plain_image(run):
    @jax.jit
    def misfits(x):
        ends = run(velocity, MEASUREMENT, x), sample(velocity, x, TIMES, step=Midpoint()).x
        return [jnp.linalg.norm(MEASUREMENT.y - squared(end)) for end in ends]

    restored, plain = misfits(X)
    assert restored < 0.6 * plain


@pytest.mark.parametrize("run", RUNS)
def test_bad_inputs_of_restorations_are_reported(run):
    name = run.__name__.removeprefix("run_")
    with pytest.raises(ValueError, match=r"Measurement\(y\).*\[2\], got \[3\]"):
        run(velocity, Measurement(MEASUREMENT.operator, X, 0.1), X)
    with pytest.raises(ValueError, match=f"`{name}\\(times\\)` needs at least 2 nodes"):
        run(velocity, MEASUREMENT, X, times=TIMES[:1])

    guided = Guided(
        lambda x, t, condition: velocity(x, t), X, X, 2.0, rule=Projected(momentum=-0.5)
    )
    with pytest.raises(ValueError, match=f"`{name}\\(velocity\\)` got a velocity with a memory"):
        run(guided, MEASUREMENT, X)


def test_bad_options_are_reported():
    with pytest.raises(ValueError, match=r"`pnp_flow\(rate\)` needs .* at least 0, got -1"):
        run_pnp_flow(velocity, MEASUREMENT, X, rate=-1.0)
    with pytest.raises(ValueError, match=r"`pnp_flow\(draws\)` needs .* at least 1, got 0"):
        run_pnp_flow(velocity, MEASUREMENT, X, draws=0)
    with pytest.raises(ValueError, match=r"`red_diff\(rate\)` needs a positive number"):
        run_red_diff(velocity, MEASUREMENT, X, rate=0.0)
    with pytest.raises(ValueError, match=r"rising times"):
        run_red_diff(velocity, MEASUREMENT, X, times=TIMES[::-1])
    exact = Measurement(MEASUREMENT.operator, MEASUREMENT.y, 0.0)
    with pytest.raises(ValueError, match=r"`optimize_noise` divides .* needs std above 0"):
        run_optimize_noise(velocity, exact, X)
    with pytest.raises(ValueError, match=r"`optimize_noise\(step\)` .* draws no noise, got DDIM"):
        run_optimize_noise(velocity, MEASUREMENT, X, step=DDIM(1.0))
    with pytest.raises(ValueError, match=r"`optimize_noise\(iterations\)`.* at least 1, got 0"):
        optimize_noise(velocity, MEASUREMENT, X, TIMES, step=Euler(), iterations=0)
    with pytest.raises(ValueError, match=r"`RadialNoise\(weight\)` needs .* at least 0"):
        RadialNoise(-1.0)
    # A traced std fails when the program runs.
    with pytest.raises(Exception, match=r"needs std above 0"):
        eqx.filter_jit(run_optimize_noise)(
            velocity, eqx.tree_at(lambda m: m.std, exact, jnp.float32(0)), X
        )
