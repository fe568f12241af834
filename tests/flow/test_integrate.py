"""Integrators, against fields whose answer is known in closed form, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

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
    ancestral,
    sample,
)
from fluxjax.flow.exponential import _corrector_right_sides
from fluxjax.flow.sample import evaluation_times

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


def mixture_velocity(x, t):
    """The exact velocity for data of two normal distributions."""
    offset = x[..., None] - (1 - t) * MEANS
    variance = ((1 - t) * DEVIATIONS) ** 2 + t**2
    share = jax.nn.softmax(
        jnp.log(WEIGHTS) - 0.5 * jnp.log(variance) - 0.5 * offset**2 / variance, axis=-1
    )
    image = jnp.sum(share * (MEANS + (1 - t) * DEVIATIONS**2 / variance * offset), -1)
    return jnp.sum(share * t / variance * offset, -1) - image


def exact_end(x, first, last):
    """The flow keeps the quantile: by bisection of the mixture's distribution function at the last time."""

    def distribution(x, t):
        deviations = jnp.sqrt(((1 - t) * DEVIATIONS) ** 2 + t**2)
        return jnp.sum(WEIGHTS * norm.cdf(x[..., None], (1 - t) * MEANS, deviations), -1)

    wanted = distribution(x, first)
    low, high = x - 10, x + 10
    for _ in range(100):
        middle = (low + high) / 2
        below = distribution(middle, last) < wanted
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    return (low + high) / 2


def nodes(steps: int, first: float, last: float, uneven: bool):
    ramp = jnp.linspace(0.0, 1.0, steps + 1)
    return first + (last - first) * (ramp**1.5 if uneven else ramp)


def errors(step: Step, counts, first: float, last: float, uneven: bool) -> np.ndarray:
    x = jnp.linspace(-2.0, 2.0, 9)
    wanted = exact_end(x, first, last)
    return np.array(
        [
            float(
                jnp.abs(
                    sample(mixture_velocity, x, nodes(n, first, last, uneven), step=step).x - wanted
                ).max()
            )
            for n in counts
        ]
    )


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_the_error_falls_with_the_declared_order(step, uneven):
    found = errors(step, (96, 192), 0.95, 0.05, uneven)
    assert np.log2(found[0] / found[1]) == pytest.approx(step.order, abs=0.25)


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_rising_times_have_the_same_order(step):
    found = errors(step, (96, 192), 0.05, 0.95, False)
    assert np.log2(found[0] / found[1]) == pytest.approx(step.order, abs=0.25)
    inverted = sample(
        mixture_velocity, jnp.linspace(-2.0, 2.0, 9), jnp.linspace(0.0, 1.0, 21), step=step
    ).x
    assert np.isfinite(inverted).all()


@pytest.mark.parametrize("way", [1e-4, 1e-2, 0.5, 3.0, -1e-3])
def test_the_corrector_keeps_float32s_digits_on_close_times(way):
    # phi_k(z) is the sum of z^n / (n + k)!.
    one, two, three = (
        sum((-way) ** n / math.factorial(n + k) for n in range(40)) for k in (1, 2, 3)
    )
    np.testing.assert_allclose(
        _corrector_right_sides(jnp.float32(way)), [two / one, 2 * three / one], rtol=1e-6
    )


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_many_close_nodes_in_float32_round_nothing_away(step):
    def end(dtype):
        x, times = (
            np.linspace(-2, 2, 33, dtype=np.float32),
            np.linspace(0.6, 0.55, 200, dtype=np.float32),
        )
        speed = lambda x, t: jnp.sin(3 * x + 5 * t)  # noqa: E731
        return np.asarray(
            sample(speed, jnp.asarray(x, dtype), jnp.asarray(times, dtype), step=step).x, np.float64
        )

    # 199 roundings of x by up to 6e-8 each are 2e-7 to 5e-7 if they are independent; of one sign they would be 4e-6 and more.
    error = end(jnp.float32) - end(jnp.float64)
    assert np.linalg.norm(error) <= 1e-6 * np.linalg.norm(end(jnp.float64))


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_over_the_whole_way_the_error_falls_without_a_floor(step):
    counts = (64, 1024, 16_384) if step.order > 1 else (1024, 32_768, 4_194_304)
    found = errors(step, counts, 1.0, 0.0, False)
    assert np.all(found[1:] < 0.15 * found[:-1])
    assert found[-1] < 1e-6


@pytest.mark.parametrize("step", [*EXPONENTIAL, DEIS2()], ids=name)
def test_exponential_steps_are_exact_where_the_estimate_is_constant_and_end_on_it(step):
    target = jnp.array([0.3, -2.0])
    constant = lambda x, t: (x - target) / jnp.maximum(t, 1e-30)  # noqa: E731 (0 at t = 0, where x is the target)
    # From 1, where x is noise alone.
    end = sample(constant, jnp.array([1.0, 5.0]), jnp.array([1.0, 0.7, 0.65, 0.2, 0.0]), step=step)
    np.testing.assert_allclose(end.x, target, atol=1e-14)
    bent = lambda x, t: jnp.sin(3 * x + t)  # noqa: E731
    path = sample(
        bent, jnp.array([1.0, 5.0]), jnp.array([1.0, 0.7, 0.65, 0.2, 0.0]), step=step, history=True
    ).history
    if step.evaluations == 1 and not isinstance(
        step, UniPC2
    ):  # its corrector moves the state that the estimate is taken at
        np.testing.assert_allclose(path[-1], path[-2] - 0.2 * bent(path[-2], 0.2), atol=1e-14)


@pytest.mark.parametrize("step", DIRECT, ids=name)
def test_direct_steps_are_exact_where_the_velocity_is_constant(step):
    end = sample(
        lambda x, t: jnp.full_like(x, 2.0),
        jnp.zeros(2),
        jnp.array([1.0, 0.7, 0.65, 0.2, 0.0]),
        step=step,
    ).x
    np.testing.assert_allclose(end, -2.0, atol=1e-14)


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_one_step_over_the_whole_way_is_finite(step):
    assert np.isfinite(
        sample(mixture_velocity, jnp.linspace(-2.0, 2.0, 9), jnp.array([1.0, 0.0]), step=step).x
    ).all()


@pytest.mark.parametrize("step", DETERMINISTIC, ids=name)
def test_evaluations_are_as_declared(step):
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -x

    assert (
        sample(counted, jnp.ones(2), nodes(5, 1, 0, False), step=step).evaluations
        == 5 * step.evaluations
    )
    jax.effects_barrier()
    assert len(calls) == 5 * step.evaluations


ONCE = [Churn(Heun(), low=0.4), ReverseSDE(), DDIM(0.5), Renoise(), DPMpp2MSDE(), ERSDE2()]


@pytest.mark.parametrize("step", [*DETERMINISTIC, *ONCE], ids=name)
def test_the_velocity_is_asked_at_the_times_that_the_step_tells(step):
    calls, times = [], nodes(5, 1, 0, True)

    def heard(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -x

    sample(heard, jnp.ones(2), times, step=step, key=jax.random.key(0))
    jax.effects_barrier()
    told = evaluation_times(step, times)
    np.testing.assert_allclose(
        sorted({round(t, 9) for t in calls}), np.unique(np.round(told, 9)), atol=1e-8
    )


def test_a_step_that_does_not_tell_its_times_is_known_to():
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


def exact_moments(step, times) -> tuple[float, float]:
    """Propagate mean and variance exactly: on a Gaussian every step is affine, so x is carried as its coefficients, of 1, of
    the first noise, and of each step's."""
    steps = len(times) - 1
    one = jnp.zeros(steps + 2).at[0].set(1.0)

    def velocity(x, t):
        slope, rest = gaussian_parts(t)
        return slope * x + rest * one

    inner = step.step if isinstance(step, Churn) else step

    def body(carry, interval):
        x, state = carry
        t, u, index = interval
        fresh = jnp.zeros(steps + 2).at[index + 2].set(1.0)
        if isinstance(step, Churn):
            t, kept, deviation = step.noisier_time(t)
            x, state, _ = inner(velocity, kept * x + deviation * fresh, t, u, state, key=None)
        else:
            x, deviation, state = inner.moments(velocity, x, t, u, state)
            x = x + deviation * fresh
        return (x, state), None

    start = jnp.zeros(steps + 2).at[1].set(1.0)
    (x, _), _ = jax.lax.scan(
        body, (start, inner.init(start)), (times[:-1], times[1:], jnp.arange(steps))
    )
    return float(x[0]), float(jnp.sum(x[1:] ** 2))


STOCHASTIC = {
    "reverse SDE": ReverseSDE(),
    "reverse SDE, own rate": ReverseSDE(squared=lambda t: 3 * t**2),
    "DDIM 0.5": DDIM(0.5),
    "ancestral": ancestral(),
    "2M SDE": DPMpp2MSDE(),
    "2M SDE 0.5": DPMpp2MSDE(0.5),
    "ER-SDE": ERSDE2(),
    "churned Heun": Churn(Heun(), 0.2, 0.1, 0.9),
}


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_mean_and_variance_converge_at_the_declared_order(kind):
    step = STOCHASTIC[kind]
    counts = (64, 128, 256, 512)
    found = [exact_moments(step, nodes(n, 1.0, 0.0, False)) for n in counts]
    off = np.array(
        [max(abs(mean - MEAN), abs(variance - DEVIATION**2)) for mean, variance in found]
    )
    assert off[-1] < 0.02 * DEVIATION**2
    if kind == "churned Heun":  # a rate a step, so that more steps churn more
        return
    # Over all of it: two errors of different sign meet on the way.
    assert np.log2(off[0] / off[-1]) / 3 > step.order - 0.25


def test_noise_drawn_anew_does_not_converge_and_says_so():
    off = [
        abs(exact_moments(Renoise(), nodes(n, 1.0, 0.0, False))[1] - DEVIATION**2)
        for n in (16, 64, 256)
    ]
    assert min(off) > 0.3 * DEVIATION**2
    assert Renoise().order == 0


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_drawn_samples_have_the_moments_that_are_declared(kind):
    step, times = STOCHASTIC[kind], nodes(12, 1.0, 0.0, False)
    count = 20_000
    x = jax.random.normal(jax.random.key(0), (count,))
    end = sample(gaussian_velocity, x, times, step=step, key=jax.random.key(1)).x
    mean, variance = exact_moments(step, times)
    # Four standard errors.
    assert float(end.mean()) == pytest.approx(mean, abs=4 * (variance / count) ** 0.5)
    assert float(end.var()) == pytest.approx(variance, rel=4 * (2 / count) ** 0.5)


@pytest.mark.parametrize("kind", ["reverse SDE", "DDIM 0.5", "ancestral", "2M SDE", "ER-SDE"])
def test_log_probabilities_are_those_of_the_density(kind):
    step, times = STOCHASTIC[kind], nodes(6, 1.0, 0.0, False)
    x = jax.random.normal(jax.random.key(0), (3,))
    result = sample(gaussian_velocity, x, times, step=step, key=jax.random.key(1), history=True)
    state = step.init(x)
    for i in range(6):
        mean, deviation, state = step.moments(
            gaussian_velocity, result.history[i], times[i], times[i + 1], state
        )
        wanted = norm.logpdf(result.history[i + 1], mean, deviation).sum() if deviation > 0 else 0.0
        np.testing.assert_allclose(result.log_prob[i], wanted, rtol=1e-9)
    assert sample(gaussian_velocity, x, times).log_prob is None


def test_steps_without_noise_are_the_deterministic_ones():
    x, times = jnp.linspace(-2.0, 2.0, 5), nodes(9, 1.0, 0.0, True)
    for quiet, same in (
        (DDIM(0.0), Euler()),
        (DPMpp2MSDE(0.0), DPMpp2M()),
        (Churn(Heun(), 0.0), Heun()),
        (ReverseSDE(0.0), Euler()),
    ):
        ours = sample(mixture_velocity, x, times, step=quiet, key=jax.random.key(0)).x
        np.testing.assert_allclose(
            ours, sample(mixture_velocity, x, times, step=same).x, atol=1e-12
        )


def test_churn_keeps_the_marginal_and_is_confined_to_its_window():
    churn = Churn(Euler(), 0.3, 0.2, 0.8)
    for t in (0.25, 0.5, 0.79):
        raised, kept, deviation = churn.noisier_time(jnp.float64(t))
        sigma = t / (1 - t)
        assert raised / (1 - raised) == pytest.approx(1.3 * sigma)
        assert kept * (1 - t) == pytest.approx(1 - raised)  # the image's share
        assert (kept * t) ** 2 + deviation**2 == pytest.approx(raised**2)  # the noise's
    for t in (0.1, 0.9):
        assert [float(x) for x in churn.noisier_time(jnp.float64(t))] == pytest.approx([t, 1, 0])


def test_a_stochastic_step_without_a_key_says_what_to_pass():
    for step in (DDIM(), Churn(Euler())):
        with pytest.raises(ValueError, match=r"Pass key=jax.random.key"):
            sample(gaussian_velocity, jnp.ones(2), nodes(2, 1, 0, False), step=step)


def test_every_integrator_is_public():
    for step in (*DETERMINISTIC, *STOCHASTIC.values(), Renoise()):
        assert getattr(fluxjax, type(step).__name__) is type(step)
