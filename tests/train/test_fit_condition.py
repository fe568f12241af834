"""Fitting a condition to an image, where the mean of the data is affine in the condition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fluxjax import Euler
from fluxjax.flow import sample
from fluxjax.train import fit_condition, interpolate_conditions

KEY = jax.random.key(0)
MATRIX = jnp.float32([[1.0, 0.3, 0.0], [0.2, -0.8, 0.4], [0.0, 0.5, 1.2]])
OFFSET = jnp.float32([0.3, -0.2, 0.1])
VARIANCE = jnp.float32([0.3, 1.0, 0.6])
IMAGE = jnp.float32([0.9, -0.4, 0.7])
START = {"txt": jnp.zeros(3), "ids": jnp.arange(3)}


@pytest.fixture(autouse=True)
def standard_promotion():
    """As users have it: optax relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def velocity(x, t, condition):
    """The velocity for data N(MATRIX txt + OFFSET, VARIANCE)."""
    mean = MATRIX @ condition["txt"] + OFFSET
    off = x - (1 - t) * mean
    scatter = (1 - t) ** 2 * VARIANCE + t**2
    return (t - (1 - t) * VARIANCE) / scatter * off - mean


def fit(steps, **options):
    rate = optax.cosine_decay_schedule(0.1, steps)
    options = {"optimizer": optax.adam(rate), **options}
    return fit_condition(velocity, START, IMAGE, key=KEY, steps=steps, **options)


def test_the_fit_puts_the_mean_of_the_data_on_the_image():
    fitted = fit(400)
    mean = MATRIX @ fitted.condition["txt"] + OFFSET
    # The noises in pairs leave no error but that of the optimizer.
    np.testing.assert_allclose(mean, IMAGE, atol=1e-4)
    np.testing.assert_array_equal(fitted.condition["ids"], START["ids"])
    assert fitted.losses.shape == (400,)


def test_at_the_fitted_condition_the_gradient_is_0_at_every_step():
    """Since noise and its negative cancel: one step with any key leaves it where it is."""
    best = {"txt": jnp.linalg.solve(MATRIX, IMAGE - OFFSET), "ids": START["ids"]}
    for seed in range(5):
        key, optimizer = jax.random.key(seed), optax.sgd(1.0)
        moved = fit_condition(velocity, best, IMAGE, key=key, steps=1, optimizer=optimizer)
        np.testing.assert_allclose(moved.condition["txt"], best["txt"], atol=1e-5)  # rounding


def test_the_default_optimizer_moves_by_a_thousandth_a_step():
    fitted = fit_condition(velocity, START, IMAGE, key=KEY, steps=20)
    moved = jnp.abs(fitted.condition["txt"])
    assert 0.01 < moved.max() <= 0.0205


def test_interpolation_goes_from_the_fitted_condition_to_the_target():
    target = {"txt": jnp.ones(3), "ids": jnp.arange(3) + 5}
    for share in (0.0, 0.7, 1.0):
        mixed = interpolate_conditions(START, target, share)
        np.testing.assert_allclose(mixed["txt"], share * jnp.ones(3), rtol=1e-6)
        np.testing.assert_array_equal(mixed["ids"], target["ids"])


def test_between_both_conditions_an_edit_keeps_a_part_of_the_image():
    """Imagic as a whole: with the same noise, the drawn images lie on a line."""
    target = {"txt": START["txt"] + 1, "ids": START["ids"]}
    fitted = fit(400).condition
    times, noise = jnp.linspace(1, 0, 9, dtype=jnp.float32), jnp.zeros(3)

    def draw(share):
        condition = interpolate_conditions(fitted, target, share)
        return sample(lambda x, t: velocity(x, t, condition), noise, times, step=Euler()).x

    # From no noise a Gaussian's flow returns its mean: the image, for the fitted condition.
    np.testing.assert_allclose(draw(0.0), IMAGE, atol=1e-4)
    np.testing.assert_allclose(draw(0.7), 0.3 * draw(0.0) + 0.7 * draw(1.0), atol=1e-5)


def test_only_trainable_leaves_are_fitted_and_numpy_arrays_are_too():
    start = {"txt": np.zeros(3, np.float32), "ids": np.ones(3, np.float32)}
    trainable = {"txt": True, "ids": False}
    fitted = fit_condition(velocity, start, IMAGE, key=KEY, steps=2, trainable=trainable)
    assert jnp.all(fitted.condition["txt"] != 0)
    np.testing.assert_array_equal(fitted.condition["ids"], 1)
    with pytest.raises(ValueError, match="has no trainable leaf"):
        fit_condition(velocity, {"txt": jnp.arange(3)}, IMAGE, key=KEY)


def test_a_half_precision_image_is_fitted_in_float32():
    image = IMAGE.astype(jnp.bfloat16)
    fitted = fit_condition(velocity, START, image, key=KEY, steps=3).condition
    assert fitted["txt"].dtype == jnp.float32


def test_misuse_names_the_remedy():
    with pytest.raises(ValueError, match=r"`fit_condition\(steps\)` needs at least 1 step"):
        fit_condition(velocity, START, IMAGE, key=KEY, steps=0)
    with pytest.raises(ValueError, match=r"`interpolate_conditions\(share\)` needs finite"):
        interpolate_conditions(START, START, float("nan"))
