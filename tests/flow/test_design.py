"""Information gains of measurements, against closed forms of normal distributions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PIXELS, g8

from fluxjax.flow import (
    Composition,
    Downsample,
    LinearMap,
    Mask,
    choose_measurements,
    contrastive_gain,
    moment_gain,
    window_masks,
)

STD = 0.2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal_draws(covariance, count, key):
    noise = jax.random.normal(key, (count, len(covariance)))
    return noise @ jnp.linalg.cholesky(covariance).T


def exact_draws(covariance, count=64, seed=0):
    """Return draws whose sample covariance is exactly the given one."""
    noise = np.random.default_rng(seed).normal(size=(count, len(covariance)))
    noise -= noise.mean(0)
    white = np.linalg.qr(noise)[0] * np.sqrt(count - 1)
    return jnp.asarray(white @ np.linalg.cholesky(covariance).T)


def true_gain(covariance, matrix, std=STD):
    """1/2 log det(1 + A C A^T / std^2), the mutual information of normal x and y."""
    inside = np.eye(len(matrix)) + matrix @ covariance @ matrix.T / std**2
    return 0.5 * np.linalg.slogdet(inside)[1]


def g8_after_pixels(*pixels):
    """Return the posterior covariance of G8 once these pixels were measured."""
    rows = np.eye(PIXELS)[list(pixels)]
    prior = g8("mask").prior
    return np.asarray(prior.posterior(rows, np.zeros(len(pixels)), STD).covariance)


WINDOWS = [2.5708, 2.3589, 1.4887, 0.6442, 1.4887, 2.3589, 2.5708]
"""Of G8's windows {j, j + 1} after pixels 3 and 4; the middle one is mirrored around it."""


def test_the_moment_gain_of_a_normal_distribution_is_exact():
    covariance = g8_after_pixels(3, 4)
    draws = exact_draws(covariance)
    for mask, expected in zip(window_masks((PIXELS,), 2, 1), WINDOWS, strict=True):
        gain = float(moment_gain(draws, Mask(mask), STD))
        matrix = np.eye(PIXELS)[np.asarray(mask)]
        np.testing.assert_allclose(gain, true_gain(covariance, matrix), rtol=1e-10)
        assert round(gain, 4) == expected


def test_the_moment_gain_is_exact_for_any_linear_operator_and_more_measurements_than_draws():
    covariance = np.asarray(g8("mask").prior.covariance)
    matrix = np.random.default_rng(1).normal(size=(100, PIXELS))
    gain = moment_gain(exact_draws(covariance), LinearMap(lambda x: matrix @ x), STD)
    np.testing.assert_allclose(gain, true_gain(covariance, matrix), rtol=1e-10)
    pairs = np.kron(np.eye(4), [[0.5, 0.5]])
    gain = moment_gain(exact_draws(covariance), Downsample(2, axes=(-1,)), STD)
    np.testing.assert_allclose(gain, true_gain(covariance, pairs), rtol=1e-10)


def test_the_best_window_is_found_from_256_draws():
    """The gain's error is within the floor of as many draws: .05 for the moment bound and .08 for
    contrasts; both are near unbiased."""
    covariance = g8_after_pixels(3, 4)
    masks = window_masks((PIXELS,), 2, 1)

    @jax.jit
    def gains(key):
        draw_key, noise_key = jax.random.split(key)
        draws = normal_draws(covariance, 256, draw_key)
        moment = jax.vmap(lambda mask: moment_gain(draws, Mask(mask), STD))(masks)
        contrastive = jax.vmap(lambda mask: contrastive_gain(draws, Mask(mask), STD, key=noise_key))
        return moment, contrastive(masks)

    moment, contrastive = jax.vmap(gains)(jax.random.split(jax.random.key(0), 40))
    for found, spread, bias, least in ((moment, 0.07, 0.02, 40), (contrastive, 0.11, 0.08, 37)):
        errors = np.asarray(found[:, 0] - WINDOWS[0])
        assert abs(errors.mean()) < bias
        assert errors.std() < spread
        best = np.asarray(found).argmax(1)
        assert np.isin(best, (0, 6)).sum() >= least


def test_greedy_choice_takes_the_ends_of_a_chain_first():
    # All pixels have the same variance: a billionth decides for the first of equal ones.
    tilt = np.diag(1e-9 * np.arange(PIXELS, 0, -1))
    draws = exact_draws(np.asarray(g8("mask").prior.covariance) + tilt)
    choice = choose_measurements(draws, Mask(window_masks((PIXELS,), 1)), STD, 4)
    np.testing.assert_allclose(choice.gains, [1.629, 1.6083, 1.4267, 1.237], atol=6e-5)
    assert choice.numbers.tolist() == [0, 7, 3, 5]


def test_greedy_gains_add_up_to_the_gain_of_all_that_were_chosen():
    covariance = np.asarray(g8("mask").prior.covariance)
    draws = exact_draws(covariance)
    choice = choose_measurements(draws, Mask(window_masks((PIXELS,), 3, 1)), STD, 3)
    rows = np.concatenate([np.eye(PIXELS)[start : start + 3] for start in choice.numbers.tolist()])
    np.testing.assert_allclose(choice.gains.sum(), true_gain(covariance, rows), rtol=1e-10)


def angle_operator(phi):
    return LinearMap(eqx.Partial(lambda phi, x: jnp.cos(phi) * x[0] + jnp.sin(phi) * x[1], phi))


COVARIANCE = np.array([[2.0, 0.6], [0.6, 0.7]])


def test_gradients_of_both_gains_are_those_of_the_closed_form():
    def exact(phi):
        way = jnp.array([jnp.cos(phi), jnp.sin(phi)])
        return 0.5 * jnp.log1p(way @ COVARIANCE @ way / 0.25)

    slope = jax.jit(jax.grad(exact))(1.0)
    assert round(float(slope), 4) == -0.4484
    draws = exact_draws(COVARIANCE)
    moment = jax.jit(jax.grad(lambda phi: moment_gain(draws, angle_operator(phi), 0.5)))(1.0)
    np.testing.assert_allclose(moment, slope, rtol=1e-9)

    @jax.jit
    def contrastive(key):
        draw_key, noise_key = jax.random.split(key)
        draws = normal_draws(COVARIANCE, 256, draw_key)

        def gain(phi):
            return contrastive_gain(draws, angle_operator(phi), 0.5, key=noise_key)

        return jax.grad(gain)(1.0)

    slopes = jax.vmap(contrastive)(jax.random.split(jax.random.key(1), 100))
    # Their standard error is .004, and contrasts bias them by less than that.
    np.testing.assert_allclose(slopes.mean(), slope, atol=0.015)
    assert slopes.std() < 0.06


def test_the_best_angle_is_along_the_top_eigenvector():
    draws = exact_draws(COVARIANCE)
    angles = jnp.linspace(0, 1, 4001)
    gains = jax.vmap(lambda phi: moment_gain(draws, angle_operator(phi), 0.5))(angles)
    np.testing.assert_allclose(angles[gains.argmax()], 0.3727, atol=2e-4)
    assert round(float(gains.max()), 4) == 1.1482


def test_contrasts_bound_the_gain_of_a_mixture_from_below_and_moments_from_above():
    """Two far points: at most log 2 can be learned, whatever the variance between them."""
    draws = jnp.repeat(jnp.array([[-5.0], [5.0]]), 64, axis=0)
    noise = 0.01 * jax.random.normal(jax.random.key(2), draws.shape)
    contrasts = contrastive_gain(draws + noise, Mask(jnp.ones(1)), 1.0, key=jax.random.key(3))
    np.testing.assert_allclose(contrasts, np.log(2), atol=0.01)
    assert moment_gain(draws, Mask(jnp.ones(1)), 1.0) > 1.6


def test_windows_are_all_places_of_a_square():
    masks = window_masks((3, 4, 6), 2)
    assert masks.shape == (6, 3, 4, 6)
    assert (masks.sum((1, 2, 3)) == 12).all()
    assert (masks.sum(0) == 1).all()  # with the stride of their size they tile
    assert window_masks((4, 6), 2, 1).shape == (15, 4, 6)


def test_candidates_may_be_any_operators():
    """Windows seen through a decoder: here one that doubles the image."""
    draws = exact_draws(np.asarray(g8("mask").prior.covariance))
    masks = Mask(window_masks((PIXELS,), 2))
    doubled = Composition(masks, LinearMap(eqx.Partial(jnp.multiply, 2.0 * jnp.ones((4, 1)))))
    choice = choose_measurements(draws, doubled, 2 * STD, 2)
    plain = choose_measurements(draws, masks, STD, 2)
    np.testing.assert_allclose(choice.gains, plain.gains, rtol=1e-9)


def test_bad_arguments_are_refused():
    draws, mask = jnp.ones((4, PIXELS)), Mask(jnp.ones(PIXELS))
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        moment_gain(draws[:1], mask, STD)
    with pytest.raises(ValueError, match="needs a positive number"):
        contrastive_gain(draws, mask, 0.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="a whole number of at least 1, got 0"):
        choose_measurements(draws, Mask(jnp.ones((2, PIXELS))), STD, 0)
    with pytest.raises(ValueError, match="leading axis of candidates"):
        choose_measurements(draws, Downsample(2, axes=(-1,)), STD, 1)
    with pytest.raises(ValueError, match=r"does not fit an array of \[8\]"):
        window_masks((PIXELS,), 9)
