"""The laws of guidance."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import ClassifierFree, Guided, Heun, flow_times, stream
from fluxjax.flow import Projected, WeakModel, ZeroStar, sample, sample_ode

X = jnp.float32([0.4, -1.0, 2.0])
WANTED, UNWANTED = jnp.float32([1.0, 0.5, -0.3]), jnp.float32([-0.2, 0.1, 0.6])


def velocity(x, t, condition):
    return condition - 0.3 * t * x


def both(t: float):
    return velocity(X, t, WANTED), velocity(X, t, UNWANTED)


@pytest.mark.parametrize(
    "rule",
    [ClassifierFree(), ZeroStar(), Projected(0.3, 0.5)],
    ids=lambda rule: type(rule).__name__,
)
def test_at_scale_1_every_rule_gives_the_wanted_velocity(rule):
    t = jnp.float32(0.7)
    positive, negative = both(t)
    np.testing.assert_allclose(rule(X, t, positive, negative, jnp.float32(1)), positive, rtol=1e-6)
    np.testing.assert_array_equal(Guided(velocity, WANTED, UNWANTED, 1.0, rule)(X, t), positive)


def test_classifier_free_guidance_is_linear_in_its_scale():
    t = jnp.float32(0.7)
    positive, negative = both(t)
    np.testing.assert_allclose(Guided(velocity, WANTED, UNWANTED, 0.0)(X, t), negative, rtol=1e-6)
    for scale in (-1.0, 3.5):
        found = Guided(velocity, WANTED, UNWANTED, scale)(X, t)
        np.testing.assert_allclose(found, negative + scale * (positive - negative), rtol=1e-5)


def test_zero_star_takes_out_what_differs_in_size_alone():
    t = jnp.float32(0.7)
    positive, negative = both(t)
    np.testing.assert_allclose(
        ZeroStar()(X, t, 2 * negative, negative, jnp.float32(5)), 2 * negative, rtol=1e-5
    )
    # The scaled velocity is the projection: what is left is orthogonal to it.
    guided = ZeroStar()(X, t, positive, negative, jnp.float32(3))
    near = positive @ negative / (negative @ negative) * negative
    np.testing.assert_allclose(guided, near + 3 * (positive - near), rtol=1e-5)
    np.testing.assert_array_equal(
        ZeroStar(0.9)(X, jnp.float32(0.95), positive, negative, jnp.float32(3)), 0
    )
    np.testing.assert_array_equal(
        ZeroStar()(X, t, positive, 0 * negative, jnp.float32(3)), 3 * positive
    )


def test_projection_damps_what_is_along_the_estimate_and_bounds_the_rest():
    t, scale = jnp.float32(0.7), jnp.float32(4)
    positive, negative = both(t)
    plain = ClassifierFree()(X, t, positive, negative, scale)
    np.testing.assert_allclose(Projected(1.0)(X, t, positive, negative, scale), plain, rtol=1e-5)
    estimate = X - t * positive
    orthogonal = Projected()(X, t, positive, negative, scale) - positive
    assert abs(float(orthogonal @ estimate)) < 1e-5
    bounded = Projected(1.0, 0.2)(X, t, positive, negative, scale) - positive
    # The change of the estimate of x0, over scale - 1.
    assert float(jnp.linalg.norm(t * bounded)) / 3 == pytest.approx(0.2, rel=1e-5)
    # At t = 0 nothing is divided by 0.
    assert np.isfinite(Projected(0.5, 0.2)(X, jnp.float32(0), positive, negative, scale)).all()


def counted(calls):
    def one(x, t, condition):
        jax.debug.callback(lambda _: calls.append(1), condition.sum())
        return velocity(x, t, condition)

    return one


@pytest.mark.parametrize(
    ("scale", "low", "high", "evaluated"),
    [(1.0, 0.0, 1.0, 4), (3.0, 0.0, 1.0, 8), (3.0, 0.3, 0.8, 6)],
)
def test_no_evaluation_is_wasted(scale, low, high, evaluated):
    calls = []

    @eqx.filter_jit
    def run(scale):
        return sample(
            Guided(counted(calls), WANTED, UNWANTED, scale, low=low, high=high), X, flow_times(4)
        ).x

    run(jnp.float32(scale)).block_until_ready()
    jax.effects_barrier()
    # A batch of two counts as two; of the times 1, 0.75, 0.5, 0.25 the window holds two.
    assert len(calls) == evaluated


def test_another_scale_condition_or_window_compiles_nothing():
    traces = []

    @eqx.filter_jit
    def run(guided, x):
        traces.append(1)
        return sample(guided, x, flow_times(3)).x

    for scale in (1.0, 2.0, 7.0):
        guided = Guided(
            velocity,
            WANTED * scale,
            UNWANTED,
            jnp.float32(scale),
            Projected(jnp.float32(scale)),
            jnp.float32(scale / 10),
        )
        run(guided, X)
    assert len(traces) == 1


def test_each_particle_may_have_a_scale_of_its_own():
    scales = jnp.float32([1.0, 2.0, 5.0])
    t = jnp.float32(0.5)
    batch = jax.vmap(lambda scale: Guided(velocity, WANTED, UNWANTED, scale)(X, t))(scales)
    for row, scale in zip(batch, scales, strict=True):
        np.testing.assert_allclose(row, Guided(velocity, WANTED, UNWANTED, scale)(X, t), rtol=1e-6)


def weak(x, t, condition):
    return 0.5 * condition + t * x


def test_away_from_a_weaker_model_adds_its_difference_from_the_wanted():
    t = jnp.float32(0.7)
    positive, negative = both(t)
    difference = positive - weak(X, t, WANTED)
    alone = Guided(velocity, WANTED, weak=WeakModel(weak, 1.5))
    np.testing.assert_allclose(alone(X, t), positive + 1.5 * difference, rtol=1e-5)
    with_both = Guided(velocity, WANTED, UNWANTED, 3.0, weak=WeakModel(weak, 1.5))
    np.testing.assert_allclose(
        with_both(X, t), negative + 3 * (positive - negative) + 1.5 * difference, rtol=1e-5
    )
    for off in (
        WeakModel(weak, 0.0),
        WeakModel(weak, 1.5, low=0.8),
        WeakModel(weak, 1.5, high=0.6),
    ):
        np.testing.assert_array_equal(Guided(velocity, WANTED, weak=off)(X, t), positive)


def test_where_a_weaker_model_is_not_used_it_is_not_evaluated():
    calls, spoilt = [], []

    @eqx.filter_jit
    def run(strength):
        def told(x, t, condition):
            jax.debug.callback(lambda _: spoilt.append(1), t)
            return weak(x, t, condition)

        return sample(
            Guided(counted(calls), WANTED, weak=WeakModel(told, strength, low=0.3, high=0.8)),
            X,
            flow_times(4),
        ).x

    for strength, evaluated in ((2.0, 2), (0.0, 0)):
        calls.clear(), spoilt.clear()
        run(jnp.float32(strength)).block_until_ready()
        jax.effects_barrier()
        assert (len(calls), len(spoilt)) == (4, evaluated)


def test_a_scale_without_an_unwanted_condition_is_refused():
    with pytest.raises(ValueError, match=r"Pass negative="):
        Guided(velocity, WANTED, scale=3.0)
    np.testing.assert_array_equal(
        Guided(velocity, WANTED)(X, jnp.float32(0.5)), velocity(X, jnp.float32(0.5), WANTED)
    )


def momentum_by_hand(times, scale, parallel, momentum):
    """Euler's steps of algorithm 1 of the paper, on estimates of x0, in float64."""
    x, carried = np.float64(X), np.zeros(3)
    for t, u in itertools.pairwise(times):
        positive, negative = (
            x - t * (np.float64(side) - 0.3 * t * x) for side in (WANTED, UNWANTED)
        )
        carried = positive - negative + momentum * carried
        along = carried @ positive / (positive @ positive) * positive
        estimate = positive + (scale - 1) * (carried - along + parallel * along)
        x = x + (u - t) * (x - estimate) / t
    return x


@pytest.mark.parametrize("momentum", [-0.5, 0.0])
def test_momentum_runs_through_the_evaluations(momentum):
    times = flow_times(5)
    guided = Guided(velocity, WANTED, UNWANTED, 3.0, Projected(0.2, momentum=momentum))
    expected = momentum_by_hand(np.float64(times), 3.0, 0.2, momentum)
    np.testing.assert_allclose(sample(guided, X, times).x, expected, rtol=2e-5)
    *_, last = stream(guided, X, times)
    np.testing.assert_allclose(last.x, expected, rtol=2e-5)
    none = sample(Guided(velocity, WANTED, UNWANTED, 3.0, Projected(0.2)), X, times).x
    assert (np.abs(none - expected).max() > 1e-3) == (momentum != 0)
    # A step that evaluates at 0 divides by nothing.
    assert np.isfinite(sample(guided, X, times, step=Heun()).x).all()


def test_a_solver_that_may_take_steps_back_refuses_a_memory():
    guided = Guided(velocity, WANTED, UNWANTED, 3.0, Projected(momentum=-0.5))
    with pytest.raises(ValueError, match="remembers"):
        sample_ode(guided, X, flow_times(4), solver=diffrax.Euler())
