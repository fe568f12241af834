"""Velocities made of several: weighted means, windows, and guidance by an image and a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import Normal, falling_times, moments_of_affine

from fluxjax.flow import (
    Guided,
    ImageGuided,
    Midpoint,
    Mixed,
    Projected,
    SlidingWindows,
    sample,
)

X, T = jnp.linspace(-1.0, 1.0, 6), jnp.float32(0.6)


def first(x, t):
    return jnp.sin(x) - t


def second(x, t):
    return 2 * x * t


def test_a_mixed_velocity_is_the_weighted_mean_at_each_entry():
    share = jnp.linspace(0.0, 1.0, 6)
    mixed = Mixed([first, second], [3 * (1 - share), 3 * share])
    expected = (1 - share) * first(X, T) + share * second(X, T)
    np.testing.assert_allclose(mixed(X, T), expected, rtol=1e-6, atol=1e-7)


def test_equal_velocities_mix_to_themselves():
    mixed = Mixed([first] * 3, [0.2, np.linspace(0, 5, 6), 1])
    np.testing.assert_allclose(mixed(X, T), first(X, T), rtol=1e-6)


def test_a_region_follows_only_its_own_velocity():
    left = np.float32([1, 1, 1, 0, 0, 0])
    mixed = Mixed([first, second], [left, 1 - left])(X, T)
    np.testing.assert_array_equal(mixed[:3], first(X, T)[:3])
    np.testing.assert_array_equal(mixed[3:], second(X, T)[3:])


def autoregressive(pixels):
    i = jnp.arange(pixels, dtype=jnp.float64)
    return Normal(jnp.zeros(pixels), 0.8 ** jnp.abs(i[:, None] - i))


@pytest.mark.parametrize(
    ("stride", "seam", "variance", "distant"), [(4, 0.44, 0.88, 0.02), (1, 0.67, 0.91, 0.03)]
)
def test_windows_blur_and_are_coherent_only_within_one(stride, seam, variance, distant):
    """16 pixels of correlation 0.8 in windows of 8: covariances that are 0.8, 1 and 0.11."""
    with jax.enable_x64(True):
        windows = SlidingWindows(autoregressive(8), (8,), (stride,))

        def draw(noise):
            return sample(windows, noise, falling_times(100), step=Midpoint()).x

        mean, covariance = jax.jit(lambda: moments_of_affine(draw, 16))()
    assert covariance[7, 8] == pytest.approx(seam, abs=0.005)
    assert covariance[7, 7] == pytest.approx(variance, abs=0.0055)
    # The expected values are rounded to two places; pixels differ in the third.
    assert np.mean(np.diagonal(covariance, 10)) == pytest.approx(distant, abs=0.0055)
    np.testing.assert_allclose(mean, 0, atol=1e-12)


def test_windows_of_the_whole_or_of_a_pointwise_velocity_are_plain():
    x = jax.random.normal(jax.random.key(0), (7, 5, 3))
    for size, stride in (((7, 5), (1, 1)), ((3, 2), (2, 1)), ((4,), (3,))):
        windows = SlidingWindows(first, size, stride)
        np.testing.assert_allclose(windows(x, T), first(x, T), rtol=1e-5, atol=1e-6)


def test_windows_end_where_x_ends_and_cover_every_entry():
    windows = SlidingWindows(first, (4, 2), (3, 2))
    starts = windows.starts((9, 5, 3))
    assert sorted({row for row, _ in starts.tolist()}) == [0, 3, 5]
    assert sorted({column for _, column in starts.tolist()}) == [0, 2, 3]
    assert len(starts) == 9


def test_window_weights_decide_where_windows_overlap():
    def position(window, t):
        return jnp.arange(4.0)

    # Entries 2 and 3 are the ends of the first window and the starts of the second.
    plain = SlidingWindows(position, (4,), (2,))(jnp.zeros(6), T)
    np.testing.assert_allclose(plain, [0, 1, 1, 2, 2, 3])
    weights = np.float32([3, 3, 1, 1])
    leaning = SlidingWindows(position, (4,), (2,), weights)(jnp.zeros(6), T)
    np.testing.assert_allclose(leaning, [0, 1, (2 + 0) / 4, (3 + 3) / 4, 2, 3])


CONDITIONS = [jnp.float32([c, 1.0]) for c in (0.1, 0.5, 2.0)]


def conditional(x, t, condition):
    return jnp.sin(condition[0] * x) + condition[1] * t


def image_guided(**options):
    return ImageGuided(conditional, *CONDITIONS, **options)


def test_both_scales_of_1_give_the_velocity_of_image_and_text():
    guided = image_guided(image_scale=1, text_scale=1)
    np.testing.assert_array_equal(guided(X, T), conditional(X, T, CONDITIONS[2]))


def test_image_and_text_are_guided_by_scales_of_their_own():
    plain, of_image, of_both = (conditional(X, T, condition) for condition in CONDITIONS)
    guided = image_guided()(X, T)
    expected = plain + 1.5 * (of_image - plain) + 7.5 * (of_both - of_image)
    np.testing.assert_allclose(guided, expected, rtol=1e-5, atol=1e-5)
    neither = image_guided(image_scale=0, text_scale=0)(X, T)
    np.testing.assert_allclose(neither, plain, rtol=1e-5, atol=1e-6)
    only_image = image_guided(image_scale=1, text_scale=0)(X, T)
    np.testing.assert_allclose(only_image, of_image, rtol=1e-5, atol=1e-6)


def with_momentum(sign):
    return Guided(
        conditional, sign * CONDITIONS[0], sign * CONDITIONS[1], 2.0, Projected(momentum=-0.5)
    )


def test_the_memories_of_all_parts_are_carried():
    parts = with_momentum(1), first, with_momentum(-1)
    mixed = Mixed(list(parts), [1.0, 2.0, 3.0])
    memories, total = mixed.init(X), 0
    assert memories[1] is None
    for t in (T, T / 2):
        value, memories = mixed(X, t, memory=memories)
    one, three = (part.init(X) for part in (parts[0], parts[2]))
    for t in (T, T / 2):
        v_one, one = parts[0](X, t, memory=one)
        v_three, three = parts[2](X, t, memory=three)
        total = (v_one + 2 * first(X, t) + 3 * v_three) / 6
    np.testing.assert_allclose(value, total, rtol=1e-5)
    np.testing.assert_allclose(memories[2].rule, three.rule, rtol=1e-5)
    assert Mixed([first], [1.0]).init(X) is None


def test_each_window_has_a_memory():
    windows = SlidingWindows(with_momentum(1), (4,), (2,))
    memory = windows.init(X)
    for t in (T, T / 2):
        value, memory = windows(X, t, memory=memory)
    expected = []
    for start in (0, 2):
        part = X[start : start + 4]
        one = with_momentum(1).init(part)
        for t in (T, T / 2):
            v, one = with_momentum(1)(part, t, memory=one)
        expected.append(v)
    np.testing.assert_allclose(value[:2], expected[0][:2], rtol=1e-5)
    np.testing.assert_allclose(value[2:4], (expected[0][2:] + expected[1][:2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(value[4:], expected[1][2:], rtol=1e-5)


def test_an_image_guided_velocity_with_memories_equals_the_one_without():
    class Remembering(Guided):
        """A velocity with a memory of one number, which it ignores."""

        def init(self, x):
            return jnp.zeros(())

        def __call__(self, x, t, condition, memory=None):
            value = conditional(x, t, condition)
            return value if memory is None else (value, memory + condition[0])

    remembering = Remembering(conditional, CONDITIONS[0])
    guided = ImageGuided(remembering, *CONDITIONS)
    value, memory = guided(X, T, memory=guided.init(X))
    np.testing.assert_allclose(value, image_guided()(X, T), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(memory, [0.1, 0.5, 2.0], rtol=1e-6)


def test_misuse_names_the_remedy():
    with pytest.raises(ValueError, match="got 2 velocities and 1 weights"):
        Mixed([first, second], [1.0])
    with pytest.raises(ValueError, match="needs a sum above 0 at each entry, got 0"):
        Mixed([first, second], [np.float32([0, 1]), np.float32([0, 2])])
    with pytest.raises(ValueError, match="needs a sum above 0 at each entry, got nan"):
        Mixed([first], [float("nan")])
    with pytest.raises(ValueError, match=r"`Mixed\(weights\)` needs the shape of x, \[6\]"):
        Mixed([first], [jnp.ones(5)])(X, T)
    for size, stride in (((4,), (5,)), ((4,), (0,)), ((4,), (2, 2)), ((), ())):
        with pytest.raises(ValueError, match="needs a stride from 1 to the size"):
            SlidingWindows(first, size, stride)
    with pytest.raises(ValueError, match="which is smaller"):
        SlidingWindows(first, (8,), (4,))(X, T)
    with pytest.raises(ValueError, match="needs finite numbers above 0, got 0"):
        SlidingWindows(first, (4,), (2,), np.float32([1, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"`ImageGuided\(text_scale\)` needs finite numbers"):
        image_guided(text_scale=float("nan"))
