"""The laws of guidance."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax import ClassifierFree, Euler, Heun, flow_times, stream
from fluxjax.flow import Guided, Projected, WeakModel, ZeroStar, sample, sample_ode

X = jnp.float32([0.4, -1.0, 2.0])
POSITIVE, NEGATIVE = jnp.float32([1.0, 0.5, -0.3]), jnp.float32([-0.2, 0.1, 0.6])


def velocity(x, t, condition):
    return condition - 0.3 * t * x


@eqx.filter_jit
def evaluate(guided, t):
    """Evaluate a guided velocity at X; numbers that are arrays need no new compilation."""
    return guided(X, jnp.asarray(t, jnp.float32))


def guided_at(scale, t, negative=NEGATIVE, **options):
    return evaluate(Guided(velocity, POSITIVE, negative, jnp.float32(scale), **options), t)


def both_velocities(t):
    t = jnp.float32(t)
    return velocity(X, t, POSITIVE), velocity(X, t, NEGATIVE)


@pytest.mark.parametrize(
    "rule",
    [ClassifierFree(), ZeroStar(), Projected(0.3, 0.5)],
    ids=lambda rule: type(rule).__name__,
)
def test_at_scale_1_every_rule_gives_the_positive_velocity(rule):
    t = jnp.float32(0.7)
    positive, negative = both_velocities(t)
    np.testing.assert_allclose(rule(X, t, positive, negative, jnp.float32(1)), positive, rtol=1e-6)
    np.testing.assert_array_equal(guided_at(1, t, rule=rule), positive)


def test_classifier_free_guidance_is_linear_in_its_scale():
    t = jnp.float32(0.7)
    positive, negative = both_velocities(t)
    np.testing.assert_allclose(guided_at(0, t), negative, rtol=1e-6)
    for scale in (-1.0, 3.5):
        expected = negative + scale * (positive - negative)
        np.testing.assert_allclose(guided_at(scale, t), expected, rtol=1e-5)


def test_zero_star_ignores_a_difference_in_size_only():
    t = jnp.float32(0.7)
    positive, negative = both_velocities(t)
    np.testing.assert_allclose(
        ZeroStar()(X, t, 2 * negative, negative, jnp.float32(5)), 2 * negative, rtol=1e-5
    )
    # The scaled velocity is the projection of the positive one.
    guided = ZeroStar()(X, t, positive, negative, jnp.float32(3))
    near = positive @ negative / (negative @ negative) * negative
    np.testing.assert_allclose(guided, near + 3 * (positive - near), rtol=1e-5)
    np.testing.assert_array_equal(
        ZeroStar(0.9)(X, jnp.float32(0.95), positive, negative, jnp.float32(3)), 0
    )
    np.testing.assert_array_equal(
        ZeroStar()(X, t, positive, 0 * negative, jnp.float32(3)), 3 * positive
    )


def test_projection_removes_the_part_along_the_estimate_and_bounds_the_rest():
    t, scale = jnp.float32(0.7), jnp.float32(4)
    positive, negative = both_velocities(t)
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
            Guided(counted(calls), POSITIVE, NEGATIVE, scale, low=low, high=high), X, flow_times(4)
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
            POSITIVE * scale,
            NEGATIVE,
            jnp.float32(scale),
            Projected(jnp.float32(scale)),
            jnp.float32(scale / 10),
        )
        run(guided, X)
    assert len(traces) == 1


def test_each_particle_may_have_its_own_scale():
    scales = [1.0, 2.0, 5.0]
    batch = jax.jit(jax.vmap(lambda scale: guided_at(scale, 0.5)))(jnp.float32(scales))
    for row, scale in zip(batch, scales, strict=True):
        np.testing.assert_allclose(row, guided_at(scale, 0.5), rtol=1e-6)


def weak(x, t, condition):
    return 0.5 * condition + t * x


def weak_model(strength, low=0.0, high=1.0):
    return WeakModel(weak, *map(jnp.float32, (strength, low, high)))


def test_a_weak_model_adds_its_difference_from_the_positive_velocity():
    positive, negative = both_velocities(0.7)
    difference = positive - weak(X, 0.7, POSITIVE)
    alone = guided_at(1, 0.7, negative=None, weak=weak_model(1.5))
    np.testing.assert_allclose(alone, positive + 1.5 * difference, rtol=1e-5)
    with_both = guided_at(3, 0.7, weak=weak_model(1.5))
    expected = negative + 3 * (positive - negative) + 1.5 * difference
    np.testing.assert_allclose(with_both, expected, rtol=1e-5)
    for off in (weak_model(0.0), weak_model(1.5, low=0.8), weak_model(1.5, high=0.6)):
        found = guided_at(1, 0.7, negative=None, weak=off)
        np.testing.assert_allclose(found, positive, rtol=1e-6)


def test_a_weak_model_is_evaluated_only_where_it_is_used():
    calls, weak_calls = [], []

    @eqx.filter_jit
    def run(strength):
        def counted_weak(x, t, condition):
            jax.debug.callback(lambda _: weak_calls.append(1), t)
            return weak(x, t, condition)

        return sample(
            Guided(
                counted(calls), POSITIVE, weak=WeakModel(counted_weak, strength, low=0.3, high=0.8)
            ),
            X,
            flow_times(4),
        ).x

    for strength, evaluated in ((2.0, 2), (0.0, 0)):
        calls.clear(), weak_calls.clear()
        run(jnp.float32(strength)).block_until_ready()
        jax.effects_barrier()
        assert (len(calls), len(weak_calls)) == (4, evaluated)


def test_a_scale_without_a_negative_condition_is_refused():
    with pytest.raises(ValueError, match=r"Pass negative="):
        Guided(velocity, POSITIVE, scale=3.0)
    unguided = evaluate(Guided(velocity, POSITIVE), 0.5)
    np.testing.assert_allclose(unguided, velocity(X, 0.5, POSITIVE), rtol=1e-6)


def momentum_by_hand(times, scale, parallel, momentum):
    """Algorithm 1 of the paper with Euler's steps, on estimates of x0, in float64."""
    x, carried = np.float64(X), np.zeros(3)
    for t, u in itertools.pairwise(times):
        positive, negative = (
            x - t * (np.float64(side) - 0.3 * t * x) for side in (POSITIVE, NEGATIVE)
        )
        carried = positive - negative + momentum * carried
        along = carried @ positive / (positive @ positive) * positive
        estimate = positive + (scale - 1) * (carried - along + parallel * along)
        x = x + (u - t) * (x - estimate) / t
    return x


@eqx.filter_jit
def guided_sample(rule, step=Euler()):
    guided = Guided(velocity, POSITIVE, NEGATIVE, 3.0, rule)
    return sample(guided, X, flow_times(5), step=step).x


def test_momentum_goes_from_one_evaluation_to_the_next():
    times = np.float64(flow_times(5))
    without = guided_sample(Projected(0.2))
    for momentum in (-0.5, 0.0):
        rule = Projected(0.2, momentum=jnp.float32(momentum))
        expected = momentum_by_hand(times, 3.0, 0.2, momentum)
        np.testing.assert_allclose(guided_sample(rule), expected, rtol=2e-5)
        assert (np.abs(without - expected).max() > 1e-3) == (momentum != 0)


def test_momentum_goes_through_a_stream_and_is_finite_at_0():
    rule = Projected(0.2, momentum=-0.5)
    guided = Guided(velocity, POSITIVE, NEGATIVE, 3.0, rule)
    *_, last = stream(guided, X, flow_times(5))
    expected = momentum_by_hand(np.float64(flow_times(5)), 3.0, 0.2, -0.5)
    np.testing.assert_allclose(last.x, expected, rtol=2e-5)
    # Heun evaluates at t = 0 as well, where nothing may be divided by t.
    assert np.isfinite(guided_sample(rule, Heun())).all()


def test_ode_solvers_refuse_a_velocity_with_a_memory():
    guided = Guided(velocity, POSITIVE, NEGATIVE, 3.0, Projected(momentum=-0.5))
    with pytest.raises(ValueError, match="a velocity with a memory"):
        sample_ode(guided, X, flow_times(4), solver=diffrax.Euler())
