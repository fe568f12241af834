"""Steps that restore, on problems whose posterior is known."""

import contextlib
import functools
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fluxjax.flow import (
    DDIM,
    Composition,
    Decoded,
    Decoupled,
    Downsample,
    DPMpp2M,
    Euler,
    FireFlow,
    FlowDPS,
    Guided,
    LinearMap,
    Mask,
    Measurement,
    Midpoint,
    Nudged,
    Projected,
    Step,
    flow_times,
    sample,
    time_shift,
)
from fluxjax.flow.restore import correct_draw

PIXELS = problems.PIXELS
KEY = jax.random.key(0)
# The errors are known to three digits.
ROUNDING = 6e-4


NOISES = 3 * PIXELS
"""At least as many numbers as a step draws."""
MOST_STEPS = 1000


@contextlib.contextmanager
def supplied(noise):
    """Let `jax.random.normal` return successive parts of an array."""
    used = 0

    def normal(key, shape=(), dtype=float):
        nonlocal used
        start, used = used, used + int(np.prod(shape))
        return noise[start:used].reshape(shape).astype(dtype)

    with mock.patch("jax.random.normal", normal):
        yield


@eqx.filter_jit
def _moments_program(step, prior, times, steps):
    """One compiled program for every number of steps: all times have the same, padded length."""

    def advance(index, moments):
        def move(inputs):
            x = inputs[:PIXELS]
            with supplied(inputs[PIXELS:]):
                return step(prior, x, times[index], times[index + 1], step.init(x), key=KEY)[0]

        # The step is affine: it is read off at 0 and at the unit vectors, in one batch.
        inputs = jnp.concatenate([jnp.zeros((1, PIXELS + NOISES)), jnp.eye(PIXELS + NOISES)])
        values = jax.vmap(move)(inputs)
        columns = (values[1:] - values[0]).T
        of_x, of_noise = columns[:, :PIXELS], columns[:, PIXELS:]
        mean, covariance = moments
        mean = values[0] + of_x @ mean
        return mean, of_x @ covariance @ of_x.T + of_noise @ of_noise.T

    return jax.lax.fori_loop(0, steps, advance, (jnp.zeros(PIXELS), jnp.eye(PIXELS)))


def moments(step, problem, times):
    """Return the exact mean and covariance of an affine step's x at the last time."""
    padded = np.zeros(MOST_STEPS + 1)
    padded[: len(times)] = times
    return _moments_program(step, problem.prior, padded, jnp.asarray(len(times) - 1))


STEPS = {
    "decoupled": (Decoupled, 100, [(0.058, 0.031), (0.015, 0.043), (0.027, 0.051)]),
    "decoupled, 28": (Decoupled, 28, [(0.117, 0.049), (0.024, 0.071), (0.044, 0.087)]),
    "flowdps": (FlowDPS, 100, [(0.445, 0.186), (0.543, 0.367), (0.581, 0.472)]),
    "flowchef": (
        lambda measurement: Nudged(Euler(), measurement),
        100,
        [(0.230, 0.051), (0.562, 0.631), (0.437, 0.403)],
    ),
    # x - 0.3 grad |r|^2
    "dps": (
        lambda measurement: Nudged(Euler(), measurement, 0.6, through="network"),
        100,
        [(0.447, 0.296), (0.495, 0.687), (0.462, 0.406)],
    ),
}


@pytest.mark.parametrize("operator", problems.OPERATORS)
@pytest.mark.parametrize("name", STEPS)
def test_the_moments_on_a_gaussian_are_those_of_the_method(name, operator):
    make, steps, expected = STEPS[name]
    with jax.enable_x64(True):
        problem = problems.g8(operator)
        times = problems.falling_times(steps)
        if steps == 28:  # dense near 0: the odds t / (1 - t) are a third
            times = time_shift(times, jnp.log(1 / 3))
        found = moments(make(problem.measurement), problem, times)
        mean, covariance = problems.errors(found, problem.posterior)
    expected_mean, expected_covariance = expected[problems.OPERATORS.index(operator)]
    assert mean == pytest.approx(expected_mean, abs=ROUNDING)
    assert covariance == pytest.approx(expected_covariance, abs=ROUNDING)


@pytest.mark.parametrize("operator", problems.OPERATORS)
def test_the_error_of_decoupled_falls_with_the_number_of_steps(operator):
    with jax.enable_x64(True):
        problem = problems.g8(operator)
        times = problems.falling_times(400)
        reached = moments(Decoupled(problem.measurement), problem, times)
        found = problems.errors(reached, problem.posterior)
    # Of 100 steps, by the test above. The ratio is about 4^0.7 = 2.6.
    of_100 = STEPS["decoupled"][2][problems.OPERATORS.index(operator)]
    assert np.all(np.divide(of_100, found) > 2.3)


class ExactlyDecoupled(Step):
    """`Decoupled` with the prior's own covariance of x0 given x instead of white noise."""

    order = 1
    evaluations = 1
    measurement: Measurement
    prior: problems.Normal

    def init(self, x):
        return None

    def __call__(self, velocity, x, t, u, state, *, key):
        eye = jnp.eye(PIXELS)
        sigma = self.prior.covariance
        scatter = (1 - t) ** 2 * sigma + t**2 * eye
        covariance = sigma - (1 - t) ** 2 * sigma @ jnp.linalg.solve(scatter, sigma)
        offset = jnp.linalg.cholesky(covariance) @ jax.random.normal(key, x.shape, x.dtype)
        estimate = x - t * velocity(x, t)
        x0 = correct_draw(self.measurement, estimate, offset, lambda w: covariance @ w, 12, key=key)
        return (1 - u) * x0 + u * jax.random.normal(key, x.shape, x.dtype), None, None


@pytest.mark.parametrize(("operator", "steps"), [("mask", 1), ("blur", 1), ("down", 3)])
def test_a_corrected_draw_is_exact_with_the_exact_covariance(operator, steps):
    with jax.enable_x64(True):
        problem = problems.g8(operator)
        step = ExactlyDecoupled(problem.measurement, problem.prior)
        found = moments(step, problem, problems.falling_times(steps))
        # Conjugate gradients end there in 8 iterations, but for rounding.
        assert max(problems.errors(found, problem.posterior)) < 1e-9


def test_decoupled_is_exact_for_a_white_prior_of_the_given_deviation():
    with jax.enable_x64(True):
        times = problems.falling_times(3)
        g8 = problems.g8("blur")
        prior = problems.Normal(g8.prior.mean, 4 * jnp.eye(PIXELS))
        posterior = prior.posterior(g8.matrix, g8.measurement.y, 0.2)
        problem = problems.Problem(prior, g8.measurement, g8.matrix, posterior)
        step = Decoupled(g8.measurement, prior_std=2.0, iterations=8)
        found = moments(step, problem, times)
        assert max(problems.errors(found, posterior)) < 1e-9
        other = eqx.tree_at(lambda step: step.prior_std, step, 1.0)
        found = moments(other, problem, times)
        assert max(problems.errors(found, posterior)) > 0.01


def unseen_errors(found, problem):
    """Return both errors in what a measurement without noise leaves open.

    The open directions are those that the matrix maps to 0.
    """
    _, _, directions = np.linalg.svd(np.asarray(problem.matrix))
    open_ = directions[len(problem.matrix) :]
    (mean, covariance), posterior = found, problem.posterior
    off = open_ @ (mean - posterior.mean)
    exact = open_ @ posterior.covariance @ open_.T
    mean_error = np.sqrt(off @ np.linalg.solve(exact, off) / len(open_))
    found_open = open_ @ covariance @ open_.T
    return mean_error, np.linalg.norm(found_open - exact) / np.linalg.norm(exact)


def projecting(measurement):
    return Nudged(Euler(), measurement, 1.0, "pseudo_inverse")


@pytest.mark.parametrize(
    ("make", "operator", "steps", "expected"),
    [
        (Decoupled, "mask", 100, (0.083, 0.037)),
        (Decoupled, "mask", 1000, (0.015, 0.009)),
        (projecting, "mask", 100, (0.008, 0.013)),
        (projecting, "mask", 1000, (0.001, 0.001)),
        (projecting, "down", 1000, (0.002, 0.003)),
    ],
)
def test_without_noise_what_is_unseen_follows_the_posterior(make, operator, steps, expected):
    with jax.enable_x64(True):
        problem = problems.g8(operator, std=0.0)
        step = make(problem.measurement)
        found = moments(step, problem, problems.falling_times(steps))
        assert unseen_errors(found, problem) == pytest.approx(expected, abs=ROUNDING)
        # What is seen is kept.
        mean, covariance = found
        np.testing.assert_allclose(problem.matrix @ mean, problem.observed, atol=1e-12)
        np.testing.assert_allclose(problem.matrix @ covariance @ problem.matrix.T, 0, atol=1e-12)


DRAWS = 5000


@pytest.fixture(scope="module")
def mixture():
    """M8, draws of its posterior, and their distance from draws of its prior."""
    _, exact_key, prior_key = jax.random.split(jax.random.key(1), 3)
    with jax.enable_x64(True):
        problem = problems.m8()
        exact = problem.posterior.draw(exact_key, DRAWS)
        prior = problem.prior.draw(prior_key, DRAWS)
        return problem, exact, problems.sliced_w2(prior, exact)


@pytest.mark.parametrize(
    ("make", "steps", "sliced", "modes"),
    [
        (Decoupled, 100, 0.263, 0.15),
        (lambda measurement: Nudged(Euler(), measurement), 100, 0.324, 0.15),
        # These numbers are of 28 steps; with 100 they are a tenth smaller.
        (FlowDPS, 28, 0.38, 0.19),
    ],
    ids=["decoupled", "flowchef", "flowdps"],
)
def test_the_errors_on_a_mixture_are_those_of_the_method(mixture, make, steps, sliced, modes):
    problem, exact, prior = mixture
    draw_key = jax.random.split(jax.random.key(1), 3)[0]
    with jax.enable_x64(True):
        times = problems.falling_times(steps)
        draws = problems.draw_many(problem.prior, draw_key, DRAWS, times, make(problem.measurement))
        # As a share of the prior's own distance, 0.53, since another set of directions changes both
        # by up to a tenth. The floor of 5,000 draws is 0.05 of it.
        assert problems.sliced_w2(draws, exact) / prior == pytest.approx(sliced / 0.53, abs=0.05)
        # Two deviations of shares of 5,000 draws.
        assert problems.mode_distance(draws, problem.posterior) == pytest.approx(modes, abs=0.015)


X = jnp.float32([0.4, -1.0, 2.0, 0.3])
T, U = jnp.float32(0.7), jnp.float32(0.6)


def velocity(x, t):
    return jnp.sin(x) - 0.3 * t * jnp.flip(x)


def decode(x):
    return jnp.stack([x[0] * x[1], jnp.tanh(x[2]), x[3] ** 2 + x[0]])


MEASUREMENT = Measurement(
    Decoded(decode, Mask(jnp.float32([1, 1, 0]))), jnp.float32([0.1, 0.5, 0]), jnp.float32(0.2)
)


@pytest.mark.parametrize("direction", ["gradient", "norm"])
def test_through_the_network_x_moves_down_the_gradient_of_the_residual(direction):
    step = Nudged(Midpoint(), MEASUREMENT, 0.4, direction, "network")

    def loss(x):
        image = decode(x - T * velocity(x, T))
        square = jnp.sum(jnp.square(MEASUREMENT.y - image)[:2])
        return {"gradient": square / 2, "norm": jnp.sqrt(square)}[direction]

    @jax.jit
    def found_and_expected(x):
        found, plain = (one(velocity, x, T, U, None, key=None)[0] for one in (step, Midpoint()))
        return found, plain - 0.4 * jax.grad(loss)(x)

    np.testing.assert_allclose(*found_and_expected(X), rtol=1e-5)


def test_without_the_network_x_moves_down_the_gradient_at_the_estimate():
    step = Nudged(Midpoint(), MEASUREMENT, 0.4)

    def loss(x0):
        return jnp.sum(jnp.square(MEASUREMENT.y - decode(x0))[:2]) / 2

    @jax.jit
    def found_and_expected(x):
        found, plain = (one(velocity, x, T, U, None, key=None)[0] for one in (step, Midpoint()))
        return found, plain - 0.4 * jax.grad(loss)(x - T * velocity(x, T))

    np.testing.assert_allclose(*found_and_expected(X), rtol=1e-5)


def test_a_residual_of_zero_moves_nothing_and_has_finite_gradients():
    slope = jax.jit(velocity)(X, T)

    @jax.jit
    def end_and_jacobian(x, y):
        step = Nudged(Euler(), Measurement(Mask(1.0), y, 0.1), 0.4, "norm", "network")

        def end(x):
            return step(velocity, x, T, U, None, key=None)[0]

        return end(x), jax.jacobian(end)(x)

    x, t, u, slope = map(np.asarray, (X, T, U, slope))
    end, jacobian = end_and_jacobian(x, x - t * slope)
    np.testing.assert_allclose(end, x + (u - t) * slope, rtol=1e-6)
    assert np.all(np.isfinite(jacobian))


@pytest.mark.parametrize(
    "make",
    [
        Decoupled,
        lambda measurement: FlowDPS(measurement, direction="pseudo_inverse"),
        lambda measurement: Nudged(Midpoint(), measurement, direction="norm"),
    ],
    ids=["decoupled", "flowdps", "flowchef"],
)
def test_a_linear_decoder_is_as_a_linear_operator(make):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    inner, outer = eqx.Partial(jnp.matmul, matrix), Downsample(2, axes=(-1,))
    y = jnp.float32([0.2, -0.5, 1.0])

    @eqx.filter_jit
    def run(operator):
        step = make(Measurement(operator, y, 0.3))
        return sample(velocity, X, flow_times(6), step=step, key=KEY).x

    decoded = run(Decoded(inner, outer))
    composed = run(Composition(outer, LinearMap(inner)))
    np.testing.assert_allclose(decoded, composed, rtol=1e-4, atol=1e-5)


def test_decoupled_is_gauss_newton_for_a_decoder():
    noise = jnp.asarray(np.random.default_rng(1).normal(size=11), jnp.float32)
    step = Decoupled(MEASUREMENT)
    with supplied(noise):
        new = jax.jit(lambda x: step(velocity, x, T, U, None, key=KEY)[0])(X)
    a, b, z = np.split(np.float64(noise), [4, 7])
    t, u = float(T), float(U)

    @jax.jit
    def decoded(x):
        estimate = x - T * velocity(x, T)
        return estimate, decode(estimate), jax.jacobian(decode)(estimate)

    estimate, value, jacobian = map(np.float64, decoded(X))
    jacobian = jacobian[:2]
    variance = t**2 / (t**2 + (1 - t) ** 2)
    offset = np.sqrt(variance) * a
    value = value[:2] + jacobian @ offset
    r = np.float64(MEASUREMENT.y)[:2] + 0.2 * b[:2] - value
    solved = np.linalg.solve(variance * jacobian @ jacobian.T + 0.04 * np.eye(2), r)
    x0 = estimate + offset + variance * jacobian.T @ solved
    np.testing.assert_allclose(new, (1 - u) * x0 + u * z, rtol=1e-5)


def steps_of(measurement):
    return [
        Decoupled(measurement),
        FlowDPS(measurement),
        Nudged(Midpoint(), measurement),
        Nudged(DDIM(1.0), measurement, direction="norm"),
    ]


@eqx.filter_jit
def sampled(field, step, steps):
    return sample(field, X, flow_times(steps), step=step, key=KEY)


KINDS = ["decoupled", "flowdps", "flowchef", "flowchef over ddim"]


@jax.custom_jvp
def no_gradient(x):
    return jnp.sin(x)


@no_gradient.defjvp
def _(primals, tangents):
    raise RuntimeError("differentiated")


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_no_gradient_of_the_velocity_is_taken(kind):
    step = steps_of(MEASUREMENT)[kind]
    field = lambda x, t: no_gradient(x)  # noqa: E731
    assert np.all(np.isfinite(sampled(field, step, 3).x))
    through = Nudged(Euler(), MEASUREMENT, through="network")
    with pytest.raises(RuntimeError, match="differentiated"):
        sampled(field, through, 3)


@pytest.mark.parametrize("through", ["estimate", "network"])
def test_a_nudged_step_evaluates_the_velocity_no_more_often(through):
    calls = []

    def counted(x, t):
        calls.append(t)
        return velocity(x, t)

    step = Nudged(Midpoint(), MEASUREMENT, through=through)
    jax.eval_shape(lambda x: step(counted, x, T, U, None, key=None), X)
    assert len(calls) == step.evaluations == 2
    assert step.evaluation_times(T, U) == Midpoint().evaluation_times(T, U)


def image_problem():
    mask = np.zeros((4, 6), np.float32)
    mask[:2] = 1
    y = jnp.asarray(mask * np.cos(np.arange(24.0).reshape(4, 6)), jnp.float32)
    return Measurement(Mask(jnp.asarray(mask)), y, jnp.float32(0.1))


@eqx.filter_jit
def draw(velocity, measurement, x, key, kind):
    return sample(velocity, x, flow_times(5), step=steps_of(measurement)[kind], key=key).x


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_restoring_works_under_jit_vmap_grad_and_on_a_mesh(kind):
    measurement = image_problem()
    x = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    keys = jax.random.split(KEY, 8)
    ys = np.asarray(measurement.y) + np.arange(8, dtype=np.float32)[:, None, None] / 8

    def at(y, x, key):
        return draw(velocity, Measurement(measurement.operator, y, 0.1), x, key, kind)

    batched = jax.jit(jax.vmap(at))
    together = batched(ys, x, keys)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = batched(*jax.device_put((ys, x, keys), rows))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, together, rtol=1e-4, atol=1e-5)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(y, x, key):
        found = at(y, x, key)
        return jnp.sum(jnp.square(found)), found

    # One row of a batch differs by rounding.
    (_, one), _ = loss(ys[3], x[3], keys[3])
    np.testing.assert_allclose(together[3], one, rtol=1e-4, atol=1e-5)
    (_, first), gradient = loss(ys[0], x[0], keys[0])
    np.testing.assert_allclose(together[0], first, rtol=1e-4, atol=1e-5)
    direction = np.cos(np.arange(24, dtype=np.float32)).reshape(4, 6)
    # A central difference; float32 leaves it three digits.
    ends = [loss(ys[0] + step * direction, x[0], keys[0])[0][0] for step in (0.02, -0.02)]
    difference = (ends[0] - ends[1]) / 0.04
    assert float(np.vdot(gradient, direction)) == pytest.approx(float(difference), rel=5e-3)
    np.testing.assert_array_equal(gradient[2:], 0)  # under the mask


def test_another_measurement_needs_no_new_compilation():
    traced = []

    @eqx.filter_jit
    def run(step, x, key):
        traced.append(step)
        return sample(velocity, x, flow_times(4), step=step, key=key).x

    x = jnp.ones((4, 6))
    results = []
    for value in (0.1, 0.5):
        number = jnp.float32(value)
        one = image_problem()
        other = Measurement(Mask(one.operator.mask * value), one.y, number)
        for step in (Decoupled(other, number), FlowDPS(other, number), projecting(other)):
            results.append(run(step, x, KEY))
    assert len(traced) == 3
    for first, second in zip(results[:3], results[3:], strict=True):
        assert not np.allclose(first, second)


@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_a_guided_velocity_is_restored_with(kind):
    def conditional(x, t, condition):
        return velocity(x, t) + condition

    guided = Guided(conditional, jnp.ones((4, 6)), -jnp.ones((4, 6)), jnp.float32(3.0))
    x = jax.random.normal(KEY, (4, 6))
    found = draw(guided, image_problem(), x, KEY, kind)
    expected = draw(lambda x, t: velocity(x, t) + 5, image_problem(), x, KEY, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", [Midpoint(), DDIM(0.5), DPMpp2M()], ids=["m", "ddim", "2m"])
def test_a_nudge_of_size_0_is_the_step_itself(inner):
    # A rule with a memory, and a step with a state.
    guided = Guided(lambda x, t, condition: velocity(x, t) + condition, X, -X, 3.0)
    remembering = eqx.tree_at(lambda guided: guided.rule, guided, Projected(momentum=-0.5))
    for field, through in ((guided, "network"), (remembering, "estimate")):
        step = Nudged(inner, MEASUREMENT, 0.0, through=through)
        found, plain = sampled(field, step, 5), sampled(field, inner, 5)
        np.testing.assert_allclose(found.x, plain.x, rtol=1e-5)
        assert found.evaluations == plain.evaluations


def test_the_dtype_of_x_is_kept_and_the_run_is_in_float32():
    x = jax.random.normal(KEY, (4, 6), jnp.bfloat16)

    def half(x, t):
        return velocity(x, t).astype(jnp.bfloat16)

    for kind in range(4):
        found = draw(half, image_problem(), x, KEY, kind)
        assert found.dtype == jnp.bfloat16
        wide = draw(velocity, image_problem(), x.astype(jnp.float32), KEY, kind)
        # Five steps with a velocity of 8 bits.
        np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=0.05)


def test_flowdps_has_the_density_of_what_it_draws():
    run = sampled(velocity, FlowDPS(MEASUREMENT), 5)
    assert run.log_prob.shape == (5,)
    assert run.log_prob[-1] == 0  # nothing is drawn at the end
    assert sampled(velocity, Decoupled(MEASUREMENT), 5).log_prob is None


def test_bad_inputs_are_reported():
    good = Measurement(Mask(1.0), jnp.ones((4, 6)), 0.1)
    x = jnp.ones((4, 6))
    for step in (Decoupled(good), FlowDPS(good), Nudged(DDIM(1.0), good)):
        with pytest.raises(ValueError, match=r"draws noise. Pass key="):
            sample(velocity, x, flow_times(3), step=step)
        with pytest.raises(ValueError, match=r"Measurement\(y\).*\[4, 5\], got \[4, 6\]"):
            sample(velocity, jnp.ones((4, 5)), flow_times(3), step=step, key=KEY)
        with pytest.raises(ValueError, match=r"rising times"):
            sample(velocity, x, flow_times(3)[::-1], step=step, key=KEY)
    with pytest.raises(ValueError, match=r"`Decoupled\(prior_std\)` needs a positive number"):
        Decoupled(good, prior_std=0.0)
    with pytest.raises(ValueError, match=r"`Decoupled\(iterations\)`.* at least 1, got 0"):
        Decoupled(good, iterations=0)
    with pytest.raises(ValueError, match=r"`FlowDPS\(size\)` needs .* at least 0, got -1"):
        FlowDPS(good, size=-1.0)
    with pytest.raises(ValueError, match=r"`FlowDPS\(descents\)`.* at least 1, got 0"):
        FlowDPS(good, descents=0)
    with pytest.raises(ValueError, match=r"`Nudged\(size\)` needs finite numbers"):
        Nudged(Euler(), good, float("nan"))
    with pytest.raises(ValueError, match=r"`Nudged.*\(direction\)` takes"):
        Nudged(Euler(), good, direction="sideways")


@pytest.mark.parametrize("through", ["estimate", "network"])
@pytest.mark.parametrize("step", [Euler(), FireFlow()], ids=["Euler", "FireFlow"])
def test_nudging_by_a_size_of_0_leaves_the_step_as_it_is(step, through):
    """FireFlow also evaluates before its first step, which is passed on and counted."""
    with jax.enable_x64(True):
        problem = problems.g8("mask")
        times = problems.falling_times(6)
        nudged = Nudged(step, problem.measurement, 0.0, through=through)
        x = jnp.linspace(-1.0, 1.0, 8)
        run = eqx.filter_jit(lambda step: sample(problem.prior, x, times, step=step))
        found, plain = run(nudged), run(step)
        np.testing.assert_allclose(found.x, plain.x, rtol=1e-12)
        assert found.evaluations == plain.evaluations
