"""Integrators on velocity fields whose solution is known in closed form, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import fluxjax
from fluxjax import DDIM, DPMpp2M, Euler, Heun, UniPC2
from fluxjax.flow import (
    AB2,
    DEIS2,
    ERSDE2,
    RES2M,
    RES2S,
    RK4,
    Churn,
    DPMpp2MSDE,
    DPMpp2S,
    Midpoint,
    Renoise,
    ReverseSDE,
    Step,
    advance_sample,
    ancestral,
    begin_sample,
    evaluation_times,
    sample,
)
from fluxjax.flow.exponential import _corrector_right_sides

EXPONENTIAL = [
    solver(clock)
    for solver in (DPMpp2S, DPMpp2M, RES2S, RES2M, UniPC2)
    for clock in ("log_snr", "log_time")
]
DIRECT = [Euler(), Heun(), Midpoint(), RK4(), AB2()]
DETERMINISTIC = [*DIRECT, DEIS2(), *EXPONENTIAL]


def name(step: Step) -> str:
    return f"{type(step).__name__}{getattr(step, 'clock', '')}"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


WEIGHTS, MEANS, DEVIATIONS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.3, 0.5])
X = np.linspace(-2.0, 2.0, 9)


def mixture_velocity(x, t):
    """The exact velocity for data from a mixture of two normal distributions."""
    weights, means, deviations = (
        jnp.asarray(values, x.dtype) for values in (WEIGHTS, MEANS, DEVIATIONS)
    )
    offset = x[..., None] - (1 - t) * means
    variance = ((1 - t) * deviations) ** 2 + t**2
    share = jax.nn.softmax(
        jnp.log(weights) - 0.5 * jnp.log(variance) - 0.5 * offset**2 / variance, axis=-1
    )
    image = jnp.sum(share * (means + (1 - t) * deviations**2 / variance * offset), -1)
    return jnp.sum(share * t / variance * offset, -1) - image


def exact_end(x, first, last):
    """The flow keeps the quantile: bisect the distribution function at the last time."""

    def distribution(x, t):
        deviations = np.sqrt(((1 - t) * DEVIATIONS) ** 2 + t**2)
        return np.sum(WEIGHTS * norm.cdf(x[..., None], (1 - t) * MEANS, deviations), -1)

    quantile = distribution(x, first)
    low, high = x - 10, x + 10
    for _ in range(100):
        middle = (low + high) / 2
        below = distribution(middle, last) < quantile
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def nodes(steps: int, first: float, last: float, uneven: bool) -> np.ndarray:
    ramp = np.linspace(0.0, 1.0, steps + 1)
    return first + (last - first) * (ramp**1.5 if uneven else ramp)


MOST_STEPS = 2**16


@functools.cache
def _mixture_program(step: Step):
    """One compiled program for every number of steps: all times have the same, padded length."""

    @jax.jit
    def run(x, times, steps):
        state = begin_sample(mixture_velocity, x, times, step=step)
        return advance_sample(mixture_velocity, state, times, 0, steps, step=step).x

    return run


def mixture_end(step: Step, x, times) -> np.ndarray:
    padded = np.zeros(MOST_STEPS + 1, times.dtype)
    padded[: len(times)] = times
    return np.asarray(_mixture_program(step)(x, padded, len(times) - 1))


def errors(step: Step, counts, first: float, last: float, uneven: bool) -> np.ndarray:
    exact = exact_end(X, first, last)
    ends = [mixture_end(step, X, nodes(count, first, last, uneven)) for count in counts]
    return np.array([np.abs(end - exact).max() for end in ends])


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_the_error_falls_with_the_declared_order(step, uneven):
    found = errors(step, (96, 192), 0.95, 0.05, uneven)
    assert np.log2(found[0] / found[1]) == pytest.approx(step.order, abs=0.25)


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_rising_times_have_the_same_order(step):
    found = errors(step, (96, 192), 0.05, 0.95, False)
    assert np.log2(found[0] / found[1]) == pytest.approx(step.order, abs=0.25)
    assert np.isfinite(mixture_end(step, X, np.linspace(0.0, 1.0, 21))).all()


@pytest.mark.parametrize("difference", [1e-4, 1e-2, 0.5, 3.0, -1e-3])
def test_the_corrector_is_accurate_in_float32_for_close_times(difference):
    # phi_k(z) is the sum of z^n / (n + k)!.
    one, two, three = (
        sum((-difference) ** n / math.factorial(n + k) for n in range(40)) for k in (1, 2, 3)
    )
    found = _corrector_right_sides(jnp.float32(difference))
    np.testing.assert_allclose(found, [two / one, 2 * three / one], rtol=1e-6)


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_many_close_nodes_in_float32_round_nothing_away(step):
    def end(dtype):
        times = np.linspace(0.6, 0.55, 200, dtype=np.float32)
        x = np.linspace(-2, 2, 33, dtype=np.float32)
        return mixture_end(step, x.astype(dtype), times.astype(dtype)).astype(np.float64)

    # 199 independent roundings of x by up to 6e-8 each are 2e-7 to 5e-7. If all had one sign, they
    # would be 4e-6 and more.
    exact = end(np.float64)
    assert np.linalg.norm(end(np.float32) - exact) <= 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_from_1_to_0_the_error_falls_without_a_floor(step):
    if step.order > 1:
        counts, bound = (64, 1024, 16_384), 1e-6
    else:
        counts, bound = (256, 4096, MOST_STEPS), 1e-4
    found = errors(step, counts, 1.0, 0.0, False)
    assert np.all(found[1:] < 0.15 * found[:-1])
    assert found[-1] < bound


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_one_step_from_1_to_0_is_finite(step):
    assert np.isfinite(mixture_end(step, X, np.array([1.0, 0.0]))).all()


@pytest.mark.parametrize("step", [*EXPONENTIAL, DEIS2(), AB2()], ids=name)
def test_gradients_in_the_times_are_those_of_finite_differences(step):
    times, shift = jnp.linspace(1.0, 0.0, 6), 1e-6

    def end(times):
        return jnp.sum(jnp.sin(sample(mixture_velocity, jnp.asarray(X), times, step=step).x))

    @jax.jit
    def both(times):
        moved = times + shift * jnp.eye(6)[1:-1, None] * jnp.array([[1.0], [-1.0]])
        ends = jax.vmap(jax.vmap(end))(moved)
        return jax.grad(end)(times), (ends[:, 0] - ends[:, 1]) / (2 * shift)

    found, expected = both(times)
    # Also at both ends of the path, where the clocks are infinite.
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1:-1], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("step", [*EXPONENTIAL, DEIS2()], ids=name)
def test_exponential_steps_are_exact_for_a_constant_estimate_and_end_on_the_estimate(step):
    target, start = jnp.array([0.3, -2.0]), jnp.array([1.0, 5.0])

    def curved(x, t):
        return jnp.sin(3 * x + t)

    @jax.jit
    def path(is_constant):
        def velocity(x, t):
            # At t = 0 x is the target, and the velocity 0.
            constant = (x - target) / jnp.maximum(t, 1e-30)
            return jnp.where(is_constant, constant, curved(x, t))

        # From 1, where x is only noise.
        times = jnp.array([1.0, 0.7, 0.65, 0.2, 0.0])
        return sample(velocity, start, times, step=step, history=True).history

    np.testing.assert_allclose(path(True)[-1], target, atol=1e-14)
    # UniPC's corrector changes the x at which the last estimate was evaluated.
    if step.evaluations == 1 and not isinstance(step, UniPC2):
        *_, before, end = np.asarray(path(False))
        np.testing.assert_allclose(end, before - 0.2 * np.sin(3 * before + 0.2), atol=1e-14)


@pytest.mark.parametrize("step", DIRECT, ids=name)
def test_direct_steps_are_exact_for_a_constant_velocity(step):
    times = jnp.array([1.0, 0.7, 0.65, 0.2, 0.0])
    end = sample(lambda x, t: jnp.full_like(x, 2.0), jnp.zeros(2), times, step=step).x
    np.testing.assert_allclose(end, -2.0, atol=1e-14)


NOISY = [Churn(Heun(), low=0.4), ReverseSDE(), DDIM(0.5), Renoise(), DPMpp2MSDE(), ERSDE2()]


@pytest.mark.parametrize("step", [*DETERMINISTIC, *NOISY], ids=name)
def test_the_velocity_is_evaluated_as_often_and_when_the_step_declares(step):
    calls, times = [], jnp.asarray(nodes(5, 1, 0, True))

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -x

    result = sample(counted, jnp.ones(2), times, step=step, key=jax.random.key(0))
    jax.effects_barrier()
    assert len(calls) == result.evaluations == 5 * step.evaluations
    declared = np.unique(np.round(evaluation_times(step, times), 9))
    np.testing.assert_allclose(sorted({round(t, 9) for t in calls}), declared, atol=1e-8)


def test_evaluation_times_are_none_for_a_step_that_does_not_declare_them():
    class Ralston(Step):
        order, evaluations = 2, 2

        def init(self, x):
            return None

        def __call__(self, velocity, x, t, u, state, *, key):
            raise NotImplementedError

    assert evaluation_times(Ralston(), jnp.linspace(1, 0, 3)) is None
    assert evaluation_times(Churn(Ralston()), jnp.linspace(1, 0, 3)) is None


MEAN, DEVIATION = 0.7, 0.4


def gaussian_parts(t):
    """Return a and b of the exact velocity a x + b for data N(MEAN, DEVIATION^2)."""
    variance = ((1 - t) * DEVIATION) ** 2 + t**2
    slope = (t - (1 - t) * DEVIATION**2) / variance
    return slope, -MEAN - slope * (1 - t) * MEAN


def gaussian_velocity(x, t):
    slope, rest = gaussian_parts(t)
    return slope * x + rest


STOCHASTIC = {
    "reverse SDE": ReverseSDE(),
    "reverse SDE, custom": ReverseSDE(squared=lambda t: 3 * t**2),
    "DDIM 0.5": DDIM(0.5),
    "ancestral": ancestral(),
    "2M SDE": DPMpp2MSDE(),
    "2M SDE 0.5": DPMpp2MSDE(0.5),
    "ER-SDE": ERSDE2(),
    "churned Heun": Churn(Heun(), 0.2, 0.1, 0.9),
    "renoise": Renoise(),
}
CONVERGENT = [kind for kind in STOCHASTIC if kind != "renoise"]
MOST_NOISY_STEPS = 512


@functools.cache
def _coefficients_program(kind: str):
    """Return a program that carries x as its coefficients of 1, of the start and of each draw.

    For Gaussian data every step is affine, so this propagates mean and variance exactly.
    """
    step, size = STOCHASTIC[kind], MOST_NOISY_STEPS + 2
    one = jnp.zeros(size).at[0].set(1.0)
    start = jnp.zeros(size).at[1].set(1.0)

    def velocity(x, t):
        slope, rest = gaussian_parts(t)
        return slope * x + rest * one

    def body(index, carry, times):
        x, state = carry
        t, u = times[index], times[index + 1]
        draw = jnp.zeros(size).at[index + 2].set(1.0)
        if isinstance(step, Churn):
            t, factor, deviation = step.noisier_time(t)
            x, state, _ = step.step(velocity, factor * x + deviation * draw, t, u, state, key=None)
            return x, state
        x, deviation, state = step.moments(velocity, x, t, u, state)
        return x + deviation * draw, state

    @jax.jit
    def run(times, steps):
        carry = (start, step.init(start))
        return jax.lax.fori_loop(0, steps, functools.partial(body, times=times), carry)[0]

    return run


def exact_moments(kind: str, steps: int) -> tuple[float, float]:
    """Return the exact mean and variance after equal steps from 1 to 0."""
    times = np.zeros(MOST_NOISY_STEPS + 1)
    times[: steps + 1] = nodes(steps, 1.0, 0.0, False)
    x = np.asarray(_coefficients_program(kind)(times, steps))
    return float(x[0]), float(np.sum(x[1:] ** 2))


@pytest.mark.parametrize("kind", CONVERGENT)
def test_mean_and_variance_converge_at_the_declared_order(kind):
    errors = []
    for steps in (64, 512):
        mean, variance = exact_moments(kind, steps)
        errors.append(max(abs(mean - MEAN), abs(variance - DEVIATION**2)))
    assert errors[-1] < 0.02 * DEVIATION**2
    # The rate of churn is per step, so that more steps add more noise.
    if kind != "churned Heun":
        # Over a factor of 8: two errors of different sign cancel in between.
        assert np.log2(errors[0] / errors[-1]) / 3 > STOCHASTIC[kind].order - 0.25


def test_noise_drawn_anew_does_not_converge_and_its_order_is_0():
    off = [abs(exact_moments("renoise", steps)[1] - DEVIATION**2) for steps in (16, 64, 256)]
    assert min(off) > 0.3 * DEVIATION**2
    assert Renoise().order == 0


@pytest.mark.parametrize("kind", CONVERGENT)
def test_drawn_samples_have_the_exact_moments(kind):
    times, count = nodes(12, 1.0, 0.0, False), 20_000
    x = jax.random.normal(jax.random.key(0), (count,))
    end = sample(gaussian_velocity, x, times, step=STOCHASTIC[kind], key=jax.random.key(1)).x
    mean, variance = exact_moments(kind, 12)
    # Four standard errors.
    assert np.mean(end) == pytest.approx(mean, abs=4 * (variance / count) ** 0.5)
    assert np.var(end) == pytest.approx(variance, rel=4 * (2 / count) ** 0.5)


@pytest.mark.parametrize("kind", ["reverse SDE", "DDIM 0.5", "ancestral", "2M SDE", "ER-SDE"])
def test_log_probabilities_are_those_of_the_density(kind):
    step, times = STOCHASTIC[kind], nodes(6, 1.0, 0.0, False)
    x = jax.random.normal(jax.random.key(0), (3,))
    result = sample(gaussian_velocity, x, times, step=step, key=jax.random.key(1), history=True)
    moments = jax.jit(functools.partial(step.moments, gaussian_velocity))
    state = step.init(x)
    for i in range(6):
        mean, deviation, state = moments(result.history[i], times[i], times[i + 1], state)
        expected = 0.0
        if deviation > 0:
            expected = norm.logpdf(result.history[i + 1], mean, deviation).sum()
        np.testing.assert_allclose(result.log_prob[i], expected, rtol=1e-9)


def test_deterministic_steps_have_no_log_probability():
    assert sample(gaussian_velocity, jnp.ones(3), jnp.array([1.0, 0.0])).log_prob is None


@pytest.mark.parametrize(
    ("quiet", "same"),
    [
        (DDIM(0.0), Euler()),
        (DPMpp2MSDE(0.0), DPMpp2M("log_snr")),
        (Churn(Heun(), 0.0), Heun()),
        (ReverseSDE(0.0), Euler()),
    ],
    ids=name,
)
def test_steps_without_noise_are_the_deterministic_ones(quiet, same):
    times = nodes(9, 1.0, 0.0, True)
    ours = sample(mixture_velocity, X, times, step=quiet, key=jax.random.key(0)).x
    np.testing.assert_allclose(ours, mixture_end(same, X, times), atol=1e-12)


def test_churn_keeps_the_marginal_and_only_acts_within_its_times():
    noisier_time = jax.jit(Churn(Euler(), 0.3, 0.2, 0.8).noisier_time)
    for t in (0.25, 0.5, 0.79):
        noisier, factor, deviation = map(float, noisier_time(t))
        sigma = t / (1 - t)
        assert noisier / (1 - noisier) == pytest.approx(1.3 * sigma)
        assert factor * (1 - t) == pytest.approx(1 - noisier)  # the share of the image
        assert (factor * t) ** 2 + deviation**2 == pytest.approx(noisier**2)  # of the noise
    for t in (0.1, 0.9):
        assert list(map(float, noisier_time(t))) == pytest.approx([t, 1, 0])


@pytest.mark.parametrize("step", [DDIM(), Churn(Euler())], ids=name)
def test_a_stochastic_step_without_a_key_says_what_to_pass(step):
    with pytest.raises(ValueError, match=r"Pass key=jax.random.key"):
        sample(gaussian_velocity, jnp.ones(2), nodes(2, 1, 0, False), step=step)


def test_every_integrator_is_public():
    for step in (*DETERMINISTIC, *STOCHASTIC.values()):
        assert getattr(fluxjax.flow, type(step).__name__) is type(step)
