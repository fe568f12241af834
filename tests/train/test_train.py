import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluxjax.train.loss import drop_captions, flow_matching_loss, guided_target, logit_normal_times
from fluxjax.train.step import TrainState, average, make_step

KEY = jax.random.key(0)


def test_the_loss_vanishes_at_the_one_points_velocity_only():
    x0, noise, t = jnp.float32([0.3, -1.0]), jnp.float32([1.0, 2.0]), jnp.float32(0.4)
    straight = lambda x, t: (x - x0) / t  # noqa: E731
    assert float(flow_matching_loss(straight, x0, t, noise)) < 1e-10
    assert float(
        flow_matching_loss(lambda x, t: straight(x, t) + 2, x0, t, noise)
    ) == pytest.approx(4, rel=1e-5)


def test_times_are_logit_normal_and_their_odds_shifted():
    logits = jax.scipy.special.logit(
        logit_normal_times(KEY, 20_000, mean=0.3, deviation=0.8, mu=0.5)
    )
    # 20,000 draws: five standard errors.
    assert float(logits.mean()) == pytest.approx(0.8, abs=5 * 0.8 / 20_000**0.5)
    assert float(logits.std()) == pytest.approx(0.8, abs=5 * 0.8 / 40_000**0.5)


def test_captions_are_dropped_whole_at_their_rate():
    full, empty = (
        (jnp.ones((10_000, 3)), jnp.ones((10_000, 2, 2))),
        (jnp.zeros(3), jnp.zeros((2, 2))),
    )
    one, two = drop_captions(KEY, full, empty, 0.1)
    dropped = one[:, 0] == 0
    assert float(dropped.mean()) == pytest.approx(0.1, abs=5 * 0.3 / 100)
    assert (one == jnp.where(dropped[:, None], 0, 1)).all()
    assert (two == jnp.where(dropped[:, None, None], 0, 1)).all()
    assert (drop_captions(KEY, full[0], empty[0], 0.0) == 1).all()
    assert (drop_captions(KEY, full[0], empty[0], 1.0) == 0).all()


def test_guidance_one_is_conditional_and_zero_unconditional():
    conditional, unconditional = jnp.float32([1.0]), jnp.float32([3.0])
    assert float(guided_target(conditional, unconditional, 1.0)[0]) == 1
    assert float(guided_target(conditional, unconditional, 0.0)[0]) == 3
    assert float(guided_target(conditional, unconditional, 2.0)[0]) == -1


class Line(eqx.Module):
    slope: jax.Array


def test_training_finds_the_slope_and_the_average_follows():
    def loss(line, x, y, *, key):
        return jnp.mean(jnp.square(line.slope * x - y))

    optimizer = optax.sgd(0.1)
    state = TrainState.create(Line(jnp.zeros(())), optimizer)
    step = make_step(loss, optimizer, ema_decay=0.9)
    x = jnp.linspace(-1, 1, 8)
    for index in range(200):
        state, value = step(state, x, 2 * x, key=jax.random.fold_in(KEY, index))
    assert int(state.step) == 200
    assert float(state.model.slope) == pytest.approx(2, abs=1e-4)
    assert float(state.ema.slope) == pytest.approx(2, abs=1e-3)
    assert float(value) < 1e-6


def test_the_average_mixes_leaf_by_leaf():
    mixed = average(Line(jnp.float32(1.0)), Line(jnp.float32(3.0)), 0.75)
    np.testing.assert_allclose(mixed.slope, 1.5)
